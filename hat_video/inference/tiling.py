"""Padding, and tiles that are blended: where they lie, and how. Pure geometry.

A tile is not the full frame: HAT's channel attention pools over all that it is given, so another tile gives slightly
other pixels. Tiles are for frames that do not fit in memory. Models that pool over boxes have exact ones instead: see
`hat_video.inference.regions`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["overlap_of", "pad_to_multiple", "ramp", "tile_starts", "tiled"]


def pad_to_multiple(rgb: Tensor, multiple: int) -> Tensor:
    """Right and bottom, by reflection; by repetition where the picture is too small to reflect. As upstream pads.

    Args:
        rgb: (N, C, H, W).
        multiple: of which height and width become multiples.
    """
    height, width = rgb.shape[2:]
    for axis, size in ((3, width), (2, height)):
        missing = -size % multiple
        if missing:
            pad = (0, missing, 0, 0) if axis == 3 else (0, 0, 0, missing)
            rgb = F.pad(rgb, pad, mode="reflect" if missing < size else "replicate")
    return rgb


def overlap_of(tile: int) -> int:
    """Source pixels that neighbouring tiles share: 32, or a quarter of a small tile."""
    return min(32, tile // 4)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixel of each tile along an axis; evenly spread, sharing at least `overlap`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(size: int, overlap: int, *, is_first: bool, is_last: bool) -> Tensor:
    """(size,) float32 weights that rise and fall linearly over the shared pixels; flat towards the frame's edge."""
    place = torch.arange(1, size + 1, dtype=torch.float32)
    weights = torch.ones(size)
    if not is_first:
        weights = torch.minimum(weights, place / (overlap + 1))
    if not is_last:
        weights = torch.minimum(weights, place.flip(0) / (overlap + 1))
    return weights


# Kept where they are used: a copy to a GPU waits for all that is queued there. Nine kinds of tile are in a frame.
@lru_cache(maxsize=32)
def _tile_weights(
    vertical: tuple[int, int, bool, bool], horizontal: tuple[int, int, bool, bool], device: torch.device
) -> Tensor:
    down, across = (
        ramp(size, overlap, is_first=is_first, is_last=is_last)
        for size, overlap, is_first, is_last in (vertical, horizontal)
    )
    return (down[:, None] * across).to(device)


def tiled(function: Callable[[Tensor], Tensor], rgb: Tensor, scale: int, tile: int) -> Tensor:
    """`function` of overlapping tiles, blended.

    Args:
        function: (N, C, h, w) to (N, C, scale * h, scale * w).
        rgb: (N, C, H, W).
        scale: how much `function` enlarges.
        tile: side of a tile in pixels of `rgb`.
    """
    height, width = rgb.shape[2:]
    overlap = overlap_of(tile)
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    tall, wide = min(tile, height), min(tile, width)
    out = torch.zeros(rgb.shape[0], rgb.shape[1], height * scale, width * scale, device=rgb.device)
    total = torch.zeros(1, 1, height * scale, width * scale, device=rgb.device)
    for y in rows:
        for x in columns:
            piece = function(rgb[:, :, y : y + tall, x : x + wide])
            vertical = (tall * scale, overlap * scale, y == rows[0], y == rows[-1])
            horizontal = (wide * scale, overlap * scale, x == columns[0], x == columns[-1])
            weights = _tile_weights(vertical, horizontal, rgb.device)
            place = (..., slice(y * scale, (y + tall) * scale), slice(x * scale, (x + wide) * scale))
            out[place] += piece * weights
            total[place] += weights
    return out / total
