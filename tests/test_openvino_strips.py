"""Frames computed in strips: the same bits as at once, whatever the network's shape; and less memory."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hat_video.inference import openvino_blocks, openvino_strips
from hat_video.inference.openvino_backend import OpenVINONetwork
from hat_video.inference.openvino_folds import Strip
from hat_video.inference.openvino_strips import strips_of
from hat_video.inference.regions import Reach, tiled_exactly
from hat_video.model.hat import HATConfig
from tests.test_hat import SMALL
from tests.test_openvino import ONE_HEAD, ROOT, network_of, random_frames

NANO = replace(ONE_HEAD, depths=(3,), num_heads=(1,), attention_pool=16)
SHAPES = {
    "nano": NANO,
    "two groups, two heads": replace(SMALL, attention_pool=16),
    "three groups, bare": replace(
        ONE_HEAD, depths=(1, 2, 1), num_heads=(1, 1, 1), attention_pool=8, qkv_bias=False, patch_norm=False
    ),
    "unshuffle": replace(NANO, unshuffle=2),
    "x3": replace(NANO, upscale=3, depths=(1,)),
    "x4": replace(NANO, upscale=4, depths=(1,)),
    "windows of 6, surrounds of 9": replace(NANO, window_size=6, attention_pool=12),
    "windows of 7": replace(NANO, window_size=7, attention_pool=7, depths=(2,)),
    "windows of 16": replace(NANO, window_size=16, attention_pool=16, depths=(2,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


def cut(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(openvino_strips, "_LEAST_TOKENS", 0)
    monkeypatch.setattr(openvino_strips, "_ROWS", rows)


def whole_and_strips(
    config: HATConfig, precision: str, frames: torch.Tensor, rows: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    network = network_of(config)
    whole = OpenVINONetwork(network, precision, in_flight=1, folder=folder)(frames)  # type: ignore[arg-type]
    cut(monkeypatch, rows)
    assert len(strips_of(config, *frames.shape[2:])) > 1
    return whole, OpenVINONetwork(network, precision, in_flight=1, folder=folder)(frames)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_whole(name: str, precision: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with a first, some inner and a last strip, which is a part of a box where one has several windows."""
    config = SHAPES[name]
    rows = 3 * config.attention_pool + config.window_size
    frames = random_frames(2, 3, rows * config.unshuffle, 5 * config.multiple)
    whole, strips = whole_and_strips(config, precision, frames, 1, folder, monkeypatch)
    assert torch.equal(whole, strips)


@pytest.mark.parametrize(("height", "rows"), [(24, 1), (32, 64), (72, 32), (112, 32)])
def test_equals_the_whole_at_any_height(height: int, rows: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of several boxes, or only a first and a last one; and each in several bands, which do not share evenly."""
    monkeypatch.setattr(openvino_blocks, "_BAND_BYTES", 12_000)
    frames = random_frames(1, 3, height, 48)
    whole, strips = whole_and_strips(NANO, "bf16", frames, rows, folder, monkeypatch)
    assert torch.equal(whole, strips)


def test_tiles_of_strips_equal_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, frames = network_of(NANO), random_frames(1, 3, 9 * 16, 5 * 16)
    whole = OpenVINONetwork(network, "bf16", in_flight=1, folder=folder)(frames)
    cut(monkeypatch, 32)
    assert torch.equal(
        tiled_exactly(OpenVINONetwork(network, "bf16", in_flight=1, folder=folder), frames, 48, Reach(NANO), 2), whole
    )


def test_threads_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(NANO)
    frames = [random_frames(1, 3, 40, 24) * shade / 8 for shade in range(8)]
    expected = list(map(OpenVINONetwork(network, "bf16", in_flight=1, folder=tmp_path / "whole"), frames))
    cut(monkeypatch, 16)
    many = OpenVINONetwork(network, "bf16", in_flight=2, folder=tmp_path / "strips")
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(many, frames * 2))
    assert all(torch.equal(a, b) for a, b in zip(results, expected * 2, strict=True))
    kinds, stages = 3, 1 + 3 + 1 + 1 + 1
    assert len(list((tmp_path / "strips").iterdir())) == kinds * stages


def test_how_a_frame_is_cut() -> None:
    def rows(*size: int, config: HATConfig = NANO) -> list[int]:
        return [strip.rows for strip in strips_of(config, *size)]

    assert rows(1080, 1920) == [48, *[64] * 16, 8]
    assert rows(1088, 1920) == [48, *[64] * 16, 16]
    assert rows(2160, 3840, config=replace(NANO, unshuffle=2)) == [48, *[64] * 16, 8]
    assert rows(1080, 1920, config=replace(NANO, attention_pool=48)) == [96, *[96] * 10, 24]
    assert strips_of(NANO, 32, 1 << 15) == [Strip(16, False, True), Strip(16, True, False)]
    # Small ones, ones of a single row of boxes, and networks that look at all of a frame.
    assert rows(180, 320) == [180]
    assert rows(16, 1 << 16) == [16]
    assert rows(1080, 1920, config=replace(NANO, attention_pool=0)) == [1080]
    # In bf16 their bits would be others.
    assert rows(1080, 1920, config=replace(NANO, resi_connection="identity")) == [1080]
    for height in range(520, 2200, 8):
        strips = strips_of(NANO, height, 1920)
        assert sum(strip.rows for strip in strips) == height
        assert [strip.has_above for strip in strips] == [False, *[True] * (len(strips) - 1)]
        assert [strip.has_below for strip in strips] == [*[True] * (len(strips) - 1), False]
        assert {strip.rows for strip in strips[1:-1]} == {64}
        assert strips[0].rows in (16, 32, 48, 64)
        assert strips[-1].rows in (8, 16)


def test_less_memory(tmp_path: Path) -> None:
    """What a process takes at most, in MB, where a trunk has 25."""
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.test_openvino_strips import NANO, OpenVINONetwork, network_of, openvino_strips\n"
        "openvino_strips._LEAST_TOKENS = int(sys.argv[1])\n"
        "network = OpenVINONetwork(network_of(NANO), 'bf16', in_flight=1, folder=Path(sys.argv[2]))\n"
        "for _ in range(2):\n"
        "    network(torch.zeros(1, 3, 512, 1024))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)\n"
    )
    # A child starts out with its parent's peak; so a small process starts it, and not this one.
    launcher = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)"
    peaks = []
    for least in (1 << 40, 0):
        command = [sys.executable, "-S", "-c", launcher, sys.executable, "-c", code, str(least), str(tmp_path)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout))
    whole, strips = peaks
    assert strips < whole - 100, peaks
