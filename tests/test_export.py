"""ONNX files, run by another runtime."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hat_video.cli import main
from hat_video.errors import ModelError, UsageError
from hat_video.model.hat import HAT, HATConfig
from hat_video.model.onnx_export import OPSET, export_onnx
from hat_video.model.zoo import load_model
from hat_video.training.export import save_network
from tests.reference import scramble

TINY = HATConfig(
    embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, compress_ratio=2, squeeze_factor=4, upscale=3, num_feat=4
)


@pytest.mark.parametrize("pool", [0, 8])
def test_another_runtime_computes_the_same_at_any_size(pool: int, tmp_path: Path) -> None:
    network = scramble(HAT(TINY), 0).eval().requires_grad_(False)
    save_network(network, tmp_path / "tiny.safetensors", {})
    out = tmp_path / "tiny.onnx"
    words = ["export", str(tmp_path / "tiny.safetensors"), "--onnx", str(out)]
    assert main([*words, "--attention-pool", f"box:{pool}" if pool else "global"]) == 0
    session = onnxruntime.InferenceSession(out)
    network.pool_over(pool)
    for shape in ((2, 3, 12, 20), (1, 3, 4, 4), (3, 3, 40, 24), (1, 3, 8, 36)):
        frames = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        (made,) = session.run(None, {"image": frames.numpy()})
        assert np.abs(made - network(frames).numpy()).max() < 1e-4
    facts = json.loads(session.get_modelmeta().custom_metadata_map["hat_video"])
    assert (facts["scale"], facts["window"], facts["multiple"], facts["attention_pool"]) == (3, 4, 4, pool)
    assert {"padding", "colour", "range", "licence", "sha256"} <= facts.keys()
    proto = onnx.load(out)
    assert {item.domain: item.version for item in proto.opset_import}[""] == facts["opset"] == OPSET
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(out, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    frames = torch.rand(1, 3, 16, 12)
    assert np.abs(compiled(frames.numpy())[0] - network(frames).numpy()).max() < 1e-4


def test_what_cannot_be_exported_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", "bicubic", "--scale", "2", "--onnx", str(tmp_path / "a.onnx")]) == 2
    assert "is a resampler and no network" in capsys.readouterr().err
    save_network(scramble(HAT(TINY), 0).eval(), tmp_path / "tiny.safetensors", {})
    tiny = ["export", str(tmp_path / "tiny.safetensors"), "--onnx"]
    assert main([*tiny, str(tmp_path / "no" / "a.onnx")]) != 0
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]
    with monkeypatch.context() as patch:
        # A file system that is read-only does not even let a missing file be removed.
        refusal = OSError(errno.EROFS, "Read-only file system")
        patch.setattr(Path, "replace", Mock(side_effect=refusal))
        patch.setattr(Path, "unlink", Mock(side_effect=refusal))
        assert main([*tiny, str(tmp_path / "a.onnx")]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == f"hat-video: {tmp_path / 'a.onnx'}: cannot be written: Read-only file system"
    config = replace(TINY, ape_size=8)
    model = replace(load_model("hat-nano", scale=2), network=HAT(config), config=config)
    with pytest.raises(ModelError, match="one size only"):
        export_onnx(model, tmp_path / "a.onnx")
    with pytest.raises(UsageError):
        export_onnx(load_model("lanczos", scale=2), tmp_path / "a.onnx")
