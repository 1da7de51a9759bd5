"""Evaluation end to end: real pictures and clips, the real command, and what is said of bad input."""

import json
import math
import resource
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hat_video.analysis.clips import evaluate_clip
from hat_video.analysis.evaluation import evaluate
from hat_video.analysis.metrics import psnr
from hat_video.analysis.pictures import read_picture
from hat_video.analysis.sheet import Sheet
from hat_video.analysis.stills import evaluate_stills
from hat_video.analysis.vmaf import find_vmaf, vmaf
from hat_video.cli import main
from hat_video.errors import ModelError, OptionError, OutputError, SourceError, UsageError, WorkError
from hat_video.inference.upscaler import Upscaler
from hat_video.model.resample import enlarge, resize
from hat_video.model.zoo import load_model
from tests.clips import color_bars, make_clip, moving_picture
from tests.conformance.tools import ffmpeg


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def stills(tmp_path: Path) -> Path:
    """A set of three pictures, one of them gray and one of odd size."""
    save(tmp_path / "Mine/HR/a.png", moving_picture(1, 64, 48))
    save(tmp_path / "Mine/HR/b_odd.png", color_bars(67, 49))
    save(tmp_path / "Mine/HR/c_gray.png", moving_picture(2, 64, 48)[..., 0])
    return tmp_path / "Mine"


def bicubic(scale: int) -> Upscaler:
    return Upscaler(load_model("bicubic", scale=scale))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_every_picture_and_the_mean(stills: Path, scale: int) -> None:
    result = evaluate_stills(bicubic(scale), stills, scale)
    assert (result.name, result.scale) == ("Mine", scale)
    assert [score.image for score in result.images] == ["a", "b_odd", "c_gray"]
    assert result.psnr == pytest.approx(sum(score.psnr for score in result.images) / 3)
    assert 0.3 < result.ssim < 1
    one = evaluate_stills(bicubic(scale), stills, scale, limit=1, with_ssim=False)
    assert len(one.images) == 1
    assert one.images[0].psnr == result.images[0].psnr
    assert math.isnan(one.ssim)


