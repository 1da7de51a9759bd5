"""A range of a clip: which frames, packets and chapters lie in it. `join` and `verify` go by the same rules."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING

from av.packet import Packet
from av.stream import Disposition, Stream

from hat_video.media.probe import FrameIndex

if TYPE_CHECKING:
    from av.container.core import Chapter  # a type of the stubs only

__all__ = ["Span", "advance_timecode"]

_MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of presentation time, in seconds of the source's own clock."""

    start: Fraction | None
    """First instant that belongs to it; None: from the beginning, with the sound that is primed before it."""
    end: Fraction | None
    """First instant that does not; None: to the end."""

    def __contains__(self, seconds: Fraction) -> bool:
        return (self.start is None or seconds >= self.start) and (self.end is None or seconds < self.end)

    def frames(self, pts: Sequence[int], time_base: Fraction) -> slice:
        """Where the frames of the range are in `pts`, which rises, in ticks of `time_base`."""
        first = 0 if self.start is None else bisect_left(pts, ceil(self.start / time_base))
        stop = len(pts) if self.end is None else bisect_left(pts, ceil(self.end / time_base))
        return slice(first, max(first, stop))

    def cut_index(self, index: FrameIndex, time_base: Fraction) -> FrameIndex:
        """The frames of the range, at least one of which must be there; each is shown as long as before."""
        kept = self.frames(index.pts, time_base)
        return replace(
            index,
            pts=index.pts[kept],
            key_pts=index.key_pts[self.frames(index.key_pts, time_base)],
            last_duration=index.duration_of(kept.stop - 1),
        )

    def cut_chapters(self, chapters: Sequence[Chapter]) -> list[Chapter]:
        """The chapters that reach into the range, cut at its ends."""
        cut: list[Chapter] = []
        for chapter in chapters:
            time_base = chapter["time_base"] or _MILLISECOND
            start, end = chapter["start"], chapter["end"]
            if self.start is not None:
                start = max(start, ceil(self.start / time_base))
            if self.end is not None:
                end = min(end, ceil(self.end / time_base))
            if start < end:
                cut.append({**chapter, "start": start, "end": end})
        return cut

    def cut(self, packet: Packet[Stream]) -> bool:
        """Whether a packet belongs to the range; a text that is shown across one of its ends is shortened to it.

        Sound is never cut inside a packet. Covers belong to no moment and always stay.
        """
        s = packet.stream
        ticks = packet.pts if packet.pts is not None else packet.dts
        if ticks is None or s.disposition & Disposition.attached_pic:
            return True
        time_base, length = packet.time_base, packet.duration or 0
        if s.type != "subtitle" or not length:
            return ticks * time_base in self
        low = ticks if self.start is None else max(ticks, ceil(self.start / time_base))
        high = ticks + length if self.end is None else min(ticks + length, ceil(self.end / time_base))
        if low >= high:
            return False
        if (low, high) != (ticks, ticks + length):
            packet.pts = packet.dts = low
            packet.duration = high - low
        return True


def advance_timecode(text: str, seconds: Fraction, rate: Fraction | None) -> str | None:
    """The timecode of the frame that is shown `seconds` after the one of `text`; None where that cannot be known.

    Source: SMPTE ST 12-1. Drop-frame timecode (`;`) leaves out the first numbers of each minute but every tenth.
    """
    match = re.fullmatch(r"(\d\d):(\d\d):(\d\d)([:;.])(\d\d)", text)
    if match is None or rate is None:
        return None
    hours, minutes, whole, number = (int(match[k]) for k in (1, 2, 3, 5))
    base = round(rate)
    dropped = base // 15 if match[4] != ":" else 0
    minutes += 60 * hours
    frame = (60 * minutes + whole) * base + number - dropped * (minutes - minutes // 10) + round(seconds * rate)
    tens, rest = divmod(frame, 600 * base - 9 * dropped)
    if dropped:
        frame += dropped * (9 * tens + max(0, (rest - dropped) // (60 * base - dropped)))
    whole, number = divmod(frame, base)
    return f"{whole // 3600 % 24:02}:{whole // 60 % 60:02}:{whole % 60:02}{match[4]}{number:02}"
