"""The plain convolutional network, on every backend, as a file, and in parts."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from hat_video import Upscaler, load_model
from hat_video.analysis.metrics import psnr
from hat_video.cli import main
from hat_video.errors import ModelError
from hat_video.inference.fast_cnn import FastCNN
from hat_video.inference.openvino_backend import OpenVINONetwork
from hat_video.inference.precision import has_fast_bf16
from hat_video.inference.regions import Reach, Rectangle, compute_region, tiled_exactly
from hat_video.model.cnn import CNN, CNNConfig
from hat_video.training.export import save_tensors
from hat_video.training.networks import BranchedCNN
from tests.reference import scramble

CPU = torch.device("cpu")


def network(scale: int = 2, layers: int = 4, embed_dim: int = 8) -> CNN:
    """Of weights that change the picture."""
    net = CNN(CNNConfig(embed_dim, layers, scale))
    scramble(net, 0)
    return net.eval().requires_grad_(False)


def saved(net: CNN, folder: Path) -> Path:
    path = folder / "plain.safetensors"
    save_tensors(net.state_dict(), path, {})
    return path


def frames(height: int = 37, width: int = 50) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def by_the_book(net: CNN, x: torch.Tensor) -> torch.Tensor:
    """ECBSR's inference form, of nothing but torch's functions."""
    state = {name: value.double() for name, value in net.state_dict().items()}

    def layer(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.conv2d(y, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    x = x.double()
    y = first = F.prelu(layer("head", x - 0.5), state["act.0.weight"])
    for number in range(net.config.layers):
        y = F.prelu(layer(f"body.{number}", y), state[f"act.{number + 1}.weight"])
    large = F.pixel_shuffle(layer("tail", y + first), net.config.upscale)
    return large + F.interpolate(x, scale_factor=net.config.upscale, mode="nearest")


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_every_form_computes_the_same(scale: int, tmp_path: Path) -> None:
    net = network(scale)
    expected = by_the_book(net, frames())
    with torch.inference_mode():
        assert (net(frames()) - expected).abs().max() < 1e-5
        assert (FastCNN(net, torch.float64, CPU)(frames().double()) - expected).abs().max() < 1e-12
    path = saved(net, tmp_path)
    model = load_model(path)
    assert model.config == net.config
    assert model.scale == scale
    for backend, precision, least in (("torch", "fp32", 100), ("openvino", "fp32", 100), ("openvino", "bf16", 45)):
        if precision == "bf16" and not has_fast_bf16(CPU):
            continue
        upscaler = Upscaler(model, backend=backend, precision=precision, device="cpu")  # type: ignore[arg-type]
        assert upscaler.backend == backend
        assert not upscaler.notes
        assert float(psnr(upscaler(frames()), expected.clamp(0, 1).float())) > least
    out = tmp_path / "plain.onnx"
    assert main(["export", str(path), "--onnx", str(out)]) == 0
    session = onnxruntime.InferenceSession(out)
    for shape in ((1, 3, 5, 7), (3, 3, 16, 16)):
        picture = torch.rand(shape)
        (made,) = session.run(None, {"image": picture.numpy()})
        assert np.abs(made - by_the_book(net, picture).numpy()).max() < 1e-4
    facts = json.loads(session.get_modelmeta().custom_metadata_map["hat_video"])
    assert facts["multiple"] == 1
    assert "window" not in facts


def test_nothing_is_tinted_in_bf16() -> None:
    """The source's own pixels are added in fp32: a network that adds nothing gives them back to the bit."""
    net = network()
    torch.nn.init.zeros_(net.tail.weight)
    torch.nn.init.zeros_(net.tail.bias)  # type: ignore[arg-type]
    expected = F.interpolate(frames(), scale_factor=2.0, mode="nearest")
    assert torch.equal(FastCNN(net, torch.bfloat16, CPU)(frames()), expected)
    assert torch.equal(OpenVINONetwork(net, "bf16")(frames()), expected)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parts_and_tiles_equal_the_whole_to_the_bit(backend: str, precision: str, tmp_path: Path) -> None:
    # Narrower ones fall to kernels of torch whose sums depend on the size of the picture.
    model = load_model(saved(network(layers=10, embed_dim=32), tmp_path))
    upscaler = Upscaler(model, backend=backend, precision=precision, device="cpu")  # type: ignore[arg-type]
    reach, frame = upscaler.reach, frames(150, 211)[:1]
    assert reach is not None
    assert reach.multiple == 1
    whole, _ = upscaler.unchecked(frame)
    rng = random.Random(0)
    for _ in range(6):
        top, left = rng.randrange(150), rng.randrange(211)
        part = Rectangle(top, rng.randint(top + 1, 150), left, rng.randint(left + 1, 211))
        region = reach.region(part, 150, 211)
        made, _ = upscaler.unchecked_part(region.cut(frame), part.within(region))
        assert torch.equal(made, part.cut(whole, 2))
    tiled = Upscaler(model, backend=backend, precision=precision, tile=64, device="cpu")  # type: ignore[arg-type]
    assert torch.equal(tiled(frame), whole)


def test_the_reach_is_what_the_gradient_says() -> None:
    net = network(layers=3).double().requires_grad_(True)
    reach = Reach(net.config)
    frame = torch.rand(1, 3, 16, 96, dtype=torch.float64, requires_grad=True)
    net(frame)[..., 2 * 48 : 2 * 49].sum().backward()
    assert frame.grad is not None
    columns = frame.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert (int(columns[0]), int(columns[-1])) == (48 - net.config.reach, 48 + net.config.reach)
    low, high = reach.along(48, 49, 96)
    assert low <= 48 - net.config.reach
    assert high > 48 + net.config.reach
    whole = net(frame).detach()
    part = Rectangle(3, 9, 40, 50)
    assert torch.equal(compute_region(net, frame.detach(), part, reach, 2).detach(), part.cut(whole, 2))
    assert torch.equal(tiled_exactly(net, frame.detach(), 16, reach, 2).detach(), whole)


def test_the_branches_fold_into_the_convolutions() -> None:
    branched = BranchedCNN(CNNConfig(8, 3, 2)).double()
    scramble(branched, 1)
    folded = branched.folded().double()
    assert asdict(folded.config) == asdict(branched.config)
    x = frames().double()
    with torch.no_grad():
        assert (folded(x).float() - branched(x).float()).abs().max() < 1e-5


def test_a_file_with_other_layers_is_none_of_ours(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["act.2.weight"]
    save_tensors(state, tmp_path / "other.safetensors", {})
    with pytest.raises(ModelError, match="is not a HAT, it looks like an SRVGG-Compact or a plain CNN"):
        load_model(tmp_path / "other.safetensors")
    state = network().state_dict() | {"body.1.weight": torch.zeros(8, 4, 3, 3)}
    save_tensors(state, tmp_path / "torn.safetensors", {})
    with pytest.raises(ModelError, match=r"looks like a CNN, but body.1.weight is \[8, 4, 3, 3\], not \[8, 8, 3, 3\]"):
        load_model(tmp_path / "torn.safetensors")
