"""Our HAT and its fast form against the reference, with random weights, to the last bits of fp32 and fp64."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hat_video.inference.optimize import optimize
from hat_video.model.checkpoint import infer_config
from hat_video.model.hat import HAT, ChannelAttention, HATConfig
from hat_video.model.windows import (
    overlapping_position_index,
    relative_position_index,
    window_partition,
    window_reverse,
)
from hat_video.model.zoo import load_model
from tests.reference import FP32, reference_hat, reference_of, scramble

CPU = torch.device("cpu")
SMALL = HATConfig(
    embed_dim=24,
    depths=(2, 2),
    num_heads=(2, 2),
    window_size=8,
    compress_ratio=3,
    squeeze_factor=6,
    num_feat=16,
    upscale=2,
)
SHAPES = {
    "x1": replace(SMALL, upscale=1),
    "x2": SMALL,
    "x3": replace(SMALL, upscale=3),
    "x4": replace(SMALL, upscale=4),
    "heads of 30": replace(SMALL, embed_dim=60, num_heads=(2,), depths=(3,), squeeze_factor=30),
    "window 16": replace(SMALL, window_size=16, depths=(2,), num_heads=(2,)),
    "overlap 0.25": replace(SMALL, overlap_ratio=0.25),
    "no overlap": replace(SMALL, overlap_ratio=0.0),
    "wide middle": replace(SMALL, compress_ratio=1, mlp_ratio=4.0, num_feat=64),
    "one block": replace(SMALL, depths=(1,), num_heads=(3,)),
    "rows not in sixteens": replace(SMALL, window_size=5, overlap_ratio=0.4),
    "bare": replace(SMALL, qkv_bias=False, patch_norm=False),
    "identity": replace(SMALL, resi_connection="identity"),
}


def ours_of(reference: torch.nn.Module) -> HAT:
    state = {name: value for name, value in reference.state_dict().items() if "position_index" not in name}
    network = HAT(infer_config(state, Path("reference"))).eval()
    network.load_state_dict(state)
    return network


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name: str) -> None:
    config = SHAPES[name]
    reference = reference_hat(config)
    ours = ours_of(reference)
    assert ours.config == config
    frames = torch.rand(
        2, 3, 2 * config.window_size, 3 * config.window_size, generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        expected = reference(frames)
        assert 0.1 < expected.std() < 3, "a silent network would prove nothing"
        assert largest(ours(frames), expected) <= FP32
        assert largest(optimize(ours, dtype=torch.float32, device=CPU)(frames), expected) <= FP32
        exact = reference.double()(frames.double())
        assert largest(ours.double()(frames.double()), exact) <= 1e-10
        assert largest(optimize(ours, dtype=torch.float64, device=CPU)(frames.double()), exact) <= 1e-10


@pytest.mark.parametrize("size", [(8, 8), (8, 40), (40, 8), (16, 24)])
def test_every_kind_of_window_is_masked_right(size: tuple[int, int]) -> None:
    """A single window is corner, last row and last column at once."""
    reference = reference_hat(SMALL).double()
    frames = torch.rand(1, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        ours = ours_of(reference).double()
        assert largest(ours(frames), reference(frames)) <= 1e-10
        fast = optimize(ours, dtype=torch.float64, device=CPU)
        assert largest(fast(frames), reference(frames)) <= 1e-10


def test_full_size_hat_s() -> None:
    config = HATConfig(
        embed_dim=144, depths=(6,) * 6, num_heads=(6,) * 6, compress_ratio=24, squeeze_factor=24, upscale=4
    )
    reference = reference_hat(config)
    ours = ours_of(reference)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 9_621_183
    frames = torch.rand(1, 3, 16, 32)
    with torch.inference_mode():
        expected = reference.double()(frames.double())
        assert largest(ours.double()(frames.double()), expected) <= 1e-10
        fast = optimize(ours, dtype=torch.float64, device=CPU)
        assert largest(fast(frames.double()), expected) <= 1e-10
        fast32 = optimize(ours.float(), dtype=torch.float32, device=CPU)
        assert largest(fast32(frames), reference.float()(frames)) <= FP32


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_shipped_models_equal_the_reference(scale: int) -> None:
    # The reference pools over the whole picture.
    model = load_model("hat-nano", scale=scale).pooled(0)
    assert model.network is not None
    reference = reference_of(model.network.state_dict() | _index_buffers(model.network.config))
    frames = torch.rand(1, 3, 40, 48)
    with torch.inference_mode():
        assert largest(model.network(frames), reference(frames)) <= FP32
        assert largest(optimize(model.network, dtype=torch.float32, device=CPU)(frames), reference(frames)) <= FP32
        exact = deepcopy(model.network).double()(frames.double())
        assert largest(exact, reference.double()(frames.double())) <= 1e-10


def _index_buffers(config: HATConfig) -> dict[str, torch.Tensor]:
    return {
        "relative_position_index_SA": relative_position_index(config.window_size),
        "relative_position_index_OCA": overlapping_position_index(config.window_size, config.overlap_size),
    }


def test_trunk_scale_changes_no_bit_of_fp32() -> None:
    network = load_model("hat-nano", scale=2).network
    assert network is not None
    frames = torch.rand(1, 3, 32, 48)
    with torch.inference_mode():
        plain = optimize(network, dtype=torch.float32, device=CPU)(frames)
        scaled = optimize(network, dtype=torch.float32, device=CPU, trunk_exponent=6)(frames)
    assert torch.equal(plain, scaled)


def test_trunk_scale_saves_fp16() -> None:
    """A trunk that grows beyond fp16's range, as in large trained networks."""
    network = HAT(replace(SMALL, depths=(2, 2, 2, 2), num_heads=(2,) * 4))
    scramble(network, 0).eval()
    for group in network.layers:
        group.conv.weight.data.mul_(30.0)
    frames = torch.rand(1, 3, 16, 24)
    with torch.inference_mode():
        expected = network(frames)
        naive = optimize(network, dtype=torch.float16, device=CPU)(frames)
        saved = optimize(network, dtype=torch.float16, device=CPU, trunk_exponent=8)(frames)
    assert not torch.isfinite(naive).all()
    error = ((saved.float() - expected) ** 2).mean() / (expected**2).mean()
    assert -10 * torch.log10(error) > 50


