"""Pipes: a source that can be read once and from the front, and an output that can only be written to.

There is no index of a pipe, so nothing can be planned, resumed or proven beforehand; frames and packets go through in
the order in which they come, each with its own time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Protocol, Self, cast

import av
import torch
from av.audio.stream import AudioStream
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.subtitles.stream import SubtitleStream
from av.video.reformatter import VideoReformatter

from hat_video.errors import OptionError, OutputError, SourceError
from hat_video.frames import FrameBatch, PixelFormat, VideoInfo
from hat_video.media.carry import Carrier, ConvertAudio, ConvertText, Copy, add_audio, add_copy, clean_metadata
from hat_video.media.describe import describe, nearest_planar, planes_of, to_fraction
from hat_video.media.encoder import EncoderSpec, add_video, video_frame
from hat_video.media.opening import safe_options
from hat_video.media.passthrough import StreamPlan, plan_open_streams

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["PIPE_FORMATS", "PipeSource", "Sink", "Y4MWriter", "open_sink"]

PIPE_FORMATS = {"mkv": "matroska", "nut": "nut", "y4m": "y4m"}
"""What may be written to a pipe, by the name that `--format` has for it."""

_THREADS = 2
# Packets and frames that may come before the first picture and the first sound of every stream.
_MOST_HELD = 400
_ADTS_BYTES = 7


def _audio_specific_config(header: bytes) -> bytes:
    """What an ADTS header says, as MP4 and Matroska want it.

    Source: ISO/IEC 14496-3, 1.6.2.1 (AudioSpecificConfig) and 1.A.2.2.1 (adts_fixed_header).
    """
    profile, rate, channels = header[2] >> 6, header[2] >> 2 & 15, (header[2] & 1) << 2 | header[3] >> 6
    return ((profile + 1) << 11 | rate << 7 | channels << 3).to_bytes(2, "big")


class _Reader:
    """The reading half of a file, and nothing that could seek."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


class _Writer:
    """The writing half of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """All of it, or an error."""
        self._file.write(data)
        return len(data)


class PipeSource:
    """Frames and packets of what comes through a pipe. A context manager; iterate `items` once.

    Args:
        file: where the bytes come from.
        name: of it, for messages.

    Raises:
        SourceError: it is no media that can be read from the front, or has no video that can be decoded.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self.notes: list[str] = []
        self._reformatter = VideoReformatter()
        self._held: deque[VideoFrame | Packet[Stream]] = deque()
        self._last: int | None = None
        self._counted = self._moved = self._bad = 0
        try:
            self.container: InputContainer = av.open(_Reader(file), "r", options=safe_options())
        except (FFmpegError, OSError, ValueError) as error:
            what = getattr(error, "strerror", None) or error
            raise SourceError(f"{name}: not a media stream that can be read from a pipe ({what})") from None
        try:
            self._start()
        except BaseException:
            self.container.close()
            raise

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
        self.stream.codec_context.thread_type, self.stream.codec_context.thread_count = "AUTO", _THREADS
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
            stream.index
            for stream in self.container.streams.audio
            if stream.codec_context.name == "aac" and not stream.codec_context.extradata
        }
        for item in self._raw:
            self._held.append(item)
            if not isinstance(item, Packet):
                first = first or item
            elif item.stream.index in nameless - self.extradata.keys() and item.size > _ADTS_BYTES:
                self.extradata[item.stream.index] = _audio_specific_config(bytes(item)[:_ADTS_BYTES])
            if (first is not None and nameless <= self.extradata.keys()) or len(self._held) > _MOST_HELD:
                break
        if first is None:
            codec = self.stream.codec_context.name
            raise SourceError(f"{self.name}: not one frame of its {codec} video can be decoded")
        self.info, notes = describe(first, self.stream, time_base, rate)
        self.notes += notes

    def _read(self) -> Iterator[VideoFrame | Packet[Stream]]:
        packets = self.container.demux()
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError as error:
                self.notes.append(f"the stream ends early: {error.strerror}")
                packet = None
            if packet is not None and packet.stream.index != self.stream.index:
                yield packet
                continue
            is_end = packet is None or not packet.size
            try:
                frames = self.stream.codec_context.decode(None if is_end else packet)
            except FFmpegError:
                self._bad += 1
                frames = []
            yield from frames
            if packet is None:
                return

    def items(self) -> Iterator[FrameBatch | Packet[Stream]]:
        """Each frame as a batch of one, and the packets of the other streams, as they come.

        Raises:
            SourceError: the picture's size or format changes.
        """
        while self._held:
            yield self._item(self._held.popleft())
        for item in self._raw:
            yield self._item(item)
        for count, what in (
            (self._counted, "frames have no timestamp and are counted"),
            (self._moved, "frames repeat a timestamp or go back: each moved to the next free tick"),
            (self._bad, "packets cannot be decoded"),
        ):
            if count:
                self.notes.append(f"{count} {what}")

    def _item(self, item: VideoFrame | Packet[Stream]) -> FrameBatch | Packet[Stream]:
        if isinstance(item, Packet):
            return item
        info, tick = self.info, item.pts
        if tick is None:
            tick = 0 if self._last is None else self._last + self._step
            self._counted += 1
        if self._last is not None and tick <= self._last:
            tick = self._last + 1
            self._moved += 1
        self._last = tick
        nearest = nearest_planar(item.format.name)
        size = (item.width, item.height)
        if size != (info.width, info.height) or nearest.opaque != info.pixel_format.opaque:
            raise SourceError(
                f"{self.name}: the picture changes from {info.width}x{info.height} {info.pixel_format.name} to"
                f" {item.width}x{item.height} {item.format.name} at pts {tick}; send the parts one by one"
            )
        if item.format.name != nearest.name:
            item = self._reformatter.reformat(item, format=nearest.name)
        return FrameBatch(tuple(plane[None] for plane in planes_of(item, info.pixel_format)), (tick,))


