"""Degradations: the classical one against imresize in double precision; what the video one must do, and must leave."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hat_video.errors import OptionError, UsageError, WorkError
from hat_video.frames import PixelFormat
from hat_video.model.resample import resize
from hat_video.training.compress import CODECS, PRESETS, round_trip
from hat_video.training.degrade import KERNELS, Shot, VideoDegradation, degrade_bicubic

ROOT = Path(__file__).parents[1]
ONE = 1 / 255


def imresize(picture: np.ndarray, scale: int) -> np.ndarray:
    """MATLAB's imresize of an (h, w) uint8 picture to 1 / scale, in double precision, its steps one by one."""
    for _ in range(2):  # rows, then, turned, columns
        length = picture.shape[0]
        u = np.arange(1, length // scale + 1) * scale + 0.5 * (1 - scale)
        left = np.floor(u - 2 * scale)
        index = left[:, None] + np.arange(4 * scale + 2)
        x = np.abs(u[:, None] - index) / scale
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x <= 1, near, np.where(x <= 2, far, 0))
        weights /= weights.sum(1, keepdims=True)
        mirror = np.r_[0:length, length - 1 : -1 : -1]
        taken = picture[mirror[(index.astype(int) - 1) % (2 * length)]].astype(float)
        summed = np.einsum("ot,otw->ow", weights, taken)
        picture = np.clip(np.floor(summed + 0.5), 0, 255).T
    return picture.astype(np.uint8)


def texture(side: int = 256, seed: int = 0) -> Tensor:
    """(3, side, side) uint8: soft and fine structure, edges, and colour that is no copy of the luma."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(1, 3, side, side)
    for cells, height in ((5, 0.5), (24, 0.35), (side // 2, 0.15)):
        field = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        out += height * F.interpolate(field, (side, side), mode="bicubic" if cells > 5 else "nearest")
    return ((out[0] * 0.8 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def ramps() -> Tensor:
    """(3, 256, 256) uint8: red rises to the right, blue to the left, green downwards: any shift is an offset."""
    place = torch.arange(256, dtype=torch.uint8)
    across, down = place.expand(256, 256), place[:, None].expand(256, 256)
    return torch.stack([across, down, across.flip(1)])


def quiet(scale: int, **changes: Any) -> VideoDegradation:
    """Nothing happens but MATLAB's bicubic and the way through YUV of 4:4:4."""
    nothing = VideoDegradation(
        scale,
        soft_probability=0,
        kernels=(("bicubic", 1.0),),
        blur_probability=0,
        noise_probability=0,
        full_chroma_probability=1,
        clean_probability=1,
    )
    return replace(nothing, **changes)


def exact_bicubic(hr: Tensor, scale: int) -> Tensor:
    """Not rounded: on a ramp imresize rounds one way, which looks like a shift."""
    return resize(hr.float() / 255, (hr.shape[2] // scale, hr.shape[3] // scale))


def inner(picture: Tensor) -> Tensor:
    """Away from the borders, beyond which a crop cannot see."""
    return picture[..., 4:-4, 4:-4]


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(float((a.double() - b.double()).square().mean()))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(16, 12), (47, 30), (5, 90)])
def test_bicubic_is_imresize_to_the_bit(scale: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(scale)
    hr = rng.integers(0, 256, (2, 3, scale * size[0], scale * size[1]), dtype=np.uint8)
    hr[1] = np.where(hr[1] < 128, 0, 255)  # overshoots between the passes
    expected = np.array([[imresize(channel, scale) for channel in picture] for picture in hr])
    out = degrade_bicubic(torch.from_numpy(hr), scale)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.from_numpy(expected).float() / 255)
    assert torch.equal(degrade_bicubic(torch.from_numpy(hr).float() / 255, scale), out)


def test_bicubic_at_scale_1_changes_nothing() -> None:
    hr = texture(32)[None]
    assert torch.equal(degrade_bicubic(hr, 1), hr.float() / 255)


