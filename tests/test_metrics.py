"""What is measured, against values known in advance and formulas written out again the long way."""

import math

import pytest
import torch
from torch import Tensor

from hat_video.analysis.metrics import crop_border, flicker, luma, psnr, seam_profiles, seam_ratio, ssim


def noise(*shape: int, seed: int = 0, strength: float = 5.0) -> Tensor:
    return strength * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seams(height: int, width: int, window: int, strength: float) -> Tensor:
    """(1, H, W): every window off by an amount of its own."""
    amounts = noise(height // window + 1, width // window + 1, seed=9, strength=strength)
    rows, columns = torch.arange(height) // window, torch.arange(width) // window
    return amounts[rows][:, columns][None]


@pytest.mark.parametrize(
    ("rgb", "code"),
    [((0, 0, 0), 16), ((1, 1, 1), 235), ((1, 0, 0), 16 + 65.481), ((0, 1, 0), 144.553), ((0, 0, 1), 40.966)],
)
def test_luma_is_that_of_rgb2ycbcr(rgb: tuple[int, int, int], code: float) -> None:
    value = luma(torch.tensor(rgb, dtype=torch.float32).reshape(1, 3, 1, 1))
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(code, abs=1e-9)


def test_psnr_of_a_known_error() -> None:
    picture = torch.full((2, 8, 8), 100.0)
    assert psnr(picture + 1, picture) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(picture + 255, picture) == pytest.approx(0)
    assert psnr(picture, picture) == math.inf
    assert psnr(torch.tensor([[0]], dtype=torch.uint8), torch.tensor([[255]], dtype=torch.uint8)) == 0


def test_the_border_does_not_count() -> None:
    picture = torch.full((1, 20, 30), 100.0)
    dirty = picture.clone()
    dirty[:, :2] = dirty[:, -2:] = dirty[:, :, :2] = dirty[:, :, -2:] = 0
    assert psnr(dirty, picture, border=2) == math.inf
    assert ssim(dirty, picture, border=2) == pytest.approx(1)
    assert psnr(dirty, picture, border=1) < 40
    assert crop_border(picture, 3).shape == (1, 14, 24)
    with pytest.raises(ValueError, match="30x20 has nothing left without a border of 10"):
        crop_border(picture, 10)


def test_ssim_of_one_window_is_the_formula() -> None:
    x = noise(11, 11, strength=40) + 128
    y = x + noise(11, 11, seed=1, strength=20)
    weights = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for i in range(11) for j in range(11)}
    total = sum(weights.values())
    mean_x = sum(w * float(x[at]) for at, w in weights.items()) / total
    mean_y = sum(w * float(y[at]) for at, w in weights.items()) / total
    var_x = sum(w * (float(x[at]) - mean_x) ** 2 for at, w in weights.items()) / total
    var_y = sum(w * (float(y[at]) - mean_y) ** 2 for at, w in weights.items()) / total
    both = sum(w * (float(x[at]) - mean_x) * (float(y[at]) - mean_y) for at, w in weights.items()) / total
    c1, c2 = 6.5025, 58.5225
    wanted = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert ssim(x[None], y[None]) == pytest.approx(wanted, abs=1e-12)


def test_ssim_of_equal_pictures_is_one_and_means_are_of_pictures() -> None:
    picture = noise(2, 24, 32, strength=40) + 128
    assert ssim(picture, picture) == pytest.approx(1)
    other = picture + noise(2, 24, 32, seed=3, strength=10)
    each = [ssim(picture[i : i + 1], other[i : i + 1]) for i in range(2)]
    assert ssim(picture, other) == pytest.approx(sum(each) / 2)
    # Of constant pictures nothing but the means is left.
    assert ssim(torch.full((1, 16, 16), 100.0), torch.full((1, 16, 16), 110.0)) == pytest.approx(
        (2 * 100 * 110 + 6.5025) / (100**2 + 110**2 + 6.5025)
    )
    with pytest.raises(ValueError, match="20x10 is smaller than SSIM's window"):
        ssim(torch.zeros(1, 10, 20), torch.zeros(1, 10, 20))


def test_an_error_that_stands_still_does_not_flicker() -> None:
    still = noise(1, 16, 16).expand(5, -1, -1)
    assert flicker(still) == 0
    assert flicker(still[:1]) == 0
    blinking = still + torch.tensor([0.0, 2, 0, 2, 0])[:, None, None]
    assert flicker(blinking) == pytest.approx(2)
    assert flicker(noise(30, 64, 64, strength=3)) == pytest.approx(3 * math.sqrt(2), rel=0.02)


@pytest.mark.parametrize(("period", "scale"), [(16, 2), (32, 2), (48, 3), (32, 4)])
def test_a_faint_grid_is_found_and_noise_is_none(period: int, scale: int) -> None:
    smooth = torch.nn.functional.avg_pool2d(noise(4, 400, 480, strength=10)[:, None], 5, 1, 2)[:, 0]
    gridded = smooth + seams(400, 480, period, 0.7)
    assert psnr(gridded, smooth) > 50, "no eye sees this on a still"
    for profile in seam_profiles(smooth):
        assert seam_ratio(profile, period, scale) == pytest.approx(1, abs=0.03)
    for profile in seam_profiles(gridded):
        assert seam_ratio(profile, period, scale) > 1.08


def test_neither_the_scale_nor_foreign_blocks_are_a_grid() -> None:
    profile = 1 + noise(479, strength=0.02)
    places = torch.arange(479)
    phases = profile + 5 * (places % 4 == 3)  # between two pixels of the source
    assert seam_ratio(phases, 32, scale=4) == pytest.approx(1, abs=0.05)
    blocks = profile + 5 * (places % 8 == 1)  # of an original that was compressed in blocks, and then shifted
    assert seam_ratio(blocks, 32, scale=2) == pytest.approx(1, abs=0.05)
    windows = profile + 5 * (places % 32 == 31)
    assert seam_ratio(windows, 32, scale=4) == pytest.approx(6, abs=0.2)


def test_grids_that_cannot_be_told() -> None:
    assert math.isnan(seam_ratio(noise(63).abs(), 16, 2)), "three periods are too few"
    assert seam_ratio(torch.zeros(160), 16, 2) == 1, "no error has no grid"
