"""Whose time it is: a camera's timestamps, connection by connection, on one line of live ticks."""

from __future__ import annotations

from fractions import Fraction

__all__ = ["LIVE_TIME_BASE", "SourceClock"]

LIVE_TIME_BASE = Fraction(1, 90000)
"""Seconds a tick of everything that leaves a live run."""

# A step of pts that is so much more than the time it took is a jump; a picture that stays so late is not catching up.
_JUMP_SECONDS = 1.0
_LATE_SECONDS = 2.0
# Sound may come so much before or after its pictures: multiplexers keep them within a second of each other.
_SOUND_SECONDS = 3.0


class SourceClock:
    """Maps a source's (pts, time base) to live ticks; tick 0 is the first picture of the run.

    A connection is anchored at its first picture: that picture's time is when it arrived, and from there on the
    source's own clock counts, so that neither a network nor a decoder that hesitates shows in the timestamps. Sound
    uses the anchor of the pictures: what was together in the source stays together.

    A new connection begins with `reconnected`. Within one, pts that jump by more than a second against the time that
    has passed are anchored anew; so are pictures that come more than a second late for two seconds on end, as from a
    camera that has rested without counting. What is given out rises strictly, for pictures and for sound each.

    One thread may use it.
    """

    def __init__(self) -> None:
        self.reanchored = 0
        """Jumps within a connection."""
        self._origin: float | None = None
        self._anchor: tuple[Fraction, int] | None = None
        self._last: tuple[Fraction, float] = (Fraction(0), 0.0)
        self._late_since: float | None = None
        self._video = self._audio = -1

    @property
    def is_anchored(self) -> bool:
        """Whether a picture of this connection has come: before that, nothing has a time."""
        return self._anchor is not None

    def reconnected(self) -> None:
        """The next timestamps are of another connection."""
        self._anchor = None

    def arrival(self, arrived: float) -> int:
        """Ticks of a picture whose source has no clock worth keeping; it anchors nothing, sound has no time there.

        Args:
            arrived: `time.monotonic()` of its packet's arrival.
        """
        self._video = max(self._passed(arrived), self._video + 1)
        return self._video

    def video(self, pts: int, time_base: Fraction, arrived: float) -> int | None:
        """Ticks of a picture; None if it is not later than the one before.

        Args:
            pts: in `time_base`.
            time_base: seconds a tick of the source.
            arrived: `time.monotonic()` of its packet's arrival.
        """
        seconds = pts * time_base
        if self._anchor is not None:
            step, passed = seconds - self._last[0], arrived - self._last[1]
            if step < -_JUMP_SECONDS or step - passed > _JUMP_SECONDS or self._is_left_behind(seconds, arrived):
                self.reanchored += 1
                self._anchor = None
        if self._anchor is None:
            self._anchor = (seconds, max(self._passed(arrived), self._video + 1))
            self._late_since = None
        ticks = self.at(pts, time_base)
        if ticks <= self._video:
            return None
        self._last, self._video = (seconds, arrived), ticks
        return ticks

    def audio(self, pts: int, time_base: Fraction, arrived: float) -> int | None:
        """Ticks of sound, by the anchor of the pictures.

        None if there is no anchor, if it belongs before the run's first picture or is not later than the sound before,
        or if its pts has nothing to do with the pictures': it has jumped and they have not, or the other way round.
        """
        if self._anchor is None:
            return None
        ticks = self.at(pts, time_base)
        ahead = (ticks - self._video) * float(LIVE_TIME_BASE) - (arrived - self._last[1])
        if abs(ahead) > _SOUND_SECONDS or ticks <= self._audio:
            return None
        self._audio = ticks
        return ticks

    def at(self, pts: int, time_base: Fraction) -> int:
        """Ticks by the present anchor, whatever was given out before."""
        if self._anchor is None:
            raise ValueError("no picture of this connection has come yet: nothing has a time")
        seconds, ticks = self._anchor
        return ticks + round((pts * time_base - seconds) / LIVE_TIME_BASE)

    @property
    def latest(self) -> int:
        """Ticks of the last picture; -1 before the first."""
        return self._video

    def ahead(self, ticks: int, now: float) -> float:
        """Seconds from `now`, a `time.monotonic()`, until it is `ticks`; below 0: so long ago."""
        return ticks * float(LIVE_TIME_BASE) - (now - (now if self._origin is None else self._origin))

    def _passed(self, arrived: float) -> int:
        """Ticks since the run's first picture, by the clock of this machine."""
        if self._origin is None:
            self._origin = arrived
        return round((arrived - self._origin) / float(LIVE_TIME_BASE))

    def _is_left_behind(self, seconds: Fraction, arrived: float) -> bool:
        assert self._anchor is not None
        mapped = self._anchor[1] + (seconds - self._anchor[0]) / LIVE_TIME_BASE
        if (self._passed(arrived) - mapped) * LIVE_TIME_BASE < _JUMP_SECONDS:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = arrived
        return self._late_since is not None and arrived - self._late_since > _LATE_SECONDS
