"""DALI, as far as it goes without a GPU: its own CPU decoder behind our guards, its GPU graph, a model of its kernel.

On the CPU it decodes VP9 and MJPEG to BT.601 R'G'B', so colours are only near; who comes when, and how many, is exact.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import torch.nn.functional as F
from av.stream import Disposition

from hat_video.color import from_rgb
from hat_video.errors import OptionError, SourceError
from hat_video.media import dali_source
from hat_video.media.dali_source import DaliSource, dali_reasons, decoded_chroma, pipeline
from hat_video.media.deinterlace import prepare
from hat_video.media.gpu_source import GpuSource
from hat_video.media.probe import Probe, probe
from hat_video.media.pyav_source import PyavSource
from hat_video.media.source import FrameSource, open_source
from tests.clips import color_bars, make_clip, moving_picture
from tests.test_deinterlace import woven_clip

SAMPLE = Path(__file__).parents[1] / "samples" / "bbb_320x180.mp4"

try:
    import nvidia.dali  # noqa: F401 - the tests alone may

    WHY_NOT = ""
except ImportError as error:
    WHY_NOT = f"DALI is not installed: {error}"

real = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")

Frames = dict[int, list[torch.Tensor]]


class OnCpu(DaliSource):
    """DALI's CPU decoder through everything that the GPU's goes through, but for the planes."""

    luma_tolerance, chroma_tolerance = 12, 40

    def __init__(self, found: Probe, **choices: Any) -> None:
        super().__init__(found, device="cpu", **choices)

    def _planes_of(self, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rgb = frames.permute(0, 3, 1, 2).float() / 255
        return from_rgb(rgb, self.info.pixel_format, replace(self.info.color, matrix=6))


def frames_of(source: FrameSource, start: int | None = None, end: int | None = None) -> Frames:
    return dict(single(source, start, end))


def single(source: FrameSource, start: int | None, end: int | None) -> Iterator[tuple[int, list[torch.Tensor]]]:
    for batch in source.read(start, end):
        for i, tick in enumerate(batch.pts):
            yield tick, [plane[i] for plane in batch.planes]


def by_pyav(found: Probe) -> Frames:
    with PyavSource(found) as source:
        return frames_of(source)


def same(a: Frames, b: Frames) -> bool:
    return list(a) == list(b) and all(
        torch.equal(x, y) for tick in a for x, y in zip(a[tick], b[tick], strict=True)
    )  # fmt: skip


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.int() - b.int()).abs().float().mean())


def assert_in_order(got: Frames, found: Probe) -> None:
    """Every frame has its own timestamp and is nearer to PyAV's frame of it than to its neighbours."""
    wanted = by_pyav(found)
    assert list(got) == list(wanted)
    ticks = list(got)
    for i, tick in enumerate(ticks):
        own = apart(got[tick][0], wanted[tick][0])
        assert own < 0.5
        assert all(own < apart(got[tick][0], wanted[ticks[k]][0]) for k in (i - 1, i + 1) if 0 <= k < len(ticks))


CLIPS: dict[str, dict[str, Any]] = {
    "vp9.webm": {},
    "vp9.mkv": {"codec": "libvpx-vp9"},
    "vp9.mp4": {"codec": "libvpx-vp9"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "audio": ()},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "audio": ()},
}


