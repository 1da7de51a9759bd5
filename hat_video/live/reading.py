"""What becomes of one connection's packets: pictures and sound with their times, and a copy for the record."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from av.error import FFmpegError
from av.packet import Packet
from av.video.reformatter import VideoReformatter
from torch import Tensor

from hat_video.errors import SourceError
from hat_video.frames import PixelFormat, VideoInfo
from hat_video.live.captured import AudioHead, Captured, CaptureEvent, Roi
from hat_video.live.clock import LIVE_TIME_BASE, SourceClock
from hat_video.live.connection import Connection
from hat_video.live.source_recorder import SourcePacket, SourceRecorder
from hat_video.media.adts import without_header
from hat_video.media.describe import describe, nearest_planar, planes_of, to_fraction

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.video.frame import VideoFrame

__all__ = ["ChangedError", "Reading", "Run"]

# A playlist's pictures come in lumps of several seconds.
_PIECES_STALL_SECONDS = 20.0
_CHANGED_SECONDS = 5.0
# Packets kept until the first picture of a connection says what time it is, and arrivals until their pictures come.
_MOST_HELD, _MOST_DELAYED = 400, 64
# More a second are ticks of a clock, not pictures.
_MOST_RATE = 480


class ChangedError(SourceError):
    """The camera gives other pictures than the run was made for: connecting again would not help."""


@dataclass(slots=True)
class Run:
    """What is known and counted across a capture's connections. Its thread writes it; others read, and move `roi`."""

    on_frame: Callable[[Captured], None]
    on_audio: Callable[[Packet[Any]], None] | None
    on_event: Callable[[CaptureEvent], None]
    name: str
    """The source's, for people."""
    stall_seconds: float
    recorder: SourceRecorder | None
    roi: Roi | None
    closing: Callable[[], bool]
    """Whether the capture is to end."""
    info: VideoInfo | None = None
    source_info: VideoInfo | None = None
    audio: AudioHead | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    """Set with the first picture, or when there will be none."""
    clock: SourceClock = field(default_factory=SourceClock)
    has_frame: bool = False
    """Whether a picture has been given out."""
    deadline: float = 0.0
    """`time.monotonic()` at which the connection is given up."""
    frames: int = 0
    corrupt: int = 0
    decode_errors: int = 0
    connections: int = 0
    """Those that gave a picture."""
    decode_seconds: float = 0.0
    last_frame: float = 0.0
    dropped: dict[str, int] = field(default_factory=lambda: {"no_pts": 0, "nonmonotonic": 0, "decode": 0, "changed": 0})
    changed_since: float | None = None

    @property
    def is_due(self) -> bool:
        """Whether whatever FFmpeg waits for is to end."""
        return self.closing() or time.monotonic() > self.deadline

    def note(self, message: str) -> None:
        """Tells people something."""
        self.on_event(CaptureEvent("note", message))


