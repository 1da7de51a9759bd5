"""Ends what FFmpeg waits for in this thread: a camera that is silent, a connection that nobody answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any, Self

from av.container import core

__all__ = ["Brake"]


class _Clock:
    """The `time` module as PyAV's interrupt callback sees it; for a thread whose brake is due, time leaps."""

    def __init__(self) -> None:
        self.brakes: dict[int, Callable[[], bool]] = {}
        # Each time further: the callback compares with what it was told when the call began.
        self._leaps = count(1)

    def monotonic(self) -> float:
        is_due = self.brakes.get(threading.get_ident())
        if is_due is not None and is_due():
            return next(self._leaps) * 1e9
        return time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


_clock = _Clock()
_lock = threading.Lock()


class Brake:
    """While it is held, calls of FFmpeg in this thread return with an error as soon as `is_due` says True.

    FFmpeg asks about ten times a second, wherever it waits for a network, whether it should give up. PyAV's answer
    knows fixed time-outs only, counted anew for each half of an open and for each packet; no other thread can end a
    wait. It takes its time from the `time` that its module has: that is where this looks in. Without such a name
    (another PyAV) nothing is changed, and the time-outs given to `av.open` are all there is; `av.open` must be given
    some, since PyAV answers nothing at all without them.

    A driver that does not return, and the resolver of host names, ask nobody; those cannot be ended.

    Args:
        is_due: called with Python's lock held; must not wait. Once True it must stay so until the call has returned.
    """

    def __init__(self, is_due: Callable[[], bool]) -> None:
        self._is_due = is_due

    def __enter__(self) -> Self:
        with _lock:
            if "time" in vars(core):
                vars(core)["time"] = _clock
            _clock.brakes[threading.get_ident()] = self._is_due
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _clock.brakes.pop(threading.get_ident(), None)
            if not _clock.brakes and "time" in vars(core):
                vars(core)["time"] = time
