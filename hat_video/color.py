"""YUV <-> RGB, in torch. No other file converts colour.

Code values become R'G'B' of the same primaries and transfer in [0, 1], and back; nothing is linearised. Matrix, range,
bit depth and chroma siting are all taken from what the file says.

Source: ITU-T H.273 (matrix coefficients, ranges, chroma sample locations); ITU-R BT.601-7, BT.709-6, BT.2020-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hat_video.frames import ColorInfo, PixelFormat

__all__ = ["alpha_from_unit", "alpha_to_unit", "from_rgb", "to_rgb"]

_LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    5: (0.299, 0.114),  # BT.470 B/G, which is BT.601
    6: (0.299, 0.114),  # SMPTE 170M, which is BT.601
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020, non-constant luminance
}
"""Matrix code point -> (Kr, Kb)."""


def to_rgb(planes: Sequence[Tensor], pixel_format: PixelFormat, color: ColorInfo) -> Tensor:
    """Planes of code values to R'G'B'.

    Args:
        planes: (N, h, w) uint8 or uint16, in the order and of the sizes that `pixel_format` says; alpha is left alone.
        pixel_format: what the planes are.
        color: what the code values mean.

    Returns:
        (N, 3, H, W) float32 on the planes' device. Nominal black and white are 0 and 1; the little that a limited-range
        signal may go beyond them is kept.

    Raises:
        ValueError: the matrix is one that cannot be inverted frame by frame (ICtCp, constant luminance, YCgCo).
    """
    luma = planes[0].float()
    scale, offset = _luma_range(pixel_format, color)
    if pixel_format.kind == "gray":
        gray = luma.sub_(offset).mul_(1 / scale)
        return gray[:, None].repeat(1, 3, 1, 1)
    if pixel_format.kind == "rgb":
        green, blue, red = ((plane.float() - offset) / scale for plane in planes[:3])
        return torch.stack([red, green, blue], dim=1)
    size = (luma.shape[1], luma.shape[2])
    yuv = torch.empty(luma.shape[0], 3, *size, device=luma.device)
    yuv[:, 0] = luma
    for k in (1, 2):
        yuv[:, k] = _upsample(planes[k].float(), size, pixel_format, color)
    matrix, bias = _decode_matrix(color.matrix, color.is_full_range, pixel_format.bit_depth, luma.device)
    return _mix(yuv, matrix, bias)


def from_rgb(rgb: Tensor, pixel_format: PixelFormat, color: ColorInfo) -> tuple[Tensor, ...]:
    """R'G'B' to planes of code values, rounded to the nearest.

    Args:
        rgb: (N, 3, H, W), any floating dtype.
        pixel_format: the planes to make.
        color: what their code values shall mean.

    Returns:
        (N, h, w) uint8 or uint16 planes on the device of `rgb`, clamped to 0..2^n-1; no alpha plane, which is no
        colour: see `alpha_from_unit`.

    Raises:
        ValueError: as for `to_rgb`.
    """
    rgb = rgb.float()
    scale, offset = _luma_range(pixel_format, color)
    if pixel_format.kind == "rgb":
        red, green, blue = rgb.unbind(1)
        return tuple(_quantize(plane * scale + offset, pixel_format) for plane in (green, blue, red))
    matrix, bias = _encode_matrix(color.matrix, color.is_full_range, pixel_format.bit_depth, rgb.device)
    if pixel_format.kind == "gray":
        return (_quantize(_mix(rgb, matrix[:1], bias[:1])[:, 0], pixel_format),)
    yuv = _mix(rgb, matrix, bias)
    chroma = _downsample(yuv[:, 1:], pixel_format, color)
    return (_quantize(yuv[:, 0], pixel_format), *(_quantize(chroma[:, k], pixel_format) for k in (0, 1)))


def alpha_to_unit(planes: Sequence[Tensor], pixel_format: PixelFormat) -> Tensor | None:
    """The alpha plane as (N, 1, H, W) float32: 0 is transparent, 1 opaque. None where the format has no alpha."""
    if not pixel_format.has_alpha:
        return None
    return planes[-1].float()[:, None] / ((1 << pixel_format.bit_depth) - 1)


def alpha_from_unit(alpha: Tensor, pixel_format: PixelFormat) -> Tensor:
    """(N, 1, H, W) alpha in [0, 1] to the (N, H, W) uint8 or uint16 plane of `pixel_format`, rounded to the nearest."""
    return _quantize(alpha[:, 0] * ((1 << pixel_format.bit_depth) - 1), pixel_format)


def _luma_range(pixel_format: PixelFormat, color: ColorInfo) -> tuple[float, float]:
    """(code values from black to white, code value of black)."""
    if color.is_full_range:
        return float((1 << pixel_format.bit_depth) - 1), 0.0
    step = float(1 << (pixel_format.bit_depth - 8))
    return 219 * step, 16 * step


def _quantize(plane: Tensor, pixel_format: PixelFormat) -> Tensor:
    top = (1 << pixel_format.bit_depth) - 1
    rounded = plane.round().clamp_(0, top)
    # torch converts float to uint16 on few devices; every one knows the way through int32.
    return rounded.to(torch.uint8) if pixel_format.bit_depth == 8 else rounded.to(torch.int32).to(torch.uint16)


@lru_cache(maxsize=32)
def _yuv_matrix(matrix: int) -> Tensor:
    """(3, 3) float64: R'G'B' in [0, 1] to Y' in [0, 1] and Cb, Cr in [-0.5, 0.5]."""
    if matrix not in _LUMA_WEIGHTS:
        raise ValueError(f"matrix coefficients {matrix} (H.273) are not supported; supported: {sorted(_LUMA_WEIGHTS)}")
    kr, kb = _LUMA_WEIGHTS[matrix]
    kg = 1 - kr - kb
    y = torch.tensor([kr, kg, kb], dtype=torch.float64)
    red, blue = torch.eye(3, dtype=torch.float64)[[0, 2]]
    return torch.stack([y, (blue - y) / (2 * (1 - kb)), (red - y) / (2 * (1 - kr))])


def _code_range(is_full_range: bool, bit_depth: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of (Y, Cb, Cr) code values, float64."""
    step, top = float(1 << (bit_depth - 8)), float((1 << bit_depth) - 1)
    scale = [top, top, top] if is_full_range else [219 * step, 224 * step, 224 * step]
    offset = [0.0 if is_full_range else 16 * step, 128 * step, 128 * step]
    return torch.tensor(scale, dtype=torch.float64), torch.tensor(offset, dtype=torch.float64)


