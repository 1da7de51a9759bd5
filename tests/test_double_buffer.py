"""Threads that run ahead: order, bounded room, errors once, and nobody left behind."""

import threading
import time
from collections.abc import Iterator

import pytest

from hat_video.inference.double_buffer import Prefetch, map_in_flight


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hat-video")]


def test_prefetch_gives_everything_in_order() -> None:
    with Prefetch(range(100), depth=3, stop=threading.Event(), name="hat-video-test") as items:
        assert list(items) == list(range(100))
    assert our_threads() == []


def test_prefetch_holds_no_more_than_its_depth() -> None:
    made = 0

    def source() -> Iterator[int]:
        nonlocal made
        while made < 100:
            made += 1
            yield made

    with Prefetch(source(), depth=3, stop=threading.Event(), name="hat-video-test") as items:
        iterator = iter(items)
        next(iterator)
        time.sleep(0.3)
        # One taken, three in the box, one in the producer's hand.
        assert made <= 5
    assert our_threads() == []


def test_prefetch_raises_the_producers_error_after_what_came_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("the third")

    seen = []
    with (
        pytest.raises(KeyError, match="the third"),
        Prefetch(source(), depth=8, stop=threading.Event(), name="hat-video-test") as items,
    ):
        seen.extend(items)
    assert our_threads() == []


def test_prefetch_leaves_when_the_consumer_fails() -> None:
    def consume() -> None:
        with Prefetch(iter(int, 1), depth=1, stop=threading.Event(), name="hat-video-test") as items:
            for item in items:
                1 // item

    with pytest.raises(ZeroDivisionError):
        consume()
    assert our_threads() == []


def test_prefetch_ends_when_stopped() -> None:
    stop = threading.Event()
    with Prefetch(iter(int, 1), depth=1, stop=stop, name="hat-video-test") as items:
        threading.Timer(0.1, stop.set).start()
        for _ in items:
            pass
    assert our_threads() == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_in_flight_keeps_the_order(workers: int) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item % 5 == 0 else 0)
        return item * item

    got = list(map_in_flight(slow_first, range(40), workers=workers, stop=threading.Event()))
    assert got == [item * item for item in range(40)]
    assert our_threads() == []


def test_in_flight_computes_that_many_at_once() -> None:
    meeting = threading.Barrier(3, timeout=5)
    # Three that wait for one another can only pass if three run at once.
    assert (
        list(map_in_flight(lambda item: meeting.wait() >= 0, range(6), workers=3, stop=threading.Event())) == [True] * 6
    )


def test_in_flight_raises_the_first_error_in_order_and_leaves_no_thread() -> None:
    def fail_at(item: int) -> int:
        if item in (3, 4):
            raise ValueError(f"item {item}")
        return item

    seen = []
    with pytest.raises(ValueError, match="item 3"):
        seen.extend(map_in_flight(fail_at, range(1000), workers=2, stop=threading.Event()))
    assert our_threads() == []


def test_in_flight_ends_when_stopped() -> None:
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()

    def work(item: int) -> int:
        time.sleep(0.01)
        return item

    assert len(list(map_in_flight(work, range(100_000), workers=2, stop=stop))) < 1000
    assert our_threads() == []
