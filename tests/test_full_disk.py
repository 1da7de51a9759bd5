"""A disk that becomes full in each phase: a small one, and a limit on the size of files where none can be mounted."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.clips import make_clip
from tests.command import ROOT, tree, upscale

WORDS = ("--model", "bicubic", "--scale", "2", "--segment", "0.2", "--jobs", "1", "--preset", "ultrafast", "--crf", "4")
SIZE = 8 << 20


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise: nothing costs more, so that the file becomes far larger than anybody would guess."""
    random = np.random.default_rng(5)
    pictures = [random.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(24)]
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", width=96, height=64, pictures=pictures, frames=24)


@pytest.fixture(scope="module")
def whole(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert upscale(clip, "-o", output, *WORDS, "-q") == 0
    return output.read_bytes()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], capture_output=True, check=False
    )
    if mounting.returncode:
        pytest.skip("this user may not mount a disk; test_file_size_limit does what can be done")
    yield place
    subprocess.run(["umount", place], check=True)


def leave_free(disk: Path, count: int) -> Path:
    """Fills a disk but for `count` bytes."""
    status = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - count) // 4096 * 4096))
    return filler


@pytest.mark.parametrize(("phase", "segments", "films"), [("plan", 0, 0), ("work", 0.5, 0), ("join", 1.05, 0.5)])
def test_full_disk(
    clip: Path,
    whole: bytes,
    disk: Path,
    phase: str,
    segments: float,
    films: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = disk / "out.mp4"
    filler = leave_free(disk, int(len(whole) * (segments + films)) + (64 << 10 if segments else 0))
    assert upscale(clip, "-o", output, *WORDS) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert ("are needed" if phase == "plan" else "No space left on device") in said[0]
    assert not output.exists()
    assert not [name for name in tree(disk) if name.endswith(".part") or "/.tmp-" in name]
    kept = len(list(disk.rglob("seg-*.json")))
    assert (kept == 0) if phase == "plan" else kept > 0
    if kept:
        assert f"{kept} of 4 segments are kept" in said[0]
    filler.unlink()
    assert upscale(clip, "-o", output, *WORDS) == 0
    assert output.read_bytes() == whole


def test_full_disk_at_the_very_end(clip: Path, whole: bytes, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somewhere here the film still fits, and its receipt or its name does not."""
    output = disk / "out.mp4"
    codes = []
    for pages in range(-8, 9):
        filler = leave_free(disk, 2 * len(whole) + (16 << 10) + pages * 4096)
        codes.append(upscale(clip, "-o", output, *WORDS))
        said = capsys.readouterr().err.strip().splitlines()
        assert output.exists() == (codes[-1] == 0)
        assert len(said) == codes[-1], said
        assert not [name for name in tree(disk) if name.endswith(".part")]
        if output.exists():
            assert output.read_bytes() == whole
        filler.unlink()
        output.unlink(missing_ok=True)
        shutil.rmtree(disk / ".hat-video", ignore_errors=True)
    assert set(codes) == {0, 1}, "the disk was too small or too large for this test"


def test_what_is_committed_is_not_asked_for_again(clip: Path, whole: bytes, disk: Path) -> None:
    """A lossless run whose segments took most of the disk: the rest and the film fit, two whole films more do not."""
    lossless = ("--crf", "0")
    output = disk / "out.mp4"
    assert upscale(clip, "-o", output, *WORDS, *lossless, "--keep-work", "-q") == 0
    film = output.read_bytes()
    output.unlink()
    (disk / ".hat-video" / "out.mp4" / "receipt.json").unlink()
    last = max(disk.rglob("seg-*.json"))
    last.unlink()
    for victim in disk.rglob(f"{last.stem}.*.mkv"):
        victim.unlink()
    leave_free(disk, int(1.4 * len(film)))
    assert upscale(clip, "-o", output, *WORDS, *lossless, "-q") == 0
    assert output.read_bytes() == film


def test_what_a_killed_join_left_is_written_over(clip: Path, whole: bytes, disk: Path) -> None:
    output = disk / "out.mp4"
    assert upscale(clip, "-o", output, *WORDS, "--keep-work", "-q") == 0
    output.rename(disk / "out.mp4.part")
    leave_free(disk, 64 << 10)
    assert upscale(clip, "-o", output, *WORDS, "-q") == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize(("full", "cure"), [("work", "--work-dir"), ("output", "-o")])
def test_both_disks_are_looked_at(
    clip: Path, tmp_path: Path, disk: Path, full: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"work": tmp_path / "work", "output": tmp_path / "made", full: disk}
    leave_free(disk, 8 << 10)
    output = places["output"] / "out.mp4"
    assert upscale(clip, "-o", output, *WORDS, "--crf", "0", "--work-dir", places["work"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "are needed" in said
    assert cure in said
    assert str(disk) in said


def test_a_tight_disk_is_a_note(clip: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gray at the lowest quality needs far less than anybody would guess."""
    gray = [np.full((64, 96, 3), 128, np.uint8)] * 24
    small = make_clip(disk / "gray.mp4", width=96, height=64, pictures=gray, frames=24, audio=())
    leave_free(disk, 60 << 10)
    words = (*WORDS, "--crf", "51", "--scale", "4", "--segment", "10")
    assert upscale(small, "-o", disk / "out.mkv", *words) == 0
    assert "MB are usual for such a run" in capsys.readouterr().err


@pytest.mark.parametrize(("phase", "share"), [("work", 0.1), ("join", 0.6)])
def test_file_size_limit(clip: Path, whole: bytes, tmp_path: Path, phase: str, share: float) -> None:
    """The same by the kernel's limit on the size of a file, which needs no rights."""
    output = tmp_path / "out.mp4"
    limit = int(len(whole) * share)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ["upscale", str(clip), "-o", str(output), *WORDS]
    done = subprocess.run(
        [sys.executable, "-m", "hat_video", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limited,
        check=False,
    )
    assert done.returncode == 1, done
    assert done.stderr.strip().count("\n") == 0, done.stderr
    assert "File too large" in done.stderr
    assert not output.exists()
    assert not [name for name in tree(tmp_path) if name.endswith(".part") or "/.tmp-" in name]
    assert bool(list(tmp_path.rglob("seg-*.json"))) == (phase == "join")
    assert upscale(*words[1:]) == 0
    assert output.read_bytes() == whole
