"""Two views in one picture: said by H.264 itself or by Matroska, and still said afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from hat_video.errors import StrictError
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.verification import verify_files
from hat_video.media.probe import probe
from tests.conformance.tools import ffmpeg

CHART = ("-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.4:r=10", "-c:v", "libx264", "-pix_fmt", "yuv420p")


def upscaled(source: Path, output: Path, *, encoder: str | None = None, strict: bool = False) -> list[str]:
    options = UpscaleOptions(model="bicubic", scale=2, encoder=encoder, strict=strict, jobs=1)
    return upscale_file(source, output, options).notes


def in_stream(path: Path, number: int) -> Path:
    ffmpeg(*CHART, "-x264-params", f"frame-packing={number}", path)
    return path


def in_container(path: Path, mode: str) -> Path:
    ffmpeg(*CHART, "-metadata:s:v", f"stereo_mode={mode}", path)
    return path


@pytest.mark.parametrize(
    ("number", "mode"),
    [
        (0, "checkerboard_lr"),
        (1, "col_interleaved_lr"),
        (2, "row_interleaved_lr"),
        (3, "left_right"),
        (4, "top_bottom"),
    ],
)
def test_what_h264_says_is_kept_everywhere(tmp_path: Path, number: int, mode: str) -> None:
    clip = in_stream(tmp_path / "clip.mp4", number)
    assert probe(clip).video.stereo == mode
    for suffix in (".mp4", ".mov", ".mkv"):
        output = tmp_path / f"out{suffix}"
        upscaled(clip, output, strict=True)
        assert probe(output).video.stereo == mode
        assert verify_files(clip, output).verdict.is_ok


@pytest.mark.parametrize("mode", ["right_left", "bottom_top"])
def test_what_only_matroska_can_say(tmp_path: Path, mode: str) -> None:
    clip = in_container(tmp_path / "clip.mkv", mode)
    assert probe(clip).video.stereo == mode
    for suffix in (".mkv", ".webm"):
        upscaled(clip, tmp_path / f"out{suffix}")
        assert probe(tmp_path / f"out{suffix}").video.stereo == mode
    notes = upscaled(clip, tmp_path / "out.mp4")
    assert any("two views" in note and mode in note for note in notes)
    with pytest.raises(StrictError, match="two views"):
        upscaled(clip, tmp_path / "strict.mp4", strict=True)
    assert verify_files(clip, tmp_path / "out.mp4").verdict.is_ok


def test_matroska_becomes_mp4(tmp_path: Path) -> None:
    clip = in_container(tmp_path / "clip.mkv", "left_right")
    upscaled(clip, tmp_path / "out.mp4", strict=True)
    assert probe(tmp_path / "out.mp4").video.stereo == "left_right"


def test_a_lost_mode_is_found(tmp_path: Path) -> None:
    clip = in_stream(tmp_path / "clip.mp4", 3)
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.4:r=10", "-vf", "scale=128:96", "-c:v", "libx264", "-pix_fmt",
           "yuv420p", tmp_path / "out.mp4")  # fmt: skip
    found = verify_files(clip, tmp_path / "out.mp4").verdict
    assert any("views" in problem for problem in found.problems)
