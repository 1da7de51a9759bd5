"""A source that is read once, from the front to the end.

There is no index of a pipe, so nothing can be planned, resumed or proven beforehand; frames and packets go through in
the order in which they come, each with its own time. A file may come this way too, and its index may lie anywhere.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

import av
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.video.reformatter import VideoReformatter

from hat_video.errors import SourceError
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.media.adts import header_for
from hat_video.media.deinterlace import deinterlaced, settle_deinterlace
from hat_video.media.describe import (
    decoder_of,
    describe,
    has_idle_alpha,
    is_see_through,
    nearest_planar,
    planes_of,
    to_fraction,
)
from hat_video.media.opening import Limits, demux, safe_options

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["PipeSource"]

_THREADS = 2
# Packets and frames that may come before the first picture and the first sound of every stream.
_MOST_HELD = 400
_ADTS_BYTES = 7
# Less is rounding, of containers and of their headers.
_SLACK = Fraction(1, 2)


# What comes first is looked at before FFmpeg, which would read to the end of a pipe for an index that lies there.
_HEAD_BYTES = 1 << 15
# Boxes that an mp4 or mov may have before its index and its pictures.
_LEADING_BOXES = (b"ftyp", b"free", b"skip", b"wide", b"pnot", b"uuid", b"pdin")


class _Reader:
    """The reading half of a file, and nothing that could seek."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.head = self._rest = file.read(_HEAD_BYTES)
        """The first bytes; they are read once more."""

    def read(self, size: int) -> bytes:
        if not self._rest:
            return self._file.read(size)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


