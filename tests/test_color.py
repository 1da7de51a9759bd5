"""Colour against an independent computation in double precision, and round trips."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hat_video.color import from_rgb, to_rgb
from hat_video.frames import ColorInfo, PixelFormat

KR_KB = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def color(matrix: int = 1, *, is_full_range: bool = False, siting: str = "left") -> ColorInfo:
    return ColorInfo(matrix, 1, 1, is_full_range, siting)  # type: ignore[arg-type]


def yuv_of(rgb: np.ndarray, info: ColorInfo, depth: int) -> np.ndarray:
    """(3, ...) code values, not rounded, straight from the standards' equations."""
    kr, kb = KR_KB[info.matrix]
    red, green, blue = rgb
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    top, step = 2**depth - 1, 2 ** (depth - 8)
    if info.is_full_range:
        return np.stack([y * top, cb * top + 128 * step, cr * top + 128 * step])
    return np.stack([219 * step * y + 16 * step, 224 * step * cb + 128 * step, 224 * step * cr + 128 * step])


@pytest.mark.parametrize(("matrix", "is_full_range", "depth"), itertools.product(KR_KB, [False, True], [8, 10, 12]))
def test_equals_the_standards(matrix: int, is_full_range: bool, depth: int) -> None:
    info = color(matrix, is_full_range=is_full_range)
    fmt = PixelFormat.parse("yuv444p" if depth == 8 else f"yuv444p{depth}le")
    rgb = np.random.default_rng(0).random((3, 40, 50))
    expected = yuv_of(rgb, info, depth)
    planes = from_rgb(torch.tensor(rgb)[None].float(), fmt, info)
    for plane, values in zip(planes, expected, strict=True):
        assert plane.dtype == fmt.dtype
        assert np.abs(plane[0].numpy().astype(float) - values).max() <= 0.501
    back = to_rgb(planes, fmt, info)[0].numpy()
    assert np.abs(back - rgb).max() < 2.5 / (2**depth)


@pytest.mark.parametrize(
    "name", ["yuv420p", "yuv422p", "yuv444p", "gray", "gbrp", "yuv420p10le", "gray10le", "yuv411p"]
)
@pytest.mark.parametrize("is_full_range", [False, True])
def test_every_gray_comes_back(name: str, is_full_range: bool) -> None:
    fmt = PixelFormat.parse(name)
    info = color(0 if fmt.kind == "rgb" else 6, is_full_range=is_full_range)
    step = 1 << (fmt.bit_depth - 8)
    low, high = (0, 256 * step - 1) if is_full_range else (16 * step, 235 * step)
    for value in range(low, high + 1, 1 if step == 1 else 13):
        sizes = fmt.plane_sizes(6, 4)
        planes = tuple(
            torch.full((1, *size), value if i == 0 or fmt.kind == "rgb" else 128 * step, dtype=fmt.dtype)
            for i, size in enumerate(sizes)
        )
        back = from_rgb(to_rgb(planes, fmt, info), fmt, info)
        assert all(torch.equal(a, b) for a, b in zip(planes, back, strict=True)), value


@pytest.mark.parametrize("siting", ["left", "center", "topleft"])
@pytest.mark.parametrize("name", ["yuv420p", "yuv422p"])
def test_siting_puts_a_ramp_where_it_is(siting: str, name: str) -> None:
    """On a linear ramp of colour any shift shows as an offset; right sampling has none, both ways."""
    fmt, info = PixelFormat.parse(name), color(6, siting=siting)
    width, height = 64, 48
    x = torch.linspace(0.2, 0.8, width)[None, :].expand(height, -1)
    y = torch.linspace(0.3, 0.7, height)[:, None].expand(-1, width)
    rgb = torch.stack([x, (x + y) / 2, y])[None]
    offset_x = 0.0 if siting != "center" else 0.5
    offset_y = 0.0 if siting == "topleft" or name == "yuv422p" else 0.5
    planes = from_rgb(rgb, fmt, info)
    step_y = 1 if name == "yuv422p" else 2
    columns = np.arange(0, width, 2) + offset_x
    rows = np.arange(0, height, step_y) + offset_y
    sampled = np.stack(
        [
            np.broadcast_to((0.2 + 0.6 * columns / (width - 1))[None, :], (len(rows), len(columns))),
            (0.2 + 0.6 * columns / (width - 1))[None, :] / 2 + (0.3 + 0.4 * rows / (height - 1))[:, None] / 2,
            np.broadcast_to((0.3 + 0.4 * rows / (height - 1))[:, None], (len(rows), len(columns))),
        ]
    )
    expected = yuv_of(sampled, info, 8)
    inner = (slice(2, -2), slice(2, -2))
    for k in (1, 2):
        assert np.abs(planes[k][0].numpy() - expected[k])[inner].max() <= 0.51
    back = to_rgb(planes, fmt, info)[0]
    assert (back - rgb[0]).abs()[:, 4:-4, 4:-4].mean() < 0.003


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 8), (48, 33)])
@pytest.mark.parametrize("name", ["yuv420p", "yuv422p", "yuv410p", "yuv440p"])
def test_odd_sizes(size: tuple[int, int], name: str) -> None:
    fmt, info = PixelFormat.parse(name), color(1)
    rgb = torch.full((2, 3, *size), 0.5)
    rgb[:, 0] = 0.25
    planes = from_rgb(rgb, fmt, info)
    assert [tuple(plane.shape[1:]) for plane in planes] == list(fmt.plane_sizes(size[1], size[0]))
    back = to_rgb(planes, fmt, info)
    assert back.shape == rgb.shape
    assert (back - rgb).abs().max() < 0.01, "one colour stays that colour, up to the last row and column"


def test_smooth_pictures_survive_subsampling() -> None:
    fmt, info = PixelFormat.parse("yuv420p"), color(1)
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    rgb = torch.nn.functional.interpolate(coarse, size=(96, 128), mode="bicubic").clamp(0.1, 0.9)
    planes = from_rgb(rgb, fmt, info)
    back = from_rgb(to_rgb(planes, fmt, info), fmt, info)
    errors = [float((a.float() - b.float()).abs().mean()) for a, b in zip(planes, back, strict=True)]
    assert errors[0] < 0.01
    assert max(errors[1:]) < 0.2


def test_rgb_planes_are_green_blue_red() -> None:
    fmt, info = PixelFormat.parse("gbrp"), color(0, is_full_range=True)
    planes = tuple(torch.full((1, 2, 2), value, dtype=torch.uint8) for value in (10, 20, 30))
    assert (to_rgb(planes, fmt, info)[0, :, 0, 0] * 255).round().tolist() == [30, 10, 20]


def test_beyond_the_range_is_clamped_not_wrapped() -> None:
    fmt, info = PixelFormat.parse("yuv444p"), color(1)
    planes = from_rgb(torch.tensor([[-3.0, 5.0, 0.5]]).view(1, 3, 1, 1), fmt, info)
    assert all(0 <= int(plane) <= 255 for plane in planes)
    assert int(from_rgb(torch.full((1, 3, 1, 1), 9.0), fmt, info)[0]) == 255


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    fmt, info = PixelFormat.parse("yuv420p"), color(1)
    assert int(from_rgb(torch.ones(1, 3, 4, 4, dtype=dtype), fmt, info)[0][0, 0, 0]) == 235


def test_a_matrix_that_is_none_is_refused() -> None:
    planes = tuple(torch.zeros(1, 2, 2, dtype=torch.uint8) for _ in range(3))
    with pytest.raises(ValueError, match=r"matrix coefficients 14 .* supported"):
        to_rgb(planes, PixelFormat.parse("yuv444p"), color(14))
