"""Any HAT checkpoint to its hyperparameters and tensors: safely, strictly, and with a clear word where it is none.

Our own convolutional networks are read here too.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hat_video.errors import ModelError
from hat_video.model.cnn import CNN, CNNConfig
from hat_video.model.hat import HAT, HATConfig

__all__ = ["Checkpoint", "infer_config", "load_network", "read_checkpoint"]

METADATA_KEY = "hat_video"
"""Entry of a safetensors file's metadata with what the tensors cannot say, as JSON."""

_INDEX_BUFFERS = ("relative_position_index_SA", "relative_position_index_OCA")
_GROUP = "layers.0.residual_group"
_SIGNATURE = (
    "conv_first.weight",
    f"{_GROUP}.overlap_attn.relative_position_bias_table",
    f"{_GROUP}.blocks.0.conv_block.cab.0.weight",
    f"{_GROUP}.blocks.0.attn.relative_position_bias_table",
    "conv_last.weight",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file held."""

    config: HATConfig | CNNConfig
    state_dict: dict[str, Tensor]
    """Parameters by upstream's names; without the index tables, which are made anew."""
    sha256: str
    """Of the file, in hex."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the file says of itself."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads .pth, .pt and .safetensors files; never runs code out of them.

    Raises:
        ModelError: missing, damaged, not a HAT, or with weights that are not finite. The message names what was found.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if not file.seek(0) else ""
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not head:
        raise ModelError(f"{path}: is empty (0 bytes)")
    tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    state = {name: tensor for name, tensor in tensors.items() if name not in _INDEX_BUFFERS}
    config = infer_config(state, path, metadata)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ModelError(f"{path}: {name} is {tensor.dtype}; weights must be floating point, not quantised")
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{path}: {name} holds NaN or infinite weights; the file is damaged or its training diverged"
            )
    return Checkpoint(config, state, sha256, metadata)


def load_network(checkpoint: Checkpoint, path: Path) -> HAT | CNN:
    """The network with its weights, fp32, in evaluation mode.

    Raises:
        ModelError: a tensor is missing, too many, or of another shape.
    """
    config = checkpoint.config
    kind = "HAT" if isinstance(config, HATConfig) else "CNN"
    try:
        network = HAT(config) if isinstance(config, HATConfig) else CNN(config)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise ModelError(f"{path}: looks like a {kind}, but of a shape that none has: {error}") from None
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in checkpoint.state_dict.items()}
    wrong = [f"{name} is missing" for name in wanted if name not in there]
    wrong += [f"{name} {list(there[name])} is unknown" for name in there if name not in wanted]
    wrong += [
        f"{name} is {list(there[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in there and there[name] != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelError(f"{path}: looks like a {kind}, but {wrong[0]}{more}")
    network.load_state_dict({name: value.float() for name, value in checkpoint.state_dict.items()})
    return network.eval().requires_grad_(False)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(METADATA_KEY, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelError(f"{path}: not a safetensors file, or cut off: {error}") from None
    try:
        own = json.loads(stored)
    except ValueError:
        own = None
    if not isinstance(own, dict):
        raise ModelError(f"{path}: metadata {METADATA_KEY!r} is {stored[:80]!r}; must be a JSON object")
    return tensors, own


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError) as error:
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: not a checkpoint of weights alone; nothing in it was run: {first[:160]}") from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes torch's reader raises whatever it trips over
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: not a torch checkpoint, or cut off: {first[:160]}") from None
    for wrapper in ("params_ema", "params", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        found = (
            f"keys {', '.join(map(str, list(loaded)[:4]))}" if isinstance(loaded, Mapping) else type(loaded).__name__
        )
        raise ModelError(f"{path}: holds no weights; found {found}")
    return {str(name).removeprefix("module."): value for name, value in loaded.items() if isinstance(value, Tensor)}


def infer_config(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any] | None = None
) -> HATConfig | CNNConfig:
    """The hyperparameters, from the tensors' names and shapes.

    `conv_scale` and `img_range` leave no trace in the tensors; they come from `metadata`, else they are upstream's.

    Raises:
        ModelError: it is another network.
    """
    plain = CNN.config_of(state)
    if plain is not None:
        return plain
    missing = [name for name in _SIGNATURE if name not in state]
    if missing:
        raise ModelError(f"{path}: {_guess(state)}; found {', '.join(list(state)[:4])}; a HAT has {missing[0]}")
    try:
        return _config(state, metadata or {})
    except (KeyError, ZeroDivisionError, IndexError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: looks like a HAT, but its tensors or metadata do not fit together ({error})"
        ) from None


def _config(state: Mapping[str, Tensor], extra: Mapping[str, Any]) -> HATConfig:
    groups = _count(state, r"layers\.(\d+)\.")
    group = f"{_GROUP}.blocks.0"
    embed_dim, conv_in = state["conv_first.weight"].shape[:2]
    in_chans = state["conv_last.weight"].shape[0]
    unshuffle = math.isqrt(conv_in // in_chans)
    own = state[f"{group}.attn.relative_position_bias_table"]
    overlapping = state[f"{_GROUP}.overlap_attn.relative_position_bias_table"]
    window_size = (math.isqrt(own.shape[0]) + 1) // 2
    overlap_size = math.isqrt(overlapping.shape[0]) + 1 - window_size
    position = state.get("absolute_pos_embed")
    return HATConfig(
        in_chans=in_chans,
        embed_dim=embed_dim,
        depths=tuple(_count(state, rf"layers\.{i}\.residual_group\.blocks\.(\d+)\.") for i in range(groups)),
        num_heads=tuple(
            state[f"layers.{i}.residual_group.overlap_attn.relative_position_bias_table"].shape[1]
            for i in range(groups)
        ),
        window_size=window_size,
        compress_ratio=embed_dim // state[f"{group}.conv_block.cab.0.weight"].shape[0],
        squeeze_factor=embed_dim // state[f"{group}.conv_block.cab.3.attention.1.weight"].shape[0],
        conv_scale=_positive(extra, "conv_scale", 0.01),
        overlap_ratio=_ratio(overlap_size - window_size, window_size),
        mlp_ratio=_ratio(state[f"{group}.mlp.fc1.weight"].shape[0], embed_dim),
        qkv_bias=f"{group}.attn.qkv.bias" in state,
        patch_norm="patch_embed.norm.weight" in state,
        ape_size=math.isqrt(position.shape[1]) if position is not None else 0,
        upscale=_tail_scale(state) // unshuffle,
        img_range=_positive(extra, "img_range", 1.0),
        resi_connection="1conv" if "conv_after_body.weight" in state else "identity",
        num_feat=state["conv_last.weight"].shape[1],
        unshuffle=unshuffle,
        attention_pool=int(extra.get("attention_pool", 0)),
    )


def _ratio(part: int, whole: int) -> float:
    """r such that int(whole * r) is `part` again, as the network will compute it; 60 / 44 * 44 falls short of 60."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, math.inf)


def _positive(extra: Mapping[str, Any], name: str, default: float) -> float:
    value = float(extra.get(name, default))
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; must be above 0")
    return value


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _tail_scale(state: Mapping[str, Tensor]) -> int:
    scale = 1
    for name, tensor in state.items():
        if re.fullmatch(r"upsample\.\d+\.weight", name):
            scale *= math.isqrt(tensor.shape[0] // state["conv_last.weight"].shape[1])
    return scale


def _guess(state: Mapping[str, Tensor]) -> str:
    """What else it looks like."""
    names = set(state)
    known = (
        ("model.0.weight", "an ESRGAN"),
        ("body.0.rdb1.conv1.weight", "a Real-ESRGAN (RRDBNet)"),
        ("body.0.weight", "an SRVGG-Compact or a plain CNN"),
        (
            "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
            "a SwinIR or another window transformer",
        ),
        ("block_1.block.0.weight", "a SPAN"),
    )
    return next((f"is not a HAT, it looks like {name}" for key, name in known if key in names), "is not a HAT")
