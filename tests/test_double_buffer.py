"""Threads that run ahead: order, bounded room, errors once, and nobody left behind."""

import json
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from hat_video.errors import OutputError
from hat_video.inference.double_buffer import Prefetch, ThreadLane, map_in_flight, run_through
from hat_video.inference.timeline import Timeline, busy_share, write_trace


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


def lanes(*workers: int, timeline: Timeline | None = None) -> list[ThreadLane]:
    return [ThreadLane(f"lane {n}", count, timeline) for n, count in enumerate(workers)]


def test_stages_follow_each_other_and_items_keep_their_order() -> None:
    copy_in, compute, copy_out = lanes(1, 3, 1)

    def uneven(item: int) -> int:
        time.sleep(0.01 * (item % 3))
        return item + 1

    stages = [(copy_in, lambda item: item * 2), (compute, uneven), (copy_out, str)]
    got = list(run_through(range(30), stages, depth=4, stop=threading.Event()))
    assert got == [str(2 * item + 1) for item in range(30)]
    assert our_threads() == []


def test_one_batch_comes_while_one_is_computed_and_one_leaves() -> None:
    timeline = Timeline(keeps_spans=True)
    meeting = threading.Barrier(3, timeout=5)

    def work(stage: int, item: int) -> int:
        # While item k is in the first stage, k - 1 must be in the second and k - 2 in the third, or all of them wait.
        if 2 <= item + stage < 20:
            meeting.wait()
        return item

    stages = [(lane, partial(work, n)) for n, lane in enumerate(lanes(1, 1, 1, timeline=timeline))]
    assert list(run_through(range(20), stages, depth=4, stop=threading.Event())) == list(range(20))
    assert busy_share(timeline.spans, "lane 0", during="lane 2") > 0.2


def test_no_more_are_on_their_way_than_asked_for() -> None:
    given = 0

    def source() -> Iterator[int]:
        nonlocal given
        while True:
            given += 1
            yield given

    stages = [(lane, lambda item: item) for lane in lanes(1, 1, 1)]
    through = run_through(source(), stages, depth=2, stop=threading.Event())
    for _ in range(5):
        next(through)
    assert given == 5 + 2
    through.close()
    assert our_threads() == []


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_error_in_any_stage_comes_in_its_turn(stage: int) -> None:
    def fail(item: int) -> int:
        if item == 7:
            raise ValueError(f"item {item}")
        return item

    stages = [(lane, fail if n == stage else lambda item: item) for n, lane in enumerate(lanes(1, 2, 1))]
    seen = []
    with pytest.raises(ValueError, match="item 7"):
        seen.extend(run_through(range(100), stages, depth=3, stop=threading.Event()))
    assert our_threads() == []


def test_stopping_leaves_no_thread_in_any_stage() -> None:
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    stages = [(lane, lambda item: time.sleep(0.002)) for lane in lanes(1, 2, 1)]
    assert len(list(run_through(iter(int, 1), stages, depth=3, stop=stop))) < 1000
    assert our_threads() == []


def test_what_an_item_needs_is_kept_until_it_is_through() -> None:
    """A stage may still read what the stage before has made: nobody may free it until the last stage is done."""
    gone: list[int] = []

    class Buffer:
        def __init__(self, number: int) -> None:
            self.number = number
            weakref.finalize(self, gone.append, number)

    def last(buffer: Buffer) -> int:
        number = buffer.number
        time.sleep(0.01)
        assert number not in gone
        return number

    first, second = lanes(1, 1)
    assert list(run_through(range(20), [(first, Buffer), (second, last)], depth=3, stop=threading.Event())) == list(
        range(20)
    )


def test_a_trace_shows_the_overlap(tmp_path: Path) -> None:
    spans = [("decode", 0.0, 1.0, 0), ("model", 1.0, 3.0, 0), ("model", 2.0, 4.0, 40), ("decode", 2.0, 2.5, 40)]
    assert busy_share(spans, "decode", during="model") == pytest.approx(0.5 / 3)
    assert busy_share(spans, "model", during="decode") == pytest.approx(0.5 / 1.5)
    assert busy_share(spans, "encode", during="model") == 0
    assert busy_share(spans, "model", during="encode") == 0
    write_trace(tmp_path / "trace.json", spans)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    work = [event for event in events if event["ph"] == "X"]
    assert sorted((rows[e["tid"]], e["ts"], e["dur"]) for e in work) == [
        ("decode", 0.0, 1e6), ("decode", 2e6, 0.5e6), ("model", 1e6, 2e6), ("model 2", 2e6, 2e6),
    ]  # fmt: skip
    with pytest.raises(OutputError, match="--trace"):
        write_trace(tmp_path / "none" / "trace.json", spans)
