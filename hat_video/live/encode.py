"""One encoder for all outputs: frames in, packets out; key frames by time, and whenever one is asked for.

Key frames go by time, never by count: under load a camera's frames are few, and a count would stretch to many seconds.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import torch
from av.error import FFmpegError
from torch import Tensor

from hat_video.errors import OutputError, WorkError
from hat_video.frames import VideoInfo
from hat_video.live.audio_line import AudioLine
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.packet import LivePacket
from hat_video.media.encoder import EncoderSpec, add_video
from hat_video.media.encoder_frames import EncoderFrames

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["AudioLine", "LiveEncoder", "LivePacket"]

# FFmpeg's AV_PICTURE_TYPE_I.
_INTRA = 1
_SECOND = round(1 / LIVE_TIME_BASE)
# No key frames by count: x264 takes this for "never".
_NEVER = 1 << 30
_FORCED_IDR = ("libx264", "libx264rgb", "libx265", "h264_nvenc", "hevc_nvenc", "av1_nvenc")


class LiveEncoder:
    """Encodes the frames of a live run. `encode` belongs to one thread, `ask_for_key` to any.

    Outputs take its streams as templates and its packets as they are; close them before the encoder.

    Args:
        spec: the encoder; of software encoders, one that was told to hold nothing back (`tune=zerolatency`).
        info: the facts of the stream it makes, in ticks of `LIVE_TIME_BASE`.
        audio: the sound that goes along.
        key_seconds: at most so long from key frame to key frame, while frames come.

    Raises:
        ValueError: `info` has another time base.
        WorkError: the encoder cannot be opened.
    """

    def __init__(
        self, spec: EncoderSpec, info: VideoInfo, audio: AudioLine | None, *, key_seconds: float = 1.0
    ) -> None:
        if info.time_base != LIVE_TIME_BASE:
            raise ValueError(f"time base {info.time_base}: a live stream has ticks of {LIVE_TIME_BASE} s")
        if spec.name in _FORCED_IDR:
            # Without it, an I picture that is asked for may be one that no player can start at.
            spec = replace(spec, options={**spec.options, "forced-idr": "1"})
        self.spec, self.info, self.audio = spec, info, audio
        self._key_ticks = round(key_seconds / LIVE_TIME_BASE)
        self._wants_key = threading.Event()
        self._frames = EncoderFrames(spec.pixel_format, info)
        self._captured: dict[int, float] = {}
        self._durations: dict[int, int] = {}
        self._last: int | None = None
        self._last_key: int | None = None
        self._primer: LivePacket | None = None
        self._hub, self._stream = self._opened()

    @property
    def video_template(self) -> VideoStream:
        """For `add_stream_from_template(..., opaque=True)`, which reads only what does not change: from any thread."""
        return self._stream

    @property
    def audio_template(self) -> AudioStream | None:
        """Likewise; None: there is no sound."""
        return None if self.audio is None else self.audio.template

    def ask_for_key(self) -> None:
        """Makes the next frame a key frame."""
        self._wants_key.set()

    def encode(self, planes: Sequence[Tensor], ticks: int, captured: float) -> list[LivePacket]:
        """One picture.

        Args:
            planes: (h, w) each, as `info.pixel_format` says.
            ticks: its time, in `LIVE_TIME_BASE`; one that is not later than the last picture's is moved behind it.
            captured: when its packet arrived, by `time.monotonic()`.

        Raises:
            ValueError: the planes are of another size or type.
            WorkError: the encoder failed.
        """
        fmt, info = self.info.pixel_format, self.info
        wanted = [(fmt.dtype, size) for size in fmt.plane_sizes(info.width, info.height)]
        given = [(plane.dtype, tuple(plane.shape)) for plane in planes]
        if given != wanted:
            raise ValueError(f"planes are {given}; {fmt.name} of {info.width}x{info.height} is {wanted}")
        if self._last is not None and ticks <= self._last:
            ticks = self._last + 1
        frame = self._frames.frame(planes, ticks)
        is_due = self._last_key is None or ticks - self._last_key >= self._key_ticks
        if self._wants_key.is_set() or is_due:
            self._wants_key.clear()
            frame.pict_type = _INTRA
            self._last_key = ticks
        self._captured[ticks], self._durations[ticks] = captured, self._duration(ticks)
        self._last = ticks
        return self._packets(frame)

    def flush(self) -> list[LivePacket]:
        """What the encoder still holds. Nothing can be encoded after it."""
        return self._packets(None)

    def close(self) -> None:
        """Lets the encoder go; its templates are not to be used any more."""
        with suppress(FFmpegError, ValueError):
            self._hub.close()

    def primer(self) -> LivePacket:
        """A black key frame at time 0 of an encoder of the same kind: readers want to see one before they start."""
        if self._primer is None:
            hub, stream = self._opened()
            try:
                made = self._frames_of(_black(self.info, self.spec), 0)
                packets = [*stream.encode(made), *stream.encode(None)]
            finally:
                with suppress(FFmpegError, ValueError):
                    hub.close()
            first = next(packet for packet in packets if packet.pts is not None and packet.pts >= 0)
            self._primer = LivePacket("video", bytes(first), 0, 0, self._duration(0), LIVE_TIME_BASE, True, None)
        return self._primer

    def _opened(self) -> tuple[OutputContainer, VideoStream]:
        hub = av.open(io.BytesIO(), "w", format="matroska")
        try:
            stream = add_video(hub, self.spec, self.info)
            context = stream.codec_context
            if self.spec.name.startswith("libx264"):
                context.thread_type = "SLICE"  # with threads by frame each would hold one back
            context.gop_size = _NEVER
            if self.spec.memory == "cuda":
                # What memory its frames are of, the encoder learns from the first one.
                stream.encode(self._frames_of(_black(self.info, self.spec), -_SECOND))
            hub.start_encoding()
        except (FFmpegError, ValueError, RuntimeError) as error:
            with suppress(FFmpegError, ValueError):
                hub.close()
            what = getattr(error, "strerror", None) or error
            raise WorkError(f"encoder {self.spec.name} cannot be opened: {what}") from None
        return hub, stream

    def _frames_of(self, planes: Sequence[Tensor], pts: int) -> VideoFrame:
        frame = EncoderFrames(self.spec.pixel_format, self.info).frame(planes, pts)
        frame.pict_type = _INTRA
        return frame

    def _duration(self, ticks: int) -> int:
        """How long the picture will be shown, as far as that can be said before the next one's time is known."""
        usual = round(1 / ((self.info.rate or Fraction(25)) * LIVE_TIME_BASE))
        return usual if self._last is None else min(ticks - self._last, usual)

    def _packets(self, frame: VideoFrame | None) -> list[LivePacket]:
        try:
            made = self._stream.encode(frame)
        except (FFmpegError, ValueError) as error:
            what = getattr(error, "strerror", None) or error
            raise WorkError(f"encoder {self.spec.name} failed: {what}") from None
        return [packet for packet in map(self._live, made) if packet is not None]

    def _live(self, packet: Packet[VideoStream]) -> LivePacket | None:
        if packet.pts is None:
            raise OutputError(f"{self.spec.name} gave a packet without a time; use another encoder")
        if packet.pts < 0:
            return None  # the black one that opened it
        self._frames.release(packet.pts)
        return LivePacket(
            kind="video",
            data=bytes(packet),
            pts=packet.pts,
            dts=packet.pts if packet.dts is None else packet.dts,
            duration=self._durations.pop(packet.pts),
            time_base=LIVE_TIME_BASE,
            is_key=packet.is_keyframe,
            captured=self._captured.pop(packet.pts, None),
        )


def _black(info: VideoInfo, spec: EncoderSpec) -> list[Tensor]:
    """Planes of zeros but for the chroma, which is in the middle."""
    fmt = info.pixel_format
    planes = [
        torch.zeros(size, dtype=fmt.dtype, device="cuda" if spec.memory == "cuda" else "cpu")
        for size in fmt.plane_sizes(info.width, info.height)
    ]
    if fmt.kind == "yuv":
        for plane in planes[1:3]:
            plane.fill_(1 << (fmt.bit_depth - 1))
    return planes