# Kept where they are used: a copy to a GPU waits for all that is queued there.
@lru_cache(maxsize=32)
def _encode_matrix(matrix: int, is_full_range: bool, bit_depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    scale, offset = _code_range(is_full_range, bit_depth)
    return (scale[:, None] * _yuv_matrix(matrix)).float().to(device), offset.float().to(device)


@lru_cache(maxsize=32)
def _decode_matrix(matrix: int, is_full_range: bool, bit_depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    scale, offset = _code_range(is_full_range, bit_depth)
    inverse = torch.linalg.inv(scale[:, None] * _yuv_matrix(matrix))
    return inverse.float().to(device), (-inverse @ offset).float().to(device)


def _mix(channels: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """`matrix` @ channels + `bias`, for every pixel, as one matrix product."""
    n, c, h, w = channels.shape
    flat = channels.reshape(n, c, h * w)
    return torch.baddbmm(bias[None, :, None], matrix.expand(n, -1, -1), flat).view(n, matrix.shape[0], h, w)


def _shift(log2: int, axis: str, siting: str) -> float:
    """Where the first chroma sample lies, in luma samples right of or below the first luma sample's centre."""
    centre = ((1 << log2) - 1) / 2
    if siting == "center":
        return centre
    if axis == "x":
        return 0.0
    # Only 4:2:0 has chroma between rows; with one row of chroma for each row of luma this is 0 anyway.
    return 0.0 if siting == "topleft" else centre


@lru_cache(maxsize=64)
def _phases(factor: int, shift: float) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """For each of `factor` luma positions: the first chroma tap, relative, and its weights (Keys, a = -0.5)."""
    phases = []
    for position in range(factor):
        place = (position - shift) / factor
        first = int(place // 1) - 1
        weights = tuple(_keys(place - (first + tap)) for tap in range(4))
        phases.append((first, weights))
    return tuple(phases)


def _keys(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0


def _upsample(plane: Tensor, size: tuple[int, int], pixel_format: PixelFormat, color: ColorInfo) -> Tensor:
    """(N, h, w) chroma to (N, *size), with regard to where its samples lie; edges are repeated."""
    for dim, log2, axis in ((1, pixel_format.log2_chroma_h, "y"), (2, pixel_format.log2_chroma_w, "x")):
        if log2:
            shift = _shift(log2, axis, color.siting)
            plane = _upsample_axis(plane, dim, 1 << log2, shift, size[dim - 1])
    return plane


def _upsample_axis(plane: Tensor, dim: int, factor: int, shift: float, length: int) -> Tensor:
    count = plane.shape[dim]
    edge = 3
    padded = _repeat_edges(plane, dim, edge)
    shape = list(plane.shape)
    shape.insert(dim + 1, factor)
    out = torch.empty(shape, device=plane.device, dtype=plane.dtype)
    for position, (first, weights) in enumerate(_phases(factor, shift)):
        target = out.select(dim + 1, position)
        taps = [(tap, weight) for tap, weight in enumerate(weights) if weight]
        for number, (tap, weight) in enumerate(taps):
            piece = padded.narrow(dim, edge + first + tap, count)
            if number == 0:
                torch.mul(piece, weight, out=target)
            else:
                target.add_(piece, alpha=weight)
    return out.flatten(dim, dim + 1).narrow(dim, 0, length)


def _repeat_edges(plane: Tensor, dim: int, edge: int) -> Tensor:
    before, after = plane.narrow(dim, 0, 1), plane.narrow(dim, plane.shape[dim] - 1, 1)
    sizes = [-1] * plane.ndim
    sizes[dim] = edge
    return torch.cat([before.expand(sizes), plane, after.expand(sizes)], dim)


def _downsample(chroma: Tensor, pixel_format: PixelFormat, color: ColorInfo) -> Tensor:
    """(N, 2, H, W) chroma at every pixel to (N, 2, h, w), low-passed and sampled where the siting says."""
    for dim, log2, axis in ((3, pixel_format.log2_chroma_w, "x"), (2, pixel_format.log2_chroma_h, "y")):
        if log2:
            chroma = _downsample_axis(chroma, dim, 1 << log2, _shift(log2, axis, color.siting))
    return chroma


@lru_cache(maxsize=64)
def _low_pass(factor: int, shift: float) -> tuple[int, tuple[float, ...]]:
    """First luma tap relative to the block's first sample, and the weights of a tent around the chroma sample."""
    reach = range(-factor, 2 * factor)
    weights = [max(0.0, factor - abs(position - shift)) for position in reach]
    if shift == (factor - 1) / 2:
        # Centred between the samples, the block's own mean is the field's filter, and the exact inverse of repetition.
        weights = [1.0 if 0 <= position < factor else 0.0 for position in reach]
    used = [i for i, weight in enumerate(weights) if weight]
    first, last = used[0], used[-1]
    total = sum(weights)
    return reach[first], tuple(weight / total for weight in weights[first : last + 1])


def _downsample_axis(chroma: Tensor, dim: int, factor: int, shift: float) -> Tensor:
    first, weights = _low_pass(factor, shift)
    length = chroma.shape[dim]
    count = -(-length // factor)
    before = max(0, -first)
    after = max(0, (count - 1) * factor + first + len(weights) - length)
    pad = [0, 0, 0, 0]
    pad[2 * (3 - dim)], pad[2 * (3 - dim) + 1] = before, after
    padded = F.pad(chroma, pad, mode="replicate") if before or after else chroma
    out = torch.zeros(())
    for tap, weight in enumerate(weights):
        start = before + first + tap
        stop = start + (count - 1) * factor + 1
        piece = padded[..., start:stop:factor] if dim == 3 else padded[:, :, start:stop:factor]
        out = piece * weight if tap == 0 else out.add_(piece, alpha=weight)
    return out
