"""Pipes that may be full for ever: every wait can be ended, and holds nobody but the thread that waits."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

from hat_video.errors import OutputError
from hat_video.live.output import EndedError

__all__ = ["PipeWriter"]

# A pipe that can be written to takes so much at least without waiting (PIPE_BUF).
_ATOMIC = 4096
_GLANCE_MS = 100


class PipeWriter:
    """The writing half of a pipe; it is never made non-blocking, since other processes may have it too.

    Args:
        fd: of the pipe. It is not closed.
        aborted: set: give up.
        stall_seconds: give up when nobody has read for so long; never if None.
        check: called now and then while it waits, and before each piece; may raise.
        on_broken: what to raise when the reader has gone.
    """

    def __init__(
        self,
        fd: int,
        *,
        aborted: threading.Event,
        stall_seconds: float | None = None,
        check: Callable[[], None] | None = None,
        on_broken: Callable[[], OutputError] = lambda: EndedError("closed by its reader"),
    ) -> None:
        self._fd, self._aborted, self._stall = fd, aborted, stall_seconds
        self._check, self._on_broken = check, on_broken
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self.closed = False
        self.written = 0
        """Bytes so far."""

    def write(self, data: bytes) -> int:
        """All of it, or an error.

        Raises:
            OutputError: the reader is gone, does not read, or the wait was ended.
        """
        view = memoryview(data)
        while view:
            self._wait()
            try:
                count = os.write(self._fd, view[:_ATOMIC])
            except BrokenPipeError:
                raise self._on_broken() from None
            view = view[count:]
            self.written += count
        return len(data)

    def _wait(self) -> None:
        give_up = None if self._stall is None else time.monotonic() + self._stall
        while True:
            if self._aborted.is_set():
                raise OutputError("was given up at the end: nobody reads it")
            if self._check is not None:
                self._check()
            if self._poll.poll(_GLANCE_MS):
                return
            if give_up is not None and time.monotonic() > give_up:
                raise OutputError(f"has taken nothing for {self._stall:g} s")
