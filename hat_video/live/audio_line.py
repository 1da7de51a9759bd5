"""The camera's sound on its way to the outputs: as it is, or as AAC; each piece at its own time.

Silence that the camera did not send is not invented: a gap stays a gap, and time only ever rises.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, Protocol, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.codec import CodecContext
from av.error import FFmpegError

from hat_video.errors import WorkError
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.packet import LivePacket
from hat_video.media.adts import AAC_RATES, header_for, without_header

if TYPE_CHECKING:
    from av.audio.codeccontext import AudioCodecContext
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.packet import Packet
    from av.stream import Stream

__all__ = ["AudioHead", "AudioLine", "open_decoder"]

# What each muxer takes as it is and players expect in it. MPEG-TS takes all, but nobody reads it; FLV's further codecs
# are too new for most servers. Tried out, but for rtsp, whose muxer looks for a server first.
_TAKEN = {
    "mp4": {"aac", "mp3", "opus", "flac"},
    "matroska": {"aac", "mp3", "mp2", "ac3", "eac3", "opus", "flac", "pcm_s16le"},
    "nut": {"aac", "mp3", "mp2", "ac3", "eac3", "opus", "flac", "pcm_s16le", "pcm_mulaw", "pcm_alaw"},
    "mpegts": {"aac", "mp3", "mp2", "ac3", "eac3", "opus"},
    "flv": {"aac", "mp3"},
    "rtsp": {"aac", "mp3", "mp2", "ac3", "opus", "pcm_mulaw", "pcm_alaw"},
}
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
# Pieces whose time differs less from the end of the piece before belong together: stamps are rounded and jitter.
_SLACK_SECONDS = 0.04


class AudioHead(Protocol):
    """What must be known of the camera's sound beforehand; `capture.AudioHead` says it."""

    @property
    def codec(self) -> str:
        """FFmpeg's name."""

    @property
    def sample_rate(self) -> int:
        """Samples a second."""

    @property
    def layout(self) -> str:
        """FFmpeg's name of the channel layout."""

    @property
    def extradata(self) -> bytes | None:
        """Of the codec; None or empty where the stream has none: AAC then has a head (ADTS) before each packet."""


