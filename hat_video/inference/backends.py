"""Who computes a network: torch as it is, or torch's compiler."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch

from hat_video.errors import OptionError
from hat_video.inference.optimize import FastHAT, optimize
from hat_video.model.hat import HAT

__all__ = ["Backend", "as_compiler_error", "build"]

Backend = Literal["torch", "torch-compiled"]

# A film has a handful of shapes: whole frames, or the tiles at its edges; and the last batch of a segment.
_MOST_SHAPES = 64


def build(
    network: HAT, backend: Backend, *, dtype: torch.dtype, device: torch.device, trunk_exponent: int = 0
) -> FastHAT:
    """A network that is ready to run: (B, 3, H, W) fp32 in [0, 1] to (B, 3, sH, sW) fp32.

    Args:
        network: in fp32; is not changed.
        backend: who computes it. `torch-compiled` compiles each kind of block once for each shape of frames, when it
            first meets it, and keeps the result on disk.
        dtype: of the arithmetic.
        device: where it will run.
        trunk_exponent: see `optimize`.

    Raises:
        OptionError: there is no compiler here.
    """
    fast = optimize(network, dtype=dtype, device=device, trunk_exponent=trunk_exponent)
    return _compiled(fast, device) if backend == "torch-compiled" else fast


def as_compiler_error(error: Exception) -> OptionError | None:
    """The error to raise where torch's compiler, not the network, has failed; else None."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    first = " ".join(str(error).split("\n", 1)[0].split())
    return OptionError(f"--compile: torch's compiler fails here: {first}; leave it out")


def _compiled(network: FastHAT, device: torch.device) -> FastHAT:
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise OptionError("--compile: needs a C++ compiler, and there is none; install g++, or leave it out")
    # Beyond its limit torch would go on without compiling and say nothing.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for block in network.blocks():
        # Were shapes left open after the second one, the order in which they come would be in the result.
        block.compile(dynamic=False)
    return network
