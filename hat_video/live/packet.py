"""What flows from the encoder to the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = ["LivePacket"]


@dataclass(frozen=True, slots=True)
class LivePacket:
    """One encoded picture or piece of sound, and its time."""

    kind: Literal["video", "audio"]
    data: bytes
    pts: int
    """In `time_base`, from 0, the first frame of the run."""
    dts: int
    duration: int
    """Of a picture an estimate: the next one's time is not known yet."""
    time_base: Fraction
    """`LIVE_TIME_BASE`."""
    is_key: bool
    """Whether one can start here; true for all sound."""
    captured: float | None
    """When the picture's packet arrived from the camera, by `time.monotonic()`; None for sound."""