class AudioLine:
    """Takes the packets of the source's sound, gives those for the outputs. One thread may use it.

    After a reconnect the sound may come in another format (`connected`). AAC is made of whatever comes; what was copied
    so far goes on as AAC where the head that the outputs have been given still says the truth, and is left out
    otherwise. Within a connection the format may change from packet to packet: AAC stays what it was, and what is
    copied says it itself.

    Args:
        head: of the source's sound when the run begins.
        mode: `copy`: as it is where every output can hold it, else as `aac`.
        containers: FFmpeg's names of the muxers that shall hold it.

    Raises:
        WorkError: no AAC encoder takes it.
    """

    def __init__(self, head: AudioHead, mode: Literal["copy", "aac"], *, containers: Iterable[str] = ()) -> None:
        self.notes: list[str] = []
        """What does not go as it was asked, one line each."""
        self.dropped = 0
        """Packets left out: not decodable or encodable, of another format than can be told, or before the time that has
        been."""
        self.action: Literal["copy", "aac"] = mode
        """What is done with the packets."""
        self._head = self._now = head
        self._encoder: _AacEncoder | None = None
        self._decoder: AudioCodecContext | None = None
        self._is_idle = False
        self._last = -1
        refusing = sorted({name for name in containers if head.codec not in _TAKEN.get(name, ())})
        if mode == "copy" and refusing:
            self.action = "aac"
            self.notes.append(f"the sound is {head.codec}, which {', '.join(refusing)} cannot hold: it becomes AAC")
        elif mode == "copy" and head.codec == "aac" and not (head.extradata or _says_all(head)):
            self.action = "aac"
            self.notes.append("the sound is AAC of a kind that is not told beforehand: it is encoded anew")
        if self.action == "copy":
            self.template: AudioStream = _copied_template(head)
        else:
            self._encoder = _AacEncoder(head.sample_rate, head.layout)
            self.template = self._encoder.stream

    def connected(self, head: AudioHead) -> None:
        """The packets that follow come from another connection, and are as `head` says."""
        self._now, self._decoder, self._is_idle = head, None, False
        if self._encoder is not None:
            self._encoder.restart()
        if self.action == "aac":
            return
        if _same(self._head, head):
            self._encoder = None
            return
        now = f"{head.codec} {head.sample_rate} Hz {head.layout}"
        if self._head.codec == "aac":
            encoder = self._encoder or _AacEncoder(self._head.sample_rate, self._head.layout)
            if encoder.head == (self.template.codec_context.extradata or b"")[:2]:
                self._encoder = encoder
                self.notes.append(f"the sound is now {now}: it is encoded as the AAC that the outputs expect")
                return
        self._is_idle = True
        was = f"{self._head.codec} {self._head.sample_rate} Hz"
        self.notes.append(f"the sound is now {now}; the outputs expect {was}: it is left out")

    def feed(self, packet: Packet[Stream]) -> list[LivePacket]:
        """One packet of the source, with its times in `LIVE_TIME_BASE`."""
        if self._is_idle or not packet.size or packet.pts is None:
            self.dropped += 1
            return []
        if self._encoder is None:
            data = bytes(packet)
            if self._head.codec == "aac":
                data = without_header(data)
            return self._rising([(packet.pts, packet.duration or 0, data)])
        made: list[tuple[int, int, bytes]] = []
        try:
            if self._decoder is None:
                self._decoder = open_decoder(self._now)
            for frame in self._decoder.decode(cast("Packet[AudioStream]", packet)):
                made += self._encoder.feed(frame, packet.pts if frame.pts is None else frame.pts)
        except (FFmpegError, ValueError):
            # To the capture, whose thread this is, an error of FFmpeg is a broken connection.
            self.dropped += 1
            self._encoder.restart()
        return self._rising(made)

    def flush(self) -> list[LivePacket]:
        """What is still held. Nothing can be fed after it."""
        if self._encoder is None:
            return []
        try:
            return self._rising(self._encoder.flush())
        except (FFmpegError, ValueError):
            self.dropped += 1
            return []

    def _rising(self, pieces: Iterable[tuple[int, int, bytes]]) -> list[LivePacket]:
        packets = []
        for ticks, duration, data in pieces:
            if ticks <= self._last or ticks < 0:
                self.dropped += 1
                continue
            self._last = ticks
            packets.append(LivePacket("audio", data, ticks, ticks, duration, LIVE_TIME_BASE, True, None))
        return packets


