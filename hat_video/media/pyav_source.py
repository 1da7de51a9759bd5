"""The universal decoder: any file that FFmpeg reads, on the CPU."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from hat_video.errors import SourceError
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.media.deinterlace import deinterlaced
from hat_video.media.describe import decoder_of, nearest_planar, planes_of
from hat_video.media.opening import demux
from hat_video.media.probe import Probe, open_container

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["PyavSource"]

# Enough to keep ahead of any network; all CPUs, FFmpeg's own default, would take them from it.
_THREADS = 2
# So many key frames further back are tried before a range is decoded from the start of the file.
_STEPS_BACK = 3


class PyavSource:
    """Frames of one video stream in presentation order, with the timestamps of the probe's index.

    One thread at a time may use it. Use it as a context manager, or call `close`.

    Args:
        probe: what is known of the file.
        batch: frames to a batch.
    """

    name = "pyav"

    def __init__(self, probe: Probe, *, batch: int = 1) -> None:
        self.info: VideoInfo = probe.video
        self.lost: list[int] = []
        """Timestamps within the ranges read so far that no frame came for."""
        self.corrupt: list[int] = []
        """Timestamps of frames that the decoder gave, but marked as damaged."""
        self.notes: list[str] = []
        """Why another decoder was not taken, one line each."""
        self._probe = probe
        self._batch = batch
        # The index counts in halves of the stream's ticks where each of two fields becomes a frame.
        self._halves = 2 if probe.deinterlace.startswith("field") else 1
        self._threads = _THREADS
        self._reformatter = VideoReformatter()
        self._open()
        self._rewind()

    def __enter__(self) -> PyavSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[FrameBatch]:
        return self.read()

    def close(self) -> None:
        """Lets go of the file."""
        self._container.close()

    def read(self, start_pts: int | None = None, end_pts: int | None = None) -> Iterator[FrameBatch]:
        """Frames with start_pts <= pts < end_pts, in batches that are counted from the first of them.

        Reading on from where the last range ended costs nothing; anything else seeks to the key frame before and
        decodes from there. Both give the same frames.

        Args:
            start_pts: first tick; the first frame's if None.
            end_pts: the tick after the last; all that is left if None.

        Raises:
            SourceError: the picture's size or format changes within the file, or the file has gone.
        """
        pts = self._probe.index.pts
        start = pts[0] if start_pts is None else start_pts
        end = pts[-1] + 1 if end_pts is None else end_pts
        wanted = pts[bisect_left(pts, start) : bisect_left(pts, end)]
        given: set[int] = set()
        held: list[tuple[int, tuple[torch.Tensor, ...]]] = []
        for tick, frame in self._range(start, end):
            given.add(tick)
            if frame.is_corrupt:
                self.corrupt.append(tick)
            held.append((tick, self._planes(frame, tick)))
            if len(held) == self._batch:
                yield _stack(held)
                held = []
        if held:
            yield _stack(held)
        self.lost.extend(tick for tick in wanted if tick not in given)

    def _open(self) -> None:
        self._container = open_container(self._probe.path)
        self._stream: VideoStream = self._container.streams[self._probe.stream_index]  # type: ignore[assignment]
        self._context = decoder_of(self._stream)
        self._context.thread_type, self._context.thread_count = "AUTO", self._threads

    def _rewind(self) -> None:
        self._frames = self._progressive()
        self._waiting: tuple[int, VideoFrame] | None = None
        self._reached: int | None = self._probe.index.pts[0]

    def _range(self, start: int, end: int) -> Iterator[tuple[int, VideoFrame]]:
        if self._reached != start:
            self._go_to(start)
        # Until the range is through, where the decoder stands is nobody's business.
        self._reached = None
        last = start - 1
        while (item := self._next()) is not None:
            tick, frame = item
            if tick >= end:
                self._waiting = item
                break
            if tick > last:
                last = tick
                yield tick, frame
        self._reached = end

    def _next(self) -> tuple[int, VideoFrame] | None:
        item, self._waiting = self._waiting, None
        return item if item is not None else next(self._frames, None)

    def _go_to(self, start: int) -> None:
        """Stands at or before the frame at `start`, with nothing missing in between."""
        keys = self._probe.index.key_pts
        begin = self._needed(start)
        last = bisect_right(keys, begin) - 1
        if self._can_seek:
            for step in range(min(_STEPS_BACK, last + 1)):
                try:
                    self._container.seek(keys[last - step] // self._halves, stream=self._stream, backward=True)
                except FFmpegError:
                    break
                self._context.flush_buffers()
                self._frames, self._waiting = self._progressive(), None
                first = self._next()
                # The pictures that lead an open GOP are decodable only from the key frame before.
                if first is not None and first[0] <= begin:
                    self._waiting = first
                    return
        self.close()
        self._open()
        self._rewind()

    @property
    def _can_seek(self) -> bool:
        """Not where frames have no timestamps, nor where VP8 and VP9 carry alpha: its key frames are its own secret."""
        return not self._probe.index.is_counted and not self._context.name.startswith("libvpx")

    def _needed(self, start: int) -> int:
        """The frame to decode from for the one at `start`: bwdif looks at the frame before, and must always see it."""
        if self._probe.deinterlace == "off":
            return start
        pts = self._probe.index.pts
        return pts[max(0, bisect_left(pts, start) - self._halves)]

    def _progressive(self) -> Iterator[tuple[int, VideoFrame]]:
        """(tick, frame) as the index knows them."""
        mode = self._probe.deinterlace
        if mode == "off":
            return self._decode()
        index = self._probe.index.pts
        halves = self._halves

        def ticks_of(pts: int) -> tuple[int, ...]:
            first = bisect_left(index, halves * pts)
            return index[first : first + halves]

        planar = ((pts, self._planar(frame, halves * pts)) for pts, frame in self._decode())
        return deinterlaced(planar, mode, ticks_of)

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        """(pts, frame) as they come, in the stream's own ticks; damaged packets are passed over."""
        last: int | None = None
        try:
            for item in self._decoded():
                yield item
                last = item[0]
        except FFmpegError:
            # Threads that hold a frame each tell of damage late, and frames that were whole would go with it: from here
            # on one thread decodes.
            self._threads = 1
            self.close()
            self._open()
            index = self._probe.index
            key = bisect_right(index.key_pts, index.pts[0] if last is None else last * self._halves) - 1
            if key > 0 and self._can_seek:
                self._container.seek(index.key_pts[key] // self._halves, stream=self._stream, backward=True)
            yield from (item for item in self._decoded() if last is None or item[0] > last)

    def _decoded(self) -> Iterator[tuple[int, VideoFrame]]:
        """The same; raises `FFmpegError` at a damaged packet where several threads decode."""
        index = self._probe.index
        counted = (tick // self._halves for tick in index.pts[:: self._halves]) if index.is_counted else None
        packets = demux(self._container, self._stream)
        is_open = True
        while is_open:
            try:
                packet = next(packets)
            except (StopIteration, FFmpegError):
                # Cut off in the middle: what the decoder still holds is worth having.
                packet, is_open = None, False
            if packet is not None and not packet.size:
                if packet.dts is not None or packet.pts is not None:
                    continue  # Theora says so that the picture stays; to a decoder it would be the end
                packet, is_open = None, False
            try:
                frames = self._context.decode(packet)
            except FFmpegError:
                if self._threads > 1:
                    raise
                continue
            for frame in frames:
                tick = next(counted, None) if counted is not None else frame.pts
                if tick is not None:
                    yield tick, frame

    def _planes(self, frame: VideoFrame, tick: int) -> tuple[torch.Tensor, ...]:
        """Each plane as an (h, w) tensor that owns its memory."""
        return planes_of(self._planar(frame, tick), self.info.pixel_format)

    def _planar(self, frame: VideoFrame, tick: int) -> VideoFrame:
        """The frame in the source's planar format, with or without the alpha."""
        info, name = self.info, frame.format.name
        if (frame.width, frame.height) != (info.width, info.height):
            raise SourceError(
                f"{self._probe.path}: the picture changes from {info.width}x{info.height}"
                f" to {frame.width}x{frame.height}"
                f" at {self._place(tick)}; cut the file there and upscale the parts"
            )
        nearest = nearest_planar(name)
        if nearest.opaque != info.pixel_format.opaque:
            raise SourceError(
                f"{self._probe.path}: the pixel format changes from {info.pixel_format.name} to {name}"
                f" at {self._place(tick)}; cut the file there and upscale the parts"
            )
        # With threads, FFmpeg 8.1 may write over rows of P010 whose width is no multiple of 8.
        return frame if name == nearest.name else self._reformatter.reformat(frame, format=nearest.name, threads=1)

    def _place(self, tick: int) -> str:
        return f"{float(tick * self.info.time_base):.3f} s (pts {tick})"


def _stack(held: list[tuple[int, tuple[torch.Tensor, ...]]]) -> FrameBatch:
    planes = zip(*(planes for _, planes in held), strict=True)
    return FrameBatch(tuple(torch.stack(plane) for plane in planes), tuple(tick for tick, _ in held))
