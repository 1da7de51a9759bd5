"""JPEGs of the newest frame: their colours, their sizes, and that each is made once."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from hat_video.color import from_rgb, to_rgb
from hat_video.frames import ColorInfo, PixelFormat, VideoInfo
from hat_video.live.pictures import _JPEG, _STILL, Pictures
from tests.live.scene import BT601, SMALL, TICKS, picture, read_jpeg


@pytest.mark.parametrize("quick", [False, True], ids=["still", "moving"])
@pytest.mark.parametrize(
    ("name", "color"),
    [
        ("yuv420p", BT601),
        ("yuv420p", ColorInfo(1, 1, 1, False)),
        ("yuv420p", ColorInfo(6, 1, 1, True, "center")),
        ("yuv420p10le", ColorInfo(9, 9, 14, False)),
        ("yuv444p", ColorInfo(1, 1, 1, False)),
        ("gbrp", ColorInfo(0, 1, 13, True)),
        ("gray", ColorInfo(1, 1, 1, False)),
        ("yuva420p", ColorInfo(1, 1, 1, False)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.matrix}{'f' if value.is_full_range else ''}",
)
def test_jpegs_have_the_colours_of_the_video(name: str, color: ColorInfo, quick: bool) -> None:
    pixel_format = PixelFormat.parse(name)
    info = VideoInfo(96, 64, TICKS, None, pixel_format, color)
    patches = torch.tensor(
        [[0.8, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.2, 0.9], [0.9, 0.9, 0.9], [0.05, 0.05, 0.05], [0.7, 0.6, 0.1]]
    )
    rgb = patches.T.reshape(1, 3, 1, 6).repeat_interleave(64, 2).repeat_interleave(16, 3)
    planes = [plane[0] for plane in from_rgb(rgb, pixel_format, color)]
    if pixel_format.has_alpha:
        planes.append(torch.full((64, 96), 255, dtype=torch.uint8))
    pictures = Pictures()
    pictures.show((planes, info), (planes, info))
    made = pictures.quick("result") if quick else pictures.best("result")
    assert made is not None
    seen = read_jpeg(made.data)[32, 8::16].astype(int)
    wanted = (patches * 255).numpy()
    if name == "gray":
        weights = np.array([0.2126, 0.7152, 0.0722])
        wanted = np.repeat((wanted @ weights)[:, None], 3, axis=1)
    assert np.abs(seen - wanted).max() <= 6


def test_pictures_of_odd_size_and_of_changing_size() -> None:
    pictures = Pictures()
    for width, height in ((33, 17), (64, 48), (33, 17)):
        info = VideoInfo(width, height, TICKS, Fraction(15), PixelFormat.parse("yuv420p"), BT601)
        planes = picture(1, info)
        pictures.show((planes, info), (planes, info))
        for made in (pictures.quick("source"), pictures.best("source"), pictures.best("result")):
            assert made is not None
            assert read_jpeg(made.data).shape == (height, width, 3)


def test_moving_pictures_are_not_huge() -> None:
    info = VideoInfo(3840, 2160, TICKS, Fraction(15), PixelFormat.parse("yuv420p"), BT601)
    planes = [torch.full(size, 90, dtype=torch.uint8) for size in info.pixel_format.plane_sizes(3840, 2160)]
    pictures = Pictures()
    pictures.show((planes, info), (planes, info))
    made = pictures.quick("result")
    assert made is not None
    assert read_jpeg(made.data).shape == (1080, 1920, 3)
    pictures.close()
    assert pictures.quick("source") is pictures.best("source") is None


def test_a_large_still_is_made_in_bands_that_do_not_show() -> None:
    info = VideoInfo(50, 601, TICKS, None, PixelFormat.parse("yuv420p"), BT601)
    planes = [torch.randint(16, 236, size, dtype=torch.uint8) for size in info.pixel_format.plane_sizes(50, 601)]
    whole = from_rgb(to_rgb([p[None] for p in planes], info.pixel_format, BT601).clamp_(0, 1), _STILL, _JPEG)
    frame = Pictures()._exact(planes, info)
    assert frame is not None
    for made, wanted in zip(frame.planes, whole, strict=True):
        rows = np.frombuffer(memoryview(made), np.uint8).reshape(601, made.line_size)[:, :50]
        assert np.array_equal(rows, wanted[0].numpy())


def test_a_picture_is_made_once_however_many_ask() -> None:
    pictures = Pictures()
    planes = picture(0, SMALL)
    pictures.show((planes, SMALL), (planes, SMALL))
    assert pictures.quick("result") is pictures.quick("result")
    assert pictures.best("source") is pictures.best("source")
