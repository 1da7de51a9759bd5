"""Time in a live run: one unit for everything that leaves."""

from __future__ import annotations

from fractions import Fraction

__all__ = ["LIVE_TIME_BASE"]

LIVE_TIME_BASE = Fraction(1, 90_000)
"""Seconds a tick, exact. Ticks count from 0, the first frame of the run."""
