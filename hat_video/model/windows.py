"""Windows: cutting a map into them, which tokens may see each other after a shift, and where each lies to each.

Pure functions. Source: Swin Transformer (ICCV 2021) for the shifted windows, HAT (CVPR 2023) for the overlapping ones;
index order as in XPixelGroup/HAT, whose checkpoints store these tables.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = [
    "overlapping_position_index",
    "overlapping_windows",
    "relative_position_index",
    "shift_regions",
    "window_partition",
    "window_reverse",
]


def window_partition(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) to (B * windows, size * size, C); H and W are multiples of `size`."""
    return rearrange(x, "b (nh h) (nw w) c -> (b nh nw) (h w) c", h=size, w=size)


def window_reverse(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `window_partition`: (B * windows, size * size, C) to (B, height, width, C)."""
    return rearrange(
        windows, "(b nh nw) (h w) c -> b (nh h) (nw w) c", h=size, w=size, nh=height // size, nw=width // size
    )


def overlapping_windows(x: Tensor, size: int, overlap_size: int) -> Tensor:
    """(B, H, W, C) to (B * windows, overlap_size^2, C): around each window of `size`; zeros outside the map.

    Made of slices, whose gradient is cheap; that of `unfold` takes a seventh of a training step.
    """
    reach = overlap_size - size
    for dim in (1, 2):
        # What a window has of itself and to its left, then what it has of the next one. Two windows at most meet.
        before = reach // 2
        pad = (0, 0) * (3 - dim) + (before, size - before)
        padded = F.pad(x, pad)
        shape = (*x.shape[:dim], -1, size, *x.shape[dim + 1 :])
        own = padded.narrow(dim, 0, x.shape[dim]).reshape(shape)
        following = padded.narrow(dim, size, x.shape[dim]).reshape(shape).narrow(dim + 1, 0, reach)
        x = torch.cat([own, following], dim + 1).flatten(dim, dim + 1)
    return window_partition(x, overlap_size)


def shift_regions(length: int, size: int, shift: int, device: torch.device | None = None) -> Tensor:
    """(length,) int64: which part of a rolled axis each position came from; only equal parts may see each other.

    After rolling by `shift`, the last window of an axis holds the end of the axis and, wrapped around, its beginning.
    """
    region = torch.zeros(length, dtype=torch.long, device=device)
    region[-size:-shift] = 1
    region[-shift:] = 2
    return region


def relative_position_index(size: int) -> Tensor:
    """(size^2, size^2) int64 in 0..(2 size - 1)^2 - 1: the row of the bias table for each query and key of a window."""
    place = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    offset = place[:, :, None] - place[:, None, :] + size - 1
    return offset[0] * (2 * size - 1) + offset[1]


def overlapping_position_index(size: int, overlap_size: int) -> Tensor:
    """(size^2, overlap_size^2) int64: the row of OCAB's bias table for each query of a window and key of its surround.

    Upstream's numbers are negative for some pairs, and PyTorch's indexing wraps them around the table's
    (size + overlap_size - 1)^2 rows; here they are wrapped already.
    """
    query = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    key = torch.stack(torch.meshgrid(torch.arange(overlap_size), torch.arange(overlap_size), indexing="ij")).flatten(1)
    offset = key[:, None, :] - query[:, :, None] + size - overlap_size + 1
    side = size + overlap_size - 1
    return (offset[0] * side + offset[1]) % (side * side)
