"""HDR: tags, mastering display and content light level through real encoders, read back from the finished file."""

from __future__ import annotations

import re
import subprocess
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import pytest

from hat_video import UpscaleOptions, probe, upscale_file
from hat_video.errors import StrictError
from hat_video.frames import ContentLight, HdrInfo, MasteringDisplay
from hat_video.media.hdr import hdr_options, hdr_written_by
from tests.clips import make_clip

P3_D65 = ((34000, 16000), (13250, 34500), (7500, 3000), (15635, 16450))
HDR = HdrInfo(
    MasteringDisplay(
        tuple((Fraction(x, 50_000), Fraction(y, 50_000)) for x, y in P3_D65),
        (Fraction(50, 10_000), Fraction(1000)),
    ),
    ContentLight(812, 203),
)
MASTER = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"


def hdr_clip(path: Path, *, light: bool = True, master: bool = True, frames: int = 6) -> Path:
    """PQ, BT.2020, 10 bit, by x265, which is told everything in its own words."""
    params = ["log-level=none", "colorprim=9", "transfer=16", "colormatrix=9"]
    params += [f"master-display={MASTER}"] * master + ["max-cll=812,203"] * light
    options = {"preset": "ultrafast", "x265-params": ":".join(params)}
    return make_clip(path, codec="libx265", pix_fmt="yuv420p10le", frames=frames, options=options, audio=())


def upscaled(clip: Path, output: Path, **choices: object) -> list[str]:
    report = upscale_file(clip, output, UpscaleOptions(model="bicubic", scale=2, **choices))  # type: ignore[arg-type]
    assert report.verification is not None
    assert report.verification.startswith("proven")
    return report.notes


def test_probe_reads_exact_numbers(tmp_path: Path) -> None:
    video = probe(hdr_clip(tmp_path / "clip.mkv")).video
    assert video.hdr == HDR
    assert (video.color.matrix, video.color.primaries, video.color.transfer) == (9, 9, 16)
    assert probe(hdr_clip(tmp_path / "light.mkv", master=False)).video.hdr == HdrInfo(None, HDR.content_light)
    assert probe(hdr_clip(tmp_path / "master.mkv", light=False)).video.hdr == HdrInfo(HDR.mastering, None)
    assert probe(hdr_clip(tmp_path / "none.mkv", master=False, light=False)).video.hdr is None


@pytest.mark.parametrize(
    ("encoder", "suffix"),
    [("libx265", ".mp4"), ("libx265", ".mkv"), ("libx264", ".mp4"), ("libsvtav1", ".mkv"), ("libsvtav1", ".mp4")],
)
def test_comes_back_from_the_finished_file(tmp_path: Path, encoder: str, suffix: str) -> None:
    clip, output = hdr_clip(tmp_path / "clip.mkv", frames=12), tmp_path / f"out{suffix}"
    notes = upscaled(clip, output, encoder=encoder, segment=0.2, strict=True)
    assert not any("HDR" in note for note in notes)
    video = probe(output).video
    assert video.hdr == hdr_written_by(encoder, HDR)
    assert (video.color.matrix, video.color.primaries, video.color.transfer) == (9, 9, 16)
    assert video.pixel_format.bit_depth == 10
    if encoder != "libsvtav1":
        assert video.hdr == HDR


def test_another_reader_agrees(tmp_path: Path) -> None:
    """FFmpeg's own program, of another version, on the finished file."""
    output = tmp_path / "out.mp4"
    upscaled(hdr_clip(tmp_path / "clip.mkv"), output, encoder="libx265")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(output), "-vf", "showinfo", "-f", "null", "-"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "r(0.6800,0.3200) g(0.2650,0.6900) b(0.1500 0.0600) wp(0.3127, 0.3290)" in said
    assert re.search(r"min_luminance=0\.00500\d*, max_luminance=1000\.0", said)
    assert "MaxCLL=812, MaxFALL=203" in said
    assert "smpte2084" in said


def test_av1_rounds_to_its_own_steps() -> None:
    """Half a step of AV1's fixed point at most: 1/131072 in chromaticity, 1/512 and 1/32768 in luminance."""
    written = hdr_written_by("libsvtav1", HDR)
    assert written is not None
    assert written.mastering is not None
    assert written.mastering.primaries is not None
    assert written.mastering.luminance is not None
    assert HDR.mastering is not None
    assert HDR.mastering.primaries is not None
    for ours, theirs in zip(written.mastering.primaries, HDR.mastering.primaries, strict=True):
        assert all(abs(a - b) <= Fraction(1, 1 << 17) for a, b in zip(ours, theirs, strict=True))
    dark, bright = written.mastering.luminance
    assert abs(dark - Fraction(50, 10_000)) <= Fraction(1, 1 << 15)
    assert bright == 1000


def test_a_part_of_a_mastering_display_is_not_made_up() -> None:
    assert HDR.mastering is not None
    part = HdrInfo(MasteringDisplay(None, HDR.mastering.luminance), HDR.content_light)
    assert hdr_written_by("libx265", part) == HdrInfo(None, HDR.content_light)
    assert hdr_options("libx265", hdr_written_by("libx265", part)) == {"x265-params": "max-cll=812,203"}
    assert hdr_written_by("libx265", HdrInfo(part.mastering, None)) is None
    assert hdr_options("libx264", None) == {}


@pytest.mark.parametrize(("encoder", "suffix"), [("prores_ks", ".mov"), ("ffv1", ".mkv")])
def test_what_an_encoder_cannot_write_is_said(tmp_path: Path, encoder: str, suffix: str) -> None:
    clip = hdr_clip(tmp_path / "clip.mkv")
    notes = upscaled(clip, tmp_path / f"out{suffix}", encoder=encoder)
    assert any("mastering display" in note and encoder in note and "libx265" in note for note in notes)
    assert any("content light level" in note for note in notes)
    with pytest.raises(StrictError, match="mastering display"):
        upscaled(clip, tmp_path / f"strict{suffix}", encoder=encoder, strict=True)
    assert not (tmp_path / f"strict{suffix}").exists()


def test_hlg_keeps_its_tags(tmp_path: Path) -> None:
    options = {"preset": "ultrafast", "x265-params": "log-level=none:colorprim=9:transfer=18:colormatrix=9"}
    clip = make_clip(tmp_path / "clip.mp4", codec="libx265", pix_fmt="yuv420p10le", frames=4, options=options, audio=())
    upscaled(clip, tmp_path / "out.mp4")
    color = probe(tmp_path / "out.mp4").video.color
    assert (color.matrix, color.primaries, color.transfer, color.is_full_range) == (9, 9, 18, False)
