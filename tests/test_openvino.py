"""The OpenVINO backend: the same pictures as HAT, whatever its shape, and a cache that is never trusted too far."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hat_video import load_model
from hat_video.analysis.stills import evaluate_stills
from hat_video.errors import ModelError, OptionError
from hat_video.inference.openvino_backend import OpenVINOCache, OpenVINONetwork, cache_folder, openvino_version
from hat_video.inference.openvino_folds import rounded_to_bf16, rounded_to_the_same_sum
from hat_video.inference.regions import Reach, tiled_exactly
from hat_video.model.hat import HAT, HATConfig
from hat_video.model.zoo import list_models
from tests.reference import FP32, scramble
from tests.test_hat import SHAPES, SMALL, largest

pytest.importorskip("openvino")

ROOT = Path(__file__).parents[1]
ONE_HEAD = replace(SMALL, num_heads=(1, 1), compress_ratio=1)
ALL_SHAPES = {
    **SHAPES,
    "one head": ONE_HEAD,
    "one head, bare": replace(ONE_HEAD, qkv_bias=False, patch_norm=False, resi_connection="identity"),
    "one head of 28": replace(ONE_HEAD, embed_dim=28, depths=(2,), num_heads=(1,), squeeze_factor=7),
    "one head, x4": replace(ONE_HEAD, upscale=4),
    "unshuffle": replace(SMALL, unshuffle=2),
    "unshuffle, x4": replace(ONE_HEAD, unshuffle=2, upscale=4),
    "position": replace(SMALL, ape_size=24),
    "image range": replace(SMALL, img_range=255.0),
    "odd surround": replace(SMALL, window_size=6),
    "boxes": replace(ONE_HEAD, attention_pool=16),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


def network_of(config: HATConfig, seed: int = 1) -> HAT:
    network = HAT(config)
    scramble(network, seed).eval()
    return network


def random_frames(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_equals_hat(name: str, folder: Path) -> None:
    """In fp32 to the last bits; in bf16 as far as its eight bits go, on an odd batch."""
    config = ALL_SHAPES[name]
    network = network_of(config)
    height, width = (config.ape_size,) * 2 if config.ape_size else (3 * config.multiple, 5 * config.multiple)
    frames = random_frames(3, 3, height, width)
    with torch.inference_mode():
        exact = network.double()(frames.double())
        network.float()
        assert largest(OpenVINONetwork(network, "fp32", in_flight=1, folder=folder)(frames), exact) <= FP32
        half = OpenVINONetwork(network, "bf16", in_flight=1, folder=folder)(frames)
    assert half.dtype == torch.float32
    assert half.shape == exact.shape
    error = ((half - exact) ** 2).mean() / ((exact - exact.mean()) ** 2).mean()
    assert -10 * torch.log10(error) > 35


@pytest.mark.parametrize("size", [(8, 8), (8, 40), (40, 8), (16, 24)])
@pytest.mark.parametrize("config", [SMALL, ONE_HEAD], ids=["two heads", "one head"])
def test_every_kind_of_window(config: HATConfig, size: tuple[int, int], folder: Path) -> None:
    """A single window is corner, last row and last column at once; the tail's border is all there is."""
    network, frames = network_of(config), random_frames(1, 3, *size)
    with torch.inference_mode():
        assert largest(OpenVINONetwork(network, "fp32", in_flight=1, folder=folder)(frames), network(frames)) <= FP32


def test_in_bands(folder: Path) -> None:
    """A frame that is large enough to be computed in several pieces, whose rows they do not share evenly."""
    network = network_of(replace(ONE_HEAD, embed_dim=48, depths=(2,), num_heads=(1,)))
    frames = random_frames(1, 3, 13 * 8, 20 * 8)
    with torch.inference_mode():
        assert largest(OpenVINONetwork(network, "fp32", in_flight=1, folder=folder)(frames), network(frames)) <= FP32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tiles_equal_the_whole(precision: str, folder: Path) -> None:
    """With boxes, to the bit: no kernel may depend on the size of what it is given."""
    config = replace(ONE_HEAD, depths=(2,), num_heads=(1,), attention_pool=16)
    network = OpenVINONetwork(network_of(config), precision, in_flight=1, folder=folder)  # type: ignore[arg-type]
    frames = random_frames(1, 3, 9 * 8, 13 * 8)
    whole = network(frames)
    assert torch.equal(tiled_exactly(network, frames, 32, Reach(config), 2), whole)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        (facts.name, scale)
        for facts in list_models()
        if facts.is_included and facts.parameters
        for scale in facts.scales
    ],
)
def test_bf16_keeps_the_quality(name: str, scale: int, folder: Path) -> None:
    """On Set5 where that lies beside the project, within 0.02 dB of fp32."""
    stills = ROOT.parent / "shared" / "eval" / "Set5"
    if not stills.is_dir():
        pytest.skip(f"no {stills}")
    model = load_model(name, scale=scale)
    assert model.network is not None
    multiple = model.network.config.multiple

    def score(network: Callable[[torch.Tensor], torch.Tensor]) -> float:
        def upscale(low: torch.Tensor) -> torch.Tensor:
            height, width = low.shape[2:]
            padded = nn.functional.pad(low, (0, -width % multiple, 0, -height % multiple), mode="reflect")
            return network(padded)[:, :, : scale * height, : scale * width].clamp(0, 1)

        with torch.inference_mode():
            return evaluate_stills(upscale, stills, scale, with_ssim=False).psnr

    half = OpenVINONetwork(model.network, "bf16", in_flight=1, folder=folder)
    assert abs(score(half) - score(model.network)) <= 0.02


