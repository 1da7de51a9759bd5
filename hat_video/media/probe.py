"""What is in a file: one pass over its packets gives every timestamp and the source's identity; one frame the rest.

Time comes from the container and from nowhere else: the index built here is what the work is planned by, what decoded
frames are paired with, and what the finished file is compared to.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from av.error import FFmpegError
from av.stream import Disposition

from hat_video.errors import SourceError
from hat_video.frames import VideoInfo
from hat_video.media.describe import describe, look, nearest_planar, to_fraction
from hat_video.media.opening import Limits, demux, open_file
from hat_video.paths import JsonPath

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["FrameIndex", "Probe", "StreamInfo", "describe", "nearest_planar", "open_container", "probe", "to_fraction"]

# A container's promise is rounded, and its sound may be longer than its pictures; less than this is no truncation.
_SLACK = Fraction(1, 2)
# So many frames show whether the timestamps are those of decoding: B-frames are never further apart.
_FRAMES_TO_ORDER = 32
# Decode times that fall back by less, in seconds and in frames, are the disorder of one recording, and no second one.
_DISORDER = Fraction(1, 4)
_FRAMES_OF_DISORDER = 8
# FFmpeg's name of mp4 and mov, whose index says where in the file each packet lies.
_ISO = "mov,mp4,m4a,3gp,3g2,mj2"


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """One stream of a container."""

    index: int
    kind: str
    """video, audio, subtitle, attachment, data or cover."""
    codec: str
    language: str | None
    title: str | None


@dataclass(frozen=True, slots=True)
class FrameIndex:
    """Every frame's time, in ticks of the stream's time base."""

    pts: tuple[int, ...]
    """Presentation order, strictly rising. Frames outside the edit list are left out."""
    key_pts: tuple[int, ...]
    """Those of the key frames."""
    last_duration: int
    """Ticks that the last frame is shown."""
    is_counted: bool = False
    """True where the file's own timestamps are missing or repeat: frames are then paired with `pts` by their order."""

    def duration_of(self, i: int) -> int:
        """Ticks that frame `i` is shown: until the next one. Packets' durations are decode-time deltas, not this."""
        return self.pts[i + 1] - self.pts[i] if i + 1 < len(self.pts) else self.last_duration


@dataclass(frozen=True, slots=True)
class Probe:
    """All that is known of a source before the first frame is computed."""

    path: JsonPath
    format_name: str
    stream_index: int
    """Of the video stream that is upscaled."""
    codec: str
    video: VideoInfo
    index: FrameIndex
    streams: tuple[StreamInfo, ...]
    digest: str
    """blake2b over every packet of every stream, and over what the file says of them, in hex: the source's identity."""
    promised_seconds: Fraction | None
    """How long the container says that it is."""
    notes: tuple[str, ...] = ()
    """Anything odd, one line each."""
    frame_bytes: tuple[int, ...] = ()
    """Size of the packet of each frame of `index`, in its order."""
    other_bytes: int = 0
    """Size of the packets of all other streams together."""
    is_truncated: bool = False
    """True where the packets end before what the container promised."""
    deinterlace: str = "off"
    """What sources that are opened by this probe do about interlaced frames; `video` and `index` are of the result."""

    @property
    def start_seconds(self) -> Fraction:
        """When the first frame is shown."""
        return self.index.pts[0] * self.video.time_base

    @property
    def duration_seconds(self) -> Fraction:
        """From the first frame's start to the last one's end."""
        return (self.index.pts[-1] + self.index.last_duration - self.index.pts[0]) * self.video.time_base


def open_container(path: Path) -> InputContainer:
    """Opens a file for reading.

    Raises:
        SourceError: missing, a directory, empty, or no media file that FFmpeg knows.
    """
    # FFmpeg's log stays off, which is PyAV's default: with any level set, a decoder thread that has something to say
    # waits for the GIL, and a seek that waits for that thread holds it. Neither ever goes on.
    try:
        return open_file(path)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except FFmpegError as error:
        raise SourceError(f"{path}: {_why_not_media(path, error)}") from None
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None


def _why_not_media(path: Path, error: FFmpegError) -> str:
    with path.open("rb") as file:
        head = file.read(12)
    # A text that is called .mp4 has no moov either; what an MP4 begins with tells the two apart.
    if head[4:8] in (b"ftyp", b"mdat", b"free", b"skip", b"wide"):
        return (
            "has no moov (index): the recording was cut off before it was written; repair it with its recorder's tool"
        )
    return f"not a media file that can be read ({error.strerror})"