class _FileReader:
    """A file from where it stands: whoever handed it over may have read some of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self._file, self._begin = file, file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset + self._begin if whence == os.SEEK_SET else offset, whence) - self._begin

    def tell(self) -> int:
        return self._file.tell() - self._begin


def _is_seekable(file: BinaryIO) -> bool:
    """Whether it is a file, or something in memory; a device may say that it can seek, and does not."""
    is_able = getattr(file, "seekable", None)
    if is_able is None or not is_able():
        return False
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, AttributeError):
        return True


def _is_index_last(head: bytes) -> bool:
    """Whether an mp4 or mov has its pictures (mdat) before the index (moov) that says where each of them lies."""
    at = 0
    while len(head) >= at + 8:
        size, kind = int.from_bytes(head[at : at + 4]), head[at + 4 : at + 8]
        if kind not in _LEADING_BOXES or size < 8:
            return kind == b"mdat"
        at += size
    return False


class PipeSource:
    """Frames and packets of what comes through a pipe. A context manager; iterate `items` once.

    Args:
        file: where the bytes come from. What can be sought in is a file and not a pipe.
        name: of it, for messages.
        limits: what it may ask of this machine.
        deinterlace: as `settle_deinterlace` takes it; the first frame's mark counts.
        has_alpha: False: transparency is left out.

    Raises:
        SourceError: it is no media, or a pipe of what cannot be read from the front; it asks for more than `limits`, or
            has no video that can be decoded.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        *,
        limits: Limits | None = None,
        deinterlace: str = "auto",
        has_alpha: bool = True,
    ) -> None:
        self.name = name
        self.notes: list[str] = []
        self.losses: list[str] = []
        """What did not come through, once all items have been taken: one line each, also in `notes`."""
        self._limits = limits or Limits()
        self._asked = deinterlace, has_alpha
        self._reformatter = VideoReformatter()
        self._held: deque[VideoFrame | Packet[Stream]] = deque()
        self._last: int | None = None
        self._counted = self._moved = self._bad = self._corrupt = self._woven = self._frames = 0
        self._transparent = 0
        self._first: int | None = None
        # The first and the last second of sound and text.
        self._others: tuple[Fraction, Fraction] | None = None
        self._error: str | None = None
        where = "" if _is_seekable(file) else " that can be read from a pipe"
        try:
            reader: _Reader | _FileReader = _Reader(file) if where else _FileReader(file)
            if isinstance(reader, _Reader) and _is_index_last(reader.head):
                raise SourceError(
                    f"{name}: its index (moov) lies at the end, and nobody can seek in a pipe; give the file itself, or"
                    " one with the index in front (ffmpeg -movflags +faststart) or in fragments"
                )
            self.container: InputContainer = av.open(reader, "r", options=safe_options())
        except SourceError:
            raise
        except (FFmpegError, OSError, ValueError) as error:
            what = getattr(error, "strerror", None) or error
            raise SourceError(f"{name}: not a media stream{where} ({what})") from None
        try:
            self._start()
        except BaseException:
            self.container.close()
            raise

    @property
    def counts(self) -> dict[str, int]:
        """in, lost and corrupt frames, once all items have been taken.

        A packet that cannot be decoded is a frame lost; what lay behind an early end is not known.
        """
        return {"in": self._frames, "lost": self._bad, "corrupt": self._corrupt}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.container.close()

    def _start(self) -> None:
        """Reads on to the first picture: only it says all that an encoder has to know."""
        if not self.container.streams.video:
            raise SourceError(f"{self.name}: no video stream in it")
        self.stream: VideoStream = self.container.streams.video[0]
        self._limits.check(Path(self.name), self.container)
        self._context = decoder_of(self.stream)
        self._context.thread_type, self._context.thread_count = "AUTO", _THREADS
        time_base = to_fraction(self.stream.time_base)
        if time_base is None:
            raise SourceError(f"{self.name}: its video stream has no time base")
        rate = to_fraction(self.stream.average_rate) or to_fraction(self.stream.guessed_rate)
        self._step = max(1, round(1 / (rate * time_base))) if rate else 1
        self._raw = self._read()
        first: VideoFrame | None = None
        self.extradata: dict[int, bytes] = {}
        """What AAC of a transport stream says in its packets, and other containers must know beforehand."""
        nameless = {
            stream.index: stream.codec_context
            for stream in self.container.streams.audio
            if stream.codec_context.name == "aac" and not stream.codec_context.extradata
        }
        for item in self._raw:
            self._held.append(item)
            if not isinstance(item, Packet):
                first = first or item
            elif item.stream.index in nameless.keys() - self.extradata.keys() and item.size > _ADTS_BYTES:
                sound = nameless[item.stream.index]
                self.extradata[item.stream.index] = header_for(bytes(item), sound.sample_rate, sound.layout.nb_channels)
            if (first is not None and nameless.keys() <= self.extradata.keys()) or len(self._held) > _MOST_HELD:
                break
        if first is None:
            codec = self.stream.codec_context.name
            raise SourceError(f"{self.name}: not one frame of its {codec} video can be decoded")
        is_transparent = not has_idle_alpha(first, self.stream) or is_see_through(first, self._reformatter)
        info, notes = describe(first, self.stream, time_base, rate, is_transparent=is_transparent)
        self._limits.check_size(Path(self.name), info.width, info.height)
        self.notes += notes
        asked, has_alpha = self._asked
        self._mode = settle_deinterlace(asked, info)
        self._drops_alpha = not has_alpha
        if not has_alpha:
            info = replace(info, pixel_format=info.pixel_format.opaque)
        if self._mode != "off":
            info = replace(info, is_interlaced=False)
            self.notes.append(f"deinterlaced by bwdif ({self._mode})")
        if self._mode.startswith("field"):
            info = replace(info, time_base=info.time_base / 2, rate=info.rate and 2 * info.rate)
        self.info: VideoInfo = info

    def _read(self) -> Iterator[VideoFrame | Packet[Stream]]:
        packets = demux(self.container)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError as error:
                self._error = error.strerror
                packet = None
            if packet is not None and packet.stream.index != self.stream.index:
                self._note_time(packet)
                yield packet
                continue
            if packet is not None and not packet.size and (packet.pts is not None or packet.dts is not None):
                continue  # Theora says so that the picture stays; to a decoder it would be the end
            is_end = packet is None or not packet.size
            try:
                frames = self._context.decode(None if is_end else packet)
            except FFmpegError:
                self._bad += 1
                frames = []
            yield from frames
            if is_end:
                return

    def _note_time(self, packet: Packet[Stream]) -> None:
        base = to_fraction(packet.time_base)
        if packet.pts is not None and base is not None:
            begin, end = packet.pts * base, (packet.pts + (packet.duration or 0)) * base
            first, last = self._others or (begin, end)
            self._others = min(first, begin), max(last, end)

    def items(self) -> Iterator[FrameBatch | Packet[Stream]]:
        """Each frame as a batch of one, and the packets of the other streams, as they come.

        Raises:
            SourceError: the picture's size or format changes, or more frames come than are allowed.
        """
        passing: deque[Packet[Stream]] = deque()

        def frames() -> Iterator[tuple[int, VideoFrame]]:
            for item in chain(self._first_items(), self._raw):
                if isinstance(item, Packet):
                    passing.append(item)
                else:
                    yield self._timed(item)

        def ticks_of(pts: int) -> tuple[int, ...]:
            # The second field is shown in the middle; of a stream that is the one the rate tells.
            return (2 * pts, 2 * pts + self._step) if self._mode.startswith("field") else (pts,)

        shown = frames() if self._mode == "off" else deinterlaced(frames(), self._mode, ticks_of)
        last: int | None = None
        for tick, frame in shown:
            while passing:
                yield passing.popleft()
            # Two fields of a variable rate may come out in each other's way.
            last = tick if last is None else max(tick, last + 1)
            yield FrameBatch(tuple(plane[None] for plane in planes_of(frame, self.info.pixel_format)), (last,))
        yield from passing
        self._sum_up()

    def _first_items(self) -> Iterator[VideoFrame | Packet[Stream]]:
        while self._held:
            yield self._held.popleft()

    def _sum_up(self) -> None:
        base = to_fraction(self.stream.time_base) or Fraction(0)
        ends = [(self._first or 0) * base, ((self._last or 0) + self._step) * base, *(self._others or ())]
        # Sound may go on where the pictures have ended; the promise is the whole stream's.
        seen = max(ends) - min(ends)
        promised = Fraction(self.container.duration or 0, 1_000_000)
        for count, what, is_loss in (
            (self._counted, "frames have no timestamp and are counted", False),
            (self._moved, "frames repeat a timestamp or go back: each moved to the next free tick", False),
            (self._bad, "packets cannot be decoded", True),
            (self._corrupt, "frames are damaged in the source", True),
            (self._woven, "frames are interlaced, and were upscaled as they are (--deinterlace frame)", False),
            (self._transparent, "frames are transparent, and were made opaque: the first one is not", True),
        ):
            if count:
                (self.losses if is_loss else self.notes).append(f"{count} {what}")
        if self._error is not None:
            self.losses.append(f"the stream ends early: {self._error}")
        elif seen + _SLACK < promised:
            self.losses.append(f"truncated: {float(seen):.3f} s came of the {float(promised):.3f} s that were promised")
        self.notes += self.losses

    def _timed(self, frame: VideoFrame) -> tuple[int, VideoFrame]:
        """A frame in the planar format, with a time that is later than the one before it."""
        info, tick = self.info, frame.pts
        self._frames += 1
        if self._frames > self._limits.frames:
            raise SourceError(f"{self.name}: has more than {self._limits.frames} frames; raise --max-frames")
        if tick is None:
            tick = 0 if self._last is None else self._last + self._step
            self._counted += 1
        if self._last is not None and tick <= self._last:
            tick = self._last + 1
            self._moved += 1
        self._last = tick
        self._first = tick if self._first is None else self._first
        self._corrupt += bool(frame.is_corrupt)
        self._woven += bool(frame.interlaced_frame) and self._mode == "off"
        nearest = nearest_planar(frame.format.name)
        size = (frame.width, frame.height)
        if size != (info.width, info.height) or nearest.opaque != info.pixel_format.opaque:
            raise SourceError(
                f"{self.name}: the picture changes from {info.width}x{info.height} {info.pixel_format.name} to"
                f" {frame.width}x{frame.height} {frame.format.name} at pts {tick}; send the parts one by one"
            )
        if nearest.has_alpha and not info.pixel_format.has_alpha and not self._drops_alpha:
            self._transparent += is_see_through(frame, self._reformatter)
        if frame.format.name != nearest.name:
            frame = self._reformatter.reformat(frame, format=nearest.name, threads=1)
        return tick, frame
