"""Does frame k of the output show frame k of the source? Timestamps cannot tell a picture that slid by one frame."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from av.error import FFmpegError
from av.video.frame import VideoFrame
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.dlpack import from_dlpack

from hat_video.frames import PixelFormat, VideoInfo
from hat_video.media.describe import nearest_planar
from hat_video.media.opening import demux, open_file
from hat_video.media.probe import Probe
from hat_video.media.source import open_source
from hat_video.media.span import Span

__all__ = ["PictureFacts", "averaged", "check_picture", "luma_of", "slip"]

_WINDOW = 8  # source frames looked at around a place
_GRID = (72, 128)  # rows, columns; compression noise averages out over the samples of a cell, motion stays
_MOTION = 0.6 / 255  # mean luma difference below which two frames count as one picture
_DECISIVE = 0.8  # a neighbour must fit that much better, in squared error, before it counts as a slip


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What the comparison found."""

    places: int
    """Frames of the output that match their own source frame better than its neighbours."""
    static: int
    """Places without enough motion to tell neighbours apart."""
    unclear: int
    """Places where a neighbour fits about as well."""
    problems: tuple[str, ...]
    """One line for each frame that shows another frame's picture."""


def check_picture(
    source: Probe,
    output: Path,
    *,
    video: VideoInfo,
    stream_index: int,
    pts: Sequence[int],
    output_pts: Sequence[int],
    output_keys: Sequence[int],
    segment_starts: Sequence[int],
    left_out: Collection[int],
    span: Span | None = None,
) -> PictureFacts:
    """Compares downscaled luma at the start, the middle and the end of each segment.

    Both files are read forward only, and a seek is taken wherever a key frame allows it, so a film costs at most one
    decode of each, in bounded memory.

    Args:
        source: the source.
        output: the finished file.
        video: the facts of the output's video stream.
        stream_index: its index in the output.
        pts: the source's pts of the output's frames, rising, in the source's ticks.
        output_pts: the output's pts of the same frames, rising, in the output's ticks.
        output_keys: those of them that are key frames.
        segment_starts: first pts of each segment, in the source's ticks.
        left_out: pts of lost and corrupt frames, which are not compared.
        span: the range of the source that the output is; None for all of it.

    Returns:
        How many places agree, and what does not.
    """
    place_of = {p: n for n, p in enumerate(pts)}
    places = static = unclear = 0
    last = -1
    problems: list[str] = []
    kept = slice(0, len(source.index.pts)) if span is None else span.frames(source.index.pts, source.video.time_base)
    with _SourceLuma(source) as reference, _OutputLuma(output, stream_index, output_keys, video) as film:
        for low, high in _windows(source.index.pts, segment_starts, kept):
            lumas = reference.read(low, high)
            # Windows overlap by a frame or two; one frame is not two places.
            k = _liveliest(lumas, source.index.pts, place_of, left_out, after=last)
            if k is None:
                static += 1
                continue
            last = k
            n = place_of[source.index.pts[k]]
            own = lumas[k]
            seen = film.read(output_pts[n], own.shape)
            if seen is None:
                problems.append(f"frame {n} of the output cannot be decoded")
                continue
            error = _squared(seen, own)
            near = {j: _squared(seen, lumas[j]) for j in (k - 1, k + 1) if j in lumas}
            best = min(near, key=lambda j: near[j])
            if error <= near[best]:
                places += 1
            elif near[best] < _DECISIVE * error:
                problems.append(f"frame {n} shows the picture of the source's frame {best} instead of {k}")
            else:
                unclear += 1
    return PictureFacts(places, static, unclear, tuple(problems))


def slip(seen: Tensor, own: Tensor, neighbours: Mapping[int, Tensor]) -> int | None:
    """Which neighbour's picture a frame shows instead of its own; None if its own, or if nobody could tell.

    Args:
        seen: (rows, columns) luma of the frame.
        own: of the source's frame that it must show.
        neighbours: of the source's frames beside that, by number.
    """
    moving = {k: luma for k, luma in neighbours.items() if float((luma - own).abs().mean()) > _MOTION}
    if not moving:
        return None
    best = min(moving, key=lambda k: _squared(seen, moving[k]))
    return best if _squared(seen, moving[best]) < _DECISIVE * _squared(seen, own) else None


