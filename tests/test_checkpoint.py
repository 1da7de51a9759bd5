"""Checkpoints in every wrapping, and files that are none."""

from __future__ import annotations

import math
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hat_video.errors import ModelError, UsageError
from hat_video.model.checkpoint import load_network, read_checkpoint
from hat_video.model.hat import HAT, HATConfig
from hat_video.model.resample import enlarge
from hat_video.model.windows import overlapping_position_index, relative_position_index
from hat_video.model.zoo import default_model_name, list_models, load_model
from tests.reference import scramble

CONFIG = HATConfig(
    embed_dim=16,
    depths=(2, 1),
    num_heads=(2, 4),
    window_size=8,
    compress_ratio=2,
    squeeze_factor=4,
    num_feat=16,
    upscale=3,
)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in scramble(HAT(CONFIG), 0).state_dict().items()}


def with_indices(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        **state,
        "relative_position_index_SA": relative_position_index(8),
        "relative_position_index_OCA": overlapping_position_index(8, 12),
    }


def check(path: Path, state: dict[str, torch.Tensor]) -> None:
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == CONFIG
    loaded = load_network(checkpoint, path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("wrapper", ["params_ema", "params", None])
@pytest.mark.parametrize("has_indices", [True, False])
def test_torch_files(
    tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, wrapper: str | None, has_indices: bool
) -> None:
    path = tmp_path / f"model{suffix}"
    stored = with_indices(state) if has_indices else state
    torch.save(stored if wrapper is None else {wrapper: stored}, path)
    check(path, state)


def test_averaged_weights_win(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "both.pth"
    torch.save({"params": {name: value * 2 for name, value in state.items()}, "params_ema": state}, path)
    check(path, state)


def test_old_torch_files(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "old.pth"
    torch.save({"params": state}, path, _use_new_zipfile_serialization=False)
    check(path, state)


def test_data_parallel_names(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "parallel.pth"
    torch.save({f"module.{name}": value for name, value in state.items()}, path)
    check(path, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors(tmp_path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in state.items()}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == CONFIG
    network = load_network(checkpoint, path)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_metadata_says_what_tensors_cannot(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={"hat_video": '{"conv_scale": 1.0, "img_range": 255.0}'})
    assert read_checkpoint(path).config == replace(CONFIG, conv_scale=1.0, img_range=255.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": False},
        {"patch_norm": False},
        {"resi_connection": "identity"},
        {"overlap_ratio": 0.25},
        {"mlp_ratio": 3.0},
        {"mlp_ratio": math.nextafter(60 / 44, 2), "embed_dim": 44},
        {"upscale": 1},
        {"upscale": 4, "unshuffle": 2},
        {"window_size": 16, "num_feat": 64},
    ],
)
def test_hyperparameters_are_inferred(tmp_path: Path, changes: dict[str, object]) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    path = tmp_path / "model.pth"
    torch.save({"params": HAT(config).state_dict()}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == config
    load_network(checkpoint, path)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(path)
    line = str(error.value)
    assert str(path) in line
    assert "\n" not in line
    return line


def test_files_that_are_no_checkpoint(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"")
    assert "empty" in refused(path)
    path.write_bytes(b"hello, I am a text" * 10)
    assert "not a" in refused(path)
    torch.save({"params": state}, path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert "cut off" in refused(path)
    torch.save([1, 2, 3], path)
    assert "no weights" in refused(path)
    safe = tmp_path / "model.safetensors"
    save_file(state, safe)
    safe.write_bytes(safe.read_bytes()[:-500])
    assert "cut off" in refused(safe)


@pytest.mark.parametrize("suffix", [".pth", ".old", ".safetensors"])
def test_damaged_bytes_never_escape_as_another_error(
    tmp_path: Path, state: dict[str, torch.Tensor], suffix: str
) -> None:
    """Where the damage hits a weight, the file may load; where it hits the structure, the error is ours."""
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"params": state}, path, _use_new_zipfile_serialization=suffix == ".pth")
    whole = path.read_bytes()
    dice = random.Random(0)
    messages = []
    for number in range(60):
        broken = bytearray(whole)
        reach = 4000 if number % 2 else len(whole)
        for _ in range(dice.choice([1, 3, 20])):
            broken[dice.randrange(reach)] = dice.randrange(256)
        path.write_bytes(broken if number % 5 else whole[: dice.randrange(1, len(whole))])
        try:
            load_model(path)
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 12
    assert not any("\n" in line for line in messages)


@pytest.mark.parametrize("value", ["[]", "3", "{", '{"conv_scale": "x"}', '{"conv_scale": null}', '{"img_range": 0}'])
def test_metadata_that_makes_no_sense(tmp_path: Path, state: dict[str, torch.Tensor], value: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={"hat_video": value})
    assert "metadata" in refused(path)


def test_tensors_of_impossible_shapes(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.pth"
    for name, value in list(state.items())[::5]:
        for changed in (torch.tensor(1.0), torch.zeros(0), torch.cat([value, value]), value.to(torch.int8)):
            torch.save({**state, name: changed}, path)
            refused(path)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (witness,))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"params": Evil()}))
    refused(path)
    torch.save({"params": Evil()}, path)
    assert "nothing in it was run" in refused(path)
    assert not witness.exists()


def test_other_networks_are_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.pth"
    torch.save({"params": {"conv_first.weight": torch.zeros(3), "body.0.rdb1.conv1.weight": torch.zeros(3)}}, path)
    assert "Real-ESRGAN" in refused(path)
    swin = {name: value for name, value in state.items() if "overlap_attn" not in name and "conv_block" not in name}
    torch.save({"params": swin}, path)
    assert "SwinIR" in refused(path)
    torch.save({"params": {name: value for name, value in state.items() if "fc2" not in name}}, path)
    assert "is missing (and 9 more)" in refused(path)
    torch.save({"params": {**state, "extra.weight": torch.zeros(2, 3)}}, path)
    assert "extra.weight [2, 3] is unknown" in refused(path)


def test_weights_that_are_not_finite(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.pth"
    broken = dict(state)
    broken["norm.bias"] = torch.full_like(broken["norm.bias"], float("inf"))
    torch.save({"params": broken}, path)
    assert "norm.bias holds NaN or infinite" in refused(path)


def test_named_models_know_their_facts() -> None:
    nano = load_model("hat-nano", scale=4)
    assert (nano.name, nano.scale, nano.parameters, nano.licence) == ("hat-nano", 4, 333_880, "Apache-2.0")
    facts = {model.name: model for model in list_models()}
    for shipped in (model for model in facts.values() if model.is_included and model.parameters):
        loaded = {scale: load_model(shipped.name, scale=scale) for scale in shipped.scales}
        assert shipped.sha256 == {scale: model.sha256 for scale, model in loaded.items()}
        assert shipped.parameters == loaded[2].parameters
    assert {"HAT-S", "HAT", "HAT-L", "Real_HAT_GAN", "bicubic", "lanczos"} <= facts.keys()
    assert {default_model_name(scale) for scale in (2, 3, 4)} == {"hat-nano-video"}
    with pytest.raises(UsageError, match="hat-nano has x2, x3, x4"):
        default_model_name(1)
    with pytest.raises(ModelError, match="--scale 3: hat-pico has x2"):
        load_model("hat-pico", scale=3)
    with pytest.raises(ModelError, match="their releases"):
        load_model("HAT-L")


def test_checkpoint_knows_its_scale(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "mine.pth"
    torch.save(state, path)
    assert load_model(path).scale == 3
    assert load_model(path, scale=3).name == "mine"
    with pytest.raises(ModelError, match="is trained for x3"):
        load_model(path, scale=2)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_pillows(scale: int) -> None:
    """Pillow enlarges with the same filter, in double precision; away from the edges, which it weighs differently."""
    from PIL import Image

    picture = torch.rand(20, 31, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(picture.numpy(), mode="F").resize((31 * scale, 20 * scale), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(image))
    ours = enlarge(picture[None, None], scale, "bicubic")[0, 0]
    inner = (slice(3 * scale, -3 * scale), slice(3 * scale, -3 * scale))
    assert (ours - expected)[inner].abs().max() < 1e-5
    lanczos = Image.fromarray(picture.numpy(), mode="F").resize((31 * scale, 20 * scale), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(lanczos))
    assert (enlarge(picture[None, None], scale, "lanczos")[0, 0] - expected)[inner].abs().max() < 1e-5


@pytest.mark.parametrize("kernel", ["bicubic", "lanczos"])
def test_resamplers_keep_flat_pictures_and_size_one(kernel: str) -> None:
    flat = torch.full((1, 3, 1, 5), 0.25)
    assert torch.allclose(enlarge(flat, 3, kernel), torch.full((1, 3, 3, 15), 0.25), atol=1e-6)
    picture = torch.rand(1, 3, 4, 5)
    assert torch.equal(enlarge(picture, 1, kernel), picture)
