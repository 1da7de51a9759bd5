"""Where captured frames wait for the network: few places, and a newcomer pushes out the oldest."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Mailbox"]

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Between one thread that must never wait and one that takes what is there.

    With one place the newest wins, and nothing that is taken is older than the work on the frame before. Dropping the
    newest instead would keep a full box at its age for good.

    Args:
        places: 1 or more.
    """

    def __init__(self, places: int = 1) -> None:
        if places < 1:
            raise ValueError(f"a mailbox of {places} places holds nothing")
        self._items: deque[T] = deque(maxlen=places)
        self._changed = threading.Condition()
        self._is_closed = False
        self.dropped = 0
        """Items that were pushed out."""

    def put(self, item: T) -> bool:
        """Never waits. False once it is closed: then nothing is taken."""
        with self._changed:
            if self._is_closed:
                return False
            self.dropped += len(self._items) == self._items.maxlen
            self._items.append(item)
            self._changed.notify_all()
            return True

    def wait_empty(self, timeout: float) -> bool:
        """Whether all that was put has been taken, within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._items, timeout)

    def take(self, timeout: float) -> T | None:
        """The oldest item that is there; None after `timeout` seconds without one, or once it is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_closed, timeout)
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Nothing comes any more: who waits is let go once the last item is taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Closed, and empty."""
        with self._changed:
            return self._is_closed and not self._items

    def __len__(self) -> int:
        with self._changed:
            return len(self._items)
