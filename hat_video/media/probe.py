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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.format import VideoFormat

from hat_video.errors import SourceError
from hat_video.frames import ColorInfo, PixelFormat, Siting, VideoInfo

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["FrameIndex", "Probe", "StreamInfo", "nearest_planar", "open_container", "probe", "to_fraction"]

# A container's promise is rounded, and its sound may be longer than its pictures; less than this is no truncation.
_SLACK = Fraction(1, 2)


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

    path: Path
    format_name: str
    stream_index: int
    """Of the video stream that is upscaled."""
    codec: str
    video: VideoInfo
    index: FrameIndex
    streams: tuple[StreamInfo, ...]
    digest: str
    """blake2b over every packet of every stream, in hex: the source's identity."""
    promised_seconds: Fraction | None
    """How long the container says that it is."""
    notes: tuple[str, ...] = ()
    """Anything odd, one line each."""
    is_truncated: bool = False
    """True where the packets end before what the container promised."""

    @property
    def start_seconds(self) -> Fraction:
        """When the first frame is shown."""
        return self.index.pts[0] * self.video.time_base

    @property
    def duration_seconds(self) -> Fraction:
        """From the first frame's start to the last one's end."""
        return (self.index.pts[-1] + self.index.last_duration - self.index.pts[0]) * self.video.time_base


def to_fraction(value: Any) -> Fraction | None:
    """A time base or rate of any PyAV version (Fraction, AVRational, None, 0/1) as a Fraction; None if unset."""
    if not value or not value.numerator:
        return None
    return Fraction(value.numerator, value.denominator)


def open_container(path: Path) -> InputContainer:
    """Opens a file for reading.

    Raises:
        SourceError: missing, a directory, empty, or no media file that FFmpeg knows.
    """
    # FFmpeg's log stays off, which is PyAV's default: with any level set, a decoder thread that has something to say
    # waits for the GIL, and a seek that waits for that thread holds it. Neither ever goes on.
    try:
        if path.is_dir():
            raise SourceError(f"{path}: is a directory")
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: is empty (0 bytes)")
        return av.open(str(path))
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


def probe(path: str | os.PathLike[str]) -> Probe:
    """Reads every packet of a file once, decodes one frame, and says what there is.

    Raises:
        SourceError: the file cannot be read, or has no video, or not one frame of it can be decoded.
    """
    source = Path(path)
    with open_container(source) as container:
        streams = tuple(_stream_info(stream) for stream in container.streams)
        main = _main_video(container, source, streams)
        tally = _Tally(main.index)
        tally.read(container)
        # AVI knows decode times only. Sorted they are the presentation times, but each belongs to another packet.
        tally.is_decode_time = container.format.name == "avi" and bool(main.codec_context.has_b_frames)
        time_base = to_fraction(main.time_base)
        if time_base is None:
            raise SourceError(f"{source}: its video stream has no time base")
        rate = to_fraction(main.average_rate) or to_fraction(main.guessed_rate)
        index, notes = tally.index(time_base, rate, source)
        promised = _promised(container, main, time_base)
        cut = _cut_off(tally, main, index, promised, time_base)
        format_name, codec, number = container.format.name, main.codec_context.name, main.index
    video, more = _first_frame(source, number, time_base, rate)
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
        is_truncated=cut is not None,
    )


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
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=20))
    times: list[int | None] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    durations: dict[int, int] = field(default_factory=dict)
    end: Fraction = Fraction(0)
    error: str | None = None
    is_decode_time: bool = False

    def read(self, container: InputContainer) -> None:
        for packet in self._packets(container):
            stream, pts, dts = packet.stream, packet.pts, packet.dts
            self.digest.update(struct.pack("<iqqi", stream.index, pts or 0, dts or 0, packet.size))
            self.digest.update(packet)
            base = to_fraction(packet.time_base)
            if pts is not None and base is not None:
                self.end = max(self.end, (pts + (packet.duration or 0)) * base)
            if stream.index != self.stream_index or packet.is_discard:
                continue
            self.times.append(pts)
            if pts is not None:
                self.durations[pts] = packet.duration or 0
                if packet.is_keyframe:
                    self.keys.append(pts)

    def _packets(self, container: InputContainer) -> Iterator[Any]:
        packets = container.demux()
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
    tally: _Tally, main: VideoStream, index: FrameIndex, promised: Fraction | None, time_base: Fraction
) -> str | None:
    """The note that says so, where the packets end before the container's promise."""
    start = min(index.pts[0] * time_base, Fraction(0))
    # A stream's own duration is about that stream; the container's is about the longest.
    last = (index.pts[-1] + index.last_duration) * time_base if main.duration else tally.end
    there = last - (index.pts[0] * time_base if main.duration else start)
    if promised is not None and there + _SLACK < promised:
        return f"truncated: {float(there):.3f} s are there of the {float(promised):.3f} s that the container promised"
    if tally.error is not None:
        return f"truncated: reading stopped after {float(there):.3f} s: {tally.error}"
    return None


