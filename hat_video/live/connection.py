"""One connection to a camera: opened with little delay, and everything that can go wrong with it in one line."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import av
import av.error
from av.codec.context import Flags, ThreadType
from av.error import FFmpegError

from hat_video.errors import SourceError
from hat_video.live.sources import CameraSource, masked
from hat_video.media.ffmpeg_child import FfmpegChild, find_ffmpeg, pull_command
from hat_video.media.opening import demux, safe_options

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.stream import VideoStream

__all__ = ["Connection", "why"]

# Pictures without times, or with times that a frame counter made up.
_TIMELESS = {"mpjpeg", "mjpeg", "jpeg_pipe", "mjpeg_2000", "png_pipe", "webp_pipe"}
# Fetched file by file, each as fast as it goes.
_IN_PIECES = {"hls", "dash"}
_POLL_MS = 100


class _Pipe:
    """The reading half of a pipe: what is there as soon as it is there, and no longer wait than `is_due` allows.

    An error is raised once, and is the end of it. Some demuxers go on reading, and PyAV, which keeps one error until
    FFmpeg has returned, prints the traceback of each that comes before that.
    """

    def __init__(self, descriptor: int, is_due: Callable[[], bool]) -> None:
        self._descriptor, self._is_due = descriptor, is_due
        self._has_failed = False
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN | select.POLLHUP)

    def read(self, count: int) -> bytes:
        if self._has_failed:
            return b""
        try:
            while not self._poll.poll(_POLL_MS):
                if self._is_due():
                    raise TimeoutError("nothing comes")
            return os.read(self._descriptor, count)
        except OSError:
            self._has_failed = True
            raise


class Connection:
    """An opened source, for the thread that opened it; that thread must hold a `Brake`.

    Args:
        source: what to open.
        is_due: as `Brake` has it; for what is read through a pipe.
        timeout: seconds for the open and for each packet, should the brake not work.

    Raises:
        SourceError: it cannot be opened, or has no video; one line without credentials.
    """

    def __init__(self, source: CameraSource, is_due: Callable[[], bool], timeout: float) -> None:
        self.source = source
        self._child: FfmpegChild | None = None
        with ExitStack() as opened:
            try:
                self.container = self._open(opened, is_due, timeout)
                opened.callback(self.container.close)
                if not self.container.streams.video:
                    raise SourceError(f"{source.name}: there is no video in it")
            except (FFmpegError, OSError, ValueError) as error:
                if isinstance(error, SourceError):
                    raise
                raise SourceError(f"{source.name}: {self.why(error)}") from None
            self._opened = opened.pop_all()
        self.video: VideoStream = self.container.streams.video[0]
        self.audio: AudioStream | None = next(
            (stream for stream in self.container.streams.audio if stream.codec_context is not None), None
        )
        if self.video.codec_context is None:
            self.close()
            raise SourceError(f"{source.name}: its video is of a kind that FFmpeg cannot decode")
        context = self.video.codec_context
        # Slices, not frames: threads that hold a frame each are frames of delay. One thread leaves the CPU to others.
        context.thread_type, context.thread_count = ThreadType.SLICE, 1
        context.flags |= Flags.low_delay
        names = set(self.container.format.name.split(","))
        # AVFMT_NOTIMESTAMPS: bare H.264 and its like, counted at a rate that nobody has told.
        is_timeless = bool(names & _TIMELESS) or bool(self.container.format.flags & 0x80)
        self.by_arrival = is_timeless or source.stamps == "arrival"
        """Whether the pictures go by the time at which they arrive, since they carry none."""
        is_film = source.kind in ("network", "pipe") and bool(self.container.duration)
        self.in_pieces = bool(names & _IN_PIECES) or is_film
        """Whether many seconds come at once, as of a playlist, or of a film that is there as a whole."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def packets(self) -> Iterator[Packet[Stream]]:
        """What comes of video and sound.

        Raises:
            FFmpegError, OSError: the connection is broken, or its brake was due.
        """
        streams: list[Stream] = [self.video] if self.audio is None else [self.video, self.audio]
        packets = demux(self.container, *streams)
        try:
            yield from packets
        finally:
            # Before the container is closed: it uses it once more.
            packets.close()  # type: ignore[attr-defined]

    def why(self, error: Exception) -> str:
        """The error in one line; for a child process by what the child has said."""
        said = "" if self._child is None else self._child.last_words
        return masked(said).removeprefix(f"{self.source.name}: ") if said else why(error, self.source)

    def close(self) -> None:
        """Lets go of everything; a second time does nothing."""
        self._opened.close()

    def _open(self, opened: ExitStack, is_due: Callable[[], bool], timeout: float) -> InputContainer:
        source = self.source
        if source.kind == "pipe":
            options = safe_options() | source.options
            return av.open(_Pipe(sys.stdin.fileno(), is_due), "r", format=source.format, options=options)
        if source.via_ffmpeg:
            command = pull_command(source.url, find_ffmpeg("srt"))
            self._child = opened.enter_context(FfmpegChild(command))
            pipe = _Pipe(self._child.stdout.fileno(), is_due)
            return av.open(pipe, "r", format=source.format, options=safe_options() | source.options)
        return av.open(source.url, "r", format=source.format, options=dict(source.options), timeout=(timeout, timeout))


def why(error: Exception, source: CameraSource) -> str:
    """What went wrong and what to do, without credentials and without the source's name."""
    match error:
        case av.error.HTTPUnauthorizedError() | av.error.HTTPForbiddenError():
            return (
                "the camera refuses this user and password (401/403); give them as in rtsp://user:password@camera/..."
            )
        case av.error.HTTPNotFoundError():
            return "there is no such stream (404); check the path after the host"
        case ConnectionRefusedError():
            return "connection refused: nothing listens there; check host and port, and that the camera is on"
        case FileNotFoundError() if source.kind == "device":
            return "no such device; `hat-video devices` lists those that are there"
        case PermissionError() if source.kind == "device":
            return "no right to open it; add yourself to the group that owns it, mostly `video`"
        case av.error.ExitError() | TimeoutError():
            return "no answer"
        case av.error.ProtocolNotFoundError():
            return "its protocol is not built into this FFmpeg"
        case av.error.InvalidDataError():
            return "what comes from there is no video that FFmpeg knows"
        case EOFError() | av.error.EOFError():
            return "it ended"
    said = masked(str(getattr(error, "strerror", None) or error)).splitlines()[0]
    if source.kind == "screen":
        return f"the screen cannot be grabbed ({said}); is an X server there, and is $XAUTHORITY its key?"
    if source.kind == "network" and isinstance(error, OSError):
        return f"{said}; check the host's name, and that it can be reached"
    return said