def test_bicubic_refuses_what_does_not_divide() -> None:
    with pytest.raises(UsageError, match="65x64 for x4"):
        degrade_bicubic(torch.zeros(1, 3, 64, 65), 4)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_quiet_video_is_bicubic(scale: int) -> None:
    """4:4:4 leaves only rounding: of YUV, and of imresize after each of its passes."""
    hr, lr = quiet(scale).make(texture(), 48, 6, np.random.default_rng(scale))
    error = inner(lr - degrade_bicubic(hr, scale))
    assert error.abs().max() < 3 * ONE
    assert error.abs().mean() < 0.6 * ONE
    assert error.mean().abs() < 0.05 * ONE


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blur", [0.0, 0.8])
def test_nothing_moves_and_no_colour_changes(scale: int, kernel: str, blur: float) -> None:
    """Half an LR pixel would be half to two code values, here and there alike; chroma is 4:2:0, sited left."""
    degradation = quiet(
        scale,
        kernels=((kernel, 1.0),),
        blur_probability=float(blur > 0),
        blur_sigma=(blur, blur),
        full_chroma_probability=0,
    )
    for seed in range(2):
        shot = degradation.shoot(ramps(), 48, np.random.default_rng(seed))
        error = shot.lr - exact_bicubic(shot.hr, scale)
        for part in inner(error).chunk(3, 2):
            for piece in part.chunk(3, 3):
                assert piece.mean((0, 2, 3)).abs().max() < 0.1 * ONE
        assert inner(error).abs().max() < 3 * ONE


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("full_chroma", [0.0, 1.0])
@pytest.mark.parametrize(("crf", "limit"), [(0, 0.1), (16, 1.2)])
def test_compression_moves_nothing(codec: str, full_chroma: float, crf: float, limit: float) -> None:
    """Half an LR pixel would be two code values; coarser steps let a slope lag behind its prediction a little."""
    degradation = quiet(
        4, codecs=((codec, 1.0),), clean_probability=0, crf=(crf, crf), full_chroma_probability=full_chroma
    )
    errors = []
    for seed in range(6):
        shot = degradation.shoot(ramps(), 48, np.random.default_rng(seed))
        errors.append(inner(shot.lr - exact_bicubic(shot.hr, 4)).mean((0, 2, 3)))
    assert torch.stack(errors).mean(0).abs().max() < limit * ONE


def test_the_mean_colour_is_kept() -> None:
    """An encoder may round a shot's colour; it does so to either side."""
    shifts = []
    for seed in range(24):
        shot = VideoDegradation(2).shoot(texture(seed=seed), 48, np.random.default_rng(seed))
        shifts.append(shot.lr.mean((0, 2, 3)) - shot.hr.float().mean((0, 2, 3)) / 255)
    assert torch.stack(shifts).abs().max() < 4 * ONE
    assert torch.stack(shifts).mean(0).abs().max() < 0.75 * ONE


def test_noise_is_of_luma_and_new_in_each_frame() -> None:
    gray = torch.full((3, 256, 256), 128, dtype=torch.uint8)
    strengths = []
    for seed in range(30):
        shot = quiet(2, noise_probability=1, noise_sigma=6).shoot(gray, 48, np.random.default_rng(seed))
        noise = shot.lr - 128 / 255
        assert (noise - noise[:, :1]).abs().max() < 1e-5
        strengths.append(float(noise.std()) * 255)
        if strengths[-1] > 2:
            rows = noise[:, 0].flatten(1)
            assert torch.corrcoef(rows).triu(1).abs().max() < 0.1
    assert max(strengths) < 6.5
    assert 1.2 < np.mean(strengths) < 3


def test_blur_blurs_and_the_target_stays_sharp() -> None:
    def detail(sigma: float) -> float:
        degradation = quiet(2, blur_probability=1, blur_sigma=(sigma, sigma))
        return float(degradation.make(texture(), 48, 6, np.random.default_rng(0))[1].diff(dim=3).abs().mean())

    assert detail(0.0) > detail(0.4) > detail(0.8)
    hr, _ = quiet(2, blur_probability=1).make(texture(), 48, 6, np.random.default_rng(0))
    same, _ = quiet(2).make(texture(), 48, 6, np.random.default_rng(0))
    assert torch.equal(hr, same)


