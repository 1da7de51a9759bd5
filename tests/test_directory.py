"""Many clips: what is found, what it is called, and that one bad clip does not stop the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hat_video.errors import OptionError, OutputError, SourceError, UsageError
from hat_video.jobs.directory import plan_clips, upscale_directory
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions
from tests.clips import make_clip
from tests.command import tree, upscale

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


def test_what_lies_where_a_product_was_is_an_input(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    clip = make_clip(shelf / "a.mp4", frames=3, audio=())
    product = shelf / "b.mp4"
    assert upscale(clip, "-o", product, *FAST, "-q") == 0
    assert [found.source for found in plan_clips([shelf], None, "x2")[0]] == [clip]
    product.unlink()
    make_clip(product, frames=5, audio=())
    assert [found.source for found in plan_clips([shelf], None, "x2")[0]] == [clip, product]


def test_links_are_followed_once(tmp_path: Path, shelf: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.mp4").write_bytes(b"x")
    (shelf / "linked").symlink_to(tmp_path / "elsewhere")
    (shelf / "deep" / "back").symlink_to(shelf)
    (tmp_path / "elsewhere" / "back").symlink_to(shelf / "deep")
    (shelf / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    clips, _ = plan_clips([shelf], None, "x2")
    assert [str(clip.source.relative_to(shelf)) for clip in clips] == [
        "a.mp4", "b.avi", "gone.mp4", "deep/c.webm", "linked/e.mp4",
    ]  # fmt: skip


def test_what_a_mac_keeps_beside_a_file_is_no_video(shelf: Path) -> None:
    (shelf / "._a.mp4").write_bytes(b"\0\5\x16\7")
    clips, skipped = plan_clips([shelf], None, "x2")
    assert [clip.source.name for clip in clips] == ["a.mp4", "b.avi", "c.webm"]
    assert skipped == [shelf / "._a.mp4", shelf / "notes.txt"]


def test_refusals(tmp_path: Path, shelf: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in" / "a.mp4").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"a\.mp4 and .*a\.mp4 would both become"):
        plan_clips([tmp_path / "one" / "in", tmp_path / "two" / "in"], tmp_path / "all", "x2")
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
    for name in ("a_x2.mp4", "b_x2.mkv"):
        (empty / name).write_bytes(b"made before")
        (empty / ".hat-video" / name).mkdir(parents=True)
        (empty / ".hat-video" / name / "receipt.json").write_bytes(b"{}")
    with pytest.raises(SourceError, match="1 other files were passed over, and 2 videos that hat-video made"):
        plan_clips([empty], None, "x2")


def test_clips_of_one_name_are_told_apart(tmp_path: Path, shelf: Path) -> None:
    for name in ("b.mkv", "b.ts"):
        (shelf / name).write_bytes(b"x")
    names = ["a.mp4", "b.avi.mkv", "b.mkv", "b.ts.mkv", "deep/c.webm"]
    assert outputs([shelf], None) == [tmp_path / "shelf_x2" / name for name in names]
    given = [shelf / name for name in ("b.avi", "b.mkv", "b.ts")]
    assert outputs(given, None) == [shelf / name for name in ("b.avi_x2.mkv", "b_x2.mkv", "b.ts_x2.mkv")]
    assert outputs(given[::2], tmp_path / "all") == [tmp_path / "all" / f"{path.name}_x2.mkv" for path in given[::2]]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--encoder", "nope"), "--encoder nope"),
        (("--crf", "99"), "--crf 99"),
        (("--preset", "warp"), "--preset warp"),
        (("--encoder-option", "nope=1"), "nope=1: unknown to libx264"),
        (("--pixel-format", "nope"), "--pixel-format nope"),
        (("--device", "cuda:77"), "--device cuda:77"),
        (("--rate", "24"), "--rate 24"),
        (("--trace", "missing/trace.json"), "--trace missing/trace.json"),
    ],
)
def test_a_wrong_option_is_refused_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("a.mp4", "b.mkv"):
        make_clip(shelf / name, frames=4)
    assert upscale(shelf, *FAST, *words) == 2
    out, err = capsys.readouterr()
    (said,) = err.splitlines()
    assert line in said
    assert out == ""
    assert not (tmp_path / "shelf_x2").exists()


@pytest.mark.parametrize("preset", ["archive", "draft", "lossless"])
def test_a_preset_is_for_every_container(tmp_path: Path, preset: str) -> None:
    """An encoder's options cannot be: libvpx-vp9 has no presets, and webm does not hold what libx264 makes."""
    shelf, made = tmp_path / "shelf", tmp_path / "made"
    shelf.mkdir()
    make_clip(shelf / "a.mp4", frames=4)
    make_clip(shelf / "b.webm", codec="libvpx-vp9", frames=4, audio=("libopus",))
    assert upscale(shelf, "-o", made, *FAST, "--config", preset) == 0
    assert tree(made) >= {"a.mp4", "b.webm"}
    assert upscale(shelf / "b.webm", "-o", made / "c.webm", *FAST, "--config", preset, "--preset", "slow") == 2
    assert not (made / "c.webm").exists()


def test_a_trace_is_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    clip = make_clip(tmp_path / "shelf" / "a.mp4", frames=4)
    for trace in (tmp_path, tmp_path / "missing" / "trace.json", tmp_path / ("n" * 300)):
        options = UpscaleOptions(model="bicubic", trace=trace)
        for work in (upscale_file, upscale_directory):
            with pytest.raises(OptionError, match="--trace"):
                work(clip if work is upscale_file else clip.parent, tmp_path / "made" / "x", options)
    assert tree(tmp_path) == {"shelf", "shelf/a.mp4"}


def test_a_trace_is_of_one_clip(tmp_path: Path) -> None:
    """The next clip's would take its place."""
    (tmp_path / "shelf").mkdir()
    make_clip(tmp_path / "shelf" / "a.mp4", frames=4)
    options = UpscaleOptions(model="bicubic", trace=tmp_path / "trace.json")
    upscale_directory(tmp_path / "shelf", tmp_path / "one", options)
    assert (tmp_path / "trace.json").exists()
    make_clip(tmp_path / "shelf" / "b.mp4", frames=4)
    with pytest.raises(UsageError, match=r"--trace .*trace.json: shows one clip's stages, and there are 2"):
        upscale_directory(tmp_path / "shelf", tmp_path / "two", options)
    assert not (tmp_path / "two").exists()


def test_what_depends_on_the_clip_stays_with_the_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    make_clip(shelf / "large.mp4", width=160, height=120, frames=4)
    make_clip(shelf / "long.mp4", frames=40)
    make_clip(shelf / "short.mp4", frames=4)
    assert upscale(shelf, "--model", "bicubic", "--size", "96p", "--start", "0.5") == 1
    out, err = capsys.readouterr()
    assert "1 of 3 clips are done" in out
    assert len([text for text in err.splitlines() if text.startswith("hat-video: ")]) == 2
    assert upscale(shelf, *FAST, "--encoder", "libvpx-vp9", "--start", "0.5", "-o", tmp_path / "out") == 1
    assert "1 of 3" in capsys.readouterr().out


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
