"""Stand-in until the encoder of the live run is merged: only what travels from it to the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = ["LivePacket"]


@dataclass(frozen=True, slots=True)
class LivePacket:
    """One coded picture, or a piece of sound."""

    kind: Literal["video", "audio"]
    data: bytes
    pts: int
    dts: int
    duration: int
    time_base: Fraction
    is_key: bool
    captured: float | None
    """`time.monotonic()` when the frame's packet had arrived; None for sound."""