def test_a_soft_shot_is_soft_in_the_target_too() -> None:
    def shot(sigma: float) -> Shot:
        return quiet(2, soft_probability=1, soft_sigma=(sigma, sigma)).shoot(texture(), 48, np.random.default_rng(0))

    details = [float(shot(sigma).hr.float().diff(dim=3).abs().mean()) for sigma in (0.0, 0.4, 1.0)]
    assert details[0] > 1.3 * details[1] > 1.3 * 1.3 * details[2]
    # The low resolution is made of it, and of nothing sharper.
    for sigma in (0.4, 1.0):
        soft = shot(sigma)
        assert inner(soft.lr - degrade_bicubic(soft.hr, 2)).abs().max() < 3 * ONE
    assert abs(shot(1.0).hr.float().mean() - shot(0.0).hr.float().mean()) < 0.1


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_window_pans_by_whole_pixels_and_in_bounds(scale: int) -> None:
    """Red and green of this tile say where each pixel is from."""
    place = torch.arange(256, dtype=torch.uint8)
    tile = torch.stack([place.expand(256, 256), place[:, None].expand(256, 256), torch.zeros(256, 256).byte()])
    moved = 0
    for seed in range(20):
        hr = quiet(scale).shoot(tile, 48, np.random.default_rng(seed)).hr
        height, width = hr.shape[2:]
        assert min(height, width) >= 48 * scale
        assert max(height, width) <= 96 * scale
        corners = hr[:, :2, 0, 0].int()
        for frame, (x, y) in zip(hr, corners.tolist(), strict=True):
            assert torch.equal(frame, tile[:, y : y + height, x : x + width])
        steps = corners.diff(dim=0).float().norm(dim=1)
        # The most speed, what its acceleration adds in 5 steps, and rounding.
        assert steps.max() <= 3 * scale * 1.9 + 1.5
        moved += bool(steps.max() > 0)
    assert 8 <= moved < 20


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_pairs_are_places_of_one_shot_and_of_all_its_frames(scale: int) -> None:
    degradation = VideoDegradation(scale, clean_probability=0, shot_size=64)
    tile, size = texture(), 32
    first_types = set()
    for seed in range(4):
        shot = degradation.shoot(tile, size, np.random.default_rng(seed))
        assert shot.frame_types[0] == "I"
        assert len(set(shot.frame_types)) > 1
        hr, lr = degradation.make(tile, size, 6, np.random.default_rng(seed))
        assert (hr.shape, lr.shape) == ((6, 3, size * scale, size * scale), (6, 3, size, size))
        windows = shot.lr.unfold(2, size, 1).unfold(3, size, 1)  # t c y x h w
        candidates = []
        for sharp, soft in zip(hr, lr, strict=True):
            same = (windows == soft[None, :, None, None]).flatten(4).all(4).all(1).nonzero().tolist()
            # What stands still is the same in several frames.
            candidates.append({frame for frame, _, _ in same})
            places = [
                (t, slice(scale * y, scale * (y + size)), slice(scale * x, scale * (x + size))) for t, y, x in same
            ]
            assert any(torch.equal(sharp, shot.hr[t][:, rows, columns].float() / 255) for t, rows, columns in places)
        assert any(
            all(frame in found for frame, found in zip(order, candidates, strict=True))
            for order in permutations(range(6))
        )
        first_types |= {shot.frame_types[frame] for frame in candidates[0]}
    assert len(first_types) > 1


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["yuv420p", "yuv444p"])
def test_every_encoder_gives_every_frame_back_in_order(codec: str, preset: str, name: str) -> None:
    """Frames of one brightness each: the order is plain to see, and only the first may be sure to be an I frame."""
    fmt = PixelFormat.parse(name)
    levels = torch.tensor([40, 60, 90, 70, 120, 100, 50], dtype=torch.uint8)
    planes = tuple(levels[:, None, None].expand(7, *size).contiguous() for size in fmt.plane_sizes(80, 48))
    back, types = round_trip(planes, fmt, codec=codec, crf=20, preset=preset)
    assert types[0] == "I"
    assert set(types) <= {"I", "P", "B"}
    for plane, before in zip(back, planes, strict=True):
        assert plane.dtype == torch.uint8
        assert plane.shape == before.shape
        assert (plane.float() - before.float()).mean((1, 2)).abs().max() < 3


@pytest.mark.parametrize("codec", CODECS)
def test_small_pictures_leave_the_heap_whole(codec: str) -> None:
    """x265 corrupts it at widths up to 48 unless told otherwise; so this has a process of its own to lose."""
    code = (
        "import sys, torch; from hat_video.frames import PixelFormat\n"
        "from hat_video.training.compress import round_trip\n"
        "fmt = PixelFormat.parse('yuv420p'); generator = torch.Generator().manual_seed(0)\n"
        "for width, height in 10 * [(48, 48), (34, 34), (16, 64), (32, 80), (50, 50)]:\n"
        "    sizes = fmt.plane_sizes(width, height)\n"
        "    planes = [torch.randint(90, 150, (6, *size), generator=generator, dtype=torch.uint8) for size in sizes]\n"
        "    round_trip(planes, fmt, codec=sys.argv[1], crf=16, preset='ultrafast')\n"
    )
    subprocess.run([sys.executable, "-c", code, codec], check=True, cwd=ROOT, timeout=100)