def probe(path: str | os.PathLike[str], limits: Limits | None = None) -> Probe:
    """Reads every packet of a file once, decodes a few frames, and says what there is.

    Args:
        path: the file.
        limits: what it may ask of this machine; the defaults if None.

    Raises:
        SourceError: the file cannot be read, asks for more than `limits`, or has no video, or its time jumps back, or
            not one frame of it can be decoded.
    """
    source, limits = Path(path), limits or Limits()
    with open_container(source) as container:
        limits.check(source, container)
        streams = tuple(_stream_info(stream) for stream in container.streams)
        main = _main_video(container, source, streams)
        tally = _Tally(main.index, limits.frames, indexed=len(main.index_entries))
        tally.read(container)
        facts = _container_facts(container)
        # A transport stream shows its streams as it goes.
        limits.check(source, container)
        if len(tally.times) > limits.frames:
            raise SourceError(
                f"{source}: has more than {limits.frames} frames; raise --max-frames if the file is to be trusted"
            )
        # AVI, and Matroska made from it, know decode times only. Sorted they are the presentation times, but each
        # belongs to another packet.
        tally.is_decode_time = bool(main.codec_context.has_b_frames) and (
            container.format.name == "avi" or (tally.is_rising() and _is_reordered(source, main.index))
        )
        time_base = to_fraction(main.time_base)
        if time_base is None:
            raise SourceError(f"{source}: its video stream has no time base")
        tally.refuse_jumps(time_base, source)
        rate = to_fraction(main.average_rate) or to_fraction(main.guessed_rate)
        index, notes = tally.index(time_base, rate, source)
        promised = _promised(container, main, time_base)
        cut = _cut_off(tally, container, main, index, promised, source)
        format_name, codec, number = container.format.name, main.codec_context.name, main.index
    video, more = _look_at(source, number, time_base, rate, index)
    limits.check_size(source, video.width, video.height)
    tally.digest.update(repr((facts, video)).encode("utf-8", "replace"))
    notes += more
    if cut is not None:
        notes.append(cut)
    return Probe(
        path=source,
        format_name=format_name,
        stream_index=number,
        codec=codec,
        video=video,
        index=index,
        streams=streams,
        digest=tally.digest.hexdigest(),
        promised_seconds=promised,
        notes=tuple(notes),
        frame_bytes=tally.frame_bytes(),
        other_bytes=tally.others,
        is_truncated=cut is not None,
    )


def _container_facts(container: InputContainer) -> tuple[object, ...]:
    """What a file says beside its packets, as far as it may become a part of the output."""
    streams = [
        (s.index, s.type, s.time_base, int(s.disposition), sorted(s.metadata.items()), _extradata(s))
        for s in container.streams
    ]
    chapters = [(c["start"], c["end"], c["time_base"], sorted(c["metadata"].items())) for c in container.chapters()]
    return sorted(container.metadata.items()), streams, chapters


def _extradata(stream: Any) -> bytes:
    context = stream.codec_context
    return b"" if context is None else bytes(context.extradata or b"")


def _stream_info(stream: Any) -> StreamInfo:
    kind = stream.type
    if kind == "video" and stream.disposition & Disposition.attached_pic:
        kind = "cover"
    context = stream.codec_context
    name = context.name if context is not None else getattr(stream, "name", None) or "unknown"
    return StreamInfo(stream.index, kind, name, stream.metadata.get("language"), stream.metadata.get("title"))


def _main_video(container: InputContainer, source: Path, streams: tuple[StreamInfo, ...]) -> VideoStream:
    for info in streams:
        if info.kind == "video":
            stream: VideoStream = container.streams[info.index]  # type: ignore[assignment]
            if stream.codec_context is None:
                raise SourceError(f"{source}: no decoder for its video stream ({info.codec})")
            return stream
    has = ", ".join(f"{info.kind}/{info.codec}" for info in streams) or "no stream at all"
    raise SourceError(f"{source}: no video stream; it has {has}")


