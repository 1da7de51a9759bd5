"""Parts of a picture, computed alone and yet equal to the whole, for networks that see a bounded part of it.

A HAT whose channel attention pools over boxes has a finite receptive field. It is not the same around every pixel:
windows and boxes lie on a grid, so what a pixel depends on ends at the next border of that grid. A convolutional
network has one that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from hat_video.model.cnn import CNNConfig
from hat_video.model.hat import HATConfig

__all__ = ["Reach", "Rectangle", "compute_region", "reach_of", "tiled_exactly"]


# Of a network that has no grid of its own: parts are of few sizes, since some backends compile for each.
_CELL = 16


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Pixels [top, bottom) x [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def cut(self, pictures: Tensor, scale: int = 1) -> Tensor:
        """Its part of (..., H, W), where those are `scale` times larger than the picture that it is of; a view."""
        part = self.times(scale)
        return pictures[..., part.top : part.bottom, part.left : part.right]

    def grown(self, by: int, height: int, width: int) -> Rectangle:
        """With `by` pixels more on each side, as far as a picture of that size goes."""
        return Rectangle(
            max(0, self.top - by), min(height, self.bottom + by), max(0, self.left - by), min(width, self.right + by)
        )

    def times(self, scale: int) -> Rectangle:
        """The same part of a picture that is `scale` times larger."""
        return Rectangle(scale * self.top, scale * self.bottom, scale * self.left, scale * self.right)

    def within(self, outer: Rectangle) -> Rectangle:
        """The same pixels, counted from the corner of another rectangle."""
        return Rectangle(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)

    def union(self, other: Rectangle) -> Rectangle:
        """The smallest that holds both."""
        return Rectangle(
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
        )


class Reach:
    """What part of its input a part of a network's output depends on.

    Args:
        config: of a convolutional network, or of a HAT whose channel attention pools over boxes.

    Raises:
        ValueError: it pools over the whole picture.
    """

    def __init__(self, config: HATConfig | CNNConfig) -> None:
        self._config = config
        self.grid = _CELL
        """Parts must begin at multiples of this, and end at such or at the padded picture's end."""
        self.multiple = config.multiple
        """Height and width of a padded picture are multiples of this."""
        if isinstance(config, CNNConfig):
            return
        if not config.attention_pool:
            raise ValueError("a channel attention over the whole picture reaches everything")
        if config.ape_size:
            raise ValueError("an absolute position embedding knows where a picture ends")
        self.grid = math.lcm(config.window_size, config.attention_pool) * config.unshuffle

    def region(self, part: Rectangle, height: int, width: int) -> Rectangle:
        """What is computed for a part of the picture: what it depends on, and more, to one of a few sizes.

        Some backends compile a network for each size; these are half an octave apart.

        Args:
            part: of the source, in its pixels.
            height: of the padded source.
            width: likewise.
        """
        rows, columns = self.along(part.top, part.bottom, height), self.along(part.left, part.right, width)
        return Rectangle(*self._sized(*rows, height), *self._sized(*columns, width))

    def _sized(self, start: int, stop: int, length: int) -> tuple[int, int]:
        steps = math.ceil(2 * math.log2(max(1, math.ceil((stop - start) / self.grid))) - 1e-9)
        return self._placed(start, max(stop - start, round(2 ** (steps / 2)) * self.grid), length)

    def _placed(self, start: int, size: int, length: int) -> tuple[int, int]:
        size = -(-size // self.grid) * self.grid
        if start + size >= length:
            # Backwards from the end, which need not lie on the grid.
            return max(0, -(-length // self.grid) * self.grid - size), length
        return start, start + size

    def tiles(self, length: int, tile: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """How one axis is cut: each part, and what is computed for it, which is of one size, or two at the end.

        Args:
            length: of the padded picture.
            tile: of a part, which gets as much more as the grid wants.
        """
        step = -(-tile // self.grid) * self.grid
        parts = [(start, min(length, start + step)) for start in range(0, length, step)]
        needs = [self.along(*part, length) for part in parts]
        size = max(stop - start for start, stop in needs)
        return [(part, self._placed(start, size, length)) for part, (start, _) in zip(parts, needs, strict=True)]

    def along(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The same along one axis."""
        config = self._config
        if isinstance(config, CNNConfig):
            first, last = max(0, start - config.reach), min(length, stop + config.reach)
            return first // self.grid * self.grid, min(length, -(-last // self.grid) * self.grid)
        return self._along_hat(config, start, stop, length)

    def _along_hat(self, config: HATConfig, start: int, stop: int, length: int) -> tuple[int, int]:
        end = length // config.unshuffle
        low, high = start // config.unshuffle, -(-stop // config.unshuffle)

        def grow(by: int) -> None:
            nonlocal low, high
            low, high = max(0, low - by), min(end, high + by)

        def snap(to: int, offset: int = 0) -> tuple[int, int]:
            return (low - offset) // to * to + offset, -(-(high - offset) // to) * to + offset

        closing_conv = 1 if config.resi_connection == "1conv" else 0
        window, box = config.window_size, config.attention_pool
        grow(_tail_of(config))
        grow(closing_conv)
        for depth in reversed(config.depths):
            grow(closing_conv)
            low, high = snap(window)
            grow((config.overlap_size - window) // 2)
            for number in reversed(range(depth)):
                attention = snap(window, window // 2 if number % 2 else 0)
                low, high = snap(box)
                grow(2)  # the two convolutions before the gate
                low, high = max(0, min(low, attention[0])), min(end, max(high, attention[1]))
        grow(1)
        step = self.grid // config.unshuffle
        low, high = low // step * step, min(end, -(-high // step) * step)
        return low * config.unshuffle, high * config.unshuffle


def reach_of(config: HATConfig | CNNConfig) -> Reach | None:
    """What a part of the output of a network depends on; None if that is the whole picture."""
    if isinstance(config, HATConfig) and (not config.attention_pool or config.ape_size):
        return None
    return Reach(config)


def _tail_of(config: HATConfig) -> int:
    """Tokens that the convolutions after the body look at, on each side."""
    reach, scale, rest = Fraction(1), 1, config.tail_scale
    while rest > 1:
        reach += Fraction(1, scale)
        step = 3 if rest == 3 else 2
        scale, rest = scale * step, rest // step
    return math.ceil(reach + Fraction(1, scale))


def compute_region(
    network: Callable[[Tensor], Tensor], padded: Tensor, part: Rectangle, reach: Reach, scale: int
) -> Tensor:
    """A part of the output, equal to that of the whole.

    Args:
        network: (N, C, h, w) to (N, C, scale * h, scale * w).
        padded: (N, C, H, W), the whole input, of a size that the network takes.
        part: in pixels of `padded`.
        reach: of the network.
        scale: likewise.

    Returns:
        (N, C, scale * part.height, scale * part.width).
    """
    region = reach.region(part, *padded.shape[2:])
    return part.within(region).cut(network(region.cut(padded)), scale)


def tiled_exactly(network: Callable[[Tensor], Tensor], padded: Tensor, tile: int, reach: Reach, scale: int) -> Tensor:
    """The whole output, in tiles that are `tile` wide and high, or as much more as the grid wants; see above."""
    height, width = padded.shape[2:]
    out = padded.new_empty(*padded.shape[:2], scale * height, scale * width)
    for rows, around_rows in reach.tiles(height, tile):
        for columns, around_columns in reach.tiles(width, tile):
            part, region = Rectangle(*rows, *columns), Rectangle(*around_rows, *around_columns)
            part.cut(out, scale).copy_(part.within(region).cut(network(region.cut(padded)), scale))
    return out
