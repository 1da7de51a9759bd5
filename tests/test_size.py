"""`--size`: what it comes to for all kinds of pictures, how it is reached, and the resampler of the last step."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from hat_video.errors import HatVideoError, ModelError, OptionError
from hat_video.frames import ColorInfo, PixelFormat, VideoInfo
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.plan import plan_file
from hat_video.jobs.size import parse_size, settle_size
from hat_video.media.probe import probe
from hat_video.model.resample import resize
from tests.clips import make_clip
from tests.command import upscale

FAST = ("--model", "bicubic", "--preset", "ultrafast", "-q")
QUARTER_TURN = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
HALF_TURN = (-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30)


def video(width: int, height: int, sar: Fraction | int = 1, matrix: tuple[int, ...] | None = None) -> VideoInfo:
    return VideoInfo(
        width,
        height,
        Fraction(1, 25),
        Fraction(25),
        PixelFormat.parse("yuv420p"),
        ColorInfo(1, 1, 1, False),
        Fraction(sar),
        matrix,
    )


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        ("1080p", video(1280, 720), (1920, 1080)),
        ("1080P", video(640, 360), (1920, 1080)),
        ("1440p", video(1920, 800), (3456, 1440)),
        ("4k", video(1280, 720), (3840, 2160)),
        ("8k", video(1920, 1080), (7680, 4320)),
        ("4k", video(1920, 800), (3840, 1600)),
        ("1920x1080", video(1920, 800), (1920, 800)),
        ("1920x1080", video(640, 480), (1440, 1080)),
        ("1920x1080", video(480, 640), (810, 1080)),
        # A phone held upright stores a lying picture: 1080p is the height that is seen.
        ("1080p", video(640, 360, matrix=QUARTER_TURN), (1080, 608)),
        ("1080p", video(640, 360, matrix=HALF_TURN), (1920, 1080)),
        ("1920x1080", video(640, 360, matrix=QUARTER_TURN), (1080, 608)),
        # PAL at 16:9: 720 samples are shown as 1024.
        ("1080p", video(720, 576, Fraction(64, 45)), (1920, 1080)),
        ("576p", video(720, 576, Fraction(64, 45)), (1024, 576)),
        ("480p", video(720, 480, Fraction(8, 9)), (640, 480)),
        ("1080p", video(360, 640, Fraction(4, 3), QUARTER_TURN), (1080, 1440)),
        # Odd sides and odd boxes: even, and never beyond the box.
        ("1080p", video(853, 480), (1920, 1080)),
        ("1081p", video(853, 480), (1922, 1080)),
        ("1001x1001", video(640, 360), (1000, 564)),
        ("2000x301", video(320, 180), (536, 300)),
    ],
)
def test_what_a_size_comes_to(text: str, source: VideoInfo, expected: tuple[int, int]) -> None:
    target = settle_size(parse_size(text), source)
    assert (target.width, target.height) == expected
    assert target.needed == max(1, Fraction(expected[0], source.width), Fraction(expected[1], source.height))


@pytest.mark.parametrize("width", range(90, 130, 7))
@pytest.mark.parametrize("height", range(50, 90, 11))
@pytest.mark.parametrize("box", [(200, 200), (333, 151), (150, 501)])
def test_a_box_is_filled_and_never_left(width: int, height: int, box: tuple[int, int]) -> None:
    target = settle_size(parse_size(f"{box[0]}x{box[1]}"), video(width, height))
    sides = (target.width, target.height)
    assert all(side % 2 == 0 and side <= limit for side, limit in zip(sides, box, strict=True))
    assert any(limit - side < 2 for side, limit in zip(sides, box, strict=True))
    # No side is further than the rounding to even from what the aspect asks for.
    factor = min(Fraction(box[0], width), Fraction(box[1], height))
    assert abs(target.width - width * factor) < 2
    assert abs(target.height - height * factor) < 2


@pytest.mark.parametrize(
    "text",
    ["1080q", "0x0", "1080", "p", "", "-1080p", "1920x", "x1080", "1920x1080p", "4K UHD", "99999p", "1x1", "1e3p"],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--size") as error:
        UpscaleOptions(size=text)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["240p", "300x2000", "2000x300"])
def test_smaller_is_refused_with_the_size_as_shown(text: str) -> None:
    with pytest.raises(OptionError, match="1024x576"):
        settle_size(parse_size(text), video(720, 576, Fraction(64, 45)))


def test_too_wide_is_refused() -> None:
    with pytest.raises(OptionError, match="wide"):
        settle_size(parse_size("8000p"), video(1920, 400))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("size") / "clip.mp4", width=96, height=64, frames=8)


@pytest.mark.parametrize(
    ("choices", "scale", "resized"),
    [
        ({"size": "128p"}, 2, None),
        ({"size": "100p"}, 2, (150, 100)),
        ({"size": "64p"}, 2, (96, 64)),
        ({"size": "150p"}, 3, (226, 150)),
        ({"size": "150p", "model": "hat-pico"}, 2, (226, 150)),
        ({"size": "256p"}, 4, None),
        ({"size": "300p"}, 4, (450, 300)),
        ({"size": "150p", "model": "lanczos"}, 3, (226, 150)),
        ({"size": "64p", "model": "bicubic"}, 1, None),
        ({"size": "150p", "scale": 2}, 2, (226, 150)),
        ({"size": "100p", "scale": 4}, 4, (150, 100)),
    ],
)
def test_the_smallest_scale_that_is_enough(
    clip: Path, tmp_path: Path, choices: dict[str, object], scale: int, resized: tuple[int, int] | None
) -> None:
    manifest = plan_file(clip, tmp_path / "out.mkv", UpscaleOptions(**choices)).manifest  # type: ignore[arg-type]
    assert (manifest.recipe.scale, manifest.recipe.resize) == (scale, resized)
    needed = max(Fraction(manifest.video.width, 96), Fraction(manifest.video.height, 64))
    assert any("Lanczos" in note for note in manifest.notes) == (needed > scale)


def test_a_scale_that_the_model_lacks_is_still_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises((ModelError, HatVideoError), match="--scale 3"):
        plan_file(clip, tmp_path / "out.mkv", UpscaleOptions(size="150p", scale=3, model="hat-pico"))


def test_size_is_in_the_key(clip: Path, tmp_path: Path) -> None:
    def key(**choices: object) -> str:
        options = UpscaleOptions(**{"model": "bicubic", **choices})  # type: ignore[arg-type]
        return plan_file(clip, tmp_path / "out.mkv", options).manifest.key

    assert key(size="128p") == key(size="192x128") == key(scale=2), "the same pictures are the same work"
    assert len({key(size="128p"), key(size="126p"), key(size="126p", scale=3)}) == 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_the_road_to_a_size(tmp_path: Path, suffix: str) -> None:
    clip = make_clip(
        tmp_path / "tv.mp4", width=90, height=72, frames=10, sample_aspect_ratio=Fraction(64, 45), audio=["aac"]
    )
    output, report = tmp_path / f"out{suffix}", tmp_path / "report.json"
    words = [word for word in FAST if suffix != ".webm" or word not in ("--preset", "ultrafast")]
    assert upscale(clip, "-o", output, *words, "--size", "108p", "--report", report) == 0
    made = probe(output).video
    assert (made.width, made.height, made.sample_aspect_ratio) == (192, 108, 1)
    (done,) = json.loads(report.read_text())["clips"]
    assert done["recipe"]["resize"] == [192, 108]
    assert done["recipe"]["scale"] == 3


def test_a_turned_picture_keeps_its_turn(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "phone.mp4", width=96, height=64, frames=5, display_matrix=QUARTER_TURN)
    assert upscale(clip, "-o", tmp_path / "out.mp4", *FAST, "--size", "240p") == 0
    made = probe(tmp_path / "out.mp4").video
    assert (made.width, made.height, made.display_matrix) == (240, 160, QUARTER_TURN)


def test_the_default_name_says_the_size(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "shelf" / name).write_bytes(clip.read_bytes())
    assert upscale(tmp_path / "shelf" / "a.mp4", *FAST, "--size", "100P") == 0
    assert (tmp_path / "shelf" / "a_100p.mp4").is_file()
    (tmp_path / "shelf" / "a_100p.mp4").unlink()
    # Each clip of a directory gets the scale that it needs.
    make_clip(tmp_path / "shelf" / "b.mp4", width=48, height=32, frames=5)
    assert upscale(tmp_path / "shelf", *FAST, "--size", "100p") == 0
    for name in ("a.mp4", "b.mp4"):
        assert probe(tmp_path / "shelf_100p" / name).video.height == 100


def test_wrong_sizes_on_the_command_line(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("1080q", "0x0", "63p"):
        assert upscale(clip, "-o", tmp_path / "out.mp4", *FAST, "--size", text) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
        assert line.startswith(f"hat-video: --size {text}")
    assert list(tmp_path.iterdir()) == []


def test_frames_in_flight_change_no_bit(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=96, height=64, frames=30)
    for jobs in (1, 3):
        assert upscale(clip, "-o", tmp_path / f"{jobs}.mp4", *FAST, "--size", "150p", "--jobs", jobs) == 0
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "3.mp4").read_bytes()


def test_the_picture_is_not_shifted_and_not_dimmed(tmp_path: Path) -> None:
    """A white square in the middle stays in the middle, of the same size in relation, and as white."""
    picture = np.full((64, 96, 3), 40, np.uint8)
    picture[24:40, 36:60] = 215
    clip = make_clip(
        tmp_path / "square.mp4",
        width=96,
        height=64,
        frames=3,
        pictures=[picture] * 3,
        audio=(),
        options={"crf": "0"},
        pix_fmt="yuv444p",
    )
    assert upscale(clip, "-o", tmp_path / "out.mp4", *FAST, "--size", "150p", "--crf", "0") == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        luma = next(container.decode(video=0)).to_ndarray(format="gray").astype(float)
    bright = luma > luma.min() + 0.5 * (np.median(luma[70:80, 105:120]) - luma.min())
    y, x = np.nonzero(bright)
    assert abs(y.mean() + 0.5 - 75) < 0.3
    assert abs(x.mean() + 0.5 - 113) < 0.3
    assert abs(bright.sum() - 24 * 16 * (226 / 96) * (150 / 64)) < 0.05 * bright.sum()


@pytest.mark.parametrize("kernel", ["lanczos", "bicubic"])
@pytest.mark.parametrize(("before", "after"), [((64, 96), (150, 226)), ((200, 130), (77, 91)), ((5, 7), (90, 64))])
def test_resize_against_its_definition(kernel: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    """The product with the whole matrix, tap by tap, in double precision."""
    picture = torch.rand(1, 2, *before, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = matrix(before[0], after[0], kernel) @ picture[0].numpy() @ matrix(before[1], after[1], kernel).T
    assert np.abs(resize(picture, after, kernel=kernel)[0].numpy() - expected).max() < 1e-12
    flat = resize(torch.full((1, 3, *before), 0.7), after, kernel=kernel)
    assert float((flat - 0.7).abs().max()) < 1e-6
    mirrored = resize(picture.flip(2, 3), after, kernel=kernel).flip(2, 3)
    assert torch.allclose(mirrored, resize(picture, after, kernel=kernel), atol=1e-12), "linear phase"


def matrix(before: int, after: int, kernel: str) -> np.ndarray:
    def weight(x: float) -> float:
        x = abs(x)
        if kernel == "lanczos":
            return float(np.sinc(x) * np.sinc(x / 3)) if x < 3 else 0.0
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    shrink = min(1.0, after / before)
    out = np.zeros((after, before))
    for row in range(after):
        place = (row + 0.5) * before / after - 0.5
        for tap in range(int(place - 3 / shrink) - 2, int(place + 3 / shrink) + 3):
            column = tap % (2 * before)
            out[row, min(column, 2 * before - 1 - column)] += weight((place - tap) * shrink)
    return out / out.sum(axis=1, keepdims=True)


def test_a_large_resize_needs_no_large_matrix() -> None:
    from hat_video.model.resample import _resize_blocks

    blocks = _resize_blocks(7680, 3840, "lanczos", True, 32, torch.float32, torch.device("cpu"))
    assert sum(weights.numel() for _, weights in blocks) < 7680 * 3840 / 50
