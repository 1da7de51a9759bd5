"""From trained weights to a file that this library, and where the shape allows upstream's tools, can load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hat_video.files import write_atomically
from hat_video.model.checkpoint import METADATA_KEY
from hat_video.model.hat import HAT, HATConfig
from hat_video.model.windows import overlapping_position_index, relative_position_index

__all__ = ["body_of", "fold_conv_scale", "save_network", "save_tensors"]

_UPSTREAM_CONV_SCALE = 0.01


def save_network(network: HAT, path: Path, facts: Mapping[str, object]) -> None:
    """Writes fp32 safetensors in upstream's state-dict format, index tables included.

    Args:
        network: of any `conv_scale`; it is folded, so that the file has upstream's 0.01.
        path: written whole or not at all.
        facts: more to keep in the metadata: name, data, recipe.
    """
    state = fold_conv_scale(network.state_dict(), network.config)
    size = network.config.window_size
    # Upstream's loaders want the tables that are computed here; theirs wrap below zero, with the same effect.
    state["relative_position_index_SA"] = relative_position_index(size)
    state["relative_position_index_OCA"] = overlapping_position_index(size, network.config.overlap_size)
    own: dict[str, object] = {"conv_scale": _UPSTREAM_CONV_SCALE}
    if network.config.attention_pool:
        own["attention_pool"] = network.config.attention_pool
    save_tensors(state, path, {**own, **facts})


def save_tensors(state: Mapping[str, Tensor], path: Path, facts: Mapping[str, object]) -> None:
    """Writes tensors and facts as safetensors, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, save(tensors, {METADATA_KEY: json.dumps(dict(facts))}))


def fold_conv_scale(state: Mapping[str, Tensor], config: HATConfig) -> dict[str, Tensor]:
    """The same function with `conv_scale` 0.01: CAB's output grows by what the scale loses, unseen by its gate."""
    factor = config.conv_scale / _UPSTREAM_CONV_SCALE
    folded = {name: tensor.detach().clone() for name, tensor in state.items()}
    for name, tensor in folded.items():
        if ".conv_block.cab.2." in name:
            tensor.mul_(factor)
        elif name.endswith(".conv_block.cab.3.attention.1.weight"):
            tensor.div_(factor)
    return folded


def body_of(state: Mapping[str, Tensor], config: HATConfig) -> dict[str, Tensor]:
    """The weights of a file as training wants them: `conv_scale` 1."""
    with torch.no_grad():
        return fold_conv_scale(state, HATConfig(conv_scale=_UPSTREAM_CONV_SCALE * config.conv_scale))
