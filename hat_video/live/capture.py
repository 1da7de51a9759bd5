"""A camera's pictures as they come: the thread that owns the connection, and makes another when it breaks.

Callbacks run on that thread, which waits for nobody: they must take what they get and return. Sound comes as packets
with bytes of their own whose pts, dts and duration are live ticks (`LIVE_TIME_BASE`, also their `time_base`); their
`stream` is not set. What they are of is in `Capture.audio`, as the first connection had it; sound of a later connection
that differs is left out, with a note.
"""

from __future__ import annotations

import io
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import av
from av.codec.context import CodecContext
from av.error import FFmpegError
from av.packet import Packet
from av.video.reformatter import VideoReformatter
from torch import Tensor

from hat_video.errors import CancelledError, HatVideoError, OptionError, SourceError
from hat_video.frames import PixelFormat, VideoInfo
from hat_video.live.brake import Brake
from hat_video.live.clock import LIVE_TIME_BASE, SourceClock
from hat_video.live.connection import Connection
from hat_video.live.source_recorder import SourceRecorder
from hat_video.live.sources import CameraSource
from hat_video.media.describe import describe, nearest_planar, planes_of, to_fraction

if TYPE_CHECKING:
    from av.audio.codeccontext import AudioCodecContext
    from av.audio.stream import AudioStream
    from av.stream import Stream
    from av.video.frame import VideoFrame

__all__ = ["AudioHead", "Capture", "CaptureEvent", "CaptureFigures", "Captured", "Roi"]

# Seconds between tries to connect: from, to. Each is multiplied by a random factor, so that many do not try at once.
_FIRST_PAUSE, _LAST_PAUSE, _JITTER = 0.25, 10.0, (0.5, 1.5)
# A playlist's pictures come in lumps of several seconds.
_PIECES_STALL_SECONDS = 20.0
# After a reconnection: key frames may be so far apart.
_FIRST_PICTURE_SECONDS = 15.0
_CHANGED_SECONDS = 5.0
# `__exit__` takes no longer, `__enter__` leaves so much of its time for the thread to end.
_CLOSE_SECONDS, _MARGIN_SECONDS = 1.8, 0.5
# Packets kept until the first picture of a connection says what time it is.
_MOST_HELD = 400
_MOST_RATE = 480


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
    """What a source's sound is; it stays valid when the connection has gone."""

    def __init__(self, stream: AudioStream) -> None:
        context = stream.codec_context
        self.codec: str = context.name
        """FFmpeg's name of it."""
        self.sample_rate: int = context.sample_rate
        self.layout: str = context.layout.name
        self.extradata: bytes | None = bytes(context.extradata) if context.extradata else None
        """None for AAC of a transport stream: each packet begins with an ADTS header instead."""
        # A container in memory: the stream lives as long as this does.
        self._hub = av.open(io.BytesIO(), "w", format="matroska")
        self.template: Stream = self._hub.add_stream_from_template(stream, opaque=True)
        """For `add_stream_from_template(template, opaque=True)`."""

    def open_decoder(self) -> AudioCodecContext:
        """A decoder of its own for the packets that come."""
        context: AudioCodecContext = CodecContext.create(self.codec, "r")  # type: ignore[assignment]
        context.sample_rate, context.layout = self.sample_rate, self.layout  # type: ignore[assignment]
        if self.extradata is not None:
            context.extradata = self.extradata
        context.time_base = LIVE_TIME_BASE
        return context

    def is_like(self, stream: AudioStream) -> bool:
        """Whether packets of `stream` can go on where this one's ended."""
        context = stream.codec_context
        mine = (self.codec, self.sample_rate, self.layout)
        return (context.name, context.sample_rate, context.layout.name) == mine


