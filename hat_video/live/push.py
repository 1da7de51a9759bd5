"""The child process of one network output: NUT comes in at standard input, and goes to a server as it comes.

In PyAV 18 the opening of an output, its header and its trailer hold Python's lock without any time limit, so a server
that accepts and is silent would freeze the whole program. Here there is nothing to freeze, and whoever started this can
kill it at any moment.

`python -m hat_video.live.push`, or this very file as a script, which starts in a quarter of a second since it imports
nothing else of the package. The first line of standard input is a job in JSON:

    parent   number of the process that started this; when that one is gone, this ends
    exec     a command that takes the place of this process and reads the same standard input; or
    url      where to, format: FFmpeg's muxer, options: of the muxer, and
    stall    seconds after which a server that takes nothing is given up

What is in the stream before `PRIMER_SECONDS` is there to be looked at and is not sent. The answer, on standard output,
is a line `progress=continue` once the server has agreed, and a last line that says what went wrong. The job does not
come as arguments, because everybody may read those, and there are passwords in URLs.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from fractions import Fraction
from typing import Any

import av
from av.error import FFmpegError

__all__ = ["PRIMER_SECONDS", "main"]

PRIMER_SECONDS = 1

_PR_SET_PDEATHSIG = 1
# What FFmpeg calls an error whose reason it has only logged.
_VAGUE = ("End of file", "Input/output error", "Invalid argument", "Invalid data found when processing input")


def main() -> int:
    """Does the job; returns the exit code."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return 2
        line += byte
    job = json.loads(line)
    _die_with(int(job["parent"]))
    # Whoever ends a service as a whole ends our parent too, which ends us when everything has been sent.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "exec" in job:
        try:
            os.execvp(job["exec"][0], job["exec"])
        except OSError as error:
            return _fail(f"{job['exec'][0]}: {error.strerror}")
    try:
        _push(job["url"], job["format"], job["options"], int(job["stall"]))
    except (FFmpegError, OSError, ValueError) as error:
        return _fail(_sentence(error))
    return 0


def _push(url: str, form: str, options: dict[str, str], stall: int) -> None:
    source = av.open("pipe:0", "r", format="nut", options={"probesize": "32", "analyzeduration": "1"})
    # From here on nothing decodes. At this level nothing is printed, and errors say what FFmpeg has said last.
    av.logging.set_level(av.logging.PANIC)
    out = av.open(url, "w", format=form, container_options=options)
    copies: dict[int, Any] = {}
    for stream in source.streams:
        if stream.type in ("video", "audio"):
            copies[stream.index] = out.add_stream_from_template(stream, opaque=True)
    out.start_encoding()
    _say("progress=continue")
    start: Fraction | None = None
    for packet in source.demux():
        if packet.pts is None or packet.dts is None or packet.stream.index not in copies:
            continue
        seconds = packet.dts * (packet.time_base or Fraction(0))
        if seconds < PRIMER_SECONDS:
            continue
        if start is None:
            start = seconds
        offset = round(start / (packet.time_base or Fraction(1)))
        packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
        if packet.pts < 0:
            continue
        packet.stream = copies[packet.stream.index]
        signal.alarm(stall)  # nobody handles it: it ends this process, whatever FFmpeg is waiting for
        out.mux(packet)
        signal.alarm(0)
    signal.alarm(stall)
    out.close()


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(2)


def _say(line: str) -> None:
    os.write(1, line.encode("utf-8", "replace") + b"\n")


def _fail(line: str) -> int:
    with suppress(OSError):
        _say(line)
    # The destructors would wait for the server once more.
    os._exit(1)


def _sentence(error: BaseException) -> str:
    said = str(error).split("last error log:")[-1] if "last error log:" in str(error) else ""
    reason = getattr(error, "strerror", None) or str(error)
    said = said.strip().rstrip(".]\n")
    return " ".join((f"{reason} ({said})" if said and reason in _VAGUE else reason).split())


if __name__ == "__main__":
    sys.exit(main())
