"""Many clips: what is found, what it is called, and that one bad clip does not stop the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hat_video.errors import OutputError, SourceError, UsageError
from hat_video.jobs.directory import plan_clips
from tests.clips import make_clip
from tests.command import upscale

FAST = ("--model", "bicubic", "--scale", "2")


def outputs(inputs: list[Path], output: str | Path | None, scale: int = 2) -> list[Path]:
    return [clip.output for clip in plan_clips(inputs, output, f"x{scale}")[0]]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    folder = tmp_path / "shelf"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.mp4", "b.avi", "deep/c.webm", "notes.txt", "d.mkv.part"):
        (folder / name).write_bytes(b"x")
    return folder


def test_default_names(tmp_path: Path, shelf: Path) -> None:
    assert outputs([shelf / "a.mp4"], None) == [shelf / "a_x2.mp4"]
    assert outputs([shelf / "b.avi"], None, 4) == [shelf / "b_x4.mkv"], "a container that is not written becomes mkv"
    clips, skipped = plan_clips([shelf], None, "x2")
    assert [clip.output for clip in clips] == [
        tmp_path / "shelf_x2" / name for name in ("a.mp4", "b.mkv", "deep/c.webm")
    ]
    assert skipped == [shelf / "notes.txt"]


def test_what_o_means(tmp_path: Path, shelf: Path) -> None:
    clip = shelf / "a.mp4"
    assert outputs([clip], tmp_path / "x.mkv") == [tmp_path / "x.mkv"]
    assert outputs([clip], f"{tmp_path}/new/") == [tmp_path / "new" / "a_x2.mp4"]
    assert outputs([clip], shelf / "deep") == [shelf / "deep" / "a_x2.mp4"]
    assert outputs([clip, shelf / "deep" / "c.webm"], tmp_path / "all") == [
        tmp_path / "all" / "a_x2.mp4",
        tmp_path / "all" / "c_x2.webm",
    ]


def test_own_products_are_no_input(shelf: Path) -> None:
    inside = shelf / "out"
    (inside / "deep").mkdir(parents=True)
    (inside / "a.mp4").write_bytes(b"made before")
    (shelf / ".hat-video" / "a_x2.mp4").mkdir(parents=True)
    (shelf / ".hat-video" / "a_x2.mp4" / "receipt.json").write_bytes(b"{}")
    (shelf / "a_x2.mp4").write_bytes(b"made before")
    (shelf / ".hat-video" / "seg.mkv").write_bytes(b"x")
    clips, _ = plan_clips([shelf], inside, "x2")
    assert [clip.source.name for clip in clips] == ["a.mp4", "b.avi", "c.webm"]


def test_refusals(tmp_path: Path, shelf: Path) -> None:
    (shelf / "b.mkv").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"b\.(avi|mkv) and .*b\.(avi|mkv) would both become"):
        plan_clips([shelf], None, "x2")
    with pytest.raises(SourceError, match="no such file"):
        plan_clips([tmp_path / "missing.mp4"], None, "x2")
    with pytest.raises(OutputError, match="the input folder itself"):
        plan_clips([shelf], shelf, "x2")
    with pytest.raises(OutputError, match="-o must be a directory"):
        plan_clips([shelf], shelf / "a.mp4", "x2")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.txt").write_bytes(b"x")
    with pytest.raises(SourceError, match="no video in this directory; 1 other"):
        plan_clips([empty], None, "x2")


def test_a_bad_clip_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = tmp_path / "shelf"
    (shelf / "deep").mkdir(parents=True)
    make_clip(shelf / "a.mp4", frames=6)
    (shelf / "bad.mp4").write_text("I am a letter")
    make_clip(shelf / "deep" / "z.mkv", frames=6)
    (shelf / "cover.txt").write_text("x")
    report = tmp_path / "report.json"
    assert upscale(shelf, *FAST, "--report", report) == 1
    out, err = capsys.readouterr()
    assert "2 of 3 clips are done" in out
    assert "bad.mp4" in err
    assert "skipped" in err
    assert sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "shelf_x2").rglob("*.m*") if p.is_file()) == [
        "shelf_x2/a.mp4",
        "shelf_x2/deep/z.mkv",
    ]
    whole = json.loads(report.read_text())
    assert [clip["status"] for clip in whole["clips"]] == ["done", "failed", "done"]
    assert whole["skipped"] == [str(shelf / "cover.txt")]

    (shelf / "bad.mp4").unlink()
    assert upscale(shelf, *FAST, "--report", report) == 0
    assert [clip["status"] for clip in json.loads(report.read_text())["clips"]] == ["already done"] * 2
