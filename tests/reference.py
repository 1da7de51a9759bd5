"""The reference HAT: spandrel's, whose import wants a torchvision that does not go with the CPU build of torch."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
from torch import nn

from hat_video.model.hat import HATConfig

FP32 = 5e-6
"""How far two fp32 computations of values near 1 may lie apart that add up in different orders, as kernels of
different CPUs do (largest seen: 2.2e-6). That two networks are the same is proven in fp64."""


def _stub_torchvision() -> None:
    """Empty modules where torchvision would be; HAT uses nothing of it."""
    if "torchvision" in sys.modules:
        return
    names = (
        "torchvision",
        "torchvision.ops",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.models",
    )
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        # Modules are asked for __file__ and the like by tools that walk them; those must stay absent.
        module.__getattr__ = _attribute  # type: ignore[method-assign]
        sys.modules[name] = module


def _attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def reference_hat(config: HATConfig, *, seed: int = 0) -> nn.Module:
    """Spandrel's HAT of that shape, every parameter random and far from its initial value."""
    _stub_torchvision()
    from spandrel.architectures.HAT.__arch.HAT import HAT

    network = HAT(
        upscale=config.upscale,
        in_chans=config.in_chans,
        img_size=4 * config.window_size,
        window_size=config.window_size,
        compress_ratio=config.compress_ratio,
        squeeze_factor=config.squeeze_factor,
        conv_scale=config.conv_scale,
        overlap_ratio=config.overlap_ratio,
        img_range=config.img_range,
        depths=list(config.depths),
        embed_dim=config.embed_dim,
        num_heads=list(config.num_heads),
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        patch_norm=config.patch_norm,
        upsampler="pixelshuffle",
        resi_connection=config.resi_connection,
        num_feat=config.num_feat,
    )
    return scramble(network, seed).eval()


def reference_of(state: dict[str, torch.Tensor]) -> nn.Module:
    """Spandrel's HAT, with its hyperparameters found by spandrel itself."""
    _stub_torchvision()
    from spandrel.architectures.HAT import HATArch

    return HATArch().load(dict(state)).model.eval()


def scramble(network: nn.Module, seed: int) -> nn.Module:
    """Gives every parameter a value that leaves none of the network's paths silent, and the output near [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if parameter.ndim == 1:
            is_gain = "norm" in name and name.endswith("weight")
            parameter.data = noise * 0.1 + (1 if is_gain else 0)
        elif name.endswith("bias_table"):
            parameter.data = noise * 0.5
        else:
            parameter.data = noise * 0.7 * parameter[0].numel() ** -0.5
    return network
