"""Which model makes the next frame: the best one that keeps up with the camera, without going up and down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Ladder", "RungChange"]

# More load than that is too much, and less than that of the rung above is little enough to try it. In between nothing
# happens: that is the hysteresis.
_TOO_MUCH = 0.95
_LITTLE = 0.85
# To begin with; encoder and capture are not at work yet while costs are measured.
_LITTLE_AT_FIRST = 0.9
# Weight of the newest frame in the averages.
_NEWEST = 0.3
# After a change, so many seconds and frames say nothing yet: frames of the rung before are still under way.
_SETTLING_SECONDS = 0.5
_SETTLING_FRAMES = 2
_TRIAL_SECONDS, _FAR_TOO_MUCH = 2.0, 1.5
# So long a rung is kept before a better one is tried; longer after a trial that failed, up to a limit.
_HOLD_SECONDS = 4.0
_LONGER = 2.0
_LONGEST_HOLD_SECONDS = 60.0
# A rung that was left again within that time had been a failure: it costs more than was thought, or, if by far,
# somebody else is busy. What a failure teaches is half forgotten after a minute.
_FAILED_WITHIN_SECONDS = 12.0
_FORGET_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class RungChange:
    """A step on the ladder."""

    before: int
    after: int
    reason: str
    """For people: the figures that led to it."""


class Ladder:
    """Chooses a rung from what frames cost; 0 is the best and the slowest.

    It is told of every finished frame and decides by the load: the seconds that a frame takes over those that there are
    for it. How much more a better rung would cost is known from the frames of the start, all made on the same machine.

    Args:
        costs: seconds of a frame on each rung, measured at the start with `in_flight` frames at a time.
        in_flight: frames that are computed at once.
        max_latency_seconds: of a frame from its arrival to its encoded picture; None: as it comes.
        interval_seconds: between two frames of the source, as far as it is known: rungs that cannot keep up are not
            begun with.
    """

    def __init__(
        self,
        costs: Sequence[float],
        *,
        in_flight: int = 1,
        max_latency_seconds: float | None = None,
        interval_seconds: float | None = None,
    ) -> None:
        if not costs or min(costs) <= 0:
            raise ValueError(f"costs are {list(costs)}: each rung takes some time")
        self._costs = list(costs)
        self._in_flight = in_flight
        self._most = max_latency_seconds
        self._interval = interval_seconds
        self.rung = 0
        """The rung for the next frame."""
        last = len(costs) - 1
        if interval_seconds is not None:
            room = in_flight * interval_seconds
            self.rung = next((n for n, cost in enumerate(costs) if self._is_fit(cost, room, _LITTLE_AT_FIRST)), last)
        self._cost: float | None = None
        self._latency: float | None = None
        self._frames = 0
        self._changed = float("-inf")
        self._went_up = float("-inf")
        self._hold = _HOLD_SECONDS
        self._expected = 0.0
        """What the better rung was thought to cost, when it was tried last."""
        self._surprise: dict[int, tuple[float, float]] = {}
        """Of rungs that failed: times that they cost what was expected, and when that was."""

    def _is_fit(self, cost: float, room: float, share: float = _LITTLE) -> bool:
        return cost < share * room and (self._most is None or cost < self._most)

    def _expected_of(self, rung: int, now: float) -> float:
        """What a frame of another rung would cost now."""
        cost = self._costs[self.rung] if self._cost is None else self._cost
        times, when = self._surprise.get(rung, (1.0, now))
        times = 1 + (times - 1) * math.exp2(-(now - when) / _FORGET_SECONDS)
        return times * cost * self._costs[rung] / self._costs[self.rung]

    @property
    def load(self) -> float:
        """Seconds that frames take over those that there are; 0 as long as nothing is known."""
        if self._cost is None or self._interval is None:
            return 0.0
        return self._cost / (self._in_flight * self._interval)

    def arrived(self, interval_seconds: float) -> None:
        """A frame came, so many seconds after the one before."""
        old = self._interval
        self._interval = interval_seconds if old is None else 0.9 * old + 0.1 * min(interval_seconds, 4 * old)

    def finished(self, now: float, rung: int, cost_seconds: float, latency_seconds: float) -> RungChange | None:
        """A frame is done; returns the step that follows from it, if any.

        Args:
            now: by a clock that never goes back, in seconds.
            rung: that made it.
            cost_seconds: that it took on its thread.
            latency_seconds: since it had arrived.
        """
        if rung != self.rung:
            return None
        self._frames += 1
        self._cost = _average(self._cost, cost_seconds)
        self._latency = _average(self._latency, latency_seconds)
        since = now - self._changed
        if self._frames < _SETTLING_FRAMES or since < self._patience() or self._interval is None:
            return None
        is_late = self._most is not None and self._latency > self._most
        if (self.load > _TOO_MUCH or is_late) and self.rung + 1 < len(self._costs):
            if now - self._went_up < _FAILED_WITHIN_SECONDS:
                self._hold = min(_LONGER * self._hold, _LONGEST_HOLD_SECONDS)
                if self.load < _FAR_TOO_MUCH:
                    self._surprise[self.rung] = (max(1.0, self._cost / self._expected), now)
            why = f"latency {1000 * self._latency:.0f} ms" if is_late else f"load {100 * self.load:.0f} %"
            return self._step(now, self.rung + 1, why)
        if self._went_up == self._changed and since > _LONGEST_HOLD_SECONDS:
            self._hold = _HOLD_SECONDS  # the better rung has proven itself
        if self.rung and since > self._hold:
            expected = self._expected_of(self.rung - 1, now)
            if self._is_fit(expected, self._in_flight * self._interval):
                self._went_up, self._expected = now, expected
                room = 100 * expected / (self._in_flight * self._interval)
                return self._step(now, self.rung - 1, f"it would be a load of {room:.0f} %")
        return None

    def _patience(self) -> float:
        """Seconds after a step in which nothing is decided: a better rung gets some more to become warm."""
        is_trial = self._went_up == self._changed and self.load < _FAR_TOO_MUCH
        return _TRIAL_SECONDS if is_trial else _SETTLING_SECONDS

    def _step(self, now: float, rung: int, reason: str) -> RungChange:
        change = RungChange(self.rung, rung, reason)
        self.rung, self._changed = rung, now
        self._cost = self._latency = None
        self._frames = 0
        return change


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else (1 - _NEWEST) * before + _NEWEST * newest
