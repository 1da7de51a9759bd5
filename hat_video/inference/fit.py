"""How large a tile, and how many frames at once, a GPU has memory for: found by trying, before the first frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hat_video.errors import OutOfMemoryError
from hat_video.inference.upscaler import Upscaler

__all__ = ["Fit", "Memory", "fit_to_gpu", "gpu_memory", "trial_bytes"]

# More frames at once fill a GPU no better, and a crash or an overflow then costs more of them.
_MOST_FRAMES = 8
# Of the GPU's memory for the network's own peak: the rest is for decoded and finished frames, the decoder, the encoder.
_SHARE = 0.6
_SMALLEST_TILE = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits."""

    tile: int | None
    """Side in source pixels; None for whole frames."""
    batch: int
    """Frames that go through the network together."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a GPU, in bytes."""

    total: int
    free: int


def fit_to_gpu(
    height: int,
    width: int,
    memory: Memory,
    trial: Callable[[int | None, int], int | None],
    *,
    tile: int | None = None,
    batch: int | None = None,
) -> Fit:
    """The largest tile and batch that fit.

    Both go by the GPU's whole memory as far as that is free, so that a run that is taken up again settles for the same.
    Where frames are cut into tiles, one of them fills the GPU.

    Args:
        height: of the frames, in source pixels.
        width: likewise.
        memory: what the GPU has.
        trial: (tile, frames) to the peak of memory that they take, in bytes; None where they do not fit.
        tile: asked for by the user: not changed.
        batch: likewise.

    Raises:
        OutOfMemoryError: not even one tile fits.
    """
    budget = int(min(memory.total * _SHARE, memory.free))
    peak = trial(tile, 1)
    while (peak is None or peak > budget) and (tile is None or tile > _SMALLEST_TILE):
        side = max(height, width) if tile is None else tile
        tile = max(_SMALLEST_TILE, (side - 1) // 2 // 64 * 64)
        peak = trial(tile, 1)
    if peak is None:
        raise OutOfMemoryError(
            f"not even a tile of {tile}x{tile} fits in the {memory.free >> 20} MiB that are free of the GPU's"
            f" {memory.total >> 20} MiB; close what else is on it, or use --device cpu"
        )
    if batch is not None:
        return Fit(tile, batch)
    frames = 1
    while tile is None and frames < _MOST_FRAMES and 2 * frames * peak <= budget:
        frames *= 2
    while frames > 1 and trial(tile, frames) is None:
        frames //= 2
    return Fit(tile, frames)


def gpu_memory(device: torch.device) -> Memory:
    """What a GPU has; what torch keeps of it for later counts as free."""
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Memory(total, free + kept)


def trial_bytes(upscaler: Upscaler, frames: int, height: int, width: int) -> int | None:
    """The peak of GPU memory that black frames take on their way through; None where they do not fit."""
    device = upscaler.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if not upscaler.fits(torch.zeros(frames, 3, height, width, device=device)):
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
