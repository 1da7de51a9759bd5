"""Threads that run ahead, with bounded room: what keeps decode, network and encode busy at the same time.

One stop event is shared by all that belongs to one run. Whoever fails or is told to stop sets it; everybody else then
leaves within a fraction of a second, the first error reaches the caller once, and no thread is left behind.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch

__all__ = ["Prefetch", "map_in_flight"]

T = TypeVar("T")
R = TypeVar("R")

_POLL_SECONDS = 0.05


class _End:
    """Closes the queue; carries the producer's error, if there was one."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetch(Generic[T]):
    """Iterates `items` in a thread of its own, at most `depth` items ahead of the consumer.

    Use it as a context manager: leaving the block stops and joins the thread, whatever happened inside. An error in
    `items` is raised again, once, where the consumer iterates. Once `stop` is set, the iteration simply ends.
    """

    def __init__(self, items: Iterable[T], *, depth: int, stop: threading.Event, name: str) -> None:
        self._items = items
        self._stop = stop
        self._left = threading.Event()
        self._box: queue.Queue[T | _End] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._produce, name=name, daemon=True)

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while not self._stop.is_set():
            try:
                item = self._box.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    def _produce(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as caught:  # noqa: BLE001 - it belongs to the consumer, who raises it again
            error = caught
        self._put(_End(error))

    def _put(self, item: T | _End) -> bool:
        while not (self._stop.is_set() or self._left.is_set()):
            try:
                self._box.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False


def map_in_flight(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, stop: threading.Event
) -> Generator[R, None, None]:
    """`function` of every item, in order, with up to `workers` items computed at once, each on one torch thread.

    On a CPU the frame is the unit of parallelism: two frames on one thread each are faster than one frame on two
    threads, and the result cannot depend on how many cores there are. At most twice as many are held, so that a worker
    does not wait for the consumer.

    Args:
        function: called from several threads at once; must not keep state between items.
        items: pulled lazily, from the thread that iterates the result.
        workers: 1 or more.
        stop: once set, nothing more is started and the iteration ends.

    Raises:
        The first error of `function`, in the order of the items.
    """
    pending: deque[Future[R]] = deque()
    # Every intra-op pool is per thread: the initializer leaves the caller's own thread count alone.
    with ThreadPoolExecutor(workers, "hat-video-frame", torch.set_num_threads, (1,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                while len(pending) > 2 * workers:
                    if stop.is_set():
                        return
                    yield pending.popleft().result()
            while pending and not stop.is_set():
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