class Sink(Protocol):
    """What takes frames and packets, in the order of time."""

    def write(self, item: FrameBatch | Packet[Stream]) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


class _MuxedSink:
    """Matroska or NUT, written as it comes. A context manager; leave it without an error to finish the stream."""

    def __init__(
        self, file: BinaryIO, container: str, source: PipeSource, plans: tuple[StreamPlan, ...], spec: EncoderSpec,
        info: VideoInfo,
    ) -> None:  # fmt: skip
        self._info = info
        self._out: OutputContainer = av.open(_Writer(file), "w", format=container, options={"flush_packets": "1"})
        self._video = add_video(self._out, spec, info)
        self._carriers: dict[int, Carrier] = {}
        for plan in plans:
            stream = source.container.streams[plan.index]
            if plan.action == "copy":
                out = add_copy(self._out, stream)
                if plan.index in source.extradata:
                    out.codec_context.extradata = source.extradata[plan.index]
                self._carriers[plan.index] = Copy(stream, out)
            elif plan.action == "convert" and plan.kind == "audio":
                sound = add_audio(self._out, cast(AudioStream, stream), plan.target or "aac")
                self._carriers[plan.index], out = ConvertAudio(cast(AudioStream, stream), sound), sound
            elif plan.action == "convert":
                text = cast(SubtitleStream, self._out.add_stream(plan.target or "ass"))
                self._carriers[plan.index], out = ConvertText(cast(SubtitleStream, stream), text), text
            else:
                continue
            out.metadata.update(clean_metadata(stream.metadata))
            out.disposition = stream.disposition
        self._video.metadata.update(clean_metadata(source.stream.metadata))
        self._out.metadata.update(clean_metadata(source.container.metadata))

    def write(self, item: FrameBatch | Packet[Stream]) -> None:
        """A frame to be encoded, or a packet to be carried."""
        if isinstance(item, Packet):
            carrier = self._carriers.get(item.stream.index)
            for packet in carrier.feed(item) if carrier is not None else ():
                self._out.mux(packet)
            return
        frame = video_frame([plane[0] for plane in item.planes], self._info)
        frame.pts, frame.time_base, frame.pict_type = item.pts[0], self._info.time_base, 0
        self._out.mux(self._video.encode(frame))

    def finish(self) -> None:
        """Flushes everything."""
        self._out.mux(self._video.encode(None))
        for carrier in self._carriers.values():
            for packet in carrier.flush():
                self._out.mux(packet)
        self._out.close()

    def abandon(self) -> None:
        """Lets go after an error."""
        try:
            self._out.close()
        except (FFmpegError, OSError, ValueError):
            return


