"""What of a frame must be computed, when the frame before it is known: pure geometry, exact.

A changed pixel reaches the output pixels whose receptive field it lies in; those are computed again, from all that they
depend on, and the others are what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from hat_video.inference.regions import Reach, Rectangle

__all__ = ["OUTPUT_MARGIN", "changed_cells", "most_pixels", "parts_to_compute"]

OUTPUT_MARGIN = 4
"""Source pixels around a part that the output's chroma at its border is made of, and more than that."""

# A chroma sample takes part in the colour of pixels up to so many samples away.
_CHROMA_REACH = 3
_WORTH_IT = 0.5


def changed_cells(before: Sequence[Tensor], after: Sequence[Tensor], cell: int, most: float = math.inf) -> np.ndarray:
    """Where two pictures differ.

    Args:
        before: planes (h, w), the first as large as the picture; smaller ones are subsampled chroma.
        after: planes of the same shapes.
        cell: side of the squares that the answer is about, in pixels of the picture; a multiple of the subsampling.
        most: with more cells than that, it looks no further: the answer may then lack some.

    Returns:
        (rows, columns) bool: whether a pixel of the cell has another colour; the last cells may be partial.
    """
    height, width = after[0].shape
    changed = np.zeros((-(-height // cell), -(-width // cell)), bool)
    for old, new in zip(before, after, strict=True):
        if changed.sum() > most:
            break
        differs = (old != new).cpu().numpy()
        down, across = -(-height // new.shape[0]), -(-width // new.shape[1])
        if (down, across) != (1, 1):
            differs = _spread(_spread(differs, _CHROMA_REACH).T, _CHROMA_REACH).T
        changed |= _in_cells(differs, cell // down, cell // across)
    return changed


def _spread(differs: np.ndarray, reach: int) -> np.ndarray:
    """Set, too, whatever lies so many rows away."""
    wide = differs.copy()
    for shift in range(1, min(reach + 1, len(differs))):
        wide[shift:] |= differs[:-shift]
        wide[:-shift] |= differs[shift:]
    return wide


def _in_cells(differs: np.ndarray, down: int, across: int) -> np.ndarray:
    """Whether anything is set in each cell."""
    height, width = differs.shape
    rows = np.logical_or.reduceat(differs, range(0, height, down), axis=0)
    found: np.ndarray = np.logical_or.reduceat(rows, range(0, width, across), axis=1)
    return found


def most_pixels(height: int, width: int) -> float:
    """With more of a picture than that to compute, the whole is the simpler way and hardly the longer one."""
    return _WORTH_IT * height * width


def parts_to_compute(cells: np.ndarray, height: int, width: int, reach: Reach) -> list[Rectangle] | None:
    """The parts of the output that a change concerns.

    Args:
        cells: from `changed_cells`, with the reach's grid for cells.
        height: of the source.
        width: of the source.
        reach: of the network, on the padded picture.

    Returns:
        Rectangles in source pixels that do not go beyond the source, in all of which every output pixel that may have
        changed lies; none where nothing has. None where the whole picture may as well be computed.
    """
    changed = _with_padding(cells, height, width, reach)
    rows, columns = (_dependence(n, length, reach) for n, length in zip(changed.shape, (height, width), strict=True))
    affected = (rows.astype(np.int32) @ changed.astype(np.int32) @ columns.T.astype(np.int32)) > 0
    if not affected.any():
        return []
    most = most_pixels(height, width)
    if affected.sum() * reach.grid**2 > most:
        return None
    size = _padded_size(height, width, reach)

    def cost(part: Rectangle) -> int:
        return reach.region(_to_pixels(part, height, width, reach.grid).grown(OUTPUT_MARGIN, height, width), *size).area

    parts = _merged(_components(affected), cost)
    if sum(map(cost, parts)) > most:
        return None
    return [_to_pixels(part, height, width, reach.grid) for part in parts]


def _padded_size(height: int, width: int, reach: Reach) -> tuple[int, int]:
    return -(-height // reach.multiple) * reach.multiple, -(-width // reach.multiple) * reach.multiple


def _with_padding(changed: np.ndarray, height: int, width: int, reach: Reach) -> np.ndarray:
    """The cells of the padded picture, where what is added mirrors pixels that lie at most as far from the edge."""
    for axis, length in enumerate((height, width)):
        missing = -length % reach.multiple
        if missing:
            first = max(0, length - 1 - missing) // reach.grid
            last = -(-(length + missing) // reach.grid)
            at_edge = changed.take(range(first, changed.shape[axis]), axis).any(axis, keepdims=True)
            added = last - changed.shape[axis]
            if added:
                changed = np.concatenate([changed, at_edge.repeat(added, axis)], axis)
            # The last cell of the picture holds some of the padding, too.
            place = [slice(None), slice(None)]
            place[axis] = slice((length - 1) // reach.grid, last)
            changed = changed.copy()
            changed[tuple(place)] |= at_edge
    return changed


@lru_cache(maxsize=64)
def _dependence(count: int, length: int, reach: Reach) -> np.ndarray:
    """(count, count) bool along one axis: whether the output of a cell depends on another cell's pixels."""
    grid = reach.grid
    padded = -(-length // reach.multiple) * reach.multiple
    table = np.zeros((count, count), bool)
    for cell in range(count):
        start, stop = max(0, cell * grid - OUTPUT_MARGIN), min(padded, (cell + 1) * grid + OUTPUT_MARGIN)
        low, high = reach.along(min(start, padded), stop, padded)
        table[cell, low // grid : -(-high // grid)] = True
    return table


def _components(cells: np.ndarray) -> list[Rectangle]:
    """Bounding boxes, in cells, of the groups of set cells that touch."""
    left = cells.copy()
    boxes = []
    while left.any():
        row, column = map(int, np.argwhere(left)[0])
        stack, box = [(row, column)], Rectangle(row, row + 1, column, column + 1)
        left[row, column] = False
        while stack:
            y, x = stack.pop()
            box = box.union(Rectangle(y, y + 1, x, x + 1))
            for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= ny < left.shape[0] and 0 <= nx < left.shape[1] and left[ny, nx]:
                    left[ny, nx] = False
                    stack.append((ny, nx))
        boxes.append(box)
    return boxes


def _merged(parts: list[Rectangle], cost: Callable[[Rectangle], int]) -> list[Rectangle]:
    """Two become one where that is cheaper: what they depend on overlaps."""
    parts = list(parts)
    while True:
        pairs = ((a, b) for i, a in enumerate(parts) for b in parts[i + 1 :])
        pair = next(((a, b) for a, b in pairs if cost(a.union(b)) <= cost(a) + cost(b)), None)
        if pair is None:
            return parts
        parts = [part for part in parts if part not in pair] + [pair[0].union(pair[1])]


def _to_pixels(cells: Rectangle, height: int, width: int, grid: int) -> Rectangle:
    return Rectangle(
        min(height, cells.top * grid),
        min(height, cells.bottom * grid),
        min(width, cells.left * grid),
        min(width, cells.right * grid),
    )