@dataclass(slots=True)
class _Tally:
    """What one pass over the packets counts."""

    stream_index: int
    most_frames: int
    """Reading stops where there are more."""
    indexed: int
    """Frames that the container's index lists before any is read. That of AVI is the last part of the file."""
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=20))
    times: list[int | None] = field(default_factory=list)
    decode_times: list[int | None] = field(default_factory=list)
    """One a frame, in the file's order; where the file has none, FFmpeg mostly works one out."""
    sizes: list[int] = field(default_factory=list)
    others: int = 0
    keys: list[int] = field(default_factory=list)
    durations: dict[int, int] = field(default_factory=dict)
    end: Fraction = Fraction(0)
    error: str | None = None
    seen: set[int] = field(default_factory=set)
    """Streams that have a packet."""
    is_corrupt: bool = False
    """Whether any packet came shorter than the file says that it is, or damaged."""
    is_decode_time: bool = False

    def read(self, container: InputContainer) -> None:
        for packet in self._packets(container):
            stream, pts, dts = packet.stream, packet.pts, packet.dts
            self.digest.update(struct.pack("<iqqi", stream.index, pts or 0, dts or 0, packet.size))
            self.digest.update(packet)
            self.seen.add(stream.index)
            self.is_corrupt |= packet.is_corrupt
            base = to_fraction(packet.time_base)
            if pts is not None and base is not None:
                self.end = max(self.end, (pts + (packet.duration or 0)) * base)
            if stream.index != self.stream_index or packet.is_discard:
                self.others += packet.size if stream.index != self.stream_index else 0
                continue
            self.decode_times.append(dts)
            self.times.append(pts)
            if len(self.times) > self.most_frames:
                return
            self.sizes.append(packet.size)
            if pts is not None:
                self.durations[pts] = packet.duration or 0
                if packet.is_keyframe:
                    self.keys.append(pts)

    def _packets(self, container: InputContainer) -> Iterator[Any]:
        packets = demux(container)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except FFmpegError as error:
                self.error = error.strerror
                return
            if packet.size:
                yield packet

    def is_rising(self) -> bool:
        """Whether every packet of the video is later than the one before it, in decode order."""
        known = [time for time in self.times if time is not None]
        return len(known) == len(self.times) and all(a < b for a, b in pairwise(known))

    def refuse_jumps(self, time_base: Fraction, source: Path) -> None:
        """Raises `SourceError` where a second recording follows the first one, and its times start over."""
        times = [time for time in self.decode_times if time is not None]
        falls = [i for i, (a, b) in enumerate(pairwise(times), 1) if (a - b) * time_base > _DISORDER]
        if not falls:
            return
        step = median([b - a for a, b in pairwise(times) if b > a] or [0])
        # A lone time that its neighbours on both sides do not share is damage.
        jumps = [
            i
            for i in falls
            if times[i - 1] - times[i] > _FRAMES_OF_DISORDER * step
            and 1 < i < len(times) - 1
            and times[i - 2] > times[i + 1]
        ]
        if not jumps:
            return
        i = jumps[0]
        frames = [frame for frame, time in enumerate(self.decode_times) if time is not None]
        more = f" ({len(jumps)} such jumps in all)" if len(jumps) > 1 else ""
        raise SourceError(
            f"{source}: its time jumps back by {float((times[i - 1] - times[i]) * time_base):.3f} s at frame "
            f"{frames[i]}, {float((times[i - 1] + step - times[0]) * time_base):.3f} s after its "
            f"start{more}: recordings were joined end to end; upscale the parts, or remux them into one, e.g. with "
            "ffmpeg's concat demuxer"
        )

    def frame_bytes(self) -> tuple[int, ...]:
        """Sizes in presentation order, as far as there are times to order by."""
        order = sorted(range(len(self.sizes)), key=lambda i: self.times[i] or 0)
        return tuple(self.sizes[i] for i in order)

    def index(self, time_base: Fraction, rate: Fraction | None, source: Path) -> tuple[FrameIndex, list[str]]:
        known = sorted(time for time in self.times if time is not None)
        if not self.times:
            raise SourceError(f"{source}: its video stream has no frame")
        step = max(1, round(1 / (rate * time_base))) if rate else 1
        if len(known) < len(self.times):
            start = known[0] if known else 0
            pts = tuple(start + step * i for i in range(len(self.times)))
            missing = len(self.times) - len(known)
            note = f"{missing} of {len(self.times)} frames have no timestamp: all are counted, at {rate or 1} frames/s"
            return FrameIndex(pts, pts[:1], step, is_counted=True), [note]
        if len(set(known)) < len(known):
            moved, last = [], None
            for time in known:
                last = time if last is None else max(time, last + 1)
                moved.append(last)
            note = f"{len(known) - len(set(known))} frames repeat a timestamp: each moved to the next free tick"
            return FrameIndex(tuple(moved), tuple(moved[:1]), self.durations[known[-1]] or step, is_counted=True), [
                note
            ]
        last_duration = self.durations[known[-1]] or (known[-1] - known[-2] if len(known) > 1 else step)
        keys = known[:1] if self.is_decode_time else sorted(self.keys)
        return FrameIndex(tuple(known), tuple(keys), max(1, last_duration), is_counted=self.is_decode_time), []


