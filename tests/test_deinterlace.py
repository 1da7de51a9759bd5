"""Interlaced video: found, made progressive by bwdif, the same in whatever pieces it is read; FFmpeg is the referee."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from hat_video import UpscaleOptions, open_source, probe, upscale_file
from hat_video.media.deinterlace import prepare, settle_deinterlace
from hat_video.media.probe import Probe
from tests.clips import make_clip, moving_picture

WOVEN = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
WIDTH, HEIGHT = 64, 48


def woven_pictures(count: int) -> list[np.ndarray]:
    """Each of two moments: even rows of the first, odd rows of the second."""
    pictures = []
    for i in range(count):
        picture = moving_picture(2 * i, WIDTH, HEIGHT)
        picture[1::2] = moving_picture(2 * i + 1, WIDTH, HEIGHT)[1::2]
        pictures.append(picture)
    return pictures


def woven_clip(path: Path, frames: int = 30, **choices: object) -> Path:
    return make_clip(
        path, frames=frames, rate=25, pictures=woven_pictures(frames), options=WOVEN, **choices  # type: ignore[arg-type]
    )  # fmt: skip


def mixed_clip(folder: Path, progressive: int = 40, woven: int = 20) -> Path:
    """A transport stream that begins progressive and goes on interlaced."""
    tick = Fraction(1, 25)
    first, second = range(progressive), range(progressive, progressive + woven)
    one = make_clip(folder / "one.ts", pts=list(first), time_base=tick, rate=25, audio=(), bframes=0)
    two = make_clip(
        folder / "two.ts", pts=list(second), time_base=tick, rate=25, audio=(), bframes=0, options=WOVEN,
        pictures=woven_pictures(woven),
    )  # fmt: skip
    both = folder / "both.ts"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    return both


def read(found: Probe, start: int | None = None, end: int | None = None) -> dict[int, list[torch.Tensor]]:
    with open_source(found.path, probe=found) as source:
        return dict(_frames(source.read(start, end)))


def _frames(batches: Iterator) -> Iterator[tuple[int, list[torch.Tensor]]]:  # type: ignore[type-arg]
    for batch in batches:
        for i, tick in enumerate(batch.pts):
            yield tick, [plane[i] for plane in batch.planes]


def by_ffmpeg(clip: Path, filters: str) -> list[list[torch.Tensor]]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(clip), "-vf", filters]
    command += ["-fps_mode", "passthrough", "-an", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"]
    raw = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    small = (HEIGHT // 2, WIDTH // 2)
    planes = []
    for frame in raw.reshape(-1, HEIGHT * WIDTH * 3 // 2):
        luma, blue, red = np.split(frame, [HEIGHT * WIDTH, HEIGHT * WIDTH * 5 // 4])
        shaped = luma.reshape(HEIGHT, WIDTH), blue.reshape(small), red.reshape(small)
        planes.append([torch.from_numpy(plane.copy()) for plane in shaped])
    return planes


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_marks_are_found(tmp_path: Path) -> None:
    woven = probe(woven_clip(tmp_path / "woven.mp4"))
    assert woven.video.is_interlaced
    assert any("interlaced" in note for note in woven.notes)
    plain = probe(make_clip(tmp_path / "plain.mp4"))
    assert not plain.video.is_interlaced
    assert not any("interlaced" in note for note in plain.notes)


def test_marks_that_come_late_are_found(tmp_path: Path) -> None:
    assert probe(mixed_clip(tmp_path)).video.is_interlaced


def test_settled(tmp_path: Path) -> None:
    woven = probe(woven_clip(tmp_path / "woven.mp4", frames=3)).video
    plain = replace(woven, is_interlaced=False)
    asked = ("auto", "off", "frame", "field")
    assert [settle_deinterlace(mode, woven) for mode in asked] == ["frame", "off", "frame", "field"]
    assert [settle_deinterlace(mode, plain) for mode in asked] == ["off", "off", "frame-all", "field-all"]


@pytest.mark.parametrize("bframes", [0, 2])
def test_frame_equals_ffmpeg(tmp_path: Path, bframes: int) -> None:
    found = probe(woven_clip(tmp_path / "woven.mp4", bframes=bframes))
    ready = prepare(found, deinterlace="frame")
    assert ready.index == found.index
    frames = read(ready)
    assert tuple(frames) == found.index.pts
    expected = by_ffmpeg(found.path, "bwdif=mode=send_frame:parity=auto:deint=interlaced")
    assert len(expected) == len(frames)
    # The first frame has no frame before it; FFmpeg 9 makes its outermost rows otherwise than FFmpeg 8 does.
    assert all(same(a, b) for a, b in list(zip(frames.values(), expected, strict=True))[1:])
    raw = read(found)
    assert not any(same(frames[pts], raw[pts]) for pts in raw)


def test_field_equals_ffmpeg_and_times_are_exact(tmp_path: Path) -> None:
    found = probe(woven_clip(tmp_path / "woven.mp4"))
    ready = prepare(found, deinterlace="field")
    base = found.video.time_base
    assert ready.video.time_base == base / 2
    assert ready.video.rate == 50
    step = found.index.pts[1] - found.index.pts[0]
    middles = [pts * base + step * base / 2 for pts in found.index.pts]
    wanted = sorted([pts * base for pts in found.index.pts] + middles)
    assert [pts * ready.video.time_base for pts in ready.index.pts] == wanted
    assert ready.duration_seconds == found.duration_seconds
    frames = read(ready)
    assert tuple(frames) == ready.index.pts
    expected = by_ffmpeg(found.path, "bwdif=mode=send_field:parity=auto:deint=interlaced")
    assert len(expected) == len(frames)
    # The first and the last field have a neighbour on one side only; FFmpeg 9 makes their outermost rows otherwise.
    assert all(same(a, b) for a, b in list(zip(frames.values(), expected, strict=True))[1:-1])


def test_second_fields_of_variable_frame_rates_are_half_way(tmp_path: Path) -> None:
    pts = [0, 40, 75, 200, 201, 300]
    clip = make_clip(
        tmp_path / "vfr.mp4", pts=pts, time_base=Fraction(1, 1000), pictures=woven_pictures(6), options=WOVEN, audio=()
    )
    found = probe(clip)
    ready = prepare(found, deinterlace="field")
    ends = [*found.index.pts[1:], found.index.pts[-1] + found.index.last_duration]
    wanted = [tick for a, b in zip(found.index.pts, ends, strict=True) for tick in (2 * a, a + b)]
    assert list(ready.index.pts) == wanted
    assert tuple(read(ready)) == ready.index.pts


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("mode", ["frame", "field"])
def test_shortest_clips(tmp_path: Path, frames: int, mode: str) -> None:
    ready = prepare(probe(woven_clip(tmp_path / "short.mp4", frames=frames)), deinterlace=mode)
    assert tuple(read(ready)) == ready.index.pts
    assert len(ready.index.pts) == frames * (2 if mode == "field" else 1)


@pytest.mark.parametrize("mode", ["frame", "field"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_every_range_equals_a_linear_run(tmp_path: Path, mode: str, suffix: str) -> None:
    clip = woven_clip(tmp_path / f"clip{suffix}", frames=40, gop=9, audio=())
    ready = prepare(probe(clip), deinterlace=mode)
    pts = ready.index.pts
    whole = read(ready)
    assert tuple(whole) == pts
    with open_source(clip, probe=ready) as source:
        for first, last in [(0, 13), (13, 14), (14, 40), (7, 30), (39, 40), (1, 2), (20, 33), (33, 35), (9, 10)]:
            got = dict(_frames(source.read(pts[first], pts[last] if last < len(pts) else None)))
            assert tuple(got) == pts[first:last], (first, last)
            assert all(same(planes, whole[tick]) for tick, planes in got.items()), (first, last)
        assert source.lost == []


def test_progressive_frames_pass_untouched(tmp_path: Path) -> None:
    found = probe(mixed_clip(tmp_path))
    raw = read(found)
    frames = read(prepare(found, deinterlace="frame"))
    assert list(frames) == list(raw)
    order = list(raw)
    assert all(same(frames[pts], raw[pts]) for pts in order[:40])
    assert not any(same(frames[pts], raw[pts]) for pts in order[41:])
    doubled = prepare(found, deinterlace="field")
    fields = read(doubled)
    assert tuple(fields) == doubled.index.pts
    assert all(same(fields[2 * pts], raw[pts]) for pts in order[:40])
    ticks = doubled.index.pts
    assert all(same(fields[ticks[2 * i]], fields[ticks[2 * i + 1]]) for i in range(40)), "shown for both of its times"


def test_unmarked_frames_are_deinterlaced_where_asked(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "unmarked.mp4", pictures=woven_pictures(8), frames=8, audio=())
    found = probe(clip)
    frames = read(prepare(found, deinterlace=settle_deinterlace("frame", found.video)))
    expected = by_ffmpeg(clip, "bwdif=mode=send_frame:parity=auto:deint=all")
    # The first frame has no frame before it; FFmpeg 9 makes its outermost rows otherwise than FFmpeg 8 does.
    assert all(same(a, b) for a, b in list(zip(frames.values(), expected, strict=True))[1:])


def upscaled(clip: Path, output: Path, **choices: object) -> list[str]:
    base = UpscaleOptions(model="bicubic", scale=2, **choices)  # type: ignore[arg-type]
    report = upscale_file(clip, output, base)
    assert report.verification is not None
    assert report.verification.startswith("proven")
    return report.notes


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@pytest.mark.parametrize("mode", ["auto", "field"])
def test_segments_of_any_length_make_the_same_film(tmp_path: Path, mode: str) -> None:
    clip = woven_clip(tmp_path / "woven.mp4", gop=7)
    films = []
    for seconds in (10.0, 0.4, 0.12):
        output = tmp_path / f"out{seconds}.mkv"
        notes = upscaled(clip, output, encoder="ffv1", segment=seconds, deinterlace=mode)
        assert any("bwdif" in note for note in notes)
        films.append(decoded(output))
    assert len(films[0]) == (60 if mode == "field" else 30)
    for film in films[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(films[0], film, strict=True))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_fields_to_a_finished_file(tmp_path: Path, suffix: str) -> None:
    clip, output = woven_clip(tmp_path / "woven.mp4"), tmp_path / f"out{suffix}"
    notes = upscaled(clip, output, deinterlace="field", segment=0.3, start="0.2", duration="0.6")
    assert any("each field" in note for note in notes)
    made = probe(output)
    assert not made.video.is_interlaced
    assert len(made.index.pts) == 30
    times = [(pts - made.index.pts[0]) * made.video.time_base for pts in made.index.pts]
    tolerance = Fraction(1, 1000) if suffix == ".mkv" else Fraction(0)
    assert all(abs(time - Fraction(n, 50)) <= tolerance for n, time in enumerate(times))


def test_off_says_so(tmp_path: Path) -> None:
    clip = woven_clip(tmp_path / "woven.mp4", frames=6)
    notes = upscaled(clip, tmp_path / "out.mkv", encoder="ffv1", deinterlace="off")
    assert any("--deinterlace off" in note for note in notes)
    assert not any("bwdif" in note for note in notes)