def test_unshuffle_folds_pixels_into_channels() -> None:
    config = replace(SMALL, unshuffle=2)
    network = HAT(config)
    scramble(network, 3).eval()
    assert infer_config(network.state_dict(), Path("mine")) == config
    frames = torch.rand(1, 3, 16, 32)
    with torch.inference_mode():
        large = network(frames)
        fast = optimize(network, dtype=torch.float32, device=CPU)(frames)
    assert large.shape == (1, 3, 32, 64)
    assert largest(large, fast) <= FP32


def test_a_frame_does_not_depend_on_its_batch() -> None:
    network = load_model("hat-nano", scale=2).network
    assert network is not None
    fast = optimize(network, dtype=torch.float32, device=CPU)
    frames = torch.rand(3, 3, 24, 32)
    with torch.inference_mode():
        together = fast(frames)
        apart = torch.cat([fast(frame[None]) for frame in frames])
    assert largest(together, apart) <= FP32


def test_windows_come_back() -> None:
    x = torch.rand(2, 16, 24, 5)
    windows = window_partition(x, 8)
    assert windows.shape == (12, 64, 5)
    assert torch.equal(windows[1, 0], x[0, 0, 8])
    assert torch.equal(window_reverse(windows, 8, 16, 24), x)


def test_position_tables_use_every_row() -> None:
    assert sorted(set(relative_position_index(16).flatten().tolist())) == list(range(31 * 31))
    assert sorted(set(overlapping_position_index(16, 24).flatten().tolist())) == list(range(39 * 39))


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (24, 40), (40, 16)])
@pytest.mark.parametrize("box", [8, 16, 24])
def test_boxes_of_the_channel_attention(size: tuple[int, int], box: int) -> None:
    """Each box is gated as if it were a picture of its own."""
    network = HAT(replace(SMALL, attention_pool=box))
    scramble(network, 5).eval().double()
    gate = network.layers[0].residual_group.blocks[0].conv_block.cab[3]
    x = torch.rand(1, SMALL.embed_dim, *size, dtype=torch.float64)
    alone = ChannelAttention(SMALL).double()
    alone.load_state_dict(gate.state_dict())
    expected = torch.cat([torch.cat([alone(piece) for piece in row.split(box, 3)], 3) for row in x.split(box, 2)], 2)
    frames = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        assert largest(gate(x), expected) <= 1e-12
        fast = optimize(network, dtype=torch.float64, device=CPU)
        assert largest(fast(frames), network(frames)) <= 1e-10
        network.pool_over(0)
        assert largest(fast(frames), network(frames)) > 1e-6 or box >= max(size)


def test_a_box_must_be_made_of_windows() -> None:
    with pytest.raises(ValueError, match=r"attention_pool 12: must be 0 .* or a multiple of the window, 8"):
        HAT(replace(SMALL, attention_pool=12))