class Capture:
    """Pictures and sound of a camera, for as long as it is entered.

    When `__enter__` returns, the first picture has been decoded, and `info` and `audio` are known. From then on a
    connection that breaks or falls silent is made again, for ever unless `retries` says otherwise.

    Args:
        source: as `parse_source` gives it.
        on_frame: gets each picture.
        on_audio: gets each packet of sound; None: sound is not read.
        on_event: gets what people should hear of.
        retries: failures to connect in a row, after the first success, before the run fails; None: no end.
        stall_seconds: a connection without a picture for so long is dead.
        roi: the part of the picture that is wanted.
        record: the camera's own packets are copied into this file.
        open_timeout: seconds within which `__enter__` returns or raises.
        stop: ends the capture when it is set; `__exit__` ends it too.

    Raises:
        OptionError, OutputError: `record` is no file that can be written.
    """

    def __init__(
        self,
        source: CameraSource,
        *,
        on_frame: Callable[[Captured], None],
        on_audio: Callable[[Packet[Any]], None] | None = None,
        on_event: Callable[[CaptureEvent], None],
        retries: int | None = None,
        stall_seconds: float = 2.0,
        roi: Roi | None = None,
        record: Path | None = None,
        open_timeout: float = 5.0,
        stop: threading.Event | None = None,
    ) -> None:
        self.source = source
        self.info: VideoInfo
        """Of what `on_frame` gets: the part, where only a part is."""
        self.source_info: VideoInfo
        """Of the camera's whole picture."""
        self.audio: AudioHead | None = None
        self.error: Exception | None = None
        """Why the capture has ended; None while it goes on, and after a proper end."""
        self._on_frame, self._on_audio, self._on_event = on_frame, on_audio, on_event
        self._retries, self._stall, self._open_timeout = retries, stall_seconds, open_timeout
        self._recorder = None if record is None else SourceRecorder(record, self._note)
        self._roi = roi
        self._stop, self._closing = stop or threading.Event(), threading.Event()
        self._ready, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._clock = SourceClock()
        self._reformatter = VideoReformatter()
        self._deadline = 0.0
        self._started = False
        self._frames = self._corrupt = self._decode_errors = self._connections = 0
        self._decode_seconds = self._last_frame = 0.0
        self._live_stall = stall_seconds
        self._dropped = {"no_pts": 0, "nonmonotonic": 0, "decode": 0, "changed": 0}
        self._changed_since: float | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + self._open_timeout
        try:
            while not self._ready.wait(0.05) and time.monotonic() < deadline:
                if self._stop.is_set():
                    raise CancelledError("stopped before the first picture")
            if not self._ready.is_set():
                # A driver or a resolver that cannot be interrupted; its thread ends when that returns.
                raise SourceError(f"{self.source.name}: no answer within {self._open_timeout:g} s")
            if self.error is not None:
                raise self.error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come; `error` says if that is an error."""
        return self._ended.is_set()

    @property
    def roi(self) -> Roi | None:
        """The part that is wanted now."""
        return self._roi

    @property
    def figures(self) -> CaptureFigures:
        """What has been counted so far."""
        silence = time.monotonic() - self._last_frame
        recorder = self._recorder
        return CaptureFigures(
            frames=self._frames,
            decode_errors=self._decode_errors,
            dropped=dict(self._dropped),
            corrupt=self._corrupt,
            reconnects=max(0, self._connections - 1),
            reanchored=self._clock.reanchored,
            is_up=self._connections > 0 and not self.is_ended and silence < self._live_stall,
            last_frame=self._last_frame,
            decode_seconds=self._decode_seconds,
            recorded_packets=0 if recorder is None else recorder.packets,
            record_dropped=0 if recorder is None else recorder.dropped,
        )

    def move_roi(self, x: int, y: int) -> tuple[int, int]:
        """Moves the part, from the next picture on, as near to (x, y) as the picture and its chroma allow.

        Returns:
            Where it is now.

        Raises:
            OptionError: there is no part: the whole picture is upscaled.
        """
        roi, info = self._roi, self.source_info
        if roi is None:
            raise OptionError("the whole picture is upscaled; only a part (--roi) can be moved")
        moved = replace(
            roi, x=min(max(0, x), info.width - roi.width), y=min(max(0, y), info.height - roi.height)
        ).within(info)
        self._roi = moved
        return moved.x, moved.y

    def _close(self) -> None:
        """Ends the thread, and waits for it as long as it can be hoped to end."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        self._closing.set()
        self._thread.join(0.7 * _CLOSE_SECONDS)
        if self._recorder is not None:
            self._recorder.close(max(0.2, deadline - time.monotonic()))

    # From here on: the capture thread.

    def _is_closing(self) -> bool:
        return self._closing.is_set() or self._stop.is_set()

    def _is_due(self) -> bool:
        return self._closing.is_set() or self._stop.is_set() or time.monotonic() > self._deadline

    def _note(self, message: str) -> None:
        self._on_event(CaptureEvent("note", message))

    def _run(self) -> None:
        try:
            with Brake(self._is_due):
                self._connect_for_ever()
        except Exception as error:  # noqa: BLE001 - whoever owns the capture is told
            self.error = error
            if self._ready.is_set():
                message = str(error).removeprefix(f"{self.source.name}: ")
                self._on_event(CaptureEvent("failed", message))
        finally:
            self._ended.set()
            self._ready.set()

    def _connect_for_ever(self) -> None:
        failures, pause = 0, _FIRST_PAUSE
        while not self._is_closing():
            before = self._frames
            problem = self._connect()
            if self._is_closing():
                return
            if problem is None:
                self._on_event(CaptureEvent("ended", "the source has ended"))
                return
            if not self._ready.is_set():
                raise SourceError(f"{self.source.name}: {problem}")
            if self._frames > before:
                failures, pause = 0, _FIRST_PAUSE
            if self._retries is not None and failures >= self._retries:
                raise SourceError(f"{self.source.name}: {problem}; given up after {failures} more tries")
            failures += 1
            seconds = pause * random.uniform(*_JITTER)
            self._on_event(CaptureEvent("down", f"{problem}; again in {seconds:.1f} s"))
            end = time.monotonic() + seconds
            while not self._is_closing() and time.monotonic() < end:
                self._closing.wait(min(0.1, max(0.0, end - time.monotonic())))
            # Where it is the camera that comes to us, a pause would only make it wait.
            pause = _FIRST_PAUSE if self._is_passive() else min(2 * pause, _LAST_PAUSE)

    def _is_passive(self) -> bool:
        return self.source.url.startswith("udp:") or "listen" in self.source.options or "listen" in self.source.url

    def _connect(self) -> str | None:
        """One connection, from open to its end; why it ended, or None if that was the end of the source."""
        began, is_first = time.monotonic(), not self._ready.is_set()
        patience = self._open_timeout - _MARGIN_SECONDS if is_first else self._open_timeout
        self._deadline = began + patience
        try:
            with Connection(
                self.source, self._is_due, max(self._open_timeout, self._stall, _PIECES_STALL_SECONDS)
            ) as opened:
                if not is_first:
                    patience = max(patience, _FIRST_PICTURE_SECONDS)
                    self._deadline = began + patience
                self._clock.reconnected()
                _Reading(self, opened).run()
        except (SourceError, FFmpegError, OSError, ValueError) as error:
            if isinstance(error, HatVideoError) and not isinstance(error, SourceError):
                raise
            if time.monotonic() > self._deadline and not self._is_closing():
                if self._last_frame > began:
                    return f"silent for {self._live_stall:g} s"
                return f"no picture within {self._open_timeout if is_first else patience:g} s"
            if isinstance(error, SourceError):
                return str(error).removeprefix(f"{self.source.name}: ")
            return opened.why(error)
        return None if self.source.kind in ("pipe", "test") else "the camera has closed the connection"