class Reading:
    """Reads one connection; lives on the capture's thread.

    Args:
        run: what is known from earlier connections, and gets what is learned from this one.
        connection: freshly opened.
    """

    def __init__(self, run: Run, connection: Connection) -> None:
        self._run, self._connection = run, connection
        self._context = connection.video.codec_context
        self._time_base = to_fraction(connection.video.time_base) or LIVE_TIME_BASE
        self._reformatter = VideoReformatter()
        self._has_picture = False
        self._arrivals: deque[tuple[int | None, float]] = deque(maxlen=_MOST_DELAYED)
        self._arrived = 0.0
        self._held: deque[tuple[Packet[Any], float]] = deque(maxlen=_MOST_HELD)
        self._has_sound = self._has_adts = False
        if connection.in_pieces:
            run.stall_seconds = max(run.stall_seconds, _PIECES_STALL_SECONDS)
        run.clock.reconnected()

    def read(self) -> None:
        """Returns when the source has ended.

        Raises:
            OptionError: the part does not fit into its picture, or its packets cannot be recorded.
            ChangedError: its pictures have been of another size or format for seconds.
            FFmpegError, OSError: the connection is broken, silent, or the capture is to end.
        """
        run = self._run
        for packet in self._connection.packets():
            self._arrived = time.monotonic()
            if run.is_due:
                raise TimeoutError("sound may come, but no picture")
            if packet.stream.type != "video":
                if packet.size:
                    self._pass_on(packet)
                continue
            if not packet.size and (packet.dts is not None or packet.pts is not None):
                continue  # Theora says so that the picture stays; to a decoder it would be the end.
            if self._has_picture:
                run.deadline = self._arrived + run.stall_seconds
            self._arrivals.append((packet.pts, self._arrived))
            for frame in self._decoded(packet):
                self._take(frame)
            if packet.size:
                self._pass_on(packet)

    def _decoded(self, packet: Packet[Any]) -> list[VideoFrame]:
        began = time.perf_counter()
        try:
            return self._context.decode(packet if packet.size else None)
        except FFmpegError:
            # Before the first key frame there is nothing to be decoded, and nothing wrong.
            if self._has_picture:
                self._run.decode_errors += 1
                self._run.dropped["decode"] += 1
            return []
        finally:
            self._run.decode_seconds += time.perf_counter() - began

    def _take(self, frame: VideoFrame) -> None:
        run = self._run
        run.frames += 1
        run.corrupt += bool(frame.is_corrupt)
        # A decoder that reorders gives a picture later than its packet came.
        arrived = self._arrived
        if frame.pts is not None:
            arrived = next((at for pts, at in self._arrivals if pts == frame.pts), arrived)
        if run.source_info is not None and not self._is_as_agreed(frame, run.source_info):
            return
        ticks = self._ticks(frame.pts, arrived)
        if ticks is None:
            return
        if run.source_info is None:
            self._settle(frame)
        if not self._has_picture:
            self._begin()
        run.last_frame = time.monotonic()
        if self._connection.in_pieces:
            self._pace(ticks)
            arrived = run.last_frame
        began = time.perf_counter()
        planes = self._planes(frame)
        run.decode_seconds += time.perf_counter() - began
        is_part = run.roi is not None
        run.on_frame(Captured(self._part(planes), ticks, arrived, planes if is_part else None))
        run.has_frame = True
        run.ready.set()

    def _ticks(self, pts: int | None, arrived: float) -> int | None:
        clock, dropped = self._run.clock, self._run.dropped
        if self._connection.by_arrival:
            return clock.arrival(arrived)
        if pts is None:
            dropped["no_pts"] += 1
            return None
        ticks = clock.video(pts, self._time_base, arrived)
        if ticks is None:
            dropped["nonmonotonic"] += 1
        return ticks

    def _settle(self, frame: VideoFrame) -> None:
        """The run's first picture: what it is holds for all that follow."""
        run, connection = self._run, self._connection
        info, notes = describe(frame, connection.video, LIVE_TIME_BASE, self._rate(), is_transparent=False)
        roi = None if run.roi is None else run.roi.within(info)
        run.info = info if roi is None else replace(info, width=roi.width, height=roi.height)
        run.source_info, run.roi = info, roi
        for note in notes:
            run.note(f"{note}; a live picture is not deinterlaced" if "woven" in note else note)
        if connection.audio is not None:
            run.audio = self._head_of(connection.audio)

    def _head_of(self, sound: AudioStream) -> AudioHead | None:
        name = sound.codec_context.codec.canonical_name
        if self._connection.by_arrival:
            return None
        if not (sound.codec_context.sample_rate and sound.codec_context.layout.nb_channels):
            self._run.note(f"its sound ({name}) is left out: it did not say in time what it is")
            return None
        packets = (packet for packet, _ in self._held if packet.stream.type == "audio")
        try:
            return AudioHead(sound, next(map(bytes, packets), None))
        except ValueError:
            self._run.note(f"its sound ({name}) is left out: no container here holds it")
            return None

    def _rate(self) -> Fraction | None:
        stream = self._connection.video
        rates = (stream.average_rate, self._context.framerate, stream.guessed_rate)
        return next((rate for rate in map(to_fraction, rates) if rate is not None and rate <= _MOST_RATE), None)

    def _begin(self) -> None:
        """The connection's first picture."""
        run, sound = self._run, self._connection.audio
        self._has_picture = True
        run.connections += 1
        run.deadline = time.monotonic() + run.stall_seconds
        if sound is not None and run.audio is not None:
            self._has_sound = run.audio.is_like(sound)
            self._has_adts = sound.codec_context.name == "aac" and not sound.codec_context.extradata
            if not self._has_sound:
                run.note("its sound is of another kind than before, and is left out")
        if run.recorder is not None:
            run.recorder.connected(self._connection.video, run.audio)
        if run.connections > 1:
            run.on_event(CaptureEvent("up", "pictures come again"))

    def _is_as_agreed(self, frame: VideoFrame, info: VideoInfo) -> bool:
        """Whether a picture is of the size and format that the run began with; if not for long, the run has failed."""
        run = self._run
        is_size = (frame.width, frame.height) == (info.width, info.height)
        if is_size and nearest_planar(frame.format.name).opaque == info.pixel_format:
            run.changed_since = None
            return True
        run.dropped["changed"] += 1
        run.changed_since = self._arrived if run.changed_since is None else run.changed_since
        if self._arrived - run.changed_since > _CHANGED_SECONDS:
            raise ChangedError(
                f"{run.name}: its picture is {frame.width}x{frame.height} {frame.format.name} now; the run began with "
                f"{info.width}x{info.height} {info.pixel_format.name}; start it again"
            )
        return False

    def _planes(self, frame: VideoFrame) -> tuple[Tensor, ...]:
        run = self._run
        assert run.info is not None
        wanted, name = run.info.pixel_format, frame.format.name
        if name != nearest_planar(name).name:
            frame = self._reformatter.reformat(frame, format=wanted.name, threads=1)
        return planes_of(frame, wanted)

    def _part(self, planes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        run = self._run
        if run.roi is None or run.info is None:
            return planes
        return _cropped(planes, run.roi, run.info.pixel_format)

    def _pass_on(self, packet: Packet[Any]) -> None:
        """To the sound's taker and the recorder; what comes before the first picture waits for its time."""
        self._held.append((packet, self._arrived))
        while self._has_picture and self._held:
            held, arrived = self._held.popleft()
            if self._has_sound or held.stream.type == "video":
                self._give(held, arrived)

    def _give(self, packet: Packet[Any], arrived: float) -> None:
        run, clock = self._run, self._run.clock
        is_video = packet.stream.type == "video"
        if is_video and run.recorder is None:
            return
        time_base = to_fraction(packet.time_base) or self._time_base
        if self._connection.by_arrival and is_video:
            pts = dts = clock.latest
        elif packet.pts is None or self._connection.by_arrival:
            return
        else:
            pts = clock.at(packet.pts, time_base)
            dts = pts if packet.dts is None else clock.at(packet.dts, time_base)
        data = whole = bytes(packet)
        if self._has_adts and not is_video:
            data = without_header(data)
        duration = round((packet.duration or 0) * time_base / LIVE_TIME_BASE)
        if run.recorder is not None:
            run.recorder.put(SourcePacket(is_video, data, pts, dts, duration, packet.is_keyframe))
        if not is_video and run.on_audio is not None and packet.pts is not None:
            ticks = clock.audio(packet.pts, time_base, arrived)
            if ticks is not None:
                # With its head, which says what it is: that may change from packet to packet.
                copy: Packet[Any] = Packet(whole)
                copy.time_base, copy.pts, copy.dts, copy.duration = LIVE_TIME_BASE, ticks, ticks, duration
                copy.is_keyframe = True
                run.on_audio(copy)

    def _pace(self, ticks: int) -> None:
        """Waits until it is the picture's time: a playlist's come many at once."""
        run = self._run
        while not run.closing() and (ahead := run.clock.ahead(ticks, time.monotonic())) > 0:
            time.sleep(min(ahead, 0.1))
        run.last_frame = time.monotonic()
        run.deadline = run.last_frame + run.stall_seconds


def _cropped(planes: tuple[Tensor, ...], roi: Roi, pixel_format: PixelFormat) -> tuple[Tensor, ...]:
    across, down = pixel_format.log2_chroma_w, pixel_format.log2_chroma_h
    parts = []
    for k, plane in enumerate(planes):
        w, h = (across, down) if k in (1, 2) else (0, 0)
        y, x = roi.y >> h, roi.x >> w
        parts.append(plane[y : y + (roi.height >> h), x : x + (roi.width >> w)].clone())
    return tuple(parts)