class _AacEncoder:
    """Sound of any format into AAC of one rate and layout."""

    def __init__(self, rate: int, layout: str) -> None:
        self.hub: OutputContainer = av.open(io.BytesIO(), "w", format="matroska")
        channels = av.AudioLayout(layout).nb_channels
        rate = min(AAC_RATES[:-1], key=lambda known: (known < rate, abs(known - rate)))
        try:
            self.stream = self.hub.add_stream("aac", rate=rate)
            context = self.stream.codec_context
            context.layout = _LAYOUTS.get(channels, "stereo")
            context.bit_rate = 64000 * context.layout.nb_channels + 32000
            context.time_base = self.stream.time_base = Fraction(1, rate)
            self.hub.start_encoding()
        except (FFmpegError, ValueError) as error:
            raise WorkError(f"sound of {rate} Hz {layout} cannot be encoded: {error}") from None
        self._context, self._rate = context, rate
        self.head = (context.extradata or b"")[:2]
        self._size = context.frame_size or 1024
        self._resampler: AudioResampler | None = None
        self._taken: tuple[str, str, int] | None = None
        """Format, layout and rate of the frames that the resampler takes."""
        self._pending: list[np.ndarray] = []
        self._held = 0
        self._start = 0
        self._has_start = False

    def restart(self) -> None:
        """The next frames are of another stream, or follow an error."""
        self._resampler = None

    def feed(self, frame: AudioFrame, ticks: int) -> list[tuple[int, int, bytes]]:
        """One decoded piece, of any format; gives (ticks, duration in ticks, data) of each packet.

        Raises:
            FFmpegError, ValueError: it cannot be resampled or encoded.
        """
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._resampler is None or kind != self._taken:
            # A resampler takes one kind of frames only; on television mono, stereo and 5.1 follow each other.
            self._resampler = AudioResampler(self._context.format, self._context.layout, self._rate)
            self._taken = kind
        frame.pts = None  # else the resampler would fill gaps
        made: list[tuple[int, int, bytes]] = []
        position = round(ticks * LIVE_TIME_BASE * self._rate)
        for piece in self._resampler.resample(frame):
            samples = piece.to_ndarray()
            made += self._place(samples, position)
            position += samples.shape[1]
        return made

    def flush(self) -> list[tuple[int, int, bytes]]:
        made = self._pad()
        return made + self._packets(None)

    def _place(self, samples: np.ndarray, position: int) -> list[tuple[int, int, bytes]]:
        made: list[tuple[int, int, bytes]] = []
        slack = round(_SLACK_SECONDS * self._rate)
        if not self._has_start:
            self._start, self._has_start = position, True
        ahead = position - (self._start + self._held)
        if ahead > slack:
            made += self._pad()
            self._start = max(position, self._start)
        elif ahead < -slack:
            samples = samples[:, -ahead:]  # that time has been
        self._pending.append(samples)
        self._held += samples.shape[1]
        if self._held >= self._size:
            whole = np.concatenate(self._pending, axis=1)
            while whole.shape[1] >= self._size:
                full, whole = whole[:, : self._size], whole[:, self._size :]
                # Before it is encoded: what fails is not tried again.
                self._pending, self._held = [whole], whole.shape[1]
                made += self._encoded(full)
        return made

    def _pad(self) -> list[tuple[int, int, bytes]]:
        """What is left of a piece before a gap, with silence up to a full frame."""
        if not self._held:
            return []
        rest = np.concatenate(self._pending, axis=1)
        full = np.zeros((rest.shape[0], self._size), rest.dtype)
        full[:, : rest.shape[1]] = rest
        self._pending, self._held = [], 0
        return self._encoded(full)

    def _encoded(self, samples: np.ndarray) -> list[tuple[int, int, bytes]]:
        context = self._context
        frame = AudioFrame.from_ndarray(np.ascontiguousarray(samples), context.format.name, context.layout.name)
        frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), self._start
        self._start += self._size
        return self._packets(frame)

    def _packets(self, frame: AudioFrame | None) -> list[tuple[int, int, bytes]]:
        unit = Fraction(1, self._rate) / LIVE_TIME_BASE
        duration = round(self._size * unit)
        packets = self.stream.encode(frame)
        return [(round((packet.pts or 0) * unit), duration, bytes(packet)) for packet in packets]


def open_decoder(head: AudioHead) -> AudioCodecContext:
    """A decoder for the packets of a source's sound."""
    context = cast("AudioCodecContext", CodecContext.create(head.codec, "r"))
    context.sample_rate, context.layout = head.sample_rate, head.layout
    if head.extradata:
        context.extradata = head.extradata
    return context


def _same(was: AudioHead, now: AudioHead) -> bool:
    """Whether packets are what the outputs were told."""
    if (was.codec, was.sample_rate, was.layout) != (now.codec, now.sample_rate, now.layout):
        return False
    # Of AAC: kind, rate and channels.
    return was.codec != "aac" or (was.extradata or b"")[:2] == (now.extradata or b"")[:2]


def _says_all(head: AudioHead) -> bool:
    """Whether AAC that carries its head in every packet has nothing in it but what rate and channels tell."""
    return head.sample_rate in AAC_RATES and 1 <= av.AudioLayout(head.layout).nb_channels <= 6


def _copied_template(head: AudioHead) -> AudioStream:
    """A stream that says what `head` says, for packets that come from elsewhere."""
    shelf = av.open(io.BytesIO(), "w", format="nut")  # takes all that is copied
    bare = shelf.add_stream({"opus": "libopus", "mp3": "libmp3lame"}.get(head.codec, head.codec), rate=head.sample_rate)
    held = av.open(io.BytesIO(), "w", format="nut")
    # A stream from a template is never opened, so that what its context says can be said.
    stream = cast("AudioStream", held.add_stream_from_template(bare, opaque=True))
    context = stream.codec_context
    channels = av.AudioLayout(head.layout).nb_channels
    context.layout = _LAYOUTS.get(channels, head.layout) if "channels" in head.layout else head.layout
    extradata = head.extradata
    if head.codec == "aac" and not extradata:
        extradata = header_for(None, head.sample_rate, channels)
    if extradata:
        context.extradata = extradata
    held.start_encoding()
    return stream
