"""What PyAV's wheel lacks, SRT above all: FFmpeg's own program in a process of its own, at the end of a pipe."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from functools import cache
from importlib import import_module
from typing import Any, Self

from hat_video.errors import OutputError, SourceError

__all__ = ["FfmpegChild", "die_with_parent", "find_ffmpeg", "pull_command", "push_command"]

_NEEDED = "install FFmpeg with libsrt (apt install ffmpeg), or name its program in HAT_VIDEO_FFMPEG"
_PR_SET_PDEATHSIG = 1


class FfmpegChild:
    """FFmpeg's program, killed when this is closed and, on Linux, when the thread that started it ends in any way.

    Args:
        command: as `pull_command` or `push_command` gives it.
        reads: it takes bytes on its standard input (`stdin`); else it gives some on its standard output (`stdout`).
    """

    def __init__(self, command: list[str], *, reads: bool = False) -> None:
        self._said: deque[str] = deque(maxlen=20)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if reads else subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            preexec_fn=die_with_parent() if sys.platform == "linux" else None,
            # Ctrl-C is for us: the child ends when we say so.
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, name="ffmpeg-child", daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stdin(self) -> Any:
        """Unbuffered binary file that FFmpeg reads."""
        return self.process.stdin

    @property
    def stdout(self) -> Any:
        """Unbuffered binary file that FFmpeg writes."""
        return self.process.stdout

    @property
    def last_words(self) -> str:
        """The last line of what FFmpeg has complained of; credentials are in it as they were given. "" if nothing."""
        return self._said[-1] if self._said else ""

    def close(self) -> None:
        """Kills the process and waits for its end; a second time does nothing."""
        if self.process.poll() is None:
            # With whatever it has started, by a wrapper's script: that would keep our pipes open.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._listener.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # What was still to be written, nobody reads any more.
                    continue

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            text = line.decode("utf-8", "replace").strip()
            if text:
                self._said.append(text)


def die_with_parent() -> Any:
    """A `preexec_fn` that has Linux kill the child when the thread that started it is gone, whatever ends it."""
    # Looked up before the fork: afterwards only what is async-signal-safe may be done.
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def find_ffmpeg(protocol: str = "srt", *, is_output: bool = False) -> str:
    """Path of an FFmpeg program that speaks `protocol`.

    Raises:
        SourceError: there is none, or it does not; OutputError where `is_output`.
    """
    error = OutputError if is_output else SourceError
    asked = os.environ.get("HAT_VIDEO_FFMPEG")
    program = shutil.which(asked or "ffmpeg")
    if program is None:
        raise error(f"{protocol}:// needs the program ffmpeg, and {asked or 'ffmpeg'} is not there: {_NEEDED}")
    if protocol not in _protocols(program):
        raise error(f"{protocol}:// is not built into {program}: {_NEEDED}")
    return program


@cache
def _protocols(program: str) -> frozenset[str]:
    try:
        said = subprocess.run(
            [program, "-hide_banner", "-protocols"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(said.stdout.split())


def pull_command(url: str, program: str) -> list[str]:
    """Command that takes bytes from `url` and gives them as they are on standard output.

    The child looks at nothing: finding the streams is left to who reads, and is done once. Measured with FFmpeg 5.1, as
    `-c copy -f nut` it was 3 s later with the first picture, and 0.2 s later with all.
    """
    ffmpeg = _ffmpeg_python()
    source = ffmpeg.input(url, format="data", probesize=32, analyzeduration=0)
    return _quiet(source.output("pipe:1", format="data", codec="copy", map=0, flush_packets=1).compile(cmd=program))


def push_command(url: str, program: str) -> list[str]:
    """Command that takes NUT on standard input and sends its packets to `url` as a transport stream.

    It looks at one packet and connects, since there may be no more yet. On standard output it says how far it is.
    """
    ffmpeg = _ffmpeg_python(is_output=True)
    source = ffmpeg.input("pipe:0", format="nut", fflags="nobuffer", probesize=32, analyzeduration=1)
    target = source.output(url, format="mpegts", codec="copy", map=0, flush_packets=1, muxdelay=0, muxpreload=0)
    progress = target.global_args("-progress", "pipe:1", "-stats_period", "0.5")
    return _quiet(progress.compile(cmd=program))


def _ffmpeg_python(*, is_output: bool = False) -> Any:
    try:
        return import_module("ffmpeg")
    except ImportError:
        error = OutputError if is_output else SourceError
        raise error("srt:// needs the package ffmpeg-python; install it with: pip install ffmpeg-python") from None


def _quiet(command: list[str]) -> list[str]:
    return [command[0], "-hide_banner", "-nostdin", "-loglevel", "error", *command[1:]]
