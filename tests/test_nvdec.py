"""NVDEC, as far as it goes without a GPU: files whose decoder gives its layouts, through the same code."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from hat_video.errors import SourceError
from hat_video.frames import PixelFormat
from hat_video.media.deinterlace import prepare
from hat_video.media.nvdec_source import HardwareDecoder, NvdecSource, nvdec_reasons, planar
from hat_video.media.probe import Probe, probe
from tests.clips import make_clip, moving_picture
from tests.test_dali import by_pyav, frames_of, no_gpu, on_gpu, same
from tests.test_deinterlace import woven_clip


class OnCpu(NvdecSource):
    """PyAV without an accelerator, its frames woven as those of NVDEC."""

    def __init__(self, found: Probe, **choices: Any) -> None:
        super().__init__(found, device="cpu", **choices)

    def _make(self) -> HardwareDecoder:
        return Woven(self._probe, self._batch, self._device, None)


class Woven(HardwareDecoder):
    def _planes(self, frame: av.VideoFrame, tick: int) -> tuple[torch.Tensor, ...]:
        layout = {"yuv420p": "nv12", "yuv420p10le": "p010le"}.get(frame.format.name)
        return super()._planes(frame if layout is None else frame.reformat(format=layout, threads=1), tick)


def woven_chroma_clip(path: Path, layout: str = "nv12", frames: int = 20, **choices: Any) -> Path:
    """Frames are in that layout in the file itself."""
    return make_clip(path, frames=frames, codec="rawvideo", pix_fmt=layout, audio=(), **choices)


def frame_in(layout: str, width: int = 64, height: int = 48) -> av.VideoFrame:
    """Noise, so that no sample is like its neighbour.

    One thread, here and below: with more, swscale 9 now and then writes P010's rows over each other.
    """
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=layout, threads=1)


@pytest.mark.parametrize(("layout", "name"), [("nv12", "yuv420p"), ("p010le", "yuv420p10le")])
def test_planar_equals_swscale(layout: str, name: str) -> None:
    frame = frame_in(layout, 66, 50)
    luma, chroma = (from_dlpack(plane) for plane in frame.planes)
    assert chroma.shape == (25, 33, 2)
    wanted = [from_dlpack(plane) for plane in frame.reformat(format=name, threads=1).planes]
    pixel_format = PixelFormat.parse(name)
    got = planar(luma, chroma, pixel_format)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == pixel_format.dtype
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() not in (luma.data_ptr(), chroma.data_ptr())


def test_twelve_bits_sit_in_the_high_ones() -> None:
    codes = torch.tensor([[0, 1, 2047, 2048, 4094, 4095]], dtype=torch.int32)
    luma, mirrored = (codes << 4).to(torch.uint16), (codes.flip(1) << 4).to(torch.uint16)
    chroma = torch.stack([luma, mirrored], dim=-1)
    got = planar(luma, chroma, PixelFormat.parse("yuv420p12le"))
    assert [plane.to(torch.int32).tolist() for plane in got] == [codes.tolist(), codes.tolist(), codes.flip(1).tolist()]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mkv", "rawvideo", "nv12"),
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv420p10le"),
        ("a.ts", "libx265", "yuv420p10le"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
    ],
)
def test_frames_are_pyavs(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    pts = [0, 3, 4, 9, 10, 11, 20, 22, 23, 40, 41, 50]
    choices: dict[str, Any] = {"pts": pts, "time_base": Fraction(1, 100), "audio": ()}
    found = probe(make_clip(tmp_path / name, codec=codec, pix_fmt=pix_fmt, **choices))
    with OnCpu(found, batch=5) as source:
        assert source.name == "nvdec"
        assert [len(batch) for batch in source.read()] == [5, 5, 2]
        assert same(frames_of(source), by_pyav(found))
        assert (source.lost, source.notes) == ([], [])


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_every_range_gives_the_frames_of_a_linear_run(tmp_path: Path, codec: str) -> None:
    found = probe(make_clip(tmp_path / "a.mp4", codec=codec, frames=40, gop=9, audio=()))
    pts, whole = found.index.pts, by_pyav(found)
    with OnCpu(found, batch=4) as source:
        for first, last in [(0, 13), (13, 14), (14, 40), (7, 30), (39, 40), (1, 2), (20, 33), (5, 5)]:
            got = frames_of(source, pts[first], pts[last] if last < 40 else None)
            assert same(got, {tick: whole[tick] for tick in pts[first:last]}), (first, last)


def with_a_hole(found: Probe, at: int) -> Probe:
    """The index has a frame more than the file."""
    pts = found.index.pts
    return replace(found, index=replace(found.index, pts=(*pts[: at + 1], pts[at] + 1, *pts[at + 1 :])))


def test_a_frame_that_does_not_come_is_an_error(tmp_path: Path) -> None:
    found = probe(woven_chroma_clip(tmp_path / "a.mkv"))
    tick = found.index.pts[12] + 1
    with OnCpu(with_a_hole(found, 12)) as source, pytest.raises(
        SourceError, match=rf"nvdec failed at frame 13 \(pts {tick}\): of the frames with pts {tick} it gave those with"
    ):  # fmt: skip
        list(source.read())


def test_pyav_goes_on_at_the_exact_frame(tmp_path: Path) -> None:
    found = probe(woven_chroma_clip(tmp_path / "a.mkv"))
    wanted = by_pyav(found)
    tick = found.index.pts[12] + 1
    with OnCpu(with_a_hole(found, 12), batch=5, goes_on=True) as source:
        lost = source.lost
        assert same(frames_of(source), wanted)
        assert lost == source.lost == [tick]
        assert len(source.notes) == 1
        assert "nvdec failed at frame 10" in source.notes[0]


def test_first_frames_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(luma: torch.Tensor, chroma: torch.Tensor, pixel_format: PixelFormat) -> tuple[torch.Tensor, ...]:
        y, u, v = planar(luma, chroma, pixel_format)
        return y, v, u

    monkeypatch.setattr("hat_video.media.nvdec_source.planar", swapped)
    found = probe(woven_chroma_clip(tmp_path / "a.mkv"))
    with pytest.raises(SourceError, match=r"first 8 frames differ from pyav's by up to 0, \d+, \d+ code values"):
        OnCpu(found)


def test_another_layout_is_an_error(tmp_path: Path) -> None:
    """As when a stream changes from 8 bits to 10 half-way; here it does so at once."""
    found = probe(make_clip(tmp_path / "a.mp4", pix_fmt="yuv420p10le", frames=5))
    video = replace(found.video, pixel_format=PixelFormat.parse("yuv420p"))
    with pytest.raises(SourceError, match=r"64x48 yuv420p to 64x48 p010le at 0.000 s"):
        OnCpu(replace(found, video=video))


def test_damaged_packets_are_an_error(tmp_path: Path) -> None:
    """PyAV passes over them on the CPU; here it may as well be the GPU."""
    clip = woven_chroma_clip(tmp_path / "a.nut", frames=150)
    data = clip.read_bytes()
    found = probe(clip)
    with OnCpu(found, is_checked=False) as source:
        clip.write_bytes(data[: len(data) // 2])
        with pytest.raises(SourceError, match=r"nvdec failed at frame \d+ \(pts \d+\)"):
            list(source.read())


@no_gpu
def test_without_a_driver_the_error_says_so(tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "a.mp4", frames=4))
    with pytest.raises(SourceError, match=r"a.mp4: nvdec failed at frame 0 .*driver.*--decoder pyav") as caught:
        NvdecSource(found, device="cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"codec": "mjpeg", "pix_fmt": "yuvj420p", "audio": ()}, "its codec is mjpeg"),
        ({"codec": "libsvtav1", "audio": ()}, "its codec is libdav1d"),
        ({"pix_fmt": "yuv444p"}, "its pixel format is yuv444p"),
        ({"pix_fmt": "yuv422p10le"}, "its pixel format is yuv422p10le"),
        ({"pix_fmt": "yuv444p", "width": 63}, "its size of 63x48 is odd"),
    ],
)
def test_reasons(tmp_path: Path, choices: dict[str, Any], words: str) -> None:
    reasons = nvdec_reasons(probe(make_clip(tmp_path / "a.mkv", frames=4, **choices)), 0)
    assert any(words in reason for reason in reasons), reasons


def test_reasons_of_fields(tmp_path: Path) -> None:
    found = probe(woven_clip(tmp_path / "a.mp4", frames=6))
    assert any("interlaced" in reason for reason in nvdec_reasons(found, 0))
    assert any("bwdif" in reason for reason in nvdec_reasons(prepare(found, deinterlace="field"), 0))


@no_gpu
@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [(".mp4", "libx264", "yuv420p"), (".mkv", "libx265", "yuv420p10le"), (".webm", "libvpx-vp9", "yuv420p")],
)
def test_plain_files_lack_only_the_gpu(tmp_path: Path, suffix: str, codec: str, pix_fmt: str) -> None:
    clip = make_clip(tmp_path / f"a{suffix}", frames=4, codec=codec, pix_fmt=pix_fmt)
    (reason,) = nvdec_reasons(probe(clip), 0)
    assert "no CUDA device 0" in reason


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [
        (".mp4", "libx264", "yuv420p"),
        (".ts", "libx264", "yuv420p"),
        (".mkv", "libx265", "yuv420p"),
        (".mp4", "libx265", "yuv420p10le"),
        (".webm", "libvpx-vp9", "yuv420p"),
    ],
)
def test_gpu_frames_are_pyavs(tmp_path: Path, suffix: str, codec: str, pix_fmt: str) -> None:
    pts = [2 * i + (i > 9) + 3 * (i > 20) for i in range(45)]
    choices: dict[str, Any] = {"pts": pts, "time_base": Fraction(1, 60), "gop": 9, "audio": ()}
    pictures = [moving_picture(i, 320, 180) for i in range(45)]
    clip = make_clip(
        tmp_path / f"a{suffix}", width=320, height=180, codec=codec, pix_fmt=pix_fmt, pictures=pictures, **choices
    )
    found = probe(clip)
    assert nvdec_reasons(found, 0) == []
    assert same(on_gpu(NvdecSource, found, batch=4), by_pyav(found))


@pytest.mark.gpu
def test_gpu_ranges_give_the_frames_of_a_linear_run(tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "a.mp4", width=320, height=180, frames=60, gop=9, audio=()))
    pts, whole = found.index.pts, by_pyav(found)
    with NvdecSource(found, device="cuda", batch=5) as source:
        for first, last in [(0, 13), (13, 40), (50, 60), (7, 30)]:
            got = frames_of(source, pts[first], pts[last] if last < 60 else None)
            got = {tick: [plane.cpu() for plane in planes] for tick, planes in got.items()}
            assert same(got, {tick: whole[tick] for tick in pts[first:last]})