def test_rounding_keeps_sums() -> None:
    """Of each kernel, to what its smallest tap can express."""
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    rounded = rounded_to_the_same_sum(weight)
    assert (rounded == rounded_to_bf16(rounded)).all()
    plain = abs((rounded_to_bf16(weight) - weight).sum((2, 3))).mean()
    assert abs((rounded - weight).sum((2, 3))).mean() < plain / 5
    assert abs(rounded - weight).max() < abs(weight).max() / 64


def test_threads_change_no_bit(folder: Path) -> None:
    network = network_of(ONE_HEAD)
    frames = [random_frames(1, 3, 64, 96) * shade / 8 for shade in range(8)]
    one = OpenVINONetwork(network, "bf16", in_flight=1, folder=folder)
    expected = [one(frame) for frame in frames]
    for in_flight in (2, 5):
        many = OpenVINONetwork(network, "bf16", in_flight=in_flight, folder=folder)
        # More callers than requests: the last ones wait; and the first ones wait for the same compilation.
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(many, frames * 3))
        assert all(torch.equal(a, b) for a, b in zip(results, expected * 3, strict=True))


def test_results_are_the_callers_own(folder: Path) -> None:
    network = OpenVINONetwork(network_of(ONE_HEAD), "fp32", in_flight=1, folder=folder)
    frame = random_frames(1, 3, 16, 16)
    first = network(frame)
    kept = first.clone()
    network(1 - frame)
    assert torch.equal(first, kept)
    # Neither the layout nor the history of the input matters.
    turned = frame.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2).requires_grad_()
    assert torch.equal(network(turned), kept)


def test_many_sizes(folder: Path) -> None:
    network = network_of(replace(ONE_HEAD, depths=(1,), num_heads=(1,)))
    fast = OpenVINONetwork(network, "fp32", in_flight=1, folder=folder)
    with torch.inference_mode():
        for width in (*range(8, 88, 8), 8):
            frame = random_frames(1, 3, 8, width)
            assert largest(fast(frame), network(frame)) <= FP32


def entry_of(folder: Path) -> Path:
    (path,) = folder.glob("*.blob")
    return path


def prepared(network: HAT, folder: Path) -> torch.Tensor:
    return OpenVINONetwork(network, "bf16", in_flight=1, folder=folder)(random_frames(1, 3, 16, 24))


def test_cache_is_used(tmp_path: Path) -> None:
    network = network_of(ONE_HEAD)
    first = prepared(network, tmp_path)
    entry = entry_of(tmp_path)
    before = entry.stat()
    os.utime(entry, (1, 1))
    assert torch.equal(prepared(network, tmp_path), first)
    after = entry_of(tmp_path).stat()
    assert after.st_ino == before.st_ino, "written again"
    assert after.st_mtime > 1, "reading did not mark it as used"


