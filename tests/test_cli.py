"""The command as people type it, above all typed wrong: one clear line, the right exit code, nothing left behind."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
import typer
from safetensors.torch import save_file

from hat_video.cli import app, main
from hat_video.jobs.gpu_check import _write_clip
from hat_video.media.source import open_source
from tests.clips import make_clip
from tests.command import ROOT, sidecars, start, tree, upscale

Err = Callable[[], str]
FAST = ("--model", "bicubic", "--scale", "2")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    make_clip(path, frames=20)
    return path


@pytest.fixture
def err(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What the command said on stderr: exactly one line."""

    def read() -> str:
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("hat-video: ")
        return lines[0]

    return read


def refused(folder: Path, *words: object, code: int = 1) -> None:
    """The command fails with this exit code and leaves the folder as it was."""
    before = tree(folder)
    assert upscale(*words) == code
    assert tree(folder) == before


def test_upscale_says_what_was_proven(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST) == 0
    out, err = capsys.readouterr()
    assert "proven: 20 frames" in out
    assert str(output) in out
    assert "it/s" not in err, "no bar where nobody looks"
    with av.open(str(output)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (128, 96)


def test_quiet_is_quiet(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upscale(clip, "-o", tmp_path / "out.mp4", *FAST, "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_json_progress_is_one_object_a_line(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upscale(clip, "-o", tmp_path / "out.mp4", *FAST, "--progress", "json") == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    stages = [event["stage"] for event in events if event["event"] == "progress"]
    assert sorted(set(stages), key=stages.index) == ["plan", "work", "join", "verify", "done"]
    assert events[-1]["event"] == "done"
    assert events[-1]["frames"] == {"in": 20, "out": 20, "lost": 0, "corrupt": 0, "reused": 0, "same": 0}
    work = next(event for event in events if event.get("stage") == "verify")
    assert (work["frames_done"], work["frames_total"], work["clip"], work["clips"]) == (20, 20, 1, 1)


def test_report_has_all_that_was_promised(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert upscale(clip, "-o", tmp_path / "out.mkv", *FAST, "--report", path, "-q") == 0
    (made,) = json.loads(path.read_text())["clips"]
    assert made["status"] == "done"
    assert made["frames"]["in"] == made["frames"]["out"] == 20
    assert set(made["seconds"]) >= {"plan", "decode", "model", "encode", "work", "join", "verify", "total"}
    assert made["model"]["name"] == "bicubic"
    assert made["recipe"]["encoder"]["name"] == "libx264"
    assert made["recipe"]["encoder"]["crf"] == 16
    assert [stream["action"] for stream in made["streams"]] == ["video", "copy"]
    assert made["verification"].startswith("proven")


def test_report_tells_of_a_failure_too(tmp_path: Path) -> None:
    broken, path = tmp_path / "broken.mp4", tmp_path / "report.json"
    broken.write_text("no video")
    assert upscale(broken, *FAST, "--report", path) == 1
    (made,) = json.loads(path.read_text())["clips"]
    assert made["status"] == "failed"
    assert "not a media file" in made["error"]


def test_config_fills_defaults_and_what_is_typed_wins(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    config = tmp_path / "mine.toml"
    config.write_text('model = "lanczos"\nscale = 3\ncrf = 30\n')
    assert upscale(clip, "-o", tmp_path / "out.mkv", "--config", config, "--crf", "16", "--report", path, "-q") == 0
    recipe = json.loads(path.read_text())["clips"][0]["recipe"]
    assert (recipe["model"], recipe["scale"], recipe["encoder"]["crf"]) == ("lanczos", 3, 16)


def test_options_may_stand_between_inputs(clip: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.mp4"
    make_clip(second, frames=4)
    assert upscale(clip, "--model", "bicubic", second, "-o", tmp_path / "both", "--scale", "2", "-q") == 0
    assert tree(tmp_path / "both") >= {"clip_x2.mp4", "second_x2.mp4"}


@pytest.mark.parametrize(
    "words",
    [
        ["upscale"],
        ["upscale", "a.mp4", "--scale", "7"],
        ["upscale", "a.mp4", "--crf", "good"],
        ["upscale", "a.mp4", "--colour", "red"],
        ["upscale", "a.mp4", "--precision", "int8"],
        ["nonsense"],
    ],
)
def test_usage_errors_exit_2(words: list[str], err: Err) -> None:
    assert main(words) == 2
    command = "hat-video upscale" if words[0] == "upscale" else "hat-video"
    assert f"Try `{command} --help`" in err()


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(rf"hat-video \d\S* \(torch {re.escape(torch.__version__)}, av {av.__version__}\)\n", said)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_can_show_where(name: str) -> None:
    """What `-v shows where` promises after an error that nobody has foreseen."""
    assert any("-v" in option.opts for option in COMMANDS[name].params)


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize("words", [["models"], ["models", "--json"], ["--help"]])
def test_stdout_that_takes_nothing(words: list[str], *, is_buffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if is_buffered else "1"}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hat_video", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            cwd=ROOT, env=environment,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "hat-video: standard output: cannot be written: No space left on device\n"


@pytest.mark.parametrize("option", ["--report", "--trace"])
@pytest.mark.parametrize("kind", ["file", "pipe", "picture"])
def test_where_reports_go_is_checked_first(clip: Path, tmp_path: Path, err: Err, kind: str, option: str) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"no picture")
    words: dict[str, list[object]] = {
        "file": [clip, "-o", tmp_path / "out.mp4"],
        "pipe": [clip, "-o", "-"],
        "picture": [picture],
    }
    for bad in (tmp_path / "no" / "x.json", tmp_path, "/proc/nowhere/x.json"):
        refused(tmp_path, *words[kind], *FAST, option, bad, code=2)
        assert f"{option} {bad}: not a file in an existing folder" in err()


@pytest.mark.parametrize("option", ["--report", "--trace"])
def test_reports_replace_no_films(clip: Path, tmp_path: Path, err: Err, option: str) -> None:
    film = tmp_path / "film.mp4"
    shutil.copy(clip, film)
    plain = tmp_path / "notes.txt"
    plain.write_text("mine")
    for bad, message in (
        (film, "is a name for a film or a picture"),
        (tmp_path / "out.mp4", "is a name for a film or a picture"),
        (plain, "holds something else than JSON"),
    ):
        refused(tmp_path, film, "-o", tmp_path / "out.mp4", *FAST, option, bad, code=2)
        assert f"{option} {bad}: {message}" in err()
    assert film.read_bytes() == clip.read_bytes()
    for old in ("", '[{"a": 1}]'):
        plain.write_text(old)
        assert upscale(film, "-o", tmp_path / "out.mp4", *FAST, "-q", "--overwrite", option, plain) == 0
        assert json.loads(plain.read_text())


def test_a_report_and_a_trace_take_two_files(clip: Path, tmp_path: Path, err: Err) -> None:
    path = tmp_path / "a.json"
    refused(tmp_path, clip, "-o", tmp_path / "out.mp4", *FAST, "--report", path, "--trace", path, code=2)
    assert f"--report {path}: is --trace's file too" in err()


@pytest.mark.parametrize("words", [[""], ["a.mp4", "-o", ""]])
def test_an_empty_word_is_not_the_current_directory(
    words: list[str], clip: Path, tmp_path: Path, err: Err, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(clip, tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    assert upscale(*words, *FAST) == 2
    assert "'': is empty; give a file or a directory" in err()
    assert tree(tmp_path) == {"a.mp4"}


def test_a_report_that_cannot_be_written_after_all(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upscale(clip, "-o", tmp_path / "out.mp4", *FAST, "-q", "--report", "/dev/full") == 1
    assert capsys.readouterr().err == "hat-video: --report /dev/full: cannot be written: No space left on device\n"


def test_what_is_passed_over_is_an_event(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "clip.mp4").write_bytes(clip.read_bytes())
    (shelf / "letter.txt").write_text("Dear Sir")
    assert upscale(shelf, *FAST, "--progress", "json") == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (skipped,) = [event for event in events if event["event"] == "skipped"]
    assert skipped == {"event": "skipped", "source": str(shelf / "letter.txt"), "reason": "not a video by its name"}


def test_scale_without_a_shipped_model_exits_2_and_names_what_has_it(clip: Path, err: Err) -> None:
    assert upscale(clip, "--scale", "1") == 2
    line = err()
    assert "x2" in line
    assert "bicubic" in line or "lanczos" in line


def test_sources_that_are_no_video(clip: Path, tmp_path: Path, err: Err) -> None:
    empty, text, cut = tmp_path / "empty.mp4", tmp_path / "letter.mp4", tmp_path / "cut.mp4"
    empty.touch()
    text.write_text("Dear Sir, this is a letter and not a video.\n" * 50)
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    sound = tmp_path / "sound.m4a"
    with av.open(str(sound), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for i in range(8):
            frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            frame.planes[0].update(bytes(4096))
            frame.sample_rate, frame.pts = 44100, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for path, reason in (
        (tmp_path / "missing.mp4", "no such file"),
        (empty, "empty"),
        (text, "not a"),
        (sound, "no video"),
        (cut, "moov"),
    ):
        refused(tmp_path, path, "-o", tmp_path / "out.mp4", *FAST)
        line = err()
        assert str(path) in line
        assert reason in line.lower(), line


def test_directory_without_video(tmp_path: Path, err: Err) -> None:
    (tmp_path / "readme.txt").write_text("x")
    refused(tmp_path, tmp_path, *FAST)
    assert "no video" in err()


def test_truncated_matroska_gives_what_is_there_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    make_clip(whole, frames=60, gop=5)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    assert upscale(cut, "-o", tmp_path / "out.mkv", *FAST) == 0
    said = capsys.readouterr()
    assert "2.0" in said.err, "the seconds that the container promised"
    assert upscale(cut, "-o", tmp_path / "strict.mkv", *FAST, "--strict") == 1
    assert "--strict" in capsys.readouterr().err
    assert not (tmp_path / "strict.mkv").exists()


def test_flipped_bytes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, bad = tmp_path / "whole.mp4", tmp_path / "bad.mp4"
    make_clip(whole, width=160, height=128, frames=60, gop=10, audio=())
    data = bytearray(whole.read_bytes())
    begin = data.index(b"mdat")
    # In several places, since a decoder can take some garbage for pictures.
    for place in range(begin + 3000, begin + 15000, 3000):
        data[place : place + 500] = bytes(byte ^ 0x5A for byte in data[place : place + 500])
    bad.write_bytes(data)
    report = tmp_path / "report.json"
    assert upscale(bad, "-o", tmp_path / "out.mp4", *FAST, "--report", report) == 0
    frames = json.loads(report.read_text())["clips"][0]["frames"]
    assert frames["in"] == 60
    assert frames["out"] == 60 - frames["lost"]
    assert frames["corrupt"] + frames["lost"] > 0
    assert "damaged" in (said := capsys.readouterr().err) or "lost" in said


def test_outputs_that_cannot_be(clip: Path, tmp_path: Path, err: Err) -> None:
    copy = tmp_path / "clip.mp4"
    copy.write_bytes(clip.read_bytes())
    refused(tmp_path, copy, "-o", copy, *FAST)
    assert "input itself" in err()
    refused(tmp_path, copy, "-o", tmp_path / "out.avi", *FAST, code=2)
    assert ".mkv" in err()
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path, copy, "-o", tmp_path / "file" / "out.mp4", *FAST)
    assert "file" in err()
    refused(tmp_path, copy, "-o", "/proc/out.mp4", *FAST)
    assert "/proc" in err()
    refused(tmp_path, copy, "-o", tmp_path / "new" / "out.webm", "--encoder", "libx264", *FAST, code=2)
    line = err()
    assert "libx264" in line
    assert "webm" in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "nonsense"], ["nonsense", "hat-nano"]),
        (["--model", "hat-pico", "--scale", "3"], ["3", "2"]),
        (["--segment", "0"], ["--segment 0"]),
        (["--segment", "-1"], ["--segment -1"]),
        (["--tile", "3"], ["--tile 3"]),
        (["--jobs", "0"], ["--jobs 0"]),
        (["--device", "toaster"], ["toaster", "cpu"]),
        (["--decoder", "dali"], ["dali", "pyav"]),
        (["--backend", "abacus"], ["Invalid value for '--backend': 'abacus' is not one of 'auto'"]),
        (["--encoder", "libx266"], ["libx266"]),
        (["--crf", "99"], ["99"]),
        (["--preset", "ludicrous"], ["ludicrous"]),
        (["--encoder-option", "tuen=film"], ["tuen"]),
        (["--encoder-option", "x264-params=mee=umh"], ["mee"]),
        (["--encoder-option", "tune"], ["tune", "KEY=VALUE"]),
        (["--config", "nonsense"], ["nonsense", "archive"]),
    ],
)
def test_choices_that_cannot_be_met(clip: Path, tmp_path: Path, err: Err, words: list[str], named: list[str]) -> None:
    rest = [] if "--model" in words else list(FAST)
    refused(tmp_path, clip, "-o", tmp_path / "out.mp4", *rest, *words, code=1 if "--model" in words else 2)
    line = err()
    assert all(name in line for name in named), line


def test_checkpoints_that_are_none(clip: Path, tmp_path: Path, err: Err) -> None:
    other, nan, text = tmp_path / "other.pth", tmp_path / "nan.safetensors", tmp_path / "text.pth"
    torch.save({"params": {"body.0.weight": torch.zeros(3, 3), "head.bias": torch.zeros(3)}}, other)
    text.write_text("not a checkpoint")
    from safetensors.torch import load_file

    state = load_file(ROOT / "hat_video" / "model" / "weights" / "hat_nano_x2.safetensors")
    state["conv_first.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, nan)
    for path, reason in ((other, "body.0.weight"), (nan, "conv_first.weight"), (text, "text.pth")):
        refused(tmp_path, clip, "-o", tmp_path / "out.mp4", "--model", path)
        line = err()
        assert str(path) in line
        assert reason in line


def test_disk_full_keeps_what_is_committed_and_says_how_to_go_on(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", small], check=False).returncode:
        pytest.skip("this machine does not let anyone mount")
    try:
        clip = tmp_path / "clip.mp4"
        make_clip(clip, width=160, height=128, frames=60)
        output = small / "out.mp4"
        # Lossless is far more than the estimate's quality; the disk fills up while the work runs.
        run = [clip, "-o", output, "--model", "bicubic", "--scale", "2", "--segment", "0.2", "--crf", "1"]
        process = start("upscale", *run)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "Traceback" not in errors
        line = errors.strip().splitlines()[-1].lower()
        assert "space" in line or "free" in line, line
        assert not output.exists()
        assert not (small / "out.mp4.part").exists()
        if sidecars(output):
            assert "segments are kept" in line
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        assert upscale(*run, "-q") == 0
    finally:
        subprocess.run(["umount", small], check=True)


def test_too_little_space_is_refused_before_any_work(tmp_path: Path, clip: Path, err: Err) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=False).returncode:
        pytest.skip("this machine does not let anyone mount")
    try:
        refused(small, clip, "-o", small / "out.mp4", *FAST, "--crf", "0")
        assert "MB are needed" in err()
    finally:
        subprocess.run(["umount", small], check=True)


def test_probe_models_doctor_clean(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(clip)]) == 0
    assert "64x48" in capsys.readouterr().out
    assert main(["probe", str(clip), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["index"]["pts"]) == 20
    assert main(["probe", str(tmp_path / "none.mp4")]) == 1
    capsys.readouterr()
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("hat-nano", "bicubic", "lanczos", "Apache-2.0"))
    assert main(["models", "--json"]) == 0
    assert {model["name"] for model in json.loads(capsys.readouterr().out)} >= {"hat-nano", "bicubic"}
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["default model"] == "hat-nano-video x2"

    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST, "--keep-work", "-q") == 0
    assert main(["clean", str(tmp_path)]) == 0
    assert "removed" in capsys.readouterr().out
    assert tree(tmp_path) == {"out.mp4", ".hat-video", ".hat-video/out.mp4", ".hat-video/out.mp4/receipt.json"}
    assert main(["clean", str(tmp_path / "nowhere")]) == 1


def test_help_needs_no_input() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hat_video", "upscale", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--model", "--scale", "--device", "--precision", "--decoder", "--encoder", "--crf", "--preset"):
        assert option in done.stdout
    for option in ("--tile", "--batch", "--segment", "--jobs", "--work-dir", "--keep-work", "--overwrite", "--strict"):
        assert option in done.stdout


def test_encoder_auto_is_the_usual_one_without_a_gpu(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", frames=4, audio=())
    assert main(["upscale", str(clip), "-o", str(tmp_path / "a.mp4"), "--model", "bicubic", "--encoder", "auto"]) == 0
    assert main(["upscale", str(clip), "-o", str(tmp_path / "b.mp4"), "--model", "bicubic"]) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_doctor_says_what_a_gpu_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--gpu"])
    said = capsys.readouterr().out
    if torch.cuda.is_available():
        assert code == 0
        assert said.count("works") >= 9
    else:
        assert code == 1
        assert "sees no GPU" in said


def test_the_doctors_own_clip_is_one(tmp_path: Path) -> None:
    """What its GPU decoders are tried on decodes on a CPU, too, frame by frame."""
    _write_clip(tmp_path / "clip.mkv")
    with open_source(tmp_path / "clip.mkv") as source:
        lumas = [batch.planes[0] for batch in source]
    assert len(lumas) == 48
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(lumas))
