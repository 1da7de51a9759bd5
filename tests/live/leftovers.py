"""What a live run must not leave behind, and a port for it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["children", "free_port", "nothing_left"]

_PATIENCE_SECONDS = 5.0


def children() -> set[int]:
    """Processes that this one has started and that are still there, zombies too."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found |= {int(word) for word in path.read_text(encoding="ascii").split()}
    return found


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Asserts that no thread and no child more than before are there in the end."""
    threads, processes = set(threading.enumerate()), children()
    yield
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while (set(threading.enumerate()) - threads or children() - processes) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - threads
    assert not children() - processes


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """A port of this machine that nobody used a moment ago."""
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
