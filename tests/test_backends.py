"""Who computes a network, and that it is the same network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hat_video.inference.upscaler import Upscaler
from hat_video.model.hat import HAT, HATConfig
from hat_video.model.zoo import load_model
from tests.clips import make_clip
from tests.command import ROOT

TINY = HATConfig(
    embed_dim=8, depths=(2,), num_heads=(1,), window_size=4, compress_ratio=2, squeeze_factor=4, upscale=2, num_feat=4
)


def checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "tiny.safetensors"
    save_file(HAT(TINY).state_dict(), path, metadata={"squeeze_factor": "4"})
    return path


def test_compiled_blocks_compute_the_same(tmp_path: Path) -> None:
    model = load_model(str(checkpoint(tmp_path)))
    frames = torch.rand(1, 3, 22, 31, generator=torch.Generator().manual_seed(0))
    compiled = Upscaler(model, precision="fp32", backend="torch-compiled")
    assert compiled.backend == "torch-compiled"
    assert (compiled(frames) - Upscaler(model, precision="fp32")(frames)).abs().max() < 1e-5


def test_a_compiler_that_fails_is_one_line(tmp_path: Path) -> None:
    words = ["upscale", make_clip(tmp_path / "clip.mp4", frames=3), "--model", checkpoint(tmp_path), "--compile"]
    done = subprocess.run(
        [sys.executable, "-m", "hat_video", *map(str, words), "-o", str(tmp_path / "out.mp4")],
        cwd=ROOT,
        env={**os.environ, "CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "--compile" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.mp4").exists()
