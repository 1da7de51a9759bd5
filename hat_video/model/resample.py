"""Fixed filters: the baselines of the literature, and MATLAB's imresize, by which the field makes its low resolution.

Pixel centres lie on half integers throughout.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["enlarge", "resize"]

# Output pixels of one matrix product. Measured on pictures of 720 to 2160 lines: 16 to 32 are the fastest.
_BLOCK = 32


def resize(
    picture: Tensor, size: tuple[int, int], *, kernel: str = "bicubic", antialias: bool = True, rounded: bool = False
) -> Tensor:
    """Resizes to any size, edges mirrored; `bicubic` with the defaults is MATLAB's imresize.

    Args:
        picture: (N, C, H, W), any floating dtype.
        size: (height, width) of the result.
        kernel: `bicubic` (Keys, a = -0.5) or `lanczos` (3 lobes).
        antialias: widen the filter where the picture becomes smaller.
        rounded: the picture is of 8 bits, and so is the result: rounded and clamped after each of the two passes, as
            imresize does with uint8.

    Returns:
        (N, C, height, width); not clamped unless `rounded`.

    Source: imresize of MATLAB, checked against its own pictures. It narrows the axis that shrinks more first.
    """
    if rounded:
        # In code values the sums are exact for powers of two, so ties fall as MATLAB's do.
        picture = (picture * 255).round_()
    scales = [size[0] / picture.shape[2], size[1] / picture.shape[3]]
    for axis in (0, 1) if scales[0] <= scales[1] else (1, 0):
        # Whole where every bit of imresize counts: a sum cut elsewhere rounds elsewhere.
        block = size[axis] if rounded else _BLOCK
        picture = _resize_axis(picture, 2 + axis, size[axis], kernel, antialias, block)
        if rounded:
            picture = (picture + 0.5).floor_().clamp_(0, 255)
    return picture / 255 if rounded else picture


def _resize_axis(picture: Tensor, dim: int, after: int, kernel: str, antialias: bool, block: int) -> Tensor:
    """One pass of `resize`, in small matrix products along the band: for a 4K frame nearly all of the matrix is 0."""
    shape = list(picture.shape)
    shape[dim] = after
    out = picture.new_empty(shape)
    blocks = _resize_blocks(picture.shape[dim], after, kernel, antialias, block, picture.dtype, picture.device)
    for number, (first, weights) in enumerate(blocks):
        taps = picture.narrow(dim, first, weights.shape[1])
        rows = out.narrow(dim, number * block, weights.shape[0])
        rows.copy_(weights @ taps if dim == 2 else taps @ weights.T)
    return out


@lru_cache(maxsize=64)
def _resize_blocks(
    before: int, after: int, kernel: str, antialias: bool, block: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, Tensor], ...]:
    """For every `block` output pixels: the first input pixel, and the (outputs, inputs) weights from there on."""
    scale = after / before
    stretch = min(scale, 1.0) if antialias else 1.0
    reach = (2 if kernel == "bicubic" else 3) / stretch
    blocks = []
    for start in range(0, after, block):
        rows = []
        for row in range(start, min(start + block, after)):
            place = (row + 0.5) / scale - 0.5
            taps = range(math.floor(place - reach), math.ceil(place + reach) + 1)
            weights = [_weight((place - tap) * stretch, kernel) for tap in taps]
            total = sum(weights)
            # Mirrored with the edge pixel repeated, as often as it takes.
            columns = [tap % (2 * before) for tap in taps]
            rows.append([(min(c, 2 * before - 1 - c), w / total) for c, w in zip(columns, weights, strict=True)])
        used = [column for row_taps in rows for column, _ in row_taps]
        first = min(used)
        matrix = torch.zeros(len(rows), max(used) + 1 - first, dtype=torch.float64)
        for matrix_row, row_taps in zip(matrix, rows, strict=True):
            for column, weight in row_taps:
                matrix_row[column - first] += weight
        blocks.append((first, matrix.to(device, dtype)))
    return tuple(blocks)


def enlarge(rgb: Tensor, scale: int, kernel: str) -> Tensor:
    """Enlarges by a fixed filter, pixel centres on half integers, edges repeated.

    Args:
        rgb: (N, C, H, W), any floating dtype.
        scale: 1 to 4.
        kernel: `bicubic` (Keys, a = -0.5, as MATLAB and Pillow have it) or `lanczos` (3 lobes).

    Returns:
        (N, C, scale * H, scale * W), not clamped.
    """
    if scale == 1:
        return rgb.clone()
    for dim in (2, 3):
        rgb = _enlarge_axis(rgb, dim, scale, kernel)
    return rgb


@lru_cache(maxsize=16)
def _filters(scale: int, kernel: str) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """For each of `scale` output phases: the first tap, relative to the input pixel, and the weights."""
    reach = 2 if kernel == "bicubic" else 3
    phases = []
    for phase in range(scale):
        place = (phase + 0.5) / scale - 0.5
        first = math.floor(place) - reach + 1
        weights = [_weight(place - (first + tap), kernel) for tap in range(2 * reach)]
        total = sum(weights)
        phases.append((first, tuple(weight / total for weight in weights)))
    return tuple(phases)


def _weight(x: float, kernel: str) -> float:
    x = abs(x)
    if kernel == "bicubic":
        if x < 1:
            return (1.5 * x - 2.5) * x * x + 1
        return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0
    if x >= 3:
        return 0.0
    return 1.0 if x == 0 else 3 * math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2


def _enlarge_axis(rgb: Tensor, dim: int, scale: int, kernel: str) -> Tensor:
    edge = 3
    count = rgb.shape[dim]
    padded = F.pad(rgb, (0, 0, edge, edge) if dim == 2 else (edge, edge, 0, 0), mode="replicate")
    phases = []
    for first, weights in _filters(scale, kernel):
        out = torch.zeros_like(rgb)
        for tap, weight in enumerate(weights):
            out.add_(padded.narrow(dim, edge + first + tap, count), alpha=weight)
        phases.append(out)
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)