class _Reading:
    """What is read of one connection; lives on the capture thread, and writes the capture's counts."""

    def __init__(self, capture: Capture, connection: Connection) -> None:
        self._capture, self._connection = capture, connection
        self._context = connection.video.codec_context
        self._time_base = to_fraction(connection.video.time_base) or LIVE_TIME_BASE
        self._has_picture = False
        self._arrivals: deque[tuple[int | None, float]] = deque(maxlen=64)
        self._arrived = 0.0
        self._held: deque[tuple[Packet[Any], float]] = deque(maxlen=_MOST_HELD)
        self._has_sound = capture._on_audio is not None and connection.audio is not None
        if capture._recorder is not None:
            capture._recorder.connected(connection.video, connection.audio)

    def run(self) -> None:
        """Until the connection ends, breaks or falls silent."""
        capture = self._capture
        for packet in self._connection.packets():
            self._arrived = time.monotonic()
            if capture._is_due():
                raise TimeoutError("nothing to see")
            if packet.stream.type != "video":
                if packet.size:
                    self._pass_on(packet)
                continue
            if not packet.size and (packet.dts is not None or packet.pts is not None):
                continue  # Theora says so that the picture stays; to a decoder it would be the end.
            if self._has_picture:
                capture._deadline = self._arrived + capture._live_stall
            self._arrivals.append((packet.pts, self._arrived))
            for frame in self._decoded(packet):
                self._take(frame)
            if packet.size:
                self._pass_on(packet)

    def _decoded(self, packet: Packet[Any]) -> list[VideoFrame]:
        began = time.perf_counter()
        try:
            return self._context.decode(packet if packet.size else None)  # type: ignore[arg-type]
        except FFmpegError:
            # Before the first key frame there is nothing to be decoded, and nothing wrong.
            if self._has_picture:
                self._capture._decode_errors += 1
                self._capture._dropped["decode"] += 1
            return []
        finally:
            self._capture._decode_seconds += time.perf_counter() - began

    def _take(self, frame: VideoFrame) -> None:
        capture = self._capture
        capture._frames += 1
        capture._corrupt += bool(frame.is_corrupt)
        if not capture._ready.is_set():
            self._settle(frame)
        elif not self._is_as_agreed(frame):
            return
        arrived = next((at for pts, at in self._arrivals if pts == frame.pts), self._arrived)
        ticks: int | None
        if self._connection.by_arrival:
            ticks = capture._clock.arrival(arrived)
        elif frame.pts is None:
            capture._dropped["no_pts"] += 1
            return
        else:
            ticks = capture._clock.video(frame.pts, self._time_base, arrived)
        if ticks is None:
            capture._dropped["nonmonotonic"] += 1
            return
        if not self._has_picture:
            self._begin()
        capture._last_frame = arrived
        if self._connection.in_pieces:
            self._pace(ticks)
        began = time.perf_counter()
        planes = self._planes(frame)
        capture._decode_seconds += time.perf_counter() - began
        capture._on_frame(Captured(planes, ticks, arrived))
        capture._ready.set()

    def _settle(self, frame: VideoFrame) -> None:
        """The run's first picture: what it is holds for all that follow."""
        capture, stream = self._capture, self._connection.video
        rate = to_fraction(stream.average_rate) or to_fraction(stream.guessed_rate)
        if rate is not None and rate > _MOST_RATE:
            rate = None  # Ticks of a clock, not pictures.
        info, notes = describe(frame, stream, LIVE_TIME_BASE, rate, is_transparent=False)
        capture.source_info = capture.info = info
        if capture._roi is not None:
            capture._roi = roi = capture._roi.within(info)
            capture.info = replace(info, width=roi.width, height=roi.height)
        for note in notes:
            capture._note(
                f"{note}; a live picture is not deinterlaced" if info.is_interlaced and "woven" in note else note
            )
        if self._has_sound:
            sound = self._connection.audio
            assert sound is not None
            if sound.codec_context.sample_rate and sound.codec_context.layout.nb_channels:
                capture.audio = AudioHead(sound)
            else:
                capture._note(f"its sound ({sound.codec_context.name}) is left out: it does not say what it is in time")

    def _begin(self) -> None:
        """The connection's first picture."""
        capture = self._capture
        self._has_picture = True
        capture._connections += 1
        capture._live_stall = max(capture._stall, _PIECES_STALL_SECONDS if self._connection.in_pieces else 0.0)
        capture._deadline = time.monotonic() + capture._live_stall
        sound = self._connection.audio
        if self._has_sound:
            assert sound is not None
            if capture.audio is None:
                self._has_sound = False
            elif not capture.audio.is_like(sound):
                self._has_sound = False
                capture._note("its sound is of another kind since it has come back, and is left out")
        if capture._connections > 1:
            capture._on_event(CaptureEvent("up", "pictures come again"))

    def _is_as_agreed(self, frame: VideoFrame) -> bool:
        """Whether a picture is of the size and kind that the run began with; if that stays so, the run has failed."""
        capture, info = self._capture, self._capture.source_info
        if (frame.width, frame.height) == (info.width, info.height):
            if nearest_planar(frame.format.name).opaque == info.pixel_format:
                capture._changed_since = None
                return True
        capture._dropped["changed"] += 1
        now = self._arrived
        if capture._changed_since is None:
            capture._changed_since = now
        if now - capture._changed_since > _CHANGED_SECONDS:
            raise _Changed(
                f"{capture.source.name}: its picture is {frame.width}x{frame.height} {frame.format.name} now; the run began "
                f"with {info.width}x{info.height} {info.pixel_format.name}; start it again"
            )
        return False

    def _planes(self, frame: VideoFrame) -> tuple[Tensor, ...]:
        capture = self._capture
        wanted, nearest = capture.info.pixel_format, nearest_planar(frame.format.name)
        if frame.format.name != nearest.name:
            frame = capture._reformatter.reformat(frame, format=wanted.name, threads=1)
        planes = planes_of(frame, wanted)
        return planes if capture._roi is None else _cropped(planes, capture._roi, wanted)

    def _pass_on(self, packet: Packet[Any]) -> None:
        """To the sound's taker and the recorder; what comes before the first picture waits for its time."""
        if not self._has_picture:
            self._held.append((packet, self._arrived))
            return
        while self._held:
            self._give(*self._held.popleft())
        self._give(packet, self._arrived)

    def _give(self, packet: Packet[Any], arrived: float) -> None:
        capture, clock = self._capture, self._capture._clock
        time_base = to_fraction(packet.time_base) or self._time_base
        is_sound = packet.stream.type == "audio"
        if capture._recorder is not None:
            if self._connection.by_arrival:
                if not is_sound:
                    capture._recorder.put(packet, clock.latest, clock.latest)
            elif packet.pts is not None:
                dts = packet.pts if packet.dts is None else packet.dts
                capture._recorder.put(packet, clock.at(packet.pts, time_base), clock.at(dts, time_base))
        if is_sound and self._has_sound and capture._on_audio is not None and packet.pts is not None:
            ticks = clock.audio(packet.pts, time_base, arrived)
            if ticks is not None:
                copy: Packet[Any] = Packet(bytes(packet))
                copy.time_base, copy.pts, copy.dts = LIVE_TIME_BASE, ticks, ticks
                copy.duration = round((packet.duration or 0) * time_base / LIVE_TIME_BASE)
                copy.is_keyframe = True
                capture._on_audio(copy)

    def _pace(self, ticks: int) -> None:
        """Waits until it is the picture's time: a playlist's come many at once."""
        capture = self._capture
        while not capture._is_closing() and (ahead := capture._clock.ahead(ticks, time.monotonic())) > 0:
            capture._deadline = time.monotonic() + capture._live_stall
            capture._closing.wait(min(ahead, 0.1))


class _Changed(HatVideoError):
    """The camera gives other pictures than the run was made for; connecting again would not help."""


def _cropped(planes: tuple[Tensor, ...], roi: Roi, pixel_format: PixelFormat) -> tuple[Tensor, ...]:
    across, down = pixel_format.log2_chroma_w, pixel_format.log2_chroma_h
    parts = []
    for k, plane in enumerate(planes):
        w, h = (across, down) if k in (1, 2) else (0, 0)
        y, x = roi.y >> h, roi.x >> w
        parts.append(plane[y : y + (roi.height >> h), x : x + (roi.width >> w)].clone())
    return tuple(parts)
