"""Counts what happens to frames, from several threads."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from dataclasses import dataclass

__all__ = ["LATENCY_BUCKETS", "Latencies", "LiveMeter"]

LATENCY_BUCKETS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0, 2.0, 5.0, math.inf)
"""Upper ends, in seconds."""

_WINDOW_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Latencies:
    """From the arrival of a frame's packet to its encoded picture, of the whole run."""

    p50_seconds: float
    p99_seconds: float
    most_seconds: float


class _Rate:
    """How often something happens, over the last seconds."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def note(self, now: float) -> None:
        self._times.append(now)
        self._forget(now)

    def value(self, now: float) -> float:
        self._forget(now)
        if len(self._times) < 2:
            return 0.0
        return (len(self._times) - 1) / max(now - self._times[0], 1e-9)

    def _forget(self, now: float) -> None:
        while self._times and now - self._times[0] > _WINDOW_SECONDS:
            self._times.popleft()


class LiveMeter:
    """Of one run. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in, self._out = _Rate(), _Rate()
        self._recent: deque[tuple[float, float]] = deque()
        self._histogram: Counter[int] = Counter()
        """Of all frames, by milliseconds: as fine as it needs to be, and no larger after a year."""
        self.began: float | None = None
        self.frames_in = self.frames_out = self.frames_held = 0
        self.latency_sum = 0.0
        self.stage_seconds: defaultdict[str, float] = defaultdict(float)

    def came(self, now: float) -> None:
        """A frame was decoded."""
        with self._lock:
            self.began = now if self.began is None else self.began
            self.frames_in += 1
            self._in.note(now)

    def left(self, now: float, latency_seconds: float) -> None:
        """A frame was encoded, so long after it had arrived."""
        with self._lock:
            self.frames_out += 1
            self._out.note(now)
            self.latency_sum += latency_seconds
            self._histogram[min(round(1000 * latency_seconds), 60_000)] += 1
            self._recent.append((now, latency_seconds))
            while now - self._recent[0][0] > _WINDOW_SECONDS:
                self._recent.popleft()

    def held(self) -> None:
        """A frame was repeated, or a slate shown."""
        with self._lock:
            self.frames_held += 1

    def spent(self, stage: str, seconds: float) -> None:
        """A stage was busy."""
        with self._lock:
            self.stage_seconds[stage] += seconds

    def rates(self) -> tuple[float, float]:
        """Frames a second in and out, over the last seconds."""
        now = time.monotonic()
        with self._lock:
            return self._in.value(now), self._out.value(now)

    def recent_latencies(self) -> tuple[float, float]:
        """Median and 99th percentile over the last seconds; 0 without a frame."""
        with self._lock:
            values = sorted(latency for _, latency in self._recent)
        return _quantile(values, 0.5), _quantile(values, 0.99)

    def latencies(self) -> Latencies:
        """Of all frames, to a millisecond."""
        with self._lock:
            values = sorted(self._histogram.elements())
        return Latencies(*(_quantile(values, share) / 1000 for share in (0.5, 0.99, 1.0)))

    def buckets(self) -> dict[float, int]:
        """Frames that took at most so many seconds, for each of `LATENCY_BUCKETS`."""
        with self._lock:
            counts = [0] * len(LATENCY_BUCKETS)
            for milliseconds, count in self._histogram.items():
                counts[bisect_left(LATENCY_BUCKETS, milliseconds / 1000)] += count
        total = 0
        cumulative: dict[float, int] = {}
        for end, count in zip(LATENCY_BUCKETS, counts, strict=True):
            total += count
            cumulative[end] = total
        return cumulative


def _quantile(ordered: list[float] | list[int], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; 0 of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
