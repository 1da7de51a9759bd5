"""How training makes its low resolution: `bicubic`, the field's classical task, and `video`, what real footage suffers.

Everything is drawn from one numpy generator: the same state gives the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hat_video.color import from_rgb, to_rgb
from hat_video.errors import OptionError, UsageError
from hat_video.frames import ColorInfo, PixelFormat
from hat_video.model.resample import resize
from hat_video.training.compress import CODECS, PRESETS, round_trip

__all__ = ["KERNELS", "Shares", "Shot", "VideoDegradation", "degrade_bicubic"]

KERNELS = ("bicubic", "lanczos", "bilinear", "area")
"""Filters that make a picture smaller, all without aliasing; `bicubic` is MATLAB's."""

Shares = tuple[tuple[str, float], ...]
"""(name, share) of each choice; shares are positive and need not add up to 1."""


def degrade_bicubic(hr: Tensor, scale: int) -> Tensor:
    """MATLAB's `imresize(hr, 1 / scale)` of 8-bit pictures, to the bit, borders included.

    Args:
        hr: (B, 3, scale * H, scale * W), uint8, or floating in [0, 1] and multiples of 1/255.
        scale: 1 to 4; 1 changes nothing.

    Returns:
        (B, 3, H, W) float32 in [0, 1], multiples of 1/255, on the device of `hr`.

    Raises:
        UsageError: the picture's sides are no multiples of `scale`.
    """
    height, width = hr.shape[2:]
    if height % scale or width % scale:
        raise UsageError(f"a picture of {width}x{height} for x{scale}: crop its sides to multiples of {scale} first")
    # fp32 is enough: halves and quarters are exact in it, and thirds, of 1/81, never come near a tie.
    hr = hr.float() / (1 if hr.is_floating_point() else 255)
    return hr if scale == 1 else resize(hr, (height // scale, width // scale), rounded=True)


@dataclass(frozen=True, slots=True)
class Shot:
    """A short moving shot, sharp and as a camera and an encoder would have left it."""

    hr: Tensor
    """(T, 3, scale * H, scale * W) uint8."""
    lr: Tensor
    """(T, 3, H, W) float32; black and white are 0 and 1, and as in real footage a few values lie beyond."""
    frame_types: tuple[str, ...]
    """How each frame was coded, `I`, `P` or `B`; empty if the shot was not compressed."""


@dataclass(frozen=True, slots=True)
class VideoDegradation:
    """What may happen to a shot on its way to a viewer; each shot draws its own fate.

    A window pans over a still picture by whole HR pixels, so the HR frames stay exact, while between LR frames
    everything moves by fractions of a pixel. Some shots are soft to begin with, as a lens out of focus makes them: what
    is soft in the original must stay so. Each frame is blurred and made smaller, noise is added, the shot becomes
    limited-range YUV, is encoded and decoded, and becomes RGB again as `color.py` does it when footage is read.

    Raises:
        OptionError: a field is out of its range.
    """

    scale: int
    """HR pixels to an LR pixel: 1 to 4. At 1 the shot is as large as before, and only cleaned."""
    soft_probability: float = 0.4
    soft_sigma: tuple[float, float] = (0.2, 1.0)
    """Of the Gaussian blur of the shot itself, the clean picture included, in LR pixels, uniform."""
    kernels: Shares = (("bicubic", 0.7), ("lanczos", 0.1), ("bilinear", 0.1), ("area", 0.1))
    """What makes it smaller, of `KERNELS`."""
    blur_probability: float = 0.1
    blur_sigma: tuple[float, float] = (0.2, 0.5)
    """Of the Gaussian blur before that, in LR pixels, uniform. The network learns to undo it, and cannot tell it from a
    soft shot: much of it, and soft footage is made harder than it was."""
    noise_probability: float = 0.6
    noise_sigma: float = 4.0
    """The most that is drawn, in code values of 8 bits; the mean is a third of it, so most noise is mild. It is in luma
    alone, and new in each frame."""
    bt709_probability: float = 0.5
    """Else the matrix is BT.601's."""
    full_chroma_probability: float = 0.1
    """4:4:4; else chroma is subsampled to 4:2:0, sited left."""
    clean_probability: float = 0.12
    """No compression; still YUV of 8 bits."""
    codecs: Shares = (("libx264", 0.75), ("libx265", 0.25))
    crf: tuple[float, float] = (16.0, 34.0)
    """Constant quality from best to worst, uniform."""
    presets: Shares = tuple((preset, 1.0) for preset in PRESETS)
    frames: int = 6
    """Frames in a shot, the first of which is an I frame."""
    still_probability: float = 0.2
    """The window does not move."""
    speed: float = 3.0
    """The most that is drawn, in LR pixels a frame; the mean is a third of it."""
    shot_size: int = 96
    """Sides of the window in LR pixels, where the picture is large enough."""

    def __post_init__(self) -> None:
        for name in ("soft", "blur", "noise", "bt709", "full_chroma", "clean", "still"):
            probability = getattr(self, f"{name}_probability")
            if not 0 <= probability <= 1:
                raise OptionError(f"{name}_probability {probability}: must be between 0 and 1")
        for name, known in (("kernels", KERNELS), ("codecs", tuple(CODECS)), ("presets", PRESETS)):
            shares: Shares = getattr(self, name)
            if not shares or any(choice not in known or share <= 0 for choice, share in shares):
                raise OptionError(f"{name} {shares}: must be pairs of {', '.join(known)} and a positive share")
        for name, most in (("crf", 51.0), ("soft_sigma", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= most:
                raise OptionError(f"{name} {(low, high)}: must be two rising numbers from 0 to {most:g}")
        for name, least in (("scale", 1), ("frames", 1), ("shot_size", 16), ("noise_sigma", 0), ("speed", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} {getattr(self, name)}: must be at least {least}")

    def make(self, tile: Tensor, lr_size: int, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Training pairs from one shot: crops at random places of its frames, all frames taken equally often.

        Args:
            tile: (3, h, w) uint8 on the CPU, h and w at least scale * lr_size. The larger, the more the pairs differ
                and the further the window can travel: at x4 a 256x256 tile leaves a window of 64 LR pixels no room.
            lr_size: side of an LR crop; even, at least 16.
            count: pairs to make. Up to `frames` of them cost little more than one.
            rng: all that is random comes from here.

        Returns:
            hr: (count, 3, scale * lr_size, scale * lr_size) float32 in [0, 1], multiples of 1/255: the clean picture.
            lr: (count, 3, lr_size, lr_size) float32, not clamped, as in `Shot`.

        Raises:
            UsageError: `tile` is no such picture, or `lr_size` no such number.
            WorkError: an encoder is missing from this build of FFmpeg.
        """
        shot = self.shoot(tile, lr_size, rng)
        hr = torch.empty(count, 3, self.scale * lr_size, self.scale * lr_size)
        lr = torch.empty(count, 3, lr_size, lr_size)
        order = rng.permutation(self.frames)
        height, width = shot.lr.shape[2:]
        for i in range(count):
            frame = int(order[i % self.frames])
            y, x = int(rng.integers(height - lr_size + 1)), int(rng.integers(width - lr_size + 1))
            lr[i] = shot.lr[frame, :, y : y + lr_size, x : x + lr_size]
            hr[i] = _cut(shot.hr[frame], self.scale * y, self.scale * x, self.scale * lr_size, self.scale * lr_size)
        return hr.div_(255), lr

    def shoot(self, tile: Tensor, lr_size: int, rng: np.random.Generator) -> Shot:
        """One shot; the arguments are those of `make`, and no side of the LR frames is shorter than `lr_size`."""
        if tile.dtype != torch.uint8 or tile.ndim != 3 or tile.shape[0] != 3:
            raise UsageError(f"the tile is {tuple(tile.shape)} of {tile.dtype}; it must be (3, h, w) of torch.uint8")
        if lr_size < 16 or lr_size % 2:
            raise UsageError(f"lr_size {lr_size}: must be even, for chroma's sake, and at least 16")
        if min(tile.shape[1:]) < self.scale * lr_size:
            raise UsageError(
                f"a tile of {tile.shape[2]}x{tile.shape[1]} is too small for x{self.scale} crops of {lr_size};"
                f" give at least {self.scale * lr_size} a side"
            )
        hr = self._softened(self._pan(tile, lr_size, rng), rng)
        lr = self._film(hr, rng)
        color = ColorInfo(1 if rng.random() < self.bt709_probability else 6, 1, 1, is_full_range=False)
        fmt = PixelFormat.parse("yuv444p" if rng.random() < self.full_chroma_probability else "yuv420p")
        planes = from_rgb(lr, fmt, color)
        types: tuple[str, ...] = ()
        if rng.random() >= self.clean_probability:
            codec, preset = _pick(self.codecs, rng), _pick(self.presets, rng)
            planes, types = round_trip(planes, fmt, codec=codec, crf=rng.uniform(*self.crf), preset=preset)
        return Shot(hr, to_rgb(planes, fmt, color), types)

    def _pan(self, tile: Tensor, lr_size: int, rng: np.random.Generator) -> Tensor:
        """(T, 3, h, w) uint8: what the window sees on its way; h and w are multiples of 2 * scale."""
        path = self._path(rng)
        starts, sides = [], []
        for axis in (0, 1):
            length, way = tile.shape[1 + axis], path[:, axis]
            room, extent = length - self.scale * lr_size, int(np.ptp(way))
            if extent > room:
                way = np.rint(way * (room / extent)).astype(np.int64)
                extent = int(np.ptp(way))
            # Whole chroma samples, and of the picture as much as the way leaves.
            unit = 2 * self.scale
            side = min(self.shot_size * self.scale, length - extent) // unit * unit
            sides.append(max(side, self.scale * lr_size))
            starts.append(way - way.min() + rng.integers(length - extent - sides[axis] + 1))
        return torch.stack([_cut(tile, int(y), int(x), *sides) for y, x in zip(*starts, strict=True)])

    def _path(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(T, 2): where the window is, in HR pixels: one direction, and a little acceleration in another."""
        moves = rng.random() >= self.still_probability
        speed = self.scale * self.speed * rng.random() ** 2 * moves
        angle, turn = rng.uniform(0, 2 * math.pi, 2)
        time = np.arange(self.frames)[:, None]
        velocity = speed * np.array([math.sin(angle), math.cos(angle)])
        acceleration = 0.1 * speed * np.array([math.sin(turn), math.cos(turn)])
        return np.rint(velocity * time + acceleration * time**2).astype(np.int64)

    def _softened(self, hr: Tensor, rng: np.random.Generator) -> Tensor:
        """(T, 3, h, w) uint8, as a lens may have left it."""
        sigma = self.scale * rng.uniform(*self.soft_sigma) * (rng.random() < self.soft_probability)
        if not sigma:
            return hr
        down, across = (_blur(side, sigma) for side in hr.shape[2:])
        return (down @ hr.float() @ across.T).round_().clamp_(0, 255).to(torch.uint8)

    def _film(self, hr: Tensor, rng: np.random.Generator) -> Tensor:
        """(T, 3, sH, sW) uint8 to (T, 3, H, W) float32 in [0, 1]: blurred, smaller, noisy."""
        kernel = _pick(self.kernels, rng)
        sigma = self.scale * rng.uniform(*self.blur_sigma) * (rng.random() < self.blur_probability)
        strength = self.noise_sigma / 255 * rng.random() ** 2 * (rng.random() < self.noise_probability)
        lr = _narrow(hr.float().div_(255), self.scale, kernel, sigma)
        if strength:
            # The same in red, green and blue is noise in luma alone.
            noise = rng.standard_normal((len(lr), 1, *lr.shape[2:]), dtype=np.float32)
            lr = lr.add(torch.from_numpy(noise), alpha=strength)
        return lr.clamp_(0, 1)


def _pick(shares: Shares, rng: np.random.Generator) -> str:
    weights = np.array([share for _, share in shares])
    return shares[int(rng.choice(len(shares), p=weights / weights.sum()))][0]


def _cut(picture: Tensor, y: int, x: int, height: int, width: int) -> Tensor:
    return picture[:, y : y + height, x : x + width]


def _narrow(frames: Tensor, scale: int, kernel: str, sigma: float) -> Tensor:
    """(T, 3, sH, sW) to (T, 3, H, W); blur and filter are one product an axis, whatever their widths."""
    if scale == 1 and not sigma:
        return frames
    down, across = (_filter(side, scale, kernel) @ _blur(side, sigma) for side in frames.shape[2:])
    return down @ frames @ across.T


@lru_cache(maxsize=256)
def _filter(before: int, scale: int, kernel: str) -> Tensor:
    """(before / scale, before) float32: each row holds the weights of one output pixel."""
    # What a filter does to the unit vectors is its matrix.
    units, after = torch.eye(before), before // scale
    if kernel == "area":
        return units.view(after, scale, before).mean(1)
    size = (after, before)
    if kernel == "bilinear":
        return F.interpolate(units[None, None], size, mode="bilinear", antialias=True)[0, 0]
    return resize(units[None, None], size, kernel=kernel)[0, 0]


def _blur(length: int, sigma: float) -> Tensor:
    """(length, length) float32: a Gaussian of `sigma` pixels, of what lies within the picture."""
    if not sigma:
        return torch.eye(length)
    place = torch.arange(length, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((place[:, None] - place) / sigma).square())
    return weights / weights.sum(1, keepdim=True)
