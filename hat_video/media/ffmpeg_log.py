"""FFmpeg's log, heard for as long as something is tried, and by one at a time.

While it is heard, a thread of a decoder that logs waits for Python's lock; if another thread holds that while it
flushes or frees the same decoder, both wait for ever. So it must be off at all other times, whatever two threads try.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import av.logging

__all__ = ["hear_ffmpeg"]

_lock = threading.RLock()


@contextmanager
def hear_ffmpeg(level: int) -> Iterator[None]:
    """Within, PyAV hears what is logged up to `level`; at PANIC nothing, but its exceptions carry FFmpeg's words.

    Args:
        level: one of `av.logging`'s.

    Others who want to hear wait meanwhile: each would take the level of the other for the one to go back to.
    """
    with _lock:
        before = av.logging.get_level()
        av.logging.set_level(level)
        try:
            yield
        finally:
            av.logging.set_level(before)
