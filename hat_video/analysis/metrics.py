"""What is measured, as pure functions on tensors of luma in code values of 8 bits.

Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (2004); the PSNR and SSIM
of MATLAB and BasicSR, which the papers of the field report.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "crop_border",
    "flicker",
    "luma",
    "mean_squared_error",
    "psnr",
    "psnr_of_error",
    "seam_profiles",
    "seam_ratio",
    "ssim",
]

_PEAK = 255.0
_WINDOW, _SIGMA = 11, 1.5
_LEAST_PERIODS = 4
"""A profile of fewer windows says more of the picture than of them."""


def luma(rgb: Tensor) -> Tensor:
    """BT.601 luma as MATLAB's rgb2ycbcr has it, not rounded.

    Args:
        rgb: (N, 3, H, W), any floating dtype, in [0, 1].

    Returns:
        (N, H, W) float64 code values, 16..235.
    """
    red, green, blue = rgb.double().unbind(1)
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def crop_border(picture: Tensor, border: int) -> Tensor:
    """Without `border` pixels on each of the four sides.

    Args:
        picture: (..., H, W).
        border: pixels; the protocol of the field takes the scale.

    Raises:
        ValueError: nothing would be left.
    """
    height, width = picture.shape[-2:]
    if min(height, width) <= 2 * border:
        raise ValueError(f"a picture of {width}x{height} has nothing left without a border of {border} pixels")
    return picture[..., border : height - border, border : width - border]


def mean_squared_error(output: Tensor, original: Tensor) -> float:
    """Of two tensors of the same shape, in fp64."""
    return float((output.double() - original.double()).square_().mean())


def psnr_of_error(error: float) -> float:
    """dB of a mean squared error in code values of 8 bits; infinite for none."""
    return 10 * math.log10(_PEAK * _PEAK / error) if error > 0 else math.inf


def psnr(output: Tensor, original: Tensor, *, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB over all values of both tensors, peak 255.

    Args:
        output: (..., H, W) code values of 8 bits in any dtype.
        original: likewise, of the same shape.
        border: pixels to leave out on each side.

    Raises:
        ValueError: nothing is left without the border.
    """
    return psnr_of_error(mean_squared_error(crop_border(output, border), crop_border(original, border)))


def ssim(output: Tensor, original: Tensor, *, border: int = 0) -> float:
    """Structural similarity: Gaussian window of 11x11, sigma 1.5, only where it lies within the picture; L = 255.

    Args:
        output: (N, H, W) code values of 8 bits in any dtype.
        original: likewise, of the same shape.
        border: pixels to leave out on each side; 11 or more rows and columns must be left.

    Returns:
        The mean over all windows of all pictures, 1 for equal ones.

    Raises:
        ValueError: the pictures are smaller than the window.
    """
    x, y = (crop_border(picture, border).double() for picture in (output, original))
    height, width = x.shape[-2:]
    if min(height, width) < _WINDOW:
        raise ValueError(f"a picture of {width}x{height} is smaller than SSIM's window of {_WINDOW}x{_WINDOW}")
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.stack([x, y, x * x, y * y, x * y])).unbind(0)
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    likeness = (2 * product + c1) * (2 * (mean_xy - product) + c2)
    return float((likeness / ((squares + c1) * (mean_xx + mean_yy - squares + c2))).mean())


def _blur(planes: Tensor) -> Tensor:
    """(A, N, H, W) under the Gaussian window, valid region only."""
    place = torch.arange(_WINDOW, dtype=planes.dtype) - _WINDOW // 2
    gauss = torch.exp(-place.square() / (2 * _SIGMA**2))
    gauss = (gauss / gauss.sum()).to(planes.device)
    flat = planes.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, gauss[None, None, :, None]), gauss[None, None, None, :])
    return flat.view(*planes.shape[:2], *flat.shape[2:])


def flicker(residual: Tensor) -> float:
    """What of the error changes from frame to frame: RMS of the differences of consecutive residuals.

    An error that stands still is no flicker; one that comes and goes is what the eye catches. The original's own noise,
    which no upscaler brings back, counts for every candidate alike: compare candidates, not clips.

    Args:
        residual: (N, H, W) output minus original, in code values of 8 bits, consecutive frames.

    Returns:
        Code values of 8 bits; 0 for a single frame.
    """
    if residual.shape[0] < 2:
        return 0.0
    return math.sqrt(float(residual.double().diff(dim=0).square_().mean()))


def seam_profiles(residual: Tensor) -> tuple[Tensor, Tensor]:
    """How rough the error is between each row and the next, and each column and the next.

    Window attention that does not blend leaves seams at the windows' edges, where the error jumps; these profiles have
    a peak there, however faint, since whole rows, columns and frames are averaged. Logarithms are, because a seam is
    seen where all around is smooth, and there it must not be outvoted by a few strong edges.

    Args:
        residual: (N, H, W) output minus original, in code values of 8 bits.

    Returns:
        (H - 1) and (W - 1) float64: means of log(1 + |difference of neighbours|), down and across. Profiles of several
        batches of one size may be averaged.
    """
    down, across = (residual.double().diff(dim=dim).abs_().log1p_() for dim in (1, 2))
    return down.mean(dim=(0, 2)), across.mean(dim=(0, 1))


def seam_ratio(profile: Tensor, period: int, scale: int) -> float:
    """How much rougher the error is across the windows' edges than between other rows or columns: 1 is no grid.

    The profile is folded at the window's period. Of the places within a window only those count that lie, like its
    edge, between two pixels of the source, since every upscaler's error repeats with these. Their median is what the
    edge is compared with, so that something else that repeats, such as the blocks of a compressed original, does no
    harm, as long as it does not fall on the windows' edges; there it raises bicubic's ratio just as much.

    Args:
        profile: (L,) as `seam_profiles` gives; the first window begins at the picture's edge.
        period: of the windows, in pixels of the output.
        scale: of the upscaler; divides `period`.

    Returns:
        The ratio; NaN where the profile has fewer than 4 periods.
    """
    periods = profile.shape[0] // period
    if periods < _LEAST_PERIODS:
        return math.nan
    folded = profile[: periods * period].view(periods, period).mean(dim=0)[scale - 1 :: scale]
    usual = float(folded[:-1].median())
    return float(folded[-1]) / usual if usual > 0 else 1.0