@real
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("frames", [1, 3, 8, 21])
def test_every_frame_comes_once_and_in_order(tmp_path: Path, name: str, frames: int) -> None:
    """A tail that does not fill a sequence of 8, and files that are shorter than one."""
    found = probe(make_clip(tmp_path / name, frames=frames, **CLIPS[name]))
    with OnCpu(found, batch=3) as source:
        assert source.name == "dali"
        sizes = [len(batch) for batch in source.read()]
        assert sizes == [3] * (frames // 3) + [frames % 3] * bool(frames % 3)
        assert_in_order(frames_of(source), found)
        assert (source.lost, source.corrupt, source.notes) == ([], [], [])


@real
def test_times_are_the_containers(tmp_path: Path) -> None:
    """Variable frame rate, and a start far from zero, which DALI's own times lose."""
    pts = [1500, 1540, 1541, 1700, 2000, 2033, 2066, 2100, 2500, 2510]
    found = probe(make_clip(tmp_path / "vfr.webm", pts=pts, time_base=Fraction(1, 1000), audio=()))
    assert found.index.pts[0] == 1500
    with OnCpu(found) as source:
        assert_in_order(frames_of(source), found)


@real
def test_ranges_give_the_frames_of_a_linear_run(tmp_path: Path) -> None:
    """In order, with gaps, backwards, and across the borders of sequences; batches count from the range's start."""
    found = probe(make_clip(tmp_path / "clip.webm", frames=40, audio=()))
    pts = found.index.pts
    with OnCpu(found, batch=3) as source:
        whole = frames_of(source)
        for first, last in [(0, 13), (13, 14), (14, 40), (7, 30), (39, 40), (1, 2), (20, 33), (33, 35), (5, 5)]:
            end = pts[last] if last < 40 else None
            assert [len(batch) for batch in source.read(pts[first], end)] == [
                min(3, last - k) for k in range(first, last, 3)
            ]
            got = frames_of(source, pts[first], end)
            assert same(got, {tick: whole[tick] for tick in pts[first:last]}), (first, last)


@real
def test_ranges_in_order_open_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(dali_source, "pipeline", lambda *words: opened.append(words) or pipeline(*words))
    found = probe(make_clip(tmp_path / "clip.webm", frames=30, audio=()))
    pts = found.index.pts
    with OnCpu(found) as source:
        for first, last in [(0, 10), (10, 20), (22, 30)]:
            frames_of(source, pts[first], pts[last] if last < 30 else None)
        assert len(opened) == 1
        frames_of(source, pts[3], pts[5])
        assert len(opened) == 2


@real
def test_a_file_that_was_rewritten_is_the_new_one(tmp_path: Path) -> None:
    """DALI remembers the index of every path for as long as the process lives."""
    path = tmp_path / "clip.webm"
    for frames in (50, 20, 33):
        found = probe(make_clip(path, frames=frames, audio=()))
        with OnCpu(found) as source:
            assert_in_order(frames_of(source), found)
    other = probe(make_clip(tmp_path / "other.webm", frames=20, audio=()))
    with pytest.raises(SourceError, match=r"finds 5 sequences of 8 frames, the file's index has 20 frames"):
        OnCpu(replace(other, path=path))


@real
@pytest.mark.parametrize(
    "name", ["a:b.webm", "ünïcödé — 1.webm", "with space 'and' \"quotes\".webm", "%d-%s.webm", "x"]
)
def test_odd_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_clip(tmp_path / "made.webm", frames=5, audio=())
    made.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = probe(Path(name))
    with OnCpu(found) as source:
        assert_in_order(frames_of(source), found)


@real
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = probe(make_clip(tmp_path / "clip.webm", frames=5, audio=()))
    with OnCpu(found) as source:
        assert len(list(tmp_path.iterdir())) == 2
        frames_of(source)
    with pytest.raises(SourceError):
        OnCpu(replace(found, index=replace(found.index, pts=tuple(range(20)))))
    assert [path.name for path in tmp_path.iterdir()] == ["clip.webm"]


@real
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_truncated_files_lose_nothing_that_pyav_finds(tmp_path: Path, share: float) -> None:
    clip = make_clip(tmp_path / "clip.webm", frames=60, audio=())
    data = clip.read_bytes()
    clip.write_bytes(data[: int(len(data) * share)])
    found = probe(clip)
    assert not found.is_truncated or "it is truncated" in dali_reasons(found, 0)
    try:
        with OnCpu(found, goes_on=True) as source:
            got = frames_of(source)
            lost = source.lost
    except SourceError:
        return  # refused when it was opened: `auto` goes to PyAV then
    with PyavSource(found) as pyav:
        assert list(got) == list(frames_of(pyav))
        assert lost == pyav.lost


@real
@pytest.mark.parametrize("seed", range(6))
def test_damaged_files_lose_nothing_that_pyav_finds(tmp_path: Path, seed: int) -> None:
    clip = make_clip(tmp_path / "clip.webm", frames=60, audio=())
    data = bytearray(clip.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(len(data) // 2, len(data), (2 + 6 * seed,), generator=generator).tolist():
        data[place] ^= 0x41
    clip.write_bytes(data)
    found = probe(clip)
    try:
        with OnCpu(found, goes_on=True) as source:
            got, lost, notes = frames_of(source), source.lost, source.notes
    except SourceError:
        return
    assert sorted([*got, *lost]) == list(found.index.pts)
    assert notes or not lost


@real
def test_the_gpus_graph_can_be_made_without_one(tmp_path: Path) -> None:
    """DALI checks names and types of every argument then."""
    graph = pipeline(tmp_path / "clip.mp4", torch.device("cuda"), 8).serialize()
    assert b"experimental__readers__Video" in graph
    assert b"sequence_length" in graph
    assert b"pad_mode" in graph


@real
@no_gpu
def test_without_a_driver_the_error_says_so(tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "clip.mp4", frames=5))
    with pytest.raises(
        SourceError, match=r"clip.mp4: dali failed at frame 0 \(pts 0\): .*CUDA.*--decoder pyav"
    ) as caught:
        DaliSource(found, device="cuda:0")
    assert "\n" not in str(caught.value)


# What the GPU gives, by a model.


def enlarged(chroma: torch.Tensor) -> torch.Tensor:
    """(N, h, w) uint8 as DALI's kernel makes it (N, 2h, 2w): bilinear between the samples' centres, rounded.

    Source: DALI 2.4, dali/kernels/imgproc/color_manipulation and dali/operators/video/color_space.cu.
    """
    large = F.interpolate(chroma[:, None].double(), scale_factor=2, mode="bilinear", align_corners=False)
    return large[:, 0].round().clamp(0, 255).to(torch.uint8)


def ycbcr(planes: list[torch.Tensor]) -> torch.Tensor:
    """(h, w) planes to (H, W, 3)."""
    return torch.stack([planes[0], *(enlarged(plane[None])[0] for plane in planes[1:])], dim=-1)


class ModelPipe:
    """What a pipeline on a GPU would give, in this machine's memory.

    Args:
        frames: (n, H, W, 3) uint8.
        length: frames in a sequence.
        breaks_at: number of the sequence at which it fails.
    """

    def __init__(self, frames: torch.Tensor, length: int, breaks_at: int | None = None) -> None:
        self.frames, self.length, self.breaks_at, self.runs = frames, length, breaks_at, 0

    def build(self) -> None: ...

    def epoch_size(self, name: str) -> int:
        assert name == "R"
        return -(-len(self.frames) // self.length)

    def run(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if self.runs == self.breaks_at:
            raise RuntimeError(
                "Critical error in pipeline:\nencountered:\n\nFailed to send packet to decoder.\n[/x.cc]"
            )
        first = self.runs * self.length
        self.runs += 1
        shown = self.frames[first : first + self.length]
        spare = self.length - len(shown)
        numbers = torch.tensor([*range(first, first + len(shown)), *[-1] * spare], dtype=torch.int32)
        return [torch.cat([shown, shown.new_zeros(spare, *shown.shape[1:])])], [numbers]


@pytest.fixture
def modelled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets `DaliSource` on the CPU get what a GPU would give."""

    def use(found: Probe, breaks_at: int | None = None, change: Any = None) -> list[ModelPipe]:
        frames = torch.stack([ycbcr(planes) for planes in by_pyav(found).values()])
        pipes = []

        def made(path: Path, device: torch.device, length: int) -> ModelPipe:
            assert path.resolve() == found.path.resolve()
            pipes.append(ModelPipe(frames.clone(), length, breaks_at))
            if change is not None:
                change(pipes[-1])
            return pipes[-1]

        monkeypatch.setattr(dali_source, "pipeline", made)
        monkeypatch.setattr(dali_source, "_release", lambda: None)
        return pipes

    return use


def test_planes_are_the_decoders_own(modelled: Any) -> None:
    """Luma to the bit; of a natural picture's chroma nine samples in ten, and the rest by one."""
    found = probe(SAMPLE)
    found = replace(found, index=replace(found.index, pts=found.index.pts[:30]))
    modelled(found)
    with DaliSource(found, device="cpu", batch=7) as source:
        got = frames_of(source)
    wanted = by_pyav(found)
    assert list(got) == list(wanted)
    errors = []
    for tick, planes in got.items():
        assert [plane.dtype for plane in planes] == [torch.uint8] * 3
        assert torch.equal(planes[0], wanted[tick][0])
        errors += [(a.int() - b.int()).abs().flatten() for a, b in zip(planes[1:], wanted[tick][1:], strict=True)]
    error = torch.cat(errors)
    assert int(error.max()) <= 1
    assert float((error == 0).float().mean()) > 0.85


def chroma_of(picture: Any) -> tuple[torch.Tensor, torch.Tensor]:
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p", threads=1)
    return tuple(torch.utils.dlpack.from_dlpack(plane).clone()[None] for plane in frame.planes[1:])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "exact", "most"),
    [("bars", 0.99, 1), ("waves", 0.85, 1), ("noise", 0.85, 1), ("stripes", 1.0, 0), ("checkerboard", 0.0, 2)],
)
def test_enlarging_is_undone(name: str, exact: float, most: int) -> None:
    """The checkerboard of 0 and 255 is the worst there is: every mean is rounded the same way."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(64)[:, None] + torch.arange(96)
    chroma = {
        "bars": lambda: chroma_of(color_bars(320, 180)),
        "waves": lambda: chroma_of(moving_picture(3, 320, 180)),
        "noise": lambda: tuple(torch.randint(0, 256, (2, 90, 160), generator=generator).byte() for _ in range(2)),
        "stripes": lambda: ((torch.arange(96) % 2 * 224 + 16).byte().expand(1, 64, 96),) * 2,
        "checkerboard": lambda: ((grid % 2 * 255).byte()[None], 255 - (grid % 2 * 255).byte()[None]),
    }[name]()
    back = decoded_chroma(torch.stack([enlarged(plane) for plane in chroma], dim=-1))
    error = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in zip(back, chroma, strict=True)])
    assert int(error.max()) <= most
    assert float((error == 0).float().mean()) >= exact


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (3, 5), (7, 8)])
def test_enlarging_is_undone_in_the_smallest_pictures(height: int, width: int) -> None:
    chroma = torch.randint(0, 256, (40, height, width), generator=torch.Generator().manual_seed(1)).byte()
    back, _ = decoded_chroma(torch.stack([enlarged(chroma)] * 2, dim=-1))
    assert back.shape == chroma.shape
    assert int((back.int() - chroma.int()).abs().max()) <= 1


def test_planes_own_their_memory(modelled: Any, tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "clip.mp4", frames=8, audio=()))
    pipes = modelled(found)
    with DaliSource(found, device="cpu") as source:
        batch = next(source.read())
        kept = [plane.clone() for plane in batch.planes]
        pipes[0].frames.zero_()
        assert all(torch.equal(a, b) for a, b in zip(batch.planes, kept, strict=True))


def test_first_frames_that_differ_are_refused(modelled: Any, tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "clip.mp4", frames=20, audio=()))

    def one_off(pipe: ModelPipe) -> None:
        pipe.frames[5, 3, 3, 0] ^= 1

    modelled(found, change=one_off)
    message = r"frame 0 \(pts 0\): the first 8 frames differ from pyav's by up to 1, [01], [01] .*\(0, 2, 2 allowed\)"
    with pytest.raises(SourceError, match=message):
        DaliSource(found, device="cpu")
    with DaliSource(found, device="cpu", is_checked=False) as source:
        assert len(frames_of(source)) == 20


def test_pyav_goes_on_at_the_exact_frame(modelled: Any, tmp_path: Path) -> None:
    """After 16 of 40 frames, within a batch of 7: the batch is begun again, and batches stay as they were counted."""
    found = probe(make_clip(tmp_path / "clip.mp4", frames=40, gop=9, audio=()))
    modelled(found, breaks_at=2)
    wanted = by_pyav(found)
    with DaliSource(found, device="cpu", batch=7, goes_on=True) as source:
        batches = list(source.read())
        assert [len(batch) for batch in batches] == [7, 7, 7, 7, 7, 5]
        assert [tick for batch in batches for tick in batch.pts] == list(found.index.pts)
        got = frames_of(source, found.index.pts[14])
        assert same(got, {tick: wanted[tick] for tick in found.index.pts[14:]})
        assert len(source.notes) == 1
        assert (
            f"dali failed at frame 16 (pts {found.index.pts[16]}): Failed to send packet to decoder" in source.notes[0]
        )
        assert source.lost == []


def test_what_pyav_loses_then_is_known(modelled: Any, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.ts", frames=40, gop=9, audio=())
    found = probe(clip)
    modelled(found, breaks_at=2)
    index = found.index
    found = replace(found, index=replace(index, pts=(*index.pts[:30], index.pts[30] - 1, *index.pts[30:-1])))
    with DaliSource(found, device="cpu", goes_on=True) as source:
        lost = source.lost
        frames_of(source)
        assert lost == [index.pts[30] - 1]


def test_explicit_dali_names_the_frame(modelled: Any, tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "clip.mp4", frames=40, audio=()))
    modelled(found, breaks_at=2)
    tick = found.index.pts[16]
    with DaliSource(found, device="cpu") as source:
        for _ in range(2):  # a pipeline is dead after an error: the next read makes another one
            with pytest.raises(SourceError, match=rf"dali failed at frame 16 \(pts {tick}\): Failed to send packet"):
                list(source.read())
        assert len(frames_of(source, None, tick)) == 16


def renumber(pipe: ModelPipe) -> None:
    run = pipe.run

    def other() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        frames, numbers = run()
        return frames, [numbers[0] + (pipe.runs == 2)]

    pipe.run = other  # type: ignore[method-assign]


def shrink(pipe: ModelPipe) -> None:
    run = pipe.run

    def other() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        frames, numbers = run()
        return ([frames[0][:, :-2]] if pipe.runs == 2 else frames), numbers

    pipe.run = other  # type: ignore[method-assign]


def cut_short(pipe: ModelPipe) -> None:
    pipe.frames = pipe.frames[:12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renumber, r"at frame 8 \(pts \d+\): it gave the frames \[9, 10, .* instead of 8 to 15"),
        (shrink, r"at frame 8 \(pts \d+\): it gave torch.uint8 of the shape \(8, 46, 64, 3\), not uint8 of \(8, 48"),
        (cut_short, r"it finds 2 sequences of 8 frames, the file's index has 20 frames"),
    ],
)  # fmt: skip
def test_guards(modelled: Any, tmp_path: Path, change: Any, message: str) -> None:
    found = probe(make_clip(tmp_path / "clip.mp4", frames=20, audio=()))
    modelled(found, change=change)
    with pytest.raises(SourceError, match=message), DaliSource(found, device="cpu", is_checked=False) as source:
        list(source.read())


# The allow-list.


def open_gop(folder: Path) -> Path:
    """From its second key frame on, with the pictures that lead it."""
    options = {"x265-params": "log-level=none:keyint=11:min-keyint=11:bframes=3:b-adapt=0:open-gop=1"}
    clip = make_clip(folder / "a.ts", frames=40, codec="libx265", audio=(), options=options)
    target = folder / "b.ts"
    with av.open(str(clip)) as inp, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(inp.streams.video[0])
        keys = 0
        for packet in inp.demux(video=0):
            keys += packet.is_keyframe
            if packet.size and keys >= 2:
                packet.stream = stream
                out.mux(packet)
    return target


def two_sizes(folder: Path) -> Path:
    parts = [
        make_clip(folder / f"{width}.ts", pts=range(at, at + 10), time_base=Fraction(1, 30), width=width, audio=())
        for at, width in ((0, 96), (10, 64))
    ]
    both = folder / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    return both


def two_streams(folder: Path) -> Path:
    """The second one is the default, which FFmpeg likes better."""
    target = folder / "two.mkv"
    parts = [make_clip(folder / f"{w}.mp4", frames=4, width=w, height=w, audio=()) for w in (48, 96)]
    with av.open(str(target), "w") as out:
        inputs = [av.open(str(part)) for part in parts]
        streams = [out.add_stream_from_template(inp.streams.video[0]) for inp in inputs]
        streams[1].disposition = Disposition.default
        for inp, stream in zip(inputs, streams, strict=True):
            for packet in inp.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
            inp.close()
    return target


REASONS: dict[str, tuple[Any, str]] = {
    "codec": (lambda d: make_clip(d / "a.webm", frames=4), "its codec is vp9"),
    "depth": (lambda d: make_clip(d / "a.mp4", frames=4, pix_fmt="yuv420p10le"), "format is yuv420p10le"),
    "4:4:4": (lambda d: make_clip(d / "a.mp4", frames=4, pix_fmt="yuv444p"), "format is yuv444p"),
    "odd": (lambda d: make_clip(d / "a.mp4", frames=4, pix_fmt="yuv444p", width=63), "its size of 63x48 is odd"),
    "interlaced": (lambda d: woven_clip(d / "a.mp4", frames=6), "its frames are interlaced"),
    "no timestamps": (
        lambda d: make_clip(d / "a.h264", frames=6, audio=(), container_format="h264"), "timestamps are missing"
    ),
    "large": (
        lambda d: make_clip(
            d / "a.ts", pts=[900_000 + i for i in range(6)], time_base=Fraction(1, 30), audio=(), frames=6
        ),
        "its timestamps reach 27",
    ),
    "edit list": (
        lambda d: make_clip(d / "a.mp4", pts=list(range(-5, 9)), time_base=Fraction(1, 30), audio=()),
        "outside the edit list",
    ),
    "open GOP": (open_gop, "its first frames need others from before the file"),
    "two sizes": (two_sizes, "parameters change half-way"),
    "two streams": (two_streams, "is not the one that DALI would take"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REASONS)
def test_reasons(tmp_path: Path, kind: str) -> None:
    make, words = REASONS[kind]
    found = probe(make(tmp_path))
    assert [reason for reason in dali_reasons(found, 0) if words in reason], dali_reasons(found, 0)


@real
@no_gpu
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".ts"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_plain_files_lack_only_the_gpu(tmp_path: Path, suffix: str, codec: str) -> None:
    clip = make_clip(tmp_path / f"a{suffix}", frames=30, codec=codec, bt709=True)
    (reason,) = dali_reasons(probe(clip), 0)
    assert "no CUDA device 0" in reason


def test_reasons_of_what_is_wanted(tmp_path: Path) -> None:
    woven = probe(woven_clip(tmp_path / "woven.mp4", frames=6))
    reasons = dali_reasons(prepare(woven, deinterlace="frame"), 0)
    assert any("bwdif" in reason for reason in reasons)
    clip = make_clip(tmp_path / "alpha.mov", codec="qtrle", pix_fmt="argb", frames=3, audio=())
    found = probe(clip)
    assert any("alpha is wanted" in reason for reason in dali_reasons(found, 0))
    assert not any("alpha" in reason for reason in dali_reasons(prepare(found, has_alpha=False), 0))


def test_reasons_of_what_is_no_file(tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "a.mp4", frames=4))
    os.mkfifo(tmp_path / "fifo")
    for path in (Path("-"), Path("http://localhost/a.mp4"), tmp_path, tmp_path / "fifo"):
        assert any("not a regular file" in reason for reason in dali_reasons(replace(found, path=path), 0))


def test_reasons_of_times_before_zero(tmp_path: Path) -> None:
    """Few demuxers give such times, and none of them for a file that PyAV can write."""
    found = probe(make_clip(tmp_path / "a.mp4", frames=4))
    early = replace(found, index=replace(found.index, pts=(-512, *found.index.pts[:-1])))
    assert "it starts before zero (pts -512): DALI leaves such frames out" in dali_reasons(early, 0)


def test_a_file_that_changed_since(tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "a.mp4", frames=14))
    make_clip(found.path, frames=12)
    assert "it has changed since it was probed" in dali_reasons(found, 0)


# Choosing.


def test_on_a_cpu_auto_is_pyav_and_needs_no_dali(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", frames=4)
    code = (
        "import sys; from hat_video import open_source\n"
        f"with open_source({str(clip)!r}) as source:\n"
        "    list(source)\n"
        "    sys.exit(0 if source.name == 'pyav' and not source.notes and 'nvidia.dali' not in sys.modules else 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@no_gpu
def test_auto_on_a_gpu_says_why_pyav_decodes(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", frames=4)
    with open_source(clip, device="cuda") as source:
        assert source.name == "pyav"
        assert [note.partition(":")[0] for note in source.notes] == ["not decoded by dali", "not decoded by nvdec"]
        assert all("no CUDA device 0" in note for note in source.notes)
        assert len(frames_of(source)) == 4


@no_gpu
def test_an_explicit_choice_that_cannot_be_is_refused_with_all_reasons(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mkv", codec="ffv1", pix_fmt="yuv422p10le", width=63, frames=3, audio=())
    for decoder in ("dali", "nvdec"):
        with pytest.raises(OptionError) as caught:
            open_source(clip, decoder=decoder)
        line = str(caught.value)
        assert "\n" not in line
        for words in (f"--decoder {decoder}", "--device is cpu", "CUDA", "ffv1", "yuv422p10le", "63x48", "pyav"):
            assert words in line


def test_unknown_decoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"toaster.*auto, dali, nvdec or pyav"):
        open_source(tmp_path / "a.mp4", decoder="toaster")


# On a GPU.


def on_gpu(kind: type[GpuSource], found: Probe, **choices: Any) -> Frames:
    with kind(found, device="cuda", **choices) as source:
        got = frames_of(source)
    assert all(plane.is_cuda for planes in got.values() for plane in planes)
    return {tick: [plane.cpu() for plane in planes] for tick, planes in got.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_gpu_frames_are_pyavs(tmp_path: Path, codec: str, suffix: str) -> None:
    assert not WHY_NOT, WHY_NOT
    pts = [2 * i + (i > 9) + 3 * (i > 20) for i in range(45)]
    choices: dict[str, Any] = {"codec": codec, "pts": pts, "time_base": Fraction(1, 60), "gop": 9, "audio": ()}
    found = probe(make_clip(tmp_path / f"a{suffix}", width=320, height=180, **choices))
    assert dali_reasons(found, 0) == []
    got, wanted = on_gpu(DaliSource, found, batch=3), by_pyav(found)
    assert list(got) == list(wanted)
    for tick, planes in got.items():
        assert torch.equal(planes[0], wanted[tick][0])
        for ours, theirs in zip(planes[1:], wanted[tick][1:], strict=True):
            assert int((ours.int() - theirs.int()).abs().max()) <= 2
            assert float((ours == theirs).float().mean()) > 0.8


@pytest.mark.gpu
def test_gpu_ranges_give_the_frames_of_a_linear_run(tmp_path: Path) -> None:
    assert not WHY_NOT, WHY_NOT
    found = probe(make_clip(tmp_path / "a.mp4", width=320, height=180, frames=60, gop=9, audio=()))
    pts = found.index.pts
    whole = on_gpu(DaliSource, found)
    with DaliSource(found, device="cuda", batch=5) as source:
        for first, last in [(0, 13), (13, 40), (50, 60), (7, 30)]:
            got = frames_of(source, pts[first], pts[last] if last < 60 else None)
            got = {tick: [plane.cpu() for plane in planes] for tick, planes in got.items()}
            assert same(got, {tick: whole[tick] for tick in pts[first:last]})


@pytest.mark.gpu
def test_gpu_planes_are_complete_on_any_stream(tmp_path: Path) -> None:
    """Read at once on another stream, while the memory of what is gone is written over."""
    assert not WHY_NOT, WHY_NOT
    found = probe(make_clip(tmp_path / "a.mp4", width=640, height=360, frames=60, audio=()))
    wanted = by_pyav(found)
    stream = torch.cuda.Stream()
    with DaliSource(found, device="cuda", batch=4) as source:
        for batch in source.read():
            with torch.cuda.stream(stream):
                luma = batch.planes[0].clone()
            poison = [torch.full((4, 360, 640), 7, dtype=torch.uint8, device="cuda") for _ in range(4)]
            stream.synchronize()
            for i, tick in enumerate(batch.pts):
                assert torch.equal(luma[i].cpu(), wanted[tick][0])
            del poison
