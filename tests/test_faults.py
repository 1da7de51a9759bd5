"""What befalls a run from outside: killed at any moment, its source taken away, its folder meddled with, odd names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hat_video.media.probe import probe
from tests.clips import make_clip
from tests.command import start, tree, upscale, wait_for_segments

SLOW = ("--model", "hat-nano", "--scale", "2", "--segment", "0.4", "--jobs", "1")
FAST = ("--model", "bicubic", "--scale", "2", "--segment", "0.2", "--jobs", "1", "--preset", "ultrafast")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    make_clip(path, width=96, height=64, frames=50, gop=1000)
    return path


def work_of(output: Path) -> Path:
    return output.parent / ".hat-video" / output.name


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the folder is made": lambda output: work_of(output).is_dir(),
    "the manifest is there": lambda output: any(work_of(output).glob("*/manifest.json")),
    "a segment is being written": lambda output: any(work_of(output).glob("*/.tmp-*.mkv")),
    "a segment is committed": lambda output: any(work_of(output).glob("*/seg-*.json")),
    "all but the last are committed": lambda output: len(list(work_of(output).glob("*/seg-*.json"))) >= 8,
    "the film is being joined": lambda output: (
        any(output.parent.glob("*.part")) or any(work_of(output).rglob("*.part"))
    ),
    "the film has its name": lambda output: output.exists(),
}


@pytest.fixture(scope="module")
def whole(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert upscale(clip, "-o", output, *FAST, "-q") == 0
    return output.read_bytes()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(clip: Path, whole: bytes, tmp_path: Path, moment: str) -> None:
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *FAST)
    deadline = time.monotonic() + 60
    while not MOMENTS[moment](output) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists() or output.read_bytes() == whole, "a name holds the whole film or nothing"
    assert upscale(clip, "-o", output, *FAST, "-q") == 0
    assert output.read_bytes() == whole
    assert not [name for name in tree(tmp_path) if "seg-" in name or ".tmp-" in name or name.endswith(".part")]


def test_killed_at_thirty_random_moments(clip: Path, whole: bytes, tmp_path: Path) -> None:
    """From the start of the interpreter to the receipt; whatever is left over, the next run makes the same bytes."""
    # The process under test is forked off one that has imported everything, so that the moments fall into the work.
    launcher = (
        "import os, random, signal, sys, time\n"
        "from hat_video.cli import main\n"
        "import hat_video.jobs.file, torch\n"
        "torch.set_num_threads(1)\n"
        "rng = random.Random(7)\n"
        "words, output = sys.argv[2:], sys.argv[1]\n"
        "began = time.monotonic()\n"
        "child = os.fork()\n"
        "if not child: os._exit(main(['upscale', *words, '-o', output + '/timed.mp4', '-q']))\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "length = time.monotonic() - began\n"
        "done = killed = 0\n"
        "for number in range(30):\n"
        "    child = os.fork()\n"
        "    if not child: os._exit(main(['upscale', *words, '-o', output + '/out.mp4', '-q']))\n"
        "    time.sleep(rng.uniform(0, 0.6 * length))\n"
        "    os.kill(child, signal.SIGKILL)\n"
        "    status = os.waitpid(child, 0)[1]\n"
        "    killed += os.WIFSIGNALED(status)\n"
        "    if not os.WIFSIGNALED(status): length *= 0.8\n"
        "    if os.path.exists(output + '/out.mp4'):\n"
        "        same = open(output + '/out.mp4', 'rb').read() == open(output + '/timed.mp4', 'rb').read()\n"
        "        assert same, f'a half film after {number}'\n"
        "        done += 1\n"
        "        os.unlink(output + '/out.mp4')\n"
        "print(killed, done)\n"
    )
    command = [sys.executable, "-c", launcher, str(tmp_path), str(clip), *FAST]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=220)
    assert result.returncode == 0, result.stderr
    # On a machine that others use too, the run that was timed may have taken much longer than those that follow.
    assert int(result.stdout.split()[0]) >= 20, "most runs were killed before they were done"
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST, "-q") == 0
    assert output.read_bytes() == whole
    assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name or path.suffix == ".part"]


def test_sigterm_stops_and_keeps_what_is_committed(clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *SLOW)
    wait_for_segments(process, output, 1)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "kept" in errors
    assert not list(work_of(output).rglob(".tmp-*"))


def test_source_deleted_while_it_runs(clip: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "source.mp4", tmp_path / "out.mp4"
    shutil.copy(clip, source)
    process = start("upscale", source, "-o", output, *SLOW)
    wait_for_segments(process, output, 1)
    source.unlink()
    _, errors = process.communicate(timeout=60)
    # The decoder holds the file open; the sound and the proof need it again.
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert str(source) in errors.splitlines()[-1]
    assert not output.exists()


def test_source_changed_while_it_runs(clip: Path, tmp_path: Path) -> None:
    source, other, output = tmp_path / "source.mp4", tmp_path / "other.mp4", tmp_path / "out.mp4"
    shutil.copy(clip, source)
    make_clip(other, width=96, height=64, frames=44, gop=10)
    process = start("upscale", source, "-o", output, *SLOW)
    wait_for_segments(process, output, 1)
    other.replace(source)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert not output.exists()
    # The new file is another job, and is done as one.
    assert upscale(source, "-o", output, *SLOW, "-q") == 0
    assert len(probe(output).index.pts) == 44


@pytest.fixture
def kept(clip: Path, tmp_path: Path) -> Path:
    """A finished run with its work folder, and the film taken away."""
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST, "--keep-work", "-q") == 0
    output.unlink()
    return output


def test_a_missing_segment_is_made_again(
    clip: Path, kept: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (victim,) = work_of(kept).rglob("seg-00002.*.mkv")
    victim.unlink()
    assert upscale(clip, "-o", kept, *FAST) == 0
    said = capsys.readouterr().err
    assert "segment 2 is made again" in said
    assert victim.name in said
    assert kept.read_bytes() == whole


def test_a_record_that_is_gone_is_made_again(clip: Path, kept: Path, whole: bytes) -> None:
    (victim,) = work_of(kept).rglob("seg-00002.json")
    victim.unlink()
    assert upscale(clip, "-o", kept, *FAST, "-q") == 0
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("text", [b"", b"{", b'{"key": "other"}', b"\xff" * 100])
def test_a_segment_with_a_damaged_record_is_made_again(
    clip: Path, kept: Path, whole: bytes, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (victim,) = work_of(kept).rglob("seg-00001.json")
    victim.write_bytes(text)
    assert upscale(clip, "-o", kept, *FAST) == 0
    said = capsys.readouterr().err
    assert "segment 1 is made again" in said
    assert victim.name in said
    assert kept.read_bytes() == whole


def test_a_segment_that_cannot_be_taken_back_is_named(
    clip: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (victim,) = work_of(kept).rglob("seg-00001.json")
    victim.unlink()
    victim.mkdir()
    assert upscale(clip, "-o", kept, *FAST) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{victim}: cannot be removed" in said


def test_a_foreign_manifest_is_not_believed(clip: Path, kept: Path, whole: bytes) -> None:
    """The plan is made anew from the source; what a manifest says matters to other machines only."""
    (manifest,) = work_of(kept).rglob("manifest.json")
    text = json.loads(manifest.read_text())
    text["source"] = "/etc/passwd"
    text["key"] = "0" * 20
    manifest.write_text(json.dumps(text))
    assert upscale(clip, "-o", kept, *FAST, "-q") == 0
    assert kept.read_bytes() == whole


@pytest.mark.parametrize(
    "name",
    [
        "with spaces.mp4",
        'it\'s "quoted".mp4',
        "ünïcode – 映画 🎬.mp4",
        "-leading-dash.mp4",
        "percent %d %s %05d.mp4",
        "brackets [x] {y} *?.mp4",
        "two\nlines.mp4",
        "colon:in:name.mp4",
        "n" * 200 + ".mp4",
    ],
)
def test_names_are_only_names(clip: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / name
    shutil.copy(clip, source)
    monkeypatch.chdir(tmp_path)
    assert upscale(*FAST, "-q", "--", name) == 0
    output = tmp_path / f"{source.stem}_x2.mp4"
    assert probe(output).index.pts == probe(clip).index.pts


def test_a_name_too_long_for_the_output_is_one_line(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / ("n" * 251 + ".mp4")
    shutil.copy(clip, source)
    assert upscale(source, *FAST) in (1, 2)
    assert "too long" in capsys.readouterr().err


def test_links_are_followed_and_kept(clip: Path, tmp_path: Path) -> None:
    link, target = tmp_path / "link.mp4", tmp_path / "elsewhere"
    link.symlink_to(clip)
    target.mkdir()
    (tmp_path / "out").symlink_to(target)
    assert upscale(link, "-o", tmp_path / "out" / "film.mp4", *FAST, "-q") == 0
    assert (target / "film.mp4").is_file()
    assert link.is_symlink()


def test_an_output_that_is_its_own_source_is_refused(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, link = tmp_path / "a.mp4", tmp_path / "b.mp4"
    shutil.copy(clip, source)
    link.symlink_to(source)
    hard = tmp_path / "c.mp4"
    os.link(source, hard)
    before = source.read_bytes()
    for output in (source, link, hard):
        assert upscale(source, "-o", output, *FAST, "--overwrite") in (1, 2), output
        assert "Traceback" not in capsys.readouterr().err
        assert source.read_bytes() == before


def test_a_read_only_folder_is_named(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if os.geteuid() == 0:
        # Root may write anywhere but on a file system that is mounted read-only.
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
        if subprocess.run(mount, check=False).returncode:
            pytest.skip("this machine does not let anyone mount")
    else:
        folder.chmod(0o500)
    try:
        assert upscale(clip, "-o", folder / "out.mp4", *FAST) == 1
        assert str(folder) in capsys.readouterr().err
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_name_that_is_no_text(clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file may have any bytes for a name; neither it nor its neighbours may suffer from that."""
    folder = tmp_path / "in"
    folder.mkdir()
    odd = folder / os.fsdecode(b"a\xff\xfe.mp4")
    shutil.copy(clip, odd)
    shutil.copy(clip, folder / "b.mp4")
    assert upscale(folder, "-o", tmp_path / "out", *FAST, "--report", tmp_path / "report.json") == 0
    assert (tmp_path / "out" / odd.name).is_file()
    assert (tmp_path / "out" / "b.mp4").is_file()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["clips"][0]["source"].endswith("a%FF%FE.mp4")
    assert upscale(odd, "-o", tmp_path / "out" / odd.name, *FAST) == 0
    assert "already done" in capfd.readouterr().out


def test_a_name_that_no_file_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upscale("x" * 300 + ".mp4", *FAST) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "File name too long" in said
    assert said.count("\n") == 1
