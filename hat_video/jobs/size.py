"""`--size`: what it means for a given picture, and how much of the way a network has to go."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from hat_video.errors import OptionError
from hat_video.frames import VideoInfo

__all__ = ["Size", "Target", "is_turned", "parse_size", "settle_size", "shown_size"]

_NAMED = {"4k": (3840, 2160), "8k": (7680, 4320)}
# What no encoder of ours goes beyond; more is a typing error, and would be found out only by the memory.
_LARGEST = 16384
_FORMS = "WIDTHxHEIGHT (a box to fit into), 1080p or any other height, 4k or 8k"


@dataclass(frozen=True, slots=True)
class Size:
    """A size that was asked for, of the picture as it is displayed."""

    text: str
    height: int
    width: int | None
    """None: whatever the aspect makes of the height. Else both are a box that the picture fits into."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a size comes to for one clip."""

    width: int
    """Coded width of the output, before rotation; its samples are square."""
    height: int
    needed: Fraction
    """Times that a network must enlarge at least, so that nothing is left for the resampler to invent; 1 or more."""


def parse_size(text: str) -> Size:
    """Reads `1920x1080`, `1080p`, `1440p`, `4k`, `8k`.

    Raises:
        OptionError: it is none of these, or beyond what can be coded.
    """
    word = text.strip().lower()
    if word in _NAMED:
        width, height = _NAMED[word]
        return Size(word, height, width)
    match = re.fullmatch(r"(?:([0-9]{1,6})x)?([0-9]{1,6})(p?)", word)
    if match is None or (match[1] is None) == (match[3] == ""):
        raise OptionError(f"--size {text}: must be {_FORMS}")
    size = Size(word, int(match[2]), None if match[1] is None else int(match[1]))
    if not all(2 <= side <= _LARGEST for side in (size.height, size.width or size.height)):
        raise OptionError(f"--size {text}: each side must be 2 to {_LARGEST}; write {_FORMS}")
    return size


def settle_size(size: Size, video: VideoInfo) -> Target:
    """The size of the output for one clip: the aspect as displayed, square samples, even sides.

    Args:
        size: what was asked for.
        video: the source.

    Raises:
        OptionError: the picture would become smaller than it is, or too wide.
    """
    shown = shown_size(video)
    factor = size.height / shown[1]
    if size.width is not None:
        factor = min(factor, size.width / shown[0])
    if factor < 1:
        raise OptionError(
            f"--size {size.text}: smaller than the clip, which is shown at {_rounded(shown[0])}x{_rounded(shown[1])},"
            " and this only enlarges; ask for more, leave --size out, or make it smaller with an editor"
        )
    wide, high = (_even(side * factor, limit) for side, limit in zip(shown, (size.width, size.height), strict=True))
    if wide > _LARGEST:
        raise OptionError(f"--size {size.text}: the picture would be {wide} wide, {_LARGEST} is the most; ask for less")
    width, height = (high, wide) if is_turned(video.display_matrix) else (wide, high)
    needed = max(Fraction(1), Fraction(width, video.width), Fraction(height, video.height))
    return Target(width, height, needed)


def shown_size(video: VideoInfo) -> tuple[Fraction, Fraction]:
    """(width, height) of the picture as it is displayed, in square pixels, not rounded."""
    width, height = video.width * video.sample_aspect_ratio, Fraction(video.height)
    return (height, width) if is_turned(video.display_matrix) else (width, height)


def is_turned(matrix: tuple[int, ...] | None) -> bool:
    """Whether the display matrix makes rows into columns: by 90 or 270 degrees, within half a right angle."""
    if matrix is None:
        return False
    return matrix[0] ** 2 + matrix[4] ** 2 < matrix[1] ** 2 + matrix[3] ** 2


def _even(side: Fraction, limit: int | None) -> int:
    """The nearest even number, within the limit's own even part."""
    even = 2 * floor(side / 2 + Fraction(1, 2))
    return max(2, even if limit is None else min(even, limit // 2 * 2))


def _rounded(side: Fraction) -> int:
    return floor(side + Fraction(1, 2))
