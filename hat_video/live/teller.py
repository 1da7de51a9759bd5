"""Calls the functions that a caller gave, from a thread of its own: one that waits or fails is felt by nobody."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

__all__ = ["Teller"]

T = TypeVar("T")

_PLACES = 1000
_CLOSE_SECONDS = 1.0


class Teller:
    """Hands values to functions, in the order in which they came. A context manager.

    Leaving it waits for what was told, for a second at most: whoever prints may stand still, as on a terminal that was
    stopped, and is left behind then.

    Args:
        on_error: told in one line that a function has raised; that function is called no more.
    """

    def __init__(self, on_error: Callable[[str], object]) -> None:
        self._on_error = on_error
        self._calls: queue.Queue[tuple[object, Callable[[], None]] | None] = queue.Queue(_PLACES)
        self._broken: set[object] = set()
        self._thread = threading.Thread(target=self._run, name="hat-video-teller", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._calls.put_nowait(None)
        except queue.Full:
            return  # nobody has listened for a long time
        self._thread.join(_CLOSE_SECONDS)

    def tell(self, function: Callable[[T], None] | None, value: T) -> None:
        """Has `function(value)` called. From any thread; never waits: what there is no place for is left out."""
        if function is None or function in self._broken:
            return
        with suppress(queue.Full):
            self._calls.put_nowait((function, partial(function, value)))

    def _run(self) -> None:
        while (told := self._calls.get()) is not None:
            function, call = told
            if function in self._broken:
                continue
            try:
                call()
            except Exception as error:  # noqa: BLE001 - it is the caller's own, and no reason to end a recording
                self._broken.add(function)
                self._on_error(f"{getattr(function, '__name__', function)} raised {error!r} and is called no more")