def spoil(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoiled(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return spoiled


@pytest.mark.parametrize(
    "harm",
    {
        "empty": spoil(lambda entry: b""),
        "cut": spoil(lambda entry: entry[: len(entry) // 2]),
        "only its head": spoil(lambda entry: entry[:40]),
        "one bit": spoil(lambda entry: entry[:-100] + bytes([entry[-100] ^ 1]) + entry[-99:]),
        "noise": spoil(lambda entry: b"\x93noise" * 1000),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
    }.items(),
    ids=lambda harm: harm[0],
)
def test_spoiled_entries_are_made_again(harm: tuple[str, Callable[[Path], None]], tmp_path: Path) -> None:
    network = network_of(ONE_HEAD)
    first = prepared(network, tmp_path)
    entry = entry_of(tmp_path)
    size = entry.stat().st_size
    harm[1](entry)
    assert torch.equal(prepared(network, tmp_path), first)
    if harm[0] != "a folder":
        # Not to the byte: OpenVINO numbers its nodes from process to process, and the numbers grow longer.
        assert abs(entry_of(tmp_path).stat().st_size - size) < 0.01 * size


def test_foreign_entries_are_not_believed(tmp_path: Path) -> None:
    """One that was written for other weights, under this one's name."""
    mine, other = network_of(ONE_HEAD), network_of(ONE_HEAD, seed=5)
    first = prepared(mine, tmp_path / "mine")
    prepared(other, tmp_path / "other")
    entry_of(tmp_path / "mine").write_bytes(entry_of(tmp_path / "other").read_bytes())
    assert torch.equal(prepared(mine, tmp_path / "mine"), first)


def test_what_a_compiled_model_depends_on(tmp_path: Path) -> None:
    network = network_of(ONE_HEAD)
    prepared(network, tmp_path)
    prepared(network_of(replace(ONE_HEAD, conv_scale=0.5)), tmp_path)
    prepared(network_of(ONE_HEAD, seed=5), tmp_path)
    OpenVINONetwork(network, "fp32", in_flight=1, folder=tmp_path).prepare(16, 24)
    OpenVINONetwork(network, "bf16", in_flight=1, folder=tmp_path).prepare(24, 16)
    assert len(list(tmp_path.iterdir())) == 5
    OpenVINONetwork(network, "bf16", in_flight=2, folder=tmp_path).prepare(24, 16)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder", encoding="ascii")
    network = network_of(ONE_HEAD)
    assert torch.equal(prepared(network, file / "below"), prepared(network, tmp_path / "fine"))


def test_cache_stays_within_its_limit(tmp_path: Path) -> None:
    cache = OpenVINOCache(tmp_path, limit=1300)
    for number, key in enumerate((b"a", b"b", b"c"), 1):
        cache.write(key, key * 300)
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (number, number))
    stale = tmp_path / "killed.part"
    stale.write_bytes(b"half")
    os.utime(stale, (1, 1))
    assert cache.read(b"a") == b"a" * 300, "which makes it the last that was used"
    cache.write(b"d", b"d" * 300)
    assert [cache.read(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert not stale.exists()
    cache.write(b"too large", b"x" * 1300)
    assert cache.read(b"too large") is None
    assert cache.read(b"a") is not None


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both build the same model in the same folder; both get the same picture."""
    code = (
        "import hashlib, torch\n"
        "from tests.test_openvino import ONE_HEAD, OpenVINONetwork, network_of, random_frames\n"
        "out = OpenVINONetwork(network_of(ONE_HEAD), 'bf16', in_flight=1)(random_frames(1, 3, 16, 24))\n"
        "print(hashlib.sha256(out.numpy().tobytes()).hexdigest())\n"
    )
    environment = {**os.environ, "HAT_VIDEO_CACHE": str(tmp_path)}
    children = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [child.communicate(timeout=120)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    mine = prepared(network_of(ONE_HEAD), tmp_path / "openvino")
    assert printed == [hashlib.sha256(mine.numpy().tobytes()).hexdigest()] * 2
    assert [path.suffix for path in (tmp_path / "openvino").iterdir()] == [".blob"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HAT_VIDEO_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("HAT_VIDEO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "shared" / "hat-video"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hat-video"


def test_refusals(tmp_path: Path) -> None:
    network = network_of(ONE_HEAD)
    with pytest.raises(OptionError, match="fp16: OpenVINO has fp32 and bf16"):
        OpenVINONetwork(network, "fp16", folder=tmp_path)  # type: ignore[arg-type]
    fast = OpenVINONetwork(network, "fp32", in_flight=1, folder=tmp_path)
    with pytest.raises(ModelError, match="20x16: both sides must be multiples of 8"):
        fast(random_frames(1, 3, 16, 20))
    for wrong in (torch.rand(3, 16, 16), torch.rand(1, 1, 16, 16), torch.rand(1, 3, 16, 16, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\) float32 on the CPU"):
            fast(wrong)
    assert fast(torch.rand(0, 3, 16, 16)).shape == (0, 3, 32, 32)


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    placed = OpenVINONetwork(network_of(replace(SMALL, ape_size=24)), "fp32", in_flight=1, folder=tmp_path)
    with pytest.raises(ModelError, match="position embedding is for frames of 24x24"):
        placed.prepare(24, 32)
    ablated = network_of(ONE_HEAD)
    ablated.layers[0].residual_group.overlap_attn = nn.Identity()
    with pytest.raises(ModelError, match="cannot be written as a graph"):
        OpenVINONetwork(ablated, "fp32", in_flight=1, folder=tmp_path).prepare(16, 16)


def test_importing_it_needs_no_openvino() -> None:
    code = "import sys; import hat_video.inference.openvino_backend; sys.exit('openvino' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert openvino_version() is not None


def test_nobody_is_told_of_it() -> None:
    """By itself the import of OpenVINO sends an event to its makers, from a thread that stays."""
    code = (
        "import sys, threading, torch; from hat_video import Upscaler, load_model;"
        "Upscaler(load_model('hat-pico'), backend='openvino')(torch.rand(1, 3, 32, 32));"
        "assert 'openvino' in sys.modules and 'openvino_telemetry' not in sys.modules;"
        "names = [thread.name for thread in threading.enumerate()];"
        "assert not any('ThreadPool' in name for name in names), names"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