def _promised(container: InputContainer, main: VideoStream, time_base: Fraction) -> Fraction | None:
    if main.duration:
        return main.duration * time_base
    return Fraction(container.duration, 1_000_000) if container.duration else None


def _cut_off(
    tally: _Tally,
    container: InputContainer,
    main: VideoStream,
    index: FrameIndex,
    promised: Fraction | None,
    source: Path,
) -> str | None:
    """The note that says so, where the packets end before the container's promise."""
    time_base = to_fraction(main.time_base) or Fraction(1)
    start = min(index.pts[0] * time_base, Fraction(0))
    # A stream's own duration is about that stream; the container's is about the longest.
    last = (index.pts[-1] + index.last_duration) * time_base if main.duration else tally.end
    there = last - (index.pts[0] * time_base if main.duration else start)
    ends_early = _ends_early(tally, container, source)
    if promised is not None and there + (0 if ends_early else _SLACK) < promised:
        return f"truncated: {float(there):.3f} s are there of the {float(promised):.3f} s that the container promised"
    if ends_early:
        return "truncated: the file ends before its last packet does"
    if tally.error is not None:
        return f"truncated: reading stopped after {float(there):.3f} s: {tally.error}"
    return None


def _ends_early(tally: _Tally, container: InputContainer, source: Path) -> bool:
    """Whether the file itself shows that its end is missing, however short that is.

    Numbers of frames in headers do not: AVI counts those that were never stored, and an edit list leaves some unread.
    """
    kind, size = container.format.name, container.size
    if kind not in ("avi", _ISO):
        return False
    # Elsewhere a packet may be called corrupt because others before it were lost.
    if tally.is_corrupt:
        return True
    if kind == "avi":
        # Sound that is parsed loses the mark above. Of a size that is wrong and an index that was never written, either
        # alone is how some recorders write.
        with source.open("rb") as file:
            head = file.read(8)
        said = int.from_bytes(head[4:], "little")
        return tally.indexed <= 1 < len(tally.times) and head[:4] == b"RIFF" and size < 8 + said < 1 << 31
    # A stream without a packet may lie in another file.
    return any(
        entry.pos + entry.size > size
        for stream in container.streams
        if stream.index in tally.seen
        for entry in stream.index_entries
    )


def _look_at(
    source: Path, stream_index: int, time_base: Fraction, rate: Fraction | None, index: FrameIndex
) -> tuple[VideoInfo, list[str]]:
    # A quarter, half and three quarters of the way, where one can go there.
    keys = () if index.is_counted else index.key_pts
    places = sorted({keys[len(keys) * part // 4] for part in (1, 2, 3)} - {index.pts[0]}) if keys else []
    with open_container(source) as container:
        stream: VideoStream = container.streams[stream_index]  # type: ignore[assignment]
        codec = stream.codec_context.name
        seen = look(container, stream, time_base, rate, places)
    if seen is None:
        raise SourceError(f"{source}: not one frame of its {codec} video can be decoded")
    return seen


def _is_reordered(source: Path, stream_index: int) -> bool:
    """Whether the first few frames come out of the decoder in another order than their timestamps say."""
    with open_container(source) as container:
        stream: VideoStream = container.streams[stream_index]  # type: ignore[assignment]
        stream.codec_context.thread_count = 1
        times: list[int] = []
        packets = demux(container, stream)
        while len(times) < _FRAMES_TO_ORDER:
            try:
                packet = next(packets)
            except (StopIteration, FFmpegError):
                break
            try:
                frames = stream.codec_context.decode(packet) if packet.size else []
            except FFmpegError:
                continue
            times += [frame.pts for frame in frames if frame.pts is not None]
    return any(a > b for a, b in pairwise(times))
