"""Frames on their way into an encoder: woven planes, and the memory that is used again."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from hat_video.frames import ColorInfo, FrameBatch, PixelFormat, VideoInfo
from hat_video.media.encoder import EncoderSpec, SegmentWriter, plan_encoder
from hat_video.media.encoder_frames import WOVEN, EncoderFrames, can_be_woven, weave
from tests.clips import make_clip
from tests.command import upscale


def facts(name: str, width: int = 98, height: int = 70) -> VideoInfo:
    return VideoInfo(width, height, Fraction(1, 25), Fraction(25), PixelFormat.parse(name), ColorInfo(1, 1, 1, False))


def planes(info: VideoInfo, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fmt = info.pixel_format
    return [
        torch.randint(0, 1 << fmt.bit_depth, size, generator=generator, dtype=torch.int32).to(fmt.dtype)
        for size in fmt.plane_sizes(info.width, info.height)
    ]


@pytest.mark.parametrize(("woven", "planar"), WOVEN.items())
def test_weaving_is_what_ffmpeg_calls_by_that_name(woven: str, planar: str) -> None:
    info = facts(planar)
    given = planes(info)
    frame = EncoderFrames(woven, info).frame(given, 7)
    assert (frame.format.name, frame.pts, frame.time_base) == (woven, 7, Fraction(1, 25))
    assert (frame.width, frame.height) == (98, 70)
    back = frame.reformat(format=planar, threads=1)
    for plane, expected in zip(back.planes, given, strict=True):
        samples = torch.from_dlpack(plane)
        assert torch.equal(samples.to(torch.int32), expected.to(torch.int32))


def test_luma_and_chroma_are_one_allocation() -> None:
    info = facts("yuv420p")
    frame = EncoderFrames("nv12", info).frame(planes(info), 0)
    luma, chroma = frame.planes
    assert luma.line_size == chroma.line_size == 256
    assert chroma.buffer_ptr - luma.buffer_ptr == luma.line_size * info.height


def test_the_deepest_values_survive() -> None:
    fmt = PixelFormat.parse("yuv420p10le")
    ends = [torch.full(size, 1023, dtype=torch.uint16) for size in ((2, 2), (1, 1), (1, 1))]
    out = torch.zeros((3, 4), dtype=torch.uint16)
    weave(ends, out, fmt)
    assert out.tolist() == [[65472, 65472, 0, 0]] * 3


def test_odd_sizes_cannot_be_woven() -> None:
    assert can_be_woven("nv12", 64, 48)
    assert not can_be_woven("nv12", 63, 48)
    assert not can_be_woven("yuv420p", 64, 48)


def written(path: Path, spec: EncoderSpec, info: VideoInfo) -> tuple[bytes, int]:
    """The file, and the most buffers that were ever needed."""
    most = 0
    with SegmentWriter(path, spec, info) as writer:
        for number in range(60):
            made = planes(info, number % 7)
            writer.write(FrameBatch(tuple(plane[None] for plane in made), (number,)))
            for plane in made:
                plane.zero_()  # woven frames have memory of their own
            most = max(most, writer.frames_held)
        writer.close()
    return path.read_bytes(), most


def test_a_buffer_is_taken_again_only_when_its_packet_is_out() -> None:
    info = facts("yuv420p")
    frames = EncoderFrames("nv12", info)
    held = {pts: frames.frame(planes(info, pts), pts) for pts in (0, 2, 1)}
    places = {pts: frame.planes[0].buffer_ptr for pts, frame in held.items()}
    assert len(set(places.values())) == frames.buffers == 3
    frames.release(2)
    frames.release(9)
    frames.release(None)
    again = frames.frame(planes(info, 3), 3)
    assert again.planes[0].buffer_ptr == places[2]
    assert frames.buffers == 3
    assert torch.equal(torch.from_dlpack(held[1].planes[0]), planes(info, 1)[0])


def test_an_encoder_that_looks_ahead_gets_the_same_pictures(tmp_path: Path) -> None:
    spec, info = plan_encoder("matroska", facts("yuv420p"), 98, 70, pixel_format="nv12")
    assert spec.pixel_format == "nv12"
    assert info.pixel_format.name == "yuv420p"
    woven, most = written(tmp_path / "woven.mkv", spec, info)
    assert 0 < most < 60
    # The planar frames are the tensors themselves, so here each gets its own.
    with SegmentWriter(tmp_path / "planar.mkv", replace(spec, pixel_format="yuv420p"), info) as writer:
        kept = [planes(info, number % 7) for number in range(60)]
        for number, made in enumerate(kept):
            writer.write(FrameBatch(tuple(plane[None] for plane in made), (number,)))
        writer.close()
    assert woven == (tmp_path / "planar.mkv").read_bytes()


def test_the_command_writes_woven_frames(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", frames=12)
    made = []
    for name in ("yuv420p", "nv12"):
        out = tmp_path / f"{name}.mkv"
        assert upscale(clip, "-o", out, "--model", "bicubic", "--pixel-format", name) == 0
        made.append(out.read_bytes())
    assert made[0] == made[1]
