"""One line of time through all that a source's timestamps may do."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest

from hat_video.live.clock import LIVE_TIME_BASE, SourceClock

MILLI = Fraction(1, 1000)
RATE = 25


def play(clock: SourceClock, pts: float, arrived: float, seconds: float, *, lateness: float = 0.0) -> list[int | None]:
    """`seconds` of pictures, and of sound 40 ms ahead of each; returns the pictures' ticks."""
    found = []
    for k in range(round(seconds * RATE)):
        at = arrived + k / RATE + lateness
        found.append(clock.video(round((pts + k / RATE) * 1000), MILLI, at))
        sound = clock.audio(round((pts + k / RATE) * 1000) - 40, MILLI, at)
        # The source's own offset, whatever has become of its clock.
        if found[-1] is not None and sound is not None:
            assert found[-1] - sound == round(Fraction(40, 1000) / LIVE_TIME_BASE)
    return found


def rises(ticks: list[int | None]) -> bool:
    known = [tick for tick in ticks if tick is not None]
    return all(a < b for a, b in pairwise(known))


def test_begins_at_zero_and_keeps_the_sources_time() -> None:
    clock = SourceClock()
    assert clock.video(123_456, MILLI, 50.0) == 0
    # Arrival wavers; the source says 40 ms.
    assert clock.video(123_496, MILLI, 50.09) == 3600
    assert clock.video(123_536, MILLI, 50.10) == 7200
    assert clock.reanchored == 0


def test_exact_in_any_time_base() -> None:
    clock = SourceClock()
    base = Fraction(1001, 30000)
    ticks = [clock.video(k, base, 10 + float(k * base)) for k in range(100_000, 103_000)]
    assert ticks == [round((k * base) / LIVE_TIME_BASE) for k in range(3000)]


def test_sound_before_the_first_picture_has_no_time() -> None:
    clock = SourceClock()
    assert clock.audio(0, MILLI, 1.0) is None
    clock.video(1000, MILLI, 1.0)
    assert clock.audio(999, MILLI, 1.0) is None
    assert clock.audio(1000, MILLI, 1.0) == 0
    assert clock.audio(1000, MILLI, 1.0) is None
    assert clock.audio(1020, MILLI, 1.0) == 1800


def test_a_new_connection_goes_on_after_the_gap() -> None:
    clock = SourceClock()
    before = play(clock, 500, 10, 2)
    clock.reconnected()
    after = play(clock, 0, 15, 2)
    assert rises(before + after)
    # The camera begins at 0 again; ours has been 5 s.
    assert after[0] == 5 * 90000
    assert clock.reanchored == 0


def test_a_connection_that_comes_back_too_early_still_rises() -> None:
    clock = SourceClock()
    # Pictures that had piled up: stamps ahead of their arrival.
    before = [clock.video(k * 40, MILLI, 10 + k * 0.001) for k in range(50)]
    clock.reconnected()
    after = play(clock, 0, 10.5, 1)
    assert None not in before + after
    assert rises(before + after)


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 1.5, -1.5, 95443.7])
def test_a_jump_of_the_source_is_anchored_anew(jump: float) -> None:
    clock = SourceClock()
    before = play(clock, 5000, 10, 2)
    after = play(clock, 5002 + jump, 12, 2)
    assert None not in before + after
    assert rises(before + after)
    assert abs((after[0] or 0) / 90000 - 2) < 0.001
    assert clock.reanchored == 1


def test_a_network_that_hesitates_moves_nothing() -> None:
    clock = SourceClock()
    play(clock, 0, 10, 2)
    # Three seconds of silence, then all at once.
    late = [clock.video(2000 + k * 40, MILLI, 15 + k * 0.001) for k in range(75)]
    assert late == [(2000 + k * 40) * 90 for k in range(75)]
    assert clock.reanchored == 0


def test_a_camera_that_rests_without_counting_is_caught_up_with() -> None:
    clock = SourceClock()
    play(clock, 0, 10, 2)
    # It goes on where it was, a minute later.
    after = play(clock, 2, 72, 5)
    assert clock.reanchored == 1
    assert rises(after)
    assert abs((after[-1] or 0) / 90000 - (62 + 5)) < 0.1


def test_a_step_back_is_no_picture() -> None:
    clock = SourceClock()
    clock.video(1000, MILLI, 1.0)
    assert clock.video(1000, MILLI, 1.0) is None
    assert clock.video(960, MILLI, 1.04) is None
    assert clock.video(1040, MILLI, 1.04) == 3600


def test_sound_that_jumps_before_the_pictures_do_waits_for_them() -> None:
    clock = SourceClock()
    play(clock, 0, 10, 1)
    assert clock.audio(3_600_000, MILLI, 11.0) is None
    clock.video(3_600_000, MILLI, 11.0)
    assert clock.audio(3_600_020, MILLI, 11.02) is not None


def test_sound_goes_on_while_the_picture_stands() -> None:
    clock = SourceClock()
    clock.video(0, MILLI, 10.0)
    assert [clock.audio(k * 1000, MILLI, 10.0 + k) for k in range(20)] == [k * 90000 for k in range(20)]


def test_by_arrival() -> None:
    clock = SourceClock()
    assert [clock.arrival(at) for at in (5.0, 5.5, 5.5, 5.4, 6.0)] == [0, 45000, 45001, 45002, 90000]
