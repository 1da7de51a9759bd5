"""`--record-source`: the camera's own packets, copied into a file while its pictures are upscaled."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
from av.error import FFmpegError
from av.packet import Packet

from hat_video.errors import OptionError, OutputError
from hat_video.live.captured import AudioHead
from hat_video.live.clock import LIVE_TIME_BASE

if TYPE_CHECKING:
    from av.stream import Stream
    from av.video.stream import VideoStream

__all__ = ["SourcePacket", "SourceRecorder"]

# A file that is killed in the middle stays readable up to the last packets.
_FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".mkv": ("matroska", {"flush_packets": "1"}),
    ".mp4": ("mp4", {"movflags": "hybrid_fragmented+delay_moov", "flush_packets": "1"}),
    ".ts": ("mpegts", {"flush_packets": "1"}),
}
_RAW = {"rawvideo", "wrapped_avframe", "bitpacked", "v210", "v308", "v408"}
# About ten seconds of a camera; a disk that is silent for longer costs the packets up to the next key frame.
_MOST_WAITING = 600


@dataclass(frozen=True, slots=True)
class SourcePacket:
    """One packet of the camera, with its own bytes; its times are live ticks."""

    is_video: bool
    data: bytes
    pts: int
    dts: int
    duration: int
    is_key: bool


class SourceRecorder:
    """Writes a camera's packets, in a thread of its own that the capture never waits for.

    Args:
        path: of the file; `.mkv`, `.mp4` or `.ts`.
        on_trouble: called with one line when the file cannot be written any more; the capture goes on.

    Raises:
        OutputError: the file is there already, or its folder is not.
        OptionError: its suffix says no container that can be cut off at any moment.
    """

    def __init__(self, path: Path, on_trouble: Callable[[str], None]) -> None:
        if path.suffix.lower() not in _FORMATS:
            raise OptionError(f"--record-source {path}: must end in {', '.join(_FORMATS)}")
        if path.exists():
            raise OutputError(f"--record-source {path}: is there already; name another file")
        if not path.parent.is_dir():
            raise OutputError(f"--record-source {path}: its folder {path.parent} is not there; make it first")
        self.path = path
        self.dropped = 0
        """Packets that the disk was too slow for."""
        self.packets = 0
        """Packets written."""
        self._format, self._options = _FORMATS[path.suffix.lower()]
        self._on_trouble = on_trouble
        self._waiting: queue.Queue[SourcePacket | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._needs_key = True
        self._is_broken = False
        self._head: tuple[Any, ...] = ()
        self._last: dict[bool, int] = {}

    def connected(self, video: VideoStream, sound: AudioHead | None) -> None:
        """A connection's streams; the first one decides what the file holds.

        Raises:
            OptionError: the camera gives raw pictures, or packets that the container cannot hold.
        """
        self._needs_key = True
        context = video.codec_context
        head = (context.name, context.width, context.height)
        if self._thread is not None:
            if head != self._head and not self._is_broken:
                self._break(f"the camera sends {head[0]} {head[1]}x{head[2]} now; {self.path} ends here")
            return
        if context.name in _RAW:
            raise OptionError(
                f"--record-source {self.path}: the source gives raw pictures ({context.name}), which are not recorded; "
                "record the result (-o), or choose --input-format mjpeg or h264"
            )
        self._head = head
        # A template of its own: the camera's streams go with their connection.
        self._hub = av.open(io.BytesIO(), "w", format=self._format)
        if (problem := self._refusal([video])) is not None:
            raise OptionError(
                f"--record-source {self.path}: {self._format} does not hold this {context.name} ({problem}); try .mkv"
            )
        self._templates: list[Stream] = [self._hub.add_stream_from_template(video, opaque=True)]
        if sound is not None:
            if (problem := self._refusal([*self._templates, sound.template])) is None:
                self._templates.append(sound.template)
            else:
                self._on_trouble(f"its sound ({sound.codec}) is not recorded: {self._format} does not hold it")
        self._thread = threading.Thread(target=self._write, name="source-recorder", daemon=True)
        self._thread.start()

    def put(self, copy: SourcePacket) -> None:
        """Takes a packet; never waits."""
        if self._thread is None or self._is_broken or (not copy.is_video and len(self._templates) < 2):
            return
        if self._needs_key and not (copy.is_video and copy.is_key):
            return
        if copy.dts <= self._last.get(copy.is_video, copy.dts - 1) or copy.pts < copy.dts:
            return
        try:
            self._waiting.put_nowait(copy)
        except queue.Full:
            self.dropped += 1
            self._needs_key = True
            return
        self._needs_key = False
        self._last[copy.is_video] = copy.dts

    def close(self, timeout: float) -> None:
        """Ends the file; at most so many seconds are spent on what still waits."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=timeout / 2)
        except queue.Full:
            self._is_broken = True
        self._thread.join(timeout / 2)

    def _refusal(self, streams: list[Stream]) -> str | None:
        """Why the container does not hold these; tried in memory."""
        try:
            with av.open(io.BytesIO(), "w", format=self._format, options=dict(self._options)) as trial:
                for stream in streams:
                    trial.add_stream_from_template(stream, opaque=True)
                trial.start_encoding()
        except (FFmpegError, ValueError) as error:
            return str(getattr(error, "strerror", None) or error)
        return None

    def _break(self, problem: str) -> None:
        self._is_broken = True
        self._on_trouble(problem)

    def _write(self) -> None:
        try:
            with av.open(str(self.path.absolute()), "w", format=self._format, options=dict(self._options)) as file:
                streams = [file.add_stream_from_template(template, opaque=True) for template in self._templates]
                while (copy := self._next()) is not None:
                    packet: Packet[Any] = Packet(copy.data)
                    packet.pts, packet.dts, packet.duration = copy.pts, copy.dts, copy.duration
                    packet.time_base, packet.is_keyframe = LIVE_TIME_BASE, copy.is_key
                    packet.stream = streams[0 if copy.is_video else 1]
                    file.mux(packet)
                    self.packets += 1
        except (FFmpegError, OSError, ValueError) as error:
            self._break(
                f"--record-source {self.path}: {getattr(error, 'strerror', None) or error}; recording has ended"
            )

    def _next(self) -> SourcePacket | None:
        while not self._is_broken:
            try:
                return self._waiting.get(timeout=0.2)
            except queue.Empty:
                continue
        return None
