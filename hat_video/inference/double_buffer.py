"""Threads that run ahead, with bounded room: what keeps decode, network and encode busy at the same time.

One stop event is shared by all that belongs to one run. Whoever fails or is told to stop sets it; everybody else then
leaves within a fraction of a second, the first error reaches the caller once, and no thread is left behind.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch

from hat_video.errors import DeviceLostError
from hat_video.inference.timeline import Timeline

__all__ = ["Given", "Lane", "Prefetch", "StreamLane", "ThreadLane", "Ticket", "map_in_flight", "run_through"]

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_POLL_SECONDS = 0.05
# Older torch has no class of its own for what CUDA reports late; there such an error stays as it is.
_GPU_ERROR: type[Exception] = getattr(torch, "AcceleratorError", torch.cuda.CudaError)


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


class Ticket(Protocol[R_co]):
    """Work that was handed to a lane."""

    def wait(self) -> R_co:
        """Returns the result once it is there; raises what the work raised."""
        ...


class Lane(Protocol):
    """Where work is done, one piece after the other or several at once, while the caller goes on."""

    def submit(self, function: Callable[[T], R], after: Ticket[T]) -> Ticket[R]:
        """Does `function` with the result of `after`, as soon as that is there."""
        ...

    def close(self) -> None:
        """Drops what has not begun, and returns once nothing of the lane is at work."""
        ...


@dataclass(frozen=True, slots=True)
class Given(Generic[R]):
    """A ticket for what is there already."""

    value: R

    def wait(self) -> R:
        return self.value


class ThreadLane:
    """Threads of this process, each with one torch thread.

    On a CPU the frame is the unit of parallelism: two frames on one thread each are faster than one frame on two
    threads, and the result cannot depend on how many cores there are.

    Args:
        name: of the lane, in the timeline.
        workers: threads.
        timeline: is told of every piece of work.
    """

    def __init__(self, name: str, workers: int = 1, timeline: Timeline | None = None) -> None:
        self._name, self._timeline = name, timeline
        # Every intra-op pool is per thread: the initializer leaves the caller's own thread count alone.
        self._pool = ThreadPoolExecutor(workers, f"hat-video-{name}", torch.set_num_threads, (1,))

    def submit(self, function: Callable[[T], R], after: Ticket[T]) -> Ticket[R]:
        """See `Lane`."""

        def work() -> R:
            given = after.wait()
            began = time.perf_counter()
            try:
                return function(given)
            finally:
                if self._timeline is not None:
                    self._timeline.add(self._name, began, time.perf_counter(), _first_pts(given))

        return _InThread(self._pool.submit(work))

    def close(self) -> None:
        """See `Lane`."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _InThread(Generic[R]):
    future: Future[R]

    def wait(self) -> R:
        return self.future.result()


class StreamLane:
    """A CUDA stream: work is queued on the GPU by the caller's thread, which does not wait for it.

    Args:
        name: of the lane, in the timeline.
        device: the GPU.
        timeline: is told of every piece of work, by the GPU's own clock.
    """

    def __init__(self, name: str, device: torch.device, timeline: Timeline | None = None) -> None:
        self._name, self._timeline = name, timeline
        self._stream = _stream_of(name, device)
        # The GPU's clock and ours have this instant in common.
        self._origin = _event()
        self._origin.record(self._stream)
        self._origin.synchronize()
        self._began = time.perf_counter()

    def submit(self, function: Callable[[T], R], after: Ticket[T]) -> Ticket[R]:
        """See `Lane`."""
        with torch.cuda.stream(self._stream):
            if isinstance(after, _OnStream):
                self._stream.wait_event(after.done)
                given = after.value
            else:
                given = after.wait()
            begun, done = _event(), _event()
            begun.record(self._stream)
            value = function(given)
            done.record(self._stream)
        return _OnStream(value, begun, done, self, after, _first_pts(given))

    def tell(self, begun: torch.cuda.Event, done: torch.cuda.Event, pts: int | None) -> None:
        """Puts work that is done on the timeline."""
        if self._timeline is not None:
            begin, end = (self._began + self._origin.elapsed_time(event) / 1000 for event in (begun, done))
            self._timeline.add(self._name, begin, end, pts)

    def close(self) -> None:
        """See `Lane`."""
        self._stream.synchronize()


@dataclass(frozen=True, slots=True)
class _OnStream(Generic[R]):
    value: R
    begun: torch.cuda.Event
    done: torch.cuda.Event
    lane: StreamLane
    after: Ticket[Any]
    """What the work was done on: its memory must not be given to others before `done`."""
    pts: int | None

    def wait(self) -> R:
        if isinstance(self.after, _OnStream):
            self.after.wait()
        self.done.synchronize()
        self.lane.tell(self.begun, self.done, self.pts)
        return self.value


@lru_cache
def _stream_of(name: str, device: torch.device) -> torch.cuda.Stream:
    """One for all lanes of a name: torch keeps freed memory for the stream that had it, so new ones would need more."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _first_pts(item: object) -> int | None:
    pts = getattr(item, "pts", None)
    return pts[0] if isinstance(pts, tuple) and pts else None


def run_through(
    items: Iterable[T],
    stages: Sequence[tuple[Lane, Callable[[Any], Any]]],
    *,
    depth: int,
    stop: threading.Event,
) -> Generator[Any, None, None]:
    """Every item through every stage, in order, with several items on their way at once.

    With the lanes copy-in, compute and copy-out on streams of a GPU and a depth of 2 this is double buffering: while
    one batch is computed, the next one arrives and the last one leaves. What an item needs is kept until it is through.
    The lanes are closed at the end, however it comes.

    Args:
        items: pulled lazily, from the thread that iterates the result.
        stages: where, and what is done there with the result of the stage before.
        depth: items on their way while the next one is pulled; 1 or more.
        stop: once set, nothing more is started and the iteration ends.

    Raises:
        The first error of a stage, in the order of the items.
        DeviceLostError: the GPU failed; the message names the frames.
    """
    pending: deque[tuple[int | None, Ticket[Any]]] = deque()
    try:
        for item in items:
            ticket: Ticket[Any] = Given(item)
            for lane, function in stages:
                ticket = lane.submit(function, ticket)
            pending.append((_first_pts(item), ticket))
            del item, ticket
            while len(pending) > depth:
                if stop.is_set():
                    return
                yield _result(*pending.popleft())
        while pending and not stop.is_set():
            yield _result(*pending.popleft())
    finally:
        for lane, _ in stages:
            lane.close()


def _result(pts: int | None, ticket: Ticket[R]) -> R:
    try:
        return ticket.wait()
    except _GPU_ERROR as error:
        first = str(error).partition("\n")[0]
        raise DeviceLostError(f"the GPU failed at the frames from pts {pts}: {first}") from error


def map_in_flight(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    stop: threading.Event,
    timeline: Timeline | None = None,
) -> Generator[R, None, None]:
    """`function` of every item, in order, with up to `workers` items computed at once on this machine's CPUs.

    At most twice as many are held, so that a worker does not wait for the consumer.

    Args:
        function: called from several threads at once; must not keep state between items.
        items: pulled lazily, from the thread that iterates the result.
        workers: 1 or more.
        stop: once set, nothing more is started and the iteration ends.
        timeline: is told of every item, in the lane `model`.

    Raises:
        The first error of `function`, in the order of the items.
    """
    return run_through(items, [(ThreadLane("model", workers, timeline), function)], depth=2 * workers, stop=stop)
