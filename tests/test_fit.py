"""What fits on a GPU: the rule, tried with a model of its memory. The trial itself runs where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hat_video.errors import OutOfMemoryError
from hat_video.inference.fit import Fit, Memory, fit_to_gpu
from hat_video.inference.upscaler import Upscaler
from hat_video.model.zoo import load_model

GIB = 1 << 30
FULL_HD = (1080, 1920)


Trial = Callable[[int | None, int], int | None]


def gpu(free: int, bytes_per_pixel: int) -> tuple[Trial, list[tuple[int | None, int]]]:
    """A trial on a GPU where each pixel that is at work takes so much; and what was tried."""
    tried = []

    def trial(tile: int | None, frames: int) -> int | None:
        tried.append((tile, frames))
        height, width = FULL_HD if tile is None else (min(tile, FULL_HD[0]), min(tile, FULL_HD[1]))
        peak = height * width * bytes_per_pixel * frames
        return None if peak > free else peak

    return trial, tried


@pytest.mark.parametrize(
    ("total", "bytes_per_pixel", "expected"),
    [
        (80 * GIB, 1000, Fit(None, 8)),  # 2 GB a frame: eight, and no more
        (24 * GIB, 1000, Fit(None, 4)),
        (8 * GIB, 1000, Fit(None, 2)),
        (4 * GIB, 1000, Fit(None, 1)),
        (2 * GIB, 1000, Fit(896, 1)),  # the frame does not fit into the share
        (1 * GIB, 10_000, Fit(128, 1)),
    ],
)
def test_the_largest_that_fits(total: int, bytes_per_pixel: int, expected: Fit) -> None:
    trial, _ = gpu(total, bytes_per_pixel)
    assert fit_to_gpu(*FULL_HD, Memory(total, total), trial) == expected


def test_what_others_hold_is_not_counted_on() -> None:
    trial, _ = gpu(3 * GIB, 1000)
    assert fit_to_gpu(*FULL_HD, Memory(80 * GIB, 3 * GIB), trial) == Fit(None, 1)


def test_a_run_that_is_taken_up_again_settles_for_the_same() -> None:
    """A little more or less that is free, as the desktop moves windows, changes nothing."""
    found = {
        fit_to_gpu(*FULL_HD, Memory(24 * GIB, free), gpu(free, 1000)[0]) for free in range(16 * GIB, 24 * GIB, GIB // 3)
    }
    assert found == {Fit(None, 4)}


def test_what_was_asked_for_is_not_changed() -> None:
    trial, tried = gpu(80 * GIB, 1000)
    assert fit_to_gpu(*FULL_HD, Memory(80 * GIB, 80 * GIB), trial, tile=256, batch=3) == Fit(256, 3)
    assert tried == [(256, 1)]


def test_not_even_a_tile() -> None:
    with pytest.raises(OutOfMemoryError, match=r"not even a tile of 64x64 fits in the 1024 MiB .* use --device cpu"):
        fit_to_gpu(*FULL_HD, Memory(8 * GIB, GIB), lambda tile, frames: None)


def test_more_frames_that_turn_out_not_to_fit_are_not_taken() -> None:
    """Several frames may take more than their number says: what counts is the trial."""

    def trial(tile: int | None, frames: int) -> int | None:
        return None if frames > 2 else GIB

    assert fit_to_gpu(*FULL_HD, Memory(80 * GIB, 80 * GIB), trial) == Fit(None, 2)


def test_a_trial_says_what_does_not_fit() -> None:
    upscaler = Upscaler(load_model("hat-nano", scale=2), precision="fp32", backend="torch")
    frames = torch.zeros(4, 3, 16, 16)
    assert upscaler.fits(frames)

    def limit(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[0] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes.")

    upscaler._network("fp32", 0).register_forward_pre_hook(limit)
    assert not upscaler.fits(frames)
    assert upscaler.fits(frames[:2])