class Y4MWriter:
    """YUV4MPEG2: uncompressed frames for VapourSynth, mpv and ffmpeg. It has pictures and one frame rate, nothing else.

    Args:
        file: where it goes.
        info: the facts of the stream; YUV or gray of 8 to 16 bits.

    Raises:
        OptionError: the pixel format is one that Y4M does not have.

    Source: https://wiki.multimedia.cx/index.php/YUV4MPEG2, and FFmpeg's yuv4mpegenc.c for the depths above 8 bits.
    """

    def __init__(self, file: BinaryIO, info: VideoInfo) -> None:
        self._file = file
        rate, aspect = info.rate or Fraction(25), info.sample_aspect_ratio
        head = f"YUV4MPEG2 W{info.width} H{info.height} F{rate.numerator}:{rate.denominator} Ip"
        head += f" A{aspect.numerator}:{aspect.denominator} C{_y4m_colour(info.pixel_format, info)}"
        head += f" XCOLORRANGE={'FULL' if info.color.is_full_range else 'LIMITED'}\n"
        file.write(head.encode("ascii"))

    def write(self, item: FrameBatch | Packet[Stream]) -> None:
        """A frame; packets of other streams have no place here."""
        if isinstance(item, Packet):
            return
        self._file.write(b"FRAME\n")
        for plane in item.planes:
            samples = plane[0].contiguous()
            data = samples if samples.dtype == torch.uint8 else samples.view(torch.uint8)
            self._file.write(data.numpy().tobytes())

    def finish(self) -> None:
        """Hands the last bytes on."""
        self._file.flush()

    def abandon(self) -> None:
        """Nothing to let go of."""


def _y4m_colour(pixel_format: PixelFormat, info: VideoInfo) -> str:
    depth = pixel_format.bit_depth
    if pixel_format.kind == "gray":
        return "mono" if depth == 8 else f"mono{depth}"
    chroma = {(1, 1): "420", (1, 0): "422", (0, 0): "444", (2, 0): "411"}.get(
        (pixel_format.log2_chroma_w, pixel_format.log2_chroma_h)
    )
    if pixel_format.kind != "yuv" or chroma is None or pixel_format.has_alpha:
        raise OptionError(f"--format y4m: cannot hold {pixel_format.name}; use --format mkv or nut")
    if depth > 8:
        return f"{chroma}p{depth}"
    siting = {"left": "mpeg2", "center": "jpeg", "topleft": "paldv"}[info.color.siting]
    return f"{chroma}{siting}" if chroma == "420" else chroma


def open_sink(
    file: BinaryIO, form: str, source: PipeSource, spec: EncoderSpec, info: VideoInfo
) -> tuple[Sink, tuple[StreamPlan, ...]]:
    """What takes the frames and packets, and what becomes of each stream of the source.

    Raises:
        OptionError: the format cannot hold the pictures.
        OutputError: nobody reads the pipe.
    """
    try:
        if form == "y4m":
            return Y4MWriter(file, info), ()
        container = PIPE_FORMATS[form]
        plans = plan_open_streams(source.container, container, video_index=source.stream.index)
        return _MuxedSink(file, container, source, plans, spec, info), plans
    except BrokenPipeError:
        raise OutputError("the output pipe was closed by its reader") from None