def test_stored_low_resolution_is_used(stills: Path) -> None:
    made = evaluate_stills(bicubic(2), stills, 2)
    for path in (stills / "HR").iterdir():
        high = read_picture(path)
        height, width = (size // 2 for size in high.shape[2:])
        low = resize(high[:, :, : 2 * height, : 2 * width].double(), (height, width), rounded=True)
        save(stills / "LR_x2" / path.name, (low[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert evaluate_stills(bicubic(2), stills, 2) == made
    save(stills / "LR_x2/a.png", np.zeros((24, 32, 3), np.uint8))
    assert evaluate_stills(bicubic(2), stills, 2).images[0].psnr < made.images[0].psnr - 5


def test_the_protocol_rounds_and_leaves_the_border_out(stills: Path) -> None:
    high = read_picture(stills / "HR/a.png")

    def nearly_right(low: Tensor) -> Tensor:
        out = high + 0.4 / 255
        out[:, :, :2] = 0
        out[..., -2:] = 7
        return out

    (score,) = evaluate_stills(nearly_right, stills, 2, limit=1).images
    assert score.psnr == math.inf
    assert score.ssim == pytest.approx(1)


def test_gray_is_read_as_rgb(stills: Path) -> None:
    picture = read_picture(stills / "HR/c_gray.png")
    assert picture.shape == (1, 3, 48, 64)
    assert torch.equal(picture[:, 0], picture[:, 2])


def test_bad_sets(stills: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--stills .*nowhere: has no pictures in .*HR"):
        evaluate_stills(bicubic(2), tmp_path / "nowhere", 2)
    with pytest.raises(ValueError, match=r"\(1, 3, 24, 32\) became \(1, 3, 24, 32\); x2 is \(1, 3, 48, 64\)"):
        evaluate_stills(lambda low: low, stills, 2)
    save(stills / "LR_x2/a.png", np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(SourceError, match=r"a\.png: is 20x20; x2 of .* is 32x24"):
        evaluate_stills(bicubic(2), stills, 2)
    (stills / "HR/a.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match=r"a\.png: not a picture"):
        evaluate_stills(bicubic(2), stills, 2)
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48", "-frames:v", "1", "-pix_fmt", "rgb48be", stills / "HR/a.png")
    with pytest.raises(SourceError, match=r"a\.png: is of RGB;16B; the protocol is for 8 bits"):
        evaluate_stills(bicubic(2), stills, 2)
    save(stills / "HR/a.png", np.zeros((14, 40, 3), np.uint8))
    with pytest.raises(SourceError, match="40x14 is too small to be evaluated at x2"):
        evaluate_stills(bicubic(2), stills, 2)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r"pip install 'hat-video\[train\]'"):
        evaluate_stills(bicubic(2), stills, 2)


@pytest.mark.parametrize(
    "facts",
    [
        {"bt709": True},
        {"pix_fmt": "yuvj420p", "bt709": False, "full_range": True},
        {"pix_fmt": "yuv444p10le", "bt709": False},
        {"codec": "ffv1", "pix_fmt": "gray"},
        {"codec": "ffv1", "pix_fmt": "bgr0"},
        {"sample_aspect_ratio": Fraction(12, 11)},
    ],
    ids=lambda facts: "-".join(str(value) for value in facts.values()),
)
def test_a_clip_is_compared_in_its_own_code_values(facts: dict[str, object], tmp_path: Path) -> None:
    """Matrix, range and depth right, or far less than 30 dB would be left of a picture without detail."""
    y, x = np.mgrid[0:50, 0:68].astype(np.float64)
    smooth = [
        np.stack([128 + 100 * np.sin((x + i) / 20), 128 + 90 * np.sin(y / 15), 2.0 * (x + y)], axis=-1)
        .clip(0, 255)
        .astype(np.uint8)
        for i in range(5)
    ]
    clip = make_clip(tmp_path / "smooth.mkv", width=68, height=50, pictures=smooth, frames=5, audio=(), **facts)  # type: ignore[arg-type]
    seen = []
    result = evaluate_clip(
        clip, {"base": "bicubic"}, 2, crf=0, frames=4, look=lambda *pictures: seen.append(pictures), periods=(8, 64)
    )
    assert (result.clip, result.width, result.height, result.frames, result.crf) == ("smooth.mkv", 60, 44, 4, 0)
    (score,) = result.scores
    assert score.candidate == "base"
    assert score.psnr > 38
    assert score.ssim > 0.97
    assert score.flicker < 2
    assert math.isfinite(score.grid[8])
    assert math.isnan(score.grid[64])
    ((candidate, label, low, output, high),) = seen
    assert (candidate, label) == ("base", "smooth.mkv crf 0")
    assert low.shape == (1, 3, 22, 30)
    assert high.shape == output.shape == (1, 3, 44, 60)
    assert psnr(255 * low, 255 * resize(high, (22, 30))) > 33
    assert psnr(255 * output, 255 * high) > 33


def test_compression_and_time_are_seen(tmp_path: Path) -> None:
    """A worse source gives a worse result; frames of any time base stay paired."""
    pts = [0, 1001, 2002, 4500, 5005]
    clip = make_clip(tmp_path / "c.mp4", frames=5, pts=pts, time_base=Fraction(1, 30000), audio=(), bframes=2)
    fine, coarse = (evaluate_clip(clip, {"b": "bicubic"}, 2, crf=crf).scores[0] for crf in (0, 40))
    assert fine.psnr > coarse.psnr + 1
    assert fine.ssim > coarse.ssim
    assert fine.flicker < coarse.flicker


def test_bad_clips(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "c.mp4", frames=2, audio=())
    with pytest.raises(SourceError, match="no such file"):
        evaluate_clip(tmp_path / "none.mp4", {"b": "bicubic"}, 2)
    with pytest.raises(UsageError, match="--frames 0: must be 1 or more"):
        evaluate_clip(clip, {"b": "bicubic"}, 2, frames=0)
    with pytest.raises(SourceError, match="64x48 is too small to be evaluated at x4"):
        evaluate_clip(clip, {"b": "bicubic"}, 4)
    with pytest.raises(WorkError, match=r"c\.mp4: hat-video upscale --model none .*: --model none: no such file"):
        evaluate_clip(clip, {"b": "none"}, 2)
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.2", "-c:v", "ffv1", "-pix_fmt", "yuva420p", tmp_path / "a.mkv")
    with pytest.raises(SourceError, match=r"a\.mkv: is transparent; only opaque clips are evaluated"):
        evaluate_clip(tmp_path / "a.mkv", {"b": "bicubic"}, 2)


def test_vmaf_where_there_is_one() -> None:
    ffmpeg = find_vmaf()
    if ffmpeg is None:
        pytest.skip("no ffmpeg with libvmaf; `pip install imageio-ffmpeg` brings one")
    # Texture that the resampling below loses, and that moves.
    texture = 128 + 60 * torch.randn(128, 192, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    picture = torch.stack([texture.roll(2 * i, dims=1) for i in range(4)])
    good, good_neg = vmaf(ffmpeg, picture, picture)
    blurred = enlarge(resize(picture[:, None], (32, 48)), 4, "bicubic")[:, 0]
    bad, bad_neg = vmaf(ffmpeg, blurred, picture)
    assert good > 90
    assert good_neg > 90
    assert bad < good - 20
    assert bad_neg < good_neg - 20


def test_the_sheet_shows_the_place_with_most_detail(tmp_path: Path) -> None:
    high = torch.full((1, 3, 128, 160), 0.5)
    high[:, :, 64:112, 96:144] = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))
    low = resize(high, (64, 80)).clamp(0, 1)
    sheet = Sheet(2, size=48, zoom=1)
    for name in ("bicubic", "mine"):
        sheet.add(name, "film", low, enlarge(low, 2, "bicubic").clamp(0, 1), high)
    sheet.write(tmp_path / "sheet.png")
    page = read_picture(tmp_path / "sheet.png")
    original = high[:, :, 64:112, 96:144]
    top, left = 8 + 18, 8 + 3 * (48 + 8)
    assert torch.allclose(page[:, :, top : top + 48, left : left + 48], original, atol=0.5 / 255)
    assert page.shape[3] == 8 + 4 * 48 + 3 * 8 + 8


def test_bad_sheets(tmp_path: Path) -> None:
    picture = torch.zeros(1, 3, 64, 64)
    with pytest.raises(UsageError, match="--crop 40,0,32,32: film is 64x64; the crop must lie within it"):
        Sheet(2, crop=(40, 0, 32, 32)).add("b", "film", picture[..., ::2, ::2], picture, picture)
    with pytest.raises(UsageError, match="no picture was evaluated"):
        Sheet(2).write(tmp_path / "sheet.png")
    sheet = Sheet(2, crop=(0, 0, 32, 32))
    sheet.add("b", "film", picture[..., ::2, ::2], picture, picture)
    with pytest.raises(OutputError, match="cannot be written"):
        sheet.write(tmp_path)


def test_the_command_measures_and_writes(stills: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = make_clip(tmp_path / "c.mp4", width=128, height=96, frames=3, audio=())
    figures, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    words = ["evaluate", "--stills", stills, "--clips", clip, "--frames", 2, "--json", figures, "--sheet", sheet]
    assert main([*map(str, words), "--crop", "16,8,32,24", "--precision", "fp32"]) == 0
    out, err = capsys.readouterr()
    assert "Mine x2 (3)" in out
    assert "c.mp4 (2 frames)" in out
    assert "grid 16" in out, "the window of the included network, in pixels of the output"
    assert [line.split()[1] for line in out.splitlines()[2:5]] == ["bicubic", "lanczos", "hat-nano-video"]
    assert "c.mp4 at crf 23" in err
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["candidates"].keys() == {"bicubic", "lanczos", "hat-nano-video"}
    scores = {score["candidate"]: score for score in found["clips"][0]["scores"]}
    assert scores["hat-nano-video"]["psnr"] != scores["bicubic"]["psnr"]
    assert found["stills"]["bicubic"][0]["psnr"] == evaluate_stills(bicubic(2), stills, 2).psnr
    assert ("VMAF was not measured" in out) == (scores["bicubic"]["vmaf"] is None)
    assert read_picture(sheet).shape[3] == 8 + 4 * 64 + 3 * 8 + 8


def test_stills_are_measured_in_fp32_whatever_the_machine_is_fast_in(stills: Path) -> None:
    found = {
        precision: evaluate(["hat-pico"], 2, stills=[stills], precision=precision).stills["hat-pico"]
        for precision in ("auto", "fp32", "bf16")
    }
    assert found["auto"] == found["fp32"] != found["bf16"]


def test_figures_that_json_has_not(tmp_path: Path) -> None:
    save(tmp_path / "Flat/HR/a.png", np.full((40, 40, 3), 90, np.uint8))
    found = json.loads(evaluate(["bicubic"], 2, stills=[tmp_path / "Flat"]).to_json())
    assert found["candidates"].keys() == {"bicubic", "lanczos"}
    assert found["stills"]["bicubic"][0]["psnr"] is None


def test_two_checkpoints_of_one_name(tmp_path: Path) -> None:
    from hat_video.analysis.evaluation import _labels

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.pth").write_bytes(b"")
    for name in ("other.pth", "input.pth"):
        (tmp_path / name).write_bytes(b"")
    names = [str(tmp_path / name) for name in ("one/net.pth", "two/net.pth", "input.pth", "other.pth")]
    assert _labels(["hat-pico", *names, "hat-pico"], ["input"]) == {
        "hat-pico": "hat-pico",
        names[0]: names[0],
        names[1]: names[1],
        names[2]: names[2],
        "other": names[3],
    }


def test_at_x1_the_compressed_clip_is_what_is_compared_with(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "c.mp4", width=128, height=96, frames=3, audio=())
    found = evaluate(["bicubic"], 1, clips=[clip], crf=[0, 34], frames=2)
    assert found.candidates.keys() == {"input"}
    lossless, compressed = (result.scores[0].psnr for result in found.clips)
    assert lossless > 50
    assert compressed < 40


def test_an_older_report_outlives_a_full_disk(tmp_path: Path, stills: Path) -> None:
    """A limit on the size of files stands for the disk."""
    path, link = tmp_path / "figures.json", tmp_path / "link.json"
    path.write_text("older")
    link.symlink_to(path)
    found = evaluate(["bicubic"], 2, stills=[stills])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OutputError, match=r"--json .*: cannot be written: File too large"):
            found.write_json(link)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "older"
    assert sorted(tmp_path.glob("*.json")) == [path, link]
    found.write_json(link)
    assert link.is_symlink()
    assert json.loads(path.read_text())["scale"] == 2


def test_bad_requests(stills: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: object) -> str:
        assert main(["evaluate", *map(str, words)]) in (1, 2)
        return capsys.readouterr().err

    assert "nothing to evaluate on; give --stills DIR or --clips FILE" in said()
    assert "no such file" in said("--stills", stills, "--clips", tmp_path / "none.mp4"), "before anything is computed"
    assert "--crop without --sheet" in said("--stills", stills, "--crop", "1,2,3,4")
    assert "--crop 1,2,3: must be x,y,width,height" in said("--stills", stills, "--crop", "1,2,3")
    assert "--sheet" in said("--stills", stills, "--sheet", tmp_path / "no" / "sheet.png")
    assert "--scale 3: hat-pico has x2" in said("--stills", stills, "--scale", 3, "--model", "hat-pico")
    assert "--stills at --scale 1: they would be" in said("--stills", stills, "--scale", 1)
    with pytest.raises(ModelError, match="no such file, nor a model"):
        evaluate(["none"], 2, stills=[stills])
    with pytest.raises(OutputError, match=r"--json .*: cannot be written"):
        evaluate(["bicubic"], 2, stills=[stills]).write_json(tmp_path)
    with pytest.raises(OptionError, match="--device moon"):
        evaluate(["bicubic"], 2, stills=[stills], device="moon")
