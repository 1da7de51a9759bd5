"""What a capture gives: pictures, facts of the sound, events and counts."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import av
from torch import Tensor

from hat_video.errors import OptionError
from hat_video.frames import VideoInfo
from hat_video.media.adts import header_for

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.stream import Stream

__all__ = ["AudioHead", "CaptureEvent", "CaptureFigures", "Captured", "Roi"]


@dataclass(frozen=True, slots=True)
class Roi:
    """The part of the picture that is wanted, in samples of the source."""

    x: int
    y: int
    width: int
    height: int

    def within(self, info: VideoInfo) -> Roi:
        """The part as chroma allows: corners and sizes moved down to whole chroma samples.

        Raises:
            OptionError: it does not fit into the picture.
        """
        across, down = 1 << info.pixel_format.log2_chroma_w, 1 << info.pixel_format.log2_chroma_h
        x, y = self.x // across * across, self.y // down * down
        width, height = max(across, self.width // across * across), max(down, self.height // down * down)
        if min(self.x, self.y) < 0 or x + width > info.width or y + height > info.height:
            raise OptionError(
                f"--roi {self.width}x{self.height}+{self.x}+{self.y}: does not fit into the camera's picture of "
                f"{info.width}x{info.height}"
            )
        return Roi(x, y, width, height)


@dataclass(frozen=True, slots=True)
class Captured:
    """One decoded picture."""

    planes: tuple[Tensor, ...]
    """(h, w) each, as `Capture.info` says, after the crop; they own their memory."""
    ticks: int
    """Of LIVE_TIME_BASE since the run's first picture; strictly rising."""
    arrived: float
    """`time.monotonic()` when its packet was there."""
    whole: tuple[Tensor, ...] | None = None
    """Where `planes` are a part: those of the whole picture, as `Capture.source_info` says."""


@dataclass(frozen=True, slots=True)
class CaptureEvent:
    """Something that people should hear of."""

    kind: Literal["up", "down", "note", "ended", "failed"]
    """`up` and `down`: of the connection; `ended`: there is no more to come; `failed`: and that is an error."""
    message: str
    """One line, credentials masked, without the source's name."""


@dataclass(frozen=True, slots=True)
class CaptureFigures:
    """What has been counted so far."""

    frames: int
    """Pictures decoded, those dropped below among them."""
    decode_errors: int
    """Packets that could not be decoded, after a connection's first picture."""
    dropped: dict[str, int]
    """Pictures that went no further: no_pts, nonmonotonic, changed; and decode, packets that gave none."""
    corrupt: int
    """Pictures that the decoder marked as damaged; they are shown."""
    reconnects: int
    """Connections after the first that gave a picture."""
    reanchored: int
    """Jumps of the source's timestamps within a connection."""
    is_up: bool
    """Whether pictures come at this moment."""
    last_frame: float
    """`time.monotonic()` of the last picture; 0 before the first."""
    decode_seconds: float
    """Spent in the decoder and in copying planes."""
    recorded_packets: int
    """Of `record`."""
    record_dropped: int
    """Packets that the recording's disk was too slow for."""


class AudioHead:
    """What a source's sound is; it stays valid when the connection has gone.

    Args:
        stream: the source's.
        first: a packet of it, if there is one yet; AAC of a transport stream says in its packets what it is.

    Raises:
        ValueError: it is of a kind that no container here holds.
    """

    def __init__(self, stream: AudioStream, first: bytes | None = None) -> None:
        context = stream.codec_context
        self.codec: str = context.codec.canonical_name
        """FFmpeg's name of it, whatever decoder is used."""
        self.sample_rate: int = context.sample_rate
        self.layout: str = context.layout.name
        self.extradata: bytes | None = bytes(context.extradata) if context.extradata else None
        """What decoders and containers have to know beforehand; always there for AAC, whose packets have no headers."""
        # A container in memory: the stream lives as long as this does.
        self._hub = av.open(io.BytesIO(), "w", format="nut")
        template = self._hub.add_stream_from_template(stream, opaque=True)
        if self.codec == "aac" and self.extradata is None:
            self.extradata = header_for(first, self.sample_rate, context.layout.nb_channels)
            template.codec_context.extradata = self.extradata
            # Only now does the stream know of it, and whoever copies it.
            self._hub.start_encoding()
        self.template: Stream = template
        """For `add_stream_from_template(template, opaque=True)`."""

    def is_like(self, stream: AudioStream) -> bool:
        """Whether packets of `stream` can go on where this one's ended."""
        context = stream.codec_context
        mine = (self.codec, self.sample_rate, self.layout)
        return (context.codec.canonical_name, context.sample_rate, context.layout.name) == mine