def _first_frame(
    source: Path, stream_index: int, time_base: Fraction, rate: Fraction | None
) -> tuple[VideoInfo, list[str]]:
    with open_container(source) as container:
        stream: VideoStream = container.streams[stream_index]  # type: ignore[assignment]
        stream.codec_context.thread_count = 1
        frame = _decode_one(container, stream)
        if frame is None:
            raise SourceError(f"{source}: not one frame of its {stream.codec_context.name} video can be decoded")
        pixel_format = nearest_planar(frame.format.name)
        notes = []
        if frame.format.name != pixel_format.name and any(part.is_alpha for part in frame.format.components):
            notes.append(f"its transparency ({frame.format.name}) is not carried")
        if frame.interlaced_frame:
            notes.append("its frames are interlaced; they are upscaled as they are")
        video = VideoInfo(
            width=frame.width,
            height=frame.height,
            time_base=time_base,
            rate=rate,
            pixel_format=pixel_format,
            color=_color(frame, stream, pixel_format),
            sample_aspect_ratio=to_fraction(stream.sample_aspect_ratio) or Fraction(1),
            display_matrix=_display_matrix(frame),
            is_interlaced=bool(frame.interlaced_frame),
        )
    return video, notes


def _decode_one(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, FFmpegError):
            return None
        try:
            frames = stream.codec_context.decode(packet if packet.size else None)
        except FFmpegError:
            continue
        if frames:
            return frames[0]
        if not packet.size:
            return None


def _display_matrix(frame: VideoFrame) -> tuple[int, ...] | None:
    side_data: Any = frame.side_data  # iterable, whatever the stubs say
    for data in side_data:
        if data.type == SideDataType.DISPLAYMATRIX:
            matrix: tuple[int, ...] = struct.unpack("<9i", bytes(data)[:36])
            # The identity says nothing; leaving it out keeps files without rotation free of it.
            return None if matrix == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30) else matrix
    return None


def _color(frame: VideoFrame, stream: VideoStream, pixel_format: PixelFormat) -> ColorInfo:
    """What the code values mean; what the file leaves open is settled by the height, as players do."""
    context = stream.codec_context
    tagged = {
        name: int(getattr(frame, name)) if int(getattr(frame, name)) not in unset else int(getattr(context, name))
        for name, unset in (
            ("colorspace", (2, 3)),
            ("color_primaries", (0, 2)),
            ("color_trc", (0, 2)),
            ("color_range", (0,)),
        )
    }
    assumed: list[str] = []
    # BT.601 names its 525-line variant; players treat the two alike.
    by_height = 1 if frame.height >= 720 else 6

    def settle(field_name: str, value: int, unset: tuple[int, ...], rule: int) -> int:
        if value not in unset:
            return value
        assumed.append(field_name)
        return rule

    is_rgb = pixel_format.kind == "rgb"
    matrix = 0 if is_rgb else settle("matrix", tagged["colorspace"], (0, 2, 3), by_height)
    # A file that names its matrix only means the rest of that standard.
    standard = {1: 1, 5: 5, 6: 6, 7: 7, 9: 9}.get(matrix, 1 if is_rgb else by_height)
    primaries = settle("primaries", tagged["color_primaries"], (0, 2), standard)
    transfer = settle("transfer", tagged["color_trc"], (0, 2), {0: 13, 9: 14, 5: 6}.get(matrix, standard))
    if tagged["color_range"] not in (1, 2):
        assumed.append("range")
    is_full = tagged["color_range"] == 2 or (
        tagged["color_range"] != 1 and (frame.format.name.startswith("yuvj") or pixel_format.kind in ("rgb", "gray"))
    )
    return ColorInfo(matrix, primaries, transfer, is_full, _siting(frame, context.name), tuple(assumed))


def _siting(frame: VideoFrame, codec: str) -> Siting:
    # PyAV 18 cannot say where the chroma lies; then the codec's own rule holds.
    named: dict[int, Siting] = {1: "left", 2: "center", 3: "topleft"}
    location = named.get(int(getattr(frame, "chroma_location", 0) or 0))
    if location is not None:
        return location
    if codec in ("mjpeg", "mpeg1video", "h263", "flv", "flv1", "theora", "vp8", "gif", "png"):
        return "center"
    return "topleft" if codec == "dvvideo" else "left"


def nearest_planar(name: str) -> PixelFormat:
    """The planar format that holds what FFmpeg's format `name` holds, without its alpha.

    Raises:
        SourceError: it is no picture of samples (a hardware surface, Bayer, XYZ).
    """
    try:
        return PixelFormat.parse(name)
    except ValueError:
        pass
    layout = VideoFormat(name, 64, 64)
    parts = [part for part in layout.components if not part.is_alpha]
    if not parts or name.startswith(("xyz", "bayer")):
        raise SourceError(f"pixel format {name} cannot be converted without loss; decode it to yuv or rgb first")
    bits = max(8, *(part.bits for part in parts), 8)
    bits = next(depth for depth in (8, 9, 10, 12, 14, 16) if depth >= bits)
    suffix = "" if bits == 8 else f"{bits}le"
    if layout.is_rgb or layout.has_palette:
        return PixelFormat.parse(f"gbrp{suffix}")
    if len(parts) == 1:
        return PixelFormat.parse(f"gray{suffix}")
    ratio = {(64, 64): "444", (32, 64): "422", (32, 32): "420", (64, 32): "440", (16, 64): "411", (16, 16): "410"}
    return PixelFormat.parse(f"yuv{ratio[parts[1].width, parts[1].height]}p{suffix}")