def _windows(index: Sequence[int], segment_starts: Sequence[int], kept: slice) -> Iterator[tuple[int, int]]:
    """Ranges of source frames to look at: three a segment, rising; neighbours of the first and last belong to them."""
    where = {p: i for i, p in enumerate(index)}
    starts = sorted({where[p] for p in segment_starts if p in where} | {kept.start})
    done = 0
    for start, stop in zip(starts, [*starts[1:], kept.stop], strict=True):
        for low in (start - 1, (start + stop - _WINDOW) // 2, stop + 1 - _WINDOW):
            low = max(0, start - 1, low)
            high = min(low + _WINDOW, len(index))
            if high > done and high - low > 1:
                yield low, high
                done = high


def _liveliest(
    lumas: dict[int, Tensor], index: Sequence[int], place_of: dict[int, int], left_out: Collection[int], *, after: int
) -> int | None:
    """The frame that differs most from both neighbours (at the film's ends: its only one). None if all stand still."""
    best, most = None, _MOTION
    for k, luma in lumas.items():
        neighbours = [j for j in (k - 1, k + 1) if 0 <= j < len(index)]
        if (
            k <= after
            or index[k] not in place_of
            or any(j not in lumas or index[j] in left_out for j in (k, *neighbours))
        ):
            continue
        motion = min((float((luma - lumas[j]).abs().mean()) for j in neighbours), default=0.0)
        if motion > most:
            best, most = k, motion
    return best


class _SourceLuma:
    """Small luma pictures of source frames, by index; windows must rise. Keeps one window."""

    def __init__(self, source: Probe) -> None:
        self._index = source.index
        self._format = source.video.pixel_format
        self._is_full = source.video.color.is_full_range
        self._frames = open_source(source.path, decoder="pyav", probe=source)
        self._where = {p: i for i, p in enumerate(source.index.pts)}
        self._kept: dict[int, Tensor] = {}
        self._next = 0

    def __enter__(self) -> _SourceLuma:
        return self

    def __exit__(self, *exc: object) -> None:
        self._frames.close()

    def read(self, low: int, high: int) -> dict[int, Tensor]:
        pts = self._index.pts
        start = max(low, self._next)
        self._kept = {i: luma for i, luma in self._kept.items() if i >= low}
        if start < high:
            keys = self._index.key_pts
            # Going on is cheaper than a seek unless a key frame lies between.
            begin = start
            if self._next < start and bisect_right(keys, pts[start]) == bisect_right(keys, pts[self._next]):
                begin = self._next
            end = pts[high] if high < len(pts) else pts[-1] + 1
            for batch in self._frames.read(pts[begin], end):
                for n, p in enumerate(batch.pts):
                    i = self._where.get(p)
                    if i is not None and i >= start:
                        self._kept[i] = averaged(
                            _luma([plane[n] for plane in batch.planes], self._format, self._is_full), None
                        )
            self._next = high
        return self._kept


class _OutputLuma:
    """Small luma pictures of the output, by pts; pts must rise."""

    def __init__(self, path: Path, stream_index: int, keys: Sequence[int], video: VideoInfo) -> None:
        self._container = open_file(path)
        self._stream = self._container.streams[stream_index]
        self._stream.thread_count = 2  # type: ignore[attr-defined]  # goes to the codec context
        self._is_full = video.color.is_full_range
        self._keys = sorted(keys)
        self._frames: Iterator[VideoFrame] = iter(())
        self._at: int | None = None

    def __enter__(self) -> _OutputLuma:
        return self

    def __exit__(self, *exc: object) -> None:
        self._container.close()

    def read(self, target: int, shape: torch.Size) -> Tensor | None:
        """The picture at `target`, averaged down to `shape` (rows, columns); None if there is none."""
        n = bisect_right(self._keys, target)
        if self._at is not None and bisect_right(self._keys, self._at) == n:
            return self._find(target, shape)
        # A container may land behind the key frame that was asked for; then the one before it is tried.
        for key in [*reversed(self._keys[max(0, n - 3) : n]), self._keys[0]]:
            self._container.seek(key, stream=self._stream, backward=True)
            self._frames = self._decode()
            found = self._find(target, shape)
            if found is not None:
                return found
        return None

    def _find(self, target: int, shape: torch.Size) -> Tensor | None:
        for frame in self._frames:
            self._at = frame.pts
            if frame.pts == target:
                return averaged(_frame_luma(frame, self._is_full), shape)
            if frame.pts is not None and frame.pts > target:
                self._frames = chain((frame,), self._frames)
                break
        return None

    def _decode(self) -> Iterator[VideoFrame]:
        for packet in demux(self._container, self._stream):
            try:
                frames = packet.decode()
            except FFmpegError:
                continue
            yield from (frame for frame in frames if isinstance(frame, VideoFrame))


def _frame_luma(frame: VideoFrame, is_full: bool) -> Tensor:
    try:
        pixel_format = PixelFormat.parse(frame.format.name)
    except ValueError:
        pixel_format = nearest_planar(frame.format.name)
        frame = frame.reformat(format=pixel_format.name, threads=1)
    return _luma([from_dlpack(plane) for plane in frame.planes], pixel_format, is_full)


def luma_of(planes: Sequence[Tensor], video: VideoInfo) -> Tensor:
    """Luma of one frame, about 0..1, float32 (h, w); `planes` are (h, w) each, in the video's pixel format."""
    return _luma(planes, video.pixel_format, video.color.is_full_range)


def _luma(planes: Sequence[Tensor], pixel_format: PixelFormat, is_full: bool) -> Tensor:
    """Luma, about 0..1, float32 (h, w)."""
    full = float(2**pixel_format.bit_depth - 1)
    if pixel_format.kind == "rgb":
        green, blue, red = (plane.to(torch.float32) for plane in planes[:3])
        return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / full
    luma = planes[0].to(torch.float32)
    if is_full:
        return luma / full
    step = float(1 << (pixel_format.bit_depth - 8))
    return (luma - 16 * step) / (219 * step)


def averaged(luma: Tensor, shape: Sequence[int] | None) -> Tensor:
    """(rows, columns) of a luma picture, each the mean of its cell; as many as are wise if None."""
    rows, columns = shape or (min(luma.shape[0], _GRID[0]), min(luma.shape[1], _GRID[1]))
    small: Tensor = adaptive_avg_pool2d(luma[None, None], (rows, columns))[0, 0]
    return small


def _squared(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())
