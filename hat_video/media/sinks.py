"""What takes frames and packets in the order in which they come: Matroska and NUT on a pipe, and raw pictures."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

import av
import torch
from av.audio.stream import AudioStream
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.subtitles.stream import SubtitleStream

from hat_video.errors import OptionError, OutputError
from hat_video.frames import FrameBatch, PixelFormat, VideoInfo
from hat_video.media.carry import Carrier, ConvertAudio, ConvertText, Copy, add_audio, add_copy, clean_metadata
from hat_video.media.encoder import EncoderSpec, add_video
from hat_video.media.encoder_frames import EncoderFrames
from hat_video.media.passthrough import StreamPlan, plan_open_streams
from hat_video.media.pipe import PipeSource

if TYPE_CHECKING:
    from av.container import OutputContainer

__all__ = ["PIPE_FORMATS", "Sink", "Y4MWriter", "open_sink", "sink_losses"]

PIPE_FORMATS = {"mkv": "matroska", "nut": "nut", "y4m": "y4m"}
"""What may be written to a pipe, by the name that `--format` has for it."""

# Frames of a constant rate stand within so much of a frame from their place.
_MOST_UNEVEN = Fraction(3, 4)


class _Writer:
    """The writing half of a file, and nothing that could seek."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """All of it, or an error."""
        self._file.write(data)
        return len(data)


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
        self._frames = EncoderFrames(spec.pixel_format, info)
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
        tags = clean_metadata(source.stream.metadata)
        # `add_video` says whether alpha comes beside the packets; of the source it may be no longer true.
        self._video.metadata.update({key: value for key, value in tags.items() if key.lower() != "alpha_mode"})
        if info.stereo is not None and container == "matroska":
            self._video.metadata["stereo_mode"] = info.stereo
        if info.display_matrix is not None and container == "matroska":
            self._video.set_display_matrix(info.display_matrix)
        self._out.metadata.update(clean_metadata(source.container.metadata))

    def write(self, item: FrameBatch | Packet[Stream]) -> None:
        """A frame to be encoded, or a packet to be carried."""
        if isinstance(item, Packet):
            carrier = self._carriers.get(item.stream.index)
            for packet in carrier.feed(item) if carrier is not None else ():
                self._out.mux(packet)
            return
        frame = self._frames.frame([plane[0] for plane in item.planes], item.pts[0])
        for packet in self._video.encode(frame):
            self._frames.release(packet.pts)
            self._out.mux(packet)

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
        self._file, self._info = file, info
        self._first: int | None = None
        self._count = 0
        self.uneven = 0
        """Frames that the constant rate shows at another time than they had."""
        rate, aspect = info.rate or Fraction(25), info.sample_aspect_ratio
        head = f"YUV4MPEG2 W{info.width} H{info.height} F{rate.numerator}:{rate.denominator} Ip"
        head += f" A{aspect.numerator}:{aspect.denominator} C{_y4m_colour(info.pixel_format, info)}"
        head += f" XCOLORRANGE={'FULL' if info.color.is_full_range else 'LIMITED'}\n"
        file.write(head.encode("ascii"))

    def write(self, item: FrameBatch | Packet[Stream]) -> None:
        """A frame; packets of other streams have no place here."""
        if isinstance(item, Packet):
            return
        tick = item.pts[0]
        self._first = tick if self._first is None else self._first
        if self._info.rate is not None:
            due = self._count / self._info.rate
            self.uneven += abs((tick - self._first) * self._info.time_base - due) > _MOST_UNEVEN / self._info.rate
        self._count += 1
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
            return Y4MWriter(file, info), tuple(
                plan if plan.action == "video" else replace(plan, action="drop", reason="y4m has pictures only")
                for plan in plan_open_streams(source.container, "matroska", video_index=source.stream.index)
            )
        container = PIPE_FORMATS[form]
        plans = plan_open_streams(source.container, container, video_index=source.stream.index)
        return _MuxedSink(file, container, source, plans, spec, info), plans
    except BrokenPipeError:
        raise OutputError("the output pipe was closed by its reader") from None


def sink_losses(form: str, info: VideoInfo) -> list[str]:
    """What a format cannot say of the pictures, one line each."""
    losses = []
    if info.display_matrix is not None and form != "mkv":
        losses.append(f"that the picture is turned is dropped: {form} cannot say it; --format mkv can")
    if form == "y4m" and (info.hdr is not None or info.color.transfer in (16, 18)):
        losses.append("that the pictures are HDR is dropped: y4m cannot say it; --format mkv can")
    return losses