@pytest.mark.parametrize("codec", CODECS)
def test_quality_follows_crf(codec: str) -> None:
    def quality(crf: float) -> float:
        degradation = quiet(2, codecs=((codec, 1.0),), clean_probability=0, crf=(crf, crf))
        shot = degradation.shoot(texture(), 48, np.random.default_rng(0))
        return psnr(shot.lr, degrade_bicubic(shot.hr, 2))

    best, middle, worst = quality(16), quality(25), quality(34)
    assert best > middle + 2 > worst + 4
    assert best > 34


def test_the_same_generator_gives_the_same_bits() -> None:
    degradation = VideoDegradation(2, codecs=(("libx264", 1.0), ("libx265", 1.0)))

    def run(seed: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        rng = np.random.default_rng(seed)
        pairs = [degradation.make(texture(), 48, 3, rng) for _ in range(8)]
        return torch.stack([hr for hr, _ in pairs]), torch.stack([lr for _, lr in pairs]), rng.bit_generator.state

    hr, lr, state = run(5)
    again_hr, again_lr, again_state = run(5)
    assert torch.equal(hr, again_hr)
    assert torch.equal(lr, again_lr)
    assert state == again_state
    assert not torch.equal(lr, run(6)[1])


@pytest.mark.parametrize("codec", CODECS)
def test_an_encoder_repeats_itself_in_every_thread(codec: str) -> None:
    """x264 with AVX-512 does not (docs/adr/0004)."""
    fmt = PixelFormat.parse("yuv420p")
    whole = texture().repeat(2, 1, 1)
    planes = tuple(
        torch.stack([whole[k, t : t + height, 2 * t : 2 * t + width] for t in range(8)])
        for k, (height, width) in enumerate(fmt.plane_sizes(96, 96))
    )

    def run(_: int) -> bytes:
        back, _types = round_trip(planes, fmt, codec=codec, crf=26, preset="medium")
        return b"".join(plane.numpy().tobytes() for plane in back)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(run, range(24)))) == 1


def test_uncompressed_shots_are_as_many_as_asked_for() -> None:
    degradation = VideoDegradation(2, shot_size=32, frames=2, clean_probability=0.5)
    clean = [not degradation.shoot(texture(), 32, np.random.default_rng(seed)).frame_types for seed in range(40)]
    assert 10 <= sum(clean) <= 30


def test_a_tile_may_be_as_small_as_a_crop_and_as_large_as_a_picture() -> None:
    hr, lr = VideoDegradation(4, shot_size=16).make(texture(128), 32, 9, np.random.default_rng(0))
    assert (hr.shape, lr.shape) == ((9, 3, 128, 128), (9, 3, 32, 32))
    shot = quiet(4).shoot(texture(512)[:, :400], 48, np.random.default_rng(0))
    assert min(shot.lr.shape[2:]) > 64


def test_refusals_are_of_one_line() -> None:
    rng = np.random.default_rng(0)
    degradation = VideoDegradation(4)
    with pytest.raises(UsageError, match="256x190 is too small for x4 crops of 48; give at least 192"):
        degradation.make(texture()[:, :190], 48, 1, rng)
    with pytest.raises(UsageError, match="lr_size 47"):
        degradation.make(texture(), 47, 1, rng)
    with pytest.raises(UsageError, match=r"torch\.float32"):
        degradation.make(texture().float(), 48, 1, rng)
    planes = tuple(torch.zeros(2, 2, 2, dtype=torch.uint8) for _ in range(3))
    with pytest.raises(WorkError, match="libx265 at 2x2, crf 20, preset fast: "):
        round_trip(planes, PixelFormat.parse("yuv444p"), codec="libx265", crf=20, preset="fast")


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 0},
        {"kernels": (("cubic", 1.0),)},
        {"kernels": ()},
        {"codecs": (("libx264", 0.0),)},
        {"presets": (("slowest", 1.0),)},
        {"crf": (34, 16)},
        {"crf": (16, 52)},
        {"blur_sigma": (-1, 1)},
        {"soft_sigma": (2, 1)},
        {"noise_probability": 1.1},
        {"frames": 0},
        {"shot_size": 8},
    ],
)
def test_options_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(changes))):
        replace(VideoDegradation(2), **changes)
