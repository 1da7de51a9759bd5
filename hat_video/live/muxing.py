"""One container being written: the encoder's streams, the packets' own time, and every byte on its way at once."""

from __future__ import annotations

import io
from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import av
from av.error import FFmpegError
from av.packet import Packet

from hat_video.errors import OutputError
from hat_video.frames import VideoInfo
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.packet import LivePacket

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.stream import Stream
    from av.video.stream import VideoStream

__all__ = ["Muxer", "Streams", "Writer", "check_container", "reason_of"]

# What was written before a kill must be whole: no more than a fragment is held back.
_OPTIONS = {
    "mp4": {"movflags": "hybrid_fragmented+delay_moov", "frag_duration": "500000"},
    "matroska": {"cluster_time_limit": "500"},
    "mpegts": {"mpegts_flags": "initial_discontinuity"},
}
_ALWAYS = {
    "flush_packets": "1",
    # Packets come in the order of time already; a stream that is silent must not hold the other back.
    "max_interleave_delta": "1",
}
# MPEG-TS takes everything as "private data", which nobody can play.
_TS_VIDEO = ("h264", "hevc", "mpeg2video")


class Streams(Protocol):
    """Whose streams are written: `LiveEncoder`, as far as outputs need it."""

    @property
    def video_template(self) -> VideoStream: ...
    @property
    def audio_template(self) -> AudioStream | None: ...
    @property
    def info(self) -> VideoInfo: ...


class Writer(Protocol):
    """Where the bytes go. With `seek` and `tell` it is a file, without a pipe."""

    closed: bool

    def write(self, data: bytes) -> int: ...


class Muxer:
    """Writes packets from the first key frame on.

    Args:
        writer: where the bytes go. What it raises comes out of `write` and `close`.
        container: FFmpeg's name of the muxer.
        streams: of the encoder.
        start: the time, in `LIVE_TIME_BASE`, that is the container's 0; the first key frame's if None.
        tags: of the container.

    Raises:
        OutputError: the container cannot hold the streams.
    """

    def __init__(
        self,
        writer: Writer,
        container: str,
        streams: Streams,
        *,
        start: int | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        self._writer, self._start = writer, start
        self._is_open = False
        # MP4 has durations for times: a picture's is known when the next one comes. Guessed at a fragment's end, it
        # would show the next picture at another time.
        self._holds_one = container == "mp4"
        self._held: Packet[Stream] | None = None
        self.frames = 0
        """Pictures written."""
        options = {**_ALWAYS, **_OPTIONS.get(container, {})}
        self._out = av.open(writer, "w", format=container, container_options=options)
        self._out.metadata.update(tags or {})
        try:
            self._video, self._audio = _added(self._out, container, streams)
        except (FFmpegError, ValueError) as error:
            raise OutputError(f"{container} cannot hold the stream: {reason_of(error)}") from None

    def head(self) -> None:
        """Writes what comes before the first packet."""
        self._out.start_encoding()

    def write(self, packet: LivePacket, *, shift: int = 0) -> bool:
        """Writes a packet; False if it was left out: before the first key frame, or sound from before it.

        Args:
            packet: in the order of `FanOut`.
            shift: ticks added to its time.
        """
        if not self._is_open:
            if packet.kind != "video" or not packet.is_key:
                return False
            self._is_open = True
            if self._start is None:
                self._start = packet.pts
        stream: Stream | None = self._video if packet.kind == "video" else self._audio
        start = self._start or 0
        if stream is None or packet.pts < start:
            return False
        made: Packet[Stream] = Packet(packet.data)
        made.stream, made.time_base, made.is_keyframe = stream, packet.time_base, packet.is_key
        made.pts, made.dts, made.duration = packet.pts - start + shift, packet.dts - start + shift, packet.duration
        if self._holds_one and packet.kind == "video":
            self._release(made.dts)
            self._held = made
        else:
            self._out.mux(made)
        self.frames += packet.kind == "video"
        return True

    def close(self) -> None:
        """Finishes the container."""
        self._release()
        self._out.close()

    def _release(self, next_dts: int | None = None) -> None:
        """Writes the picture that was held back until the next one's time was known."""
        held, self._held = self._held, None
        if held is not None:
            if next_dts is not None and held.dts is not None:
                held.duration = next_dts - held.dts
            self._out.mux(held)

    def abandon(self) -> None:
        """Lets go after an error: what is written stays as it is, and nothing is added to it."""
        self._writer.closed = True
        with suppress(FFmpegError, OSError, ValueError):
            self._out.close()


def _added(out: Any, container: str, streams: Streams) -> tuple[VideoStream, AudioStream | None]:
    template = streams.video_template
    if container == "mpegts" and template.codec_context.codec.canonical_name not in _TS_VIDEO:
        raise ValueError(f"{template.codec_context.codec.canonical_name} has no place in it")
    video: VideoStream = out.add_stream_from_template(template, opaque=True)
    # In MP4 that keeps every tick; other containers have a unit of their own.
    video.time_base = LIVE_TIME_BASE
    if streams.info.display_matrix is not None and container in ("mp4", "matroska"):
        video.set_display_matrix(streams.info.display_matrix)
    if streams.audio_template is None:
        return video, None
    audio: AudioStream = out.add_stream_from_template(streams.audio_template, opaque=True)
    audio.time_base = Fraction(1, audio.codec_context.sample_rate)
    return video, audio


class _Memory(io.BytesIO):
    """A writer whose bytes nobody wants."""


def check_container(container: str, streams: Streams) -> None:
    """Raises `OutputError` where a container cannot hold the streams; only the header is proof."""
    if container == "rtsp":
        return  # its header is a conversation with the server
    options = {"movflags": "empty_moov"} if container == "mp4" else {}
    out = av.open(_Memory(), "w", format=container, container_options=options)
    try:
        _added(out, container, streams)
        out.start_encoding()
    except (FFmpegError, ValueError, OSError) as error:
        raise OutputError(f"{container} cannot hold the stream: {reason_of(error)}") from None
    finally:
        with suppress(FFmpegError, ValueError, OSError):
            out.close()


def reason_of(error: BaseException) -> str:
    """The system's or FFmpeg's word for an error, in one line."""
    if isinstance(error, OutputError):
        return str(error)
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
