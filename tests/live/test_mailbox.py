"""The mailbox and the meter, with real threads."""

from __future__ import annotations

import math
import threading
import time

import pytest

from hat_video.live.mailbox import Mailbox
from hat_video.live.meter import LATENCY_BUCKETS, LiveMeter


def test_the_newest_wins() -> None:
    box: Mailbox[int] = Mailbox()
    for number in range(5):
        box.put(number)
    assert (box.take(0), box.take(0), box.dropped) == (4, None, 4)


def test_a_longer_one_drops_the_oldest_and_keeps_the_order() -> None:
    box: Mailbox[int] = Mailbox(3)
    for number in range(5):
        box.put(number)
    assert len(box) == 3
    assert [box.take(0) for _ in range(4)] == [2, 3, 4, None]
    assert box.dropped == 2
    with pytest.raises(ValueError, match="0 places"):
        Mailbox(0)


def test_closing_lets_the_last_item_out_and_then_the_taker_go() -> None:
    box: Mailbox[int] = Mailbox()
    taken: list[int | None] = []
    taker = threading.Thread(target=lambda: taken.extend([box.take(30), box.take(30), box.take(30)]))
    taker.start()
    box.put(1)
    while not taken and taker.is_alive() and len(box):
        time.sleep(0.001)
    box.close()
    taker.join(10)
    assert taken == [1, None, None]
    assert box.is_over


def test_what_is_taken_is_never_older_than_the_work_before() -> None:
    box: Mailbox[float] = Mailbox()
    stop = threading.Event()

    def camera() -> None:
        while not stop.wait(0.002):
            box.put(time.monotonic())

    thread = threading.Thread(target=camera)
    thread.start()
    ages = []
    for _ in range(10):
        sent = box.take(5)
        assert sent is not None
        ages.append(time.monotonic() - sent)
        time.sleep(0.03)
    stop.set()
    thread.join()
    assert sorted(ages)[5] < 0.02
    assert box.dropped > 20


def test_quantiles_and_buckets() -> None:
    meter = LiveMeter()
    for number in range(100):
        meter.came(number / 15)
        meter.left(number / 15, (number + 1) / 1000)
    found = meter.latencies()
    assert (found.p50_seconds, found.p99_seconds, found.most_seconds) == (0.05, 0.099, 0.1)
    buckets = meter.buckets()
    assert (buckets[0.025], buckets[0.05], buckets[0.1], buckets[math.inf]) == (25, 50, 100, 100)
    assert list(buckets) == list(LATENCY_BUCKETS)
    assert (meter.frames_in, meter.frames_out) == (100, 100)
    assert math.isclose(meter.latency_sum, 5.05)


def test_rates_are_those_of_the_last_seconds() -> None:
    meter = LiveMeter()
    assert meter.rates() == (0.0, 0.0)
    assert meter.recent_latencies() == (0.0, 0.0)
    now = time.monotonic()
    for number in range(40):
        meter.came(now - 2 + number / 20)
    came, left = meter.rates()
    assert 15 < came < 21
    assert left == 0
