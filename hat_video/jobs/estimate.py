"""What a run will take, measured while it works: time, disk and memory, said before anybody has waited for long."""

from __future__ import annotations

import resource
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import torch

from hat_video.files import UNFINISHED
from hat_video.frames import FrameBatch
from hat_video.jobs.plan import Manifest, Segment
from hat_video.media.encoder import SegmentWriter
from hat_video.media.full_check import is_lossless
from hat_video.media.probe import Probe, probe

__all__ = [
    "LONG_SECONDS",
    "Estimate",
    "Pace",
    "Trial",
    "film_bytes",
    "film_bytes_before",
    "peak_gpu_memory_bytes",
    "peak_memory_bytes",
]

LONG_SECONDS = 60.0
"""A run that will take longer says so at its start."""
# The first look at the pace; then so many frames, or so many seconds, for the size.
_LOOK_SECONDS, _SAMPLE_FRAMES, _SAMPLE_SECONDS = 1.5, 64, 20.0
# Where an encoder is told nothing else, it starts a new picture from nothing after so many frames.
_KEY_FRAME_INTERVAL = 250
# Bits a pixel before anything was encoded, (hardly less, usual): for lossy coding and for lossless.
_BITS_LOSSY, _BITS_LOSSLESS = (0.002, 0.15), (0.2, 5.0)
# What is still to come may be that much easier than what came so far: a dark scene, the titles.
_EASIER = 4
_LARGE = ("prores_ks", "magicyuv", "qtrle", "png", "rawvideo")
# Frames that an encoder looks ahead.
_LOOKAHEAD = 40


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run, or the rest of it, will take on this machine."""

    frames: int
    """Frames that were still to be made when the measuring began."""
    fps: float
    """Frames a second, measured."""
    seconds: float
    """From the beginning of the run to the proven file."""
    bytes: int
    """Of the finished file. Segments lie beside it meanwhile, so twice that is needed."""
    memory_bytes: int
    """Peak resident memory of the process."""
    gpu_memory_bytes: int = 0
    """Peak that torch reserved on the GPU; 0 on a CPU."""

    @property
    def line(self) -> str:
        """The one line that people read."""
        gpu = f", {_size(self.gpu_memory_bytes)} on the GPU" if self.gpu_memory_bytes else ""
        return (
            f"{self.frames} frames at {self.fps:.2f} frames/s: about {_duration(self.seconds)},"
            f" a file of {_size(self.bytes)}, {_size(self.memory_bytes)} of memory{gpu}"
        )


class Pace:
    """Frames a second, from the moment that all frames in flight have come once."""

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._created = time.perf_counter()
        self._began = self._last = self._created
        self._batches = 0
        self.frames = 0
        """Counted so far."""
        self._all = 0

    def count(self, frames: int) -> None:
        """Takes note of frames that have just come."""
        self._last = time.perf_counter()
        self._batches += 1
        self._all += frames
        if self._batches <= self._in_flight:
            self._began = self._last
        else:
            self.frames += frames

    @property
    def seconds(self) -> float:
        """Since the counting began."""
        return self._last - self._began

    @property
    def fps(self) -> float:
        """Of the counted frames; where there are too few of them, of all."""
        if self.frames >= self._in_flight and self.seconds > 0:
            return self.frames / self.seconds
        return self._all / max(self._last - self._created, 1e-6)


class Trial:
    """Watches the first seconds of a run's work. A context manager.

    Time comes from frames that the run needs anyway. For the size the same frames are encoded once more, into a file of
    their own, since an encoder holds back dozens of them; a short run is spared that.

    Args:
        manifest: the run.
        found: the probe of its source.
        folder: the work folder.
        in_flight: frames that are computed at once.
        to_do: the segments that are still to be made.
        began: `time.perf_counter()` at the run's beginning.
    """

    def __init__(
        self, manifest: Manifest, found: Probe, folder: Path, *, in_flight: int, to_do: Sequence[Segment], began: float
    ) -> None:
        self._manifest, self._found, self._began = manifest, found, began
        self._path = folder / f"{UNFINISHED}trial-{uuid.uuid4().hex}.mkv"
        self._left = sum(len(segment.pts) for segment in to_do)
        self._pace = Pace(in_flight)
        self._writer: SegmentWriter | None = None
        self._pts: list[int] = []
        self._is_over = False

    def __enter__(self) -> Trial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)
        self._path.unlink(missing_ok=True)

    def feed(self, batch: FrameBatch) -> Estimate | None:
        """Takes a batch that was just made; gives the estimate once, where the run is a long one.

        Raises:
            OutputError: the work folder cannot be written.
        """
        if self._is_over:
            return None
        self._pace.count(len(batch))
        if self._writer is None:
            if self._pace.seconds < _LOOK_SECONDS or not self._pace.frames:
                return None
            if self._left / self._pace.fps < LONG_SECONDS:
                self._is_over = True
                return None
            self._writer = SegmentWriter(self._path, self._manifest.recipe.encoder, self._manifest.video)
        self._writer.write(batch)
        self._pts += batch.pts
        if len(self._pts) < _SAMPLE_FRAMES and (self._pace.seconds < _SAMPLE_SECONDS or len(self._pts) < 2):
            return None
        self._is_over = True
        self._writer.close()
        return self._estimate()

    def _estimate(self) -> Estimate:
        manifest, found = self._manifest, self._found
        share = len(manifest.index.pts) / len(found.index.pts)
        elapsed = time.perf_counter() - self._began
        made = self._pace.frames
        return Estimate(
            frames=self._left,
            fps=self._pace.fps,
            seconds=elapsed + (self._left - made) / self._pace.fps,
            bytes=film_bytes(probe(self._path), self._pts, found, manifest) + int(share * found.other_bytes),
            memory_bytes=peak_memory_bytes(),
            gpu_memory_bytes=peak_gpu_memory_bytes(manifest.recipe.device),
        )


def film_bytes(made: Probe, pts: Iterable[int], found: Probe, manifest: Manifest) -> int:
    """Size of a film's video, from that of a few of its frames.

    The source's own packets tell how much harder or easier the rest is: a fade from black says nothing of a film, but
    what it costs beside the source's fade does. Key frames cost the same everywhere.

    Args:
        made: the probe of the file with those frames.
        pts: their timestamps in the source, rising.
        found: the probe of the source.
        manifest: the whole film.
    """
    sizes = dict(zip(made.index.pts, made.frame_bytes, strict=True))
    keys = [sizes[tick] for tick in made.index.key_pts]
    frames = len(manifest.index.pts)
    if len(keys) == len(sizes):
        return sum(keys) * frames // len(keys)
    source = dict(zip(found.index.pts, found.frame_bytes, strict=True))
    usual = max(1, sum(found.frame_bytes) // len(found.frame_bytes))
    starts = {segment.start_pts for segment in manifest.segments}
    key_pts = set(made.index.key_pts)
    pairs = [
        (sizes[ours], source.get(tick, usual))
        for tick, ours in zip(pts, made.index.pts, strict=False)
        if ours not in key_pts
    ]
    # x264 and x265 spend less on frames that they see no future of, which in a film are only the very last.
    pairs = pairs[: len(pairs) - min(_LOOKAHEAD, len(pairs) // 2)]
    ratio = Fraction(sum(ours for ours, _ in pairs), max(1, sum(theirs for _, theirs in pairs)))
    rest = sum(source.get(tick, usual) for tick in manifest.index.pts if tick not in starts)
    count = sum(-(-len(segment.pts) // _KEY_FRAME_INTERVAL) for segment in manifest.segments)
    return int(ratio * rest) + count * sum(keys) // max(1, len(keys))


def film_bytes_before(manifest: Manifest, frames: int, made_frames: int, made_bytes: int) -> tuple[int, int]:
    """(hardly less, usual) size of some frames that nobody has encoded yet.

    Args:
        manifest: the whole film.
        frames: how many.
        made_frames: frames of the same film that are encoded already, and tell best; 0 where there are none.
        made_bytes: their size.
    """
    if made_frames:
        usual = made_bytes * frames // made_frames
        return usual // _EASIER, usual
    encoder, video = manifest.recipe.encoder, manifest.video
    is_large = encoder.name in _LARGE or is_lossless(encoder)
    low, usual_bits = _BITS_LOSSLESS if is_large else _BITS_LOSSY
    samples = video.width * video.height * frames
    return int(samples * low / 8), int(samples * usual_bits / 8)


def peak_memory_bytes() -> int:
    """The most that this process has had in memory so far."""
    try:
        # getrusage would give the peak of whoever started this process, if that was higher.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory_bytes(device: str) -> int:
    """The most that torch has reserved on the GPU so far; 0 for a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.startswith("cuda") else 0


def _size(count: int) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
