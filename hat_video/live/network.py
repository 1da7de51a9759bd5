"""Network outputs, as seen from here: a child process that is fed, watched, killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

from av.error import FFmpegError

from hat_video.errors import OutputError
from hat_video.live import push
from hat_video.live.muxing import Muxer, Streams
from hat_video.live.output import Output, OutputEvent
from hat_video.live.packet import LivePacket
from hat_video.live.pipes import PipeWriter
from hat_video.live.sources import masked

__all__ = ["NETWORK_SCHEMES", "NetworkOutput"]

NETWORK_SCHEMES = {
    "rtmp": "flv",
    "rtmps": "flv",
    "rtsp": "rtsp",
    "rtsps": "rtsp",
    "srt": "mpegts",
    "tcp": "mpegts",
    "udp": "mpegts",
}
"""What can be pushed to, and in which container."""

_OPTIONS = {"flv": {"flvflags": "no_duration_filesize"}, "rtsp": {"rtsp_transport": "tcp"}, "mpegts": {}}
_ANSWER_SECONDS = 4.5
_STALL_SECONDS = 10.0
_CLOSE_SECONDS = 1.0
# Where the stream begins, behind the pictures that are there to be looked at: twice what `push` says, since the dts of
# reordered pictures are earlier than that.
_START_TICKS = 2 * push.PRIMER_SECONDS * 90_000
_PROGRESS = re.compile(r"\w+=.*")


class Primed(Streams, Protocol):
    """Streams of an encoder that can give a key frame to be looked at."""

    def primer(self) -> LivePacket: ...


class NetworkOutput(Output):
    """Pushes to a server, and does so again, after 0.25 to 10 seconds, whenever it cannot be reached.

    Args:
        url: where to, with credentials.
        streams: of the encoder.
    """

    def __init__(
        self,
        name: str,
        url: str,
        streams: Primed,
        *,
        ask_for_key: Callable[[], None],
        on_event: Callable[[OutputEvent], None] | None = None,
    ) -> None:
        super().__init__(name, ask_for_key=ask_for_key, on_event=on_event)
        self._url, self._streams = url, streams
        self._primer = streams.primer()

    def connect(self) -> _Pushing:
        """Starts the child, and waits until the server has agreed."""
        child = _Child(_job(self._url), self.aborted)
        try:
            return _Pushing(child, self._streams, self._primer)
        except BaseException:
            child.kill()
            raise


def _job(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    if parts.scheme == "srt":
        from hat_video.media.ffmpeg_child import find_ffmpeg, push_command

        return {"exec": push_command(url, find_ffmpeg("srt", is_output=True))}
    form = NETWORK_SCHEMES[parts.scheme]
    if parts.scheme == "udp" and "pkt_size=" not in parts.query:
        # Whole packets of the transport stream.
        url = f"{url}{'&' if parts.query else '?'}pkt_size=1316"
    return {"url": url, "format": form, "options": _OPTIONS[form], "stall": round(_STALL_SECONDS)}


class _Child:
    """The process, and what it says."""

    def __init__(self, job: dict[str, Any], aborted: threading.Event) -> None:
        self.aborted = aborted
        self.is_agreed = False
        self._url = job.get("url") or job["exec"][-1]
        self._said = ""
        self._last = ""
        # -P: the folder of the script must not be searched for modules. Its own session: Ctrl-C is for us, and we
        # then end it as it should be ended.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(push.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self._output = self.process.stdin, self.process.stdout
        os.set_blocking(self._output.fileno(), False)
        job = {**job, "parent": os.getpid()}
        try:
            self.input.write(json.dumps(job).encode() + b"\n")
        except BrokenPipeError:
            raise self.ended() from None

    def check(self) -> None:
        """Hears what it says; raises `OutputError` where it has ended."""
        with suppress(BlockingIOError):
            while data := self._output.read(4096):
                self._said += data.decode("utf-8", "replace")
        *lines, self._said = self._said.split("\n")
        for line in map(str.strip, lines):
            if line == "progress=continue":
                self.is_agreed = True
            elif line and not _PROGRESS.fullmatch(line):
                self._last = line
        if self.process.poll() is not None:
            raise self.ended()

    def ended(self) -> OutputError:
        """Why it is gone."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        with suppress(BlockingIOError, OSError):
            self._said += (self._output.read(65536) or b"").decode("utf-8", "replace")
        lines = [line.strip() for line in self._said.split("\n")]
        self._last = next((x for x in reversed(lines) if x and not _PROGRESS.fullmatch(x)), self._last)
        code = self.process.poll()
        if code == -signal.SIGALRM:
            return OutputError(f"the server has taken nothing for {_STALL_SECONDS:g} s")
        if self._last:
            return OutputError(masked(self._last.removeprefix(self._url).strip(": ")))
        return OutputError(f"its process has ended ({'signal ' + str(-code) if code and code < 0 else code})")

    def wait_agreed(self, seconds: float) -> None:
        """Waits until the server has agreed."""
        give_up = time.monotonic() + seconds
        while not self.is_agreed:
            self.check()
            if self.aborted.is_set():
                raise OutputError("was given up at the end")
            if time.monotonic() > give_up:
                raise OutputError(f"no answer within {_ANSWER_SECONDS:g} s")
            time.sleep(0.02)

    def finish(self) -> None:
        """Lets it end by itself, and kills it if it does not.

        Raises:
            OutputError: it had to be killed, or failed: what was sent last may not have arrived.
        """
        with suppress(OSError):
            self.input.close()
        give_up = time.monotonic() + _CLOSE_SECONDS
        while self.process.poll() is None and time.monotonic() < give_up and not self.aborted.wait(0.02):
            pass
        error = None
        if self.process.poll() is None:
            error = OutputError("was not finished in time; the last pictures may not have arrived")
        elif self.process.returncode:
            error = self.ended()
        self.kill()
        if error is not None:
            raise error

    def kill(self) -> None:
        """Ends it at once."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.input, self._output):
            with suppress(OSError):
                pipe.close()


class _Pushing:
    """A session with a server."""

    def __init__(self, child: _Child, streams: Streams, primer: LivePacket) -> None:
        self._child = child
        self._start: int | None = None
        give_up = time.monotonic() + _ANSWER_SECONDS
        self._writer = PipeWriter(
            child.input.fileno(),
            aborted=child.aborted,
            stall_seconds=_STALL_SECONDS,
            check=child.check,
            on_broken=child.ended,
        )
        self._muxer = Muxer(self._writer, "nut", streams, start=0)
        # Twice, because a muxer of several streams holds a packet back until it sees the next one.
        for shift in (0, primer.duration):
            self._muxer.write(primer, shift=shift)
        child.wait_agreed(give_up - time.monotonic())

    @property
    def bytes(self) -> int:
        """As `Session` has it."""
        return self._writer.written

    def write(self, packet: LivePacket) -> bool:
        """As `Session` has it."""
        self._child.check()
        if self._start is None:
            if packet.kind != "video" or not packet.is_key:
                return False
            self._start = packet.pts
        if packet.pts < self._start:
            return False
        return self._muxer.write(packet, shift=_START_TICKS - self._start)

    def finish(self) -> None:
        """As `Session` has it."""
        try:
            self._muxer.close()
        except BaseException:
            with suppress(OutputError):  # the first error is the reason
                self._child.finish()
            raise
        self._child.finish()

    def abandon(self) -> None:
        """As `Session` has it."""
        self._muxer.abandon()
        with suppress(FFmpegError, OSError, ValueError):
            self._child.kill()
