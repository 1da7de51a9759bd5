"""Who computes a network: torch as it is, torch's compiler, or OpenVINO."""

from __future__ import annotations

import os
import shutil
from typing import Literal, Protocol

import torch
from torch import Tensor

from hat_video.errors import ModelError, OptionError
from hat_video.inference.fast_cnn import FastCNN
from hat_video.inference.openvino_backend import OpenVINONetwork, openvino_version
from hat_video.inference.openvino_quiet import import_openvino
from hat_video.inference.optimize import FastHAT, optimize
from hat_video.inference.precision import DTYPES, has_fast_bf16
from hat_video.model.cnn import CNN, CNNConfig
from hat_video.model.hat import HAT, HATConfig

__all__ = ["Backend", "Network", "as_compiler_error", "build", "choose_backend", "prepare_compiler"]

Backend = Literal["torch", "torch-compiled", "openvino"]

# A film has a handful of shapes: whole frames, or the tiles at its edges; and the last batch of a segment.
_MOST_SHAPES = 64


class Network(Protocol):
    """What every backend makes of a network."""

    @property
    def config(self) -> HATConfig | CNNConfig: ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """RGB (B, 3, H, W) fp32 in [0, 1], of the network's multiples, to (B, 3, sH, sW) fp32, not clamped."""
        ...


def choose_backend(
    network: HAT | CNN, asked: Backend | Literal["auto"], precision: str, device: torch.device
) -> tuple[Backend, str | None]:
    """Who computes; `auto` is OpenVINO on a CPU where it is installed and can, else torch.

    Args:
        network: in fp32.
        asked: by the caller.
        precision: fp32, bf16 or fp16.
        device: where it will run.

    Returns:
        The backend, and why it is not OpenVINO where that is installed.

    Raises:
        OptionError: `openvino` was asked for, and it cannot.
    """
    if asked == "torch" or asked == "torch-compiled":
        return asked, None
    reason = _against_openvino(network, precision, device)
    if reason is None:
        return "openvino", None
    if asked == "openvino":
        raise OptionError(f"--backend openvino: {reason}; use auto or torch")
    is_expected = device.type != "cpu" or openvino_version() is None
    return "torch", None if is_expected else f"computed by torch and not by OpenVINO: {reason}"


def _against_openvino(network: HAT | CNN, precision: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it is for CPUs, and the device is {device}"
    if openvino_version() is None:
        return "it is not installed (pip install hat-video[openvino])"
    if precision == "fp16":
        return "it has no fp16 on a CPU"
    if precision == "bf16" and not has_fast_bf16(device):
        return "it has no bf16 on this CPU"
    try:
        import_openvino()  # before the file that cannot do without
        from hat_video.inference.openvino_graph import build_graph

        if isinstance(network, HAT):
            side = 2 * network.config.multiple
            build_graph(network, side, side, "bf16" if precision == "bf16" else "fp32")
    except (ImportError, OSError, ModelError) as error:
        return " ".join(str(error).split())
    return None


def build(
    network: HAT | CNN,
    backend: Backend,
    *,
    precision: str,
    device: torch.device,
    trunk_exponent: int = 0,
    in_flight: int = 0,
) -> Network:
    """A network that is ready to run.

    Args:
        network: in fp32; is not changed.
        backend: who computes it. `torch-compiled` compiles each kind of block once for each shape of frames, when it
            first meets it, and keeps the result on disk; so does `openvino` with the whole network.
        precision: of the arithmetic: fp32, bf16 or fp16.
        device: where it will run.
        trunk_exponent: see `optimize`.
        in_flight: frames at once, for `openvino`; as many as there are CPUs if 0.

    Raises:
        OptionError: there is no compiler here, or no OpenVINO.
    """
    if backend == "openvino":
        return OpenVINONetwork(network, "bf16" if precision == "bf16" else "fp32", in_flight=in_flight)
    fast: FastHAT | FastCNN
    if isinstance(network, HAT):
        fast = optimize(network, dtype=DTYPES[precision], device=device, trunk_exponent=trunk_exponent)
    else:
        fast = FastCNN(network, DTYPES[precision], device)
    return _compiled(fast, device) if backend == "torch-compiled" else fast


def as_compiler_error(error: Exception) -> OptionError | None:
    """The error to raise where torch's compiler, not the network, has failed; else None."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    first = " ".join(str(error).split("\n", 1)[0].split())
    return OptionError(f"--compile: torch's compiler fails here: {first}; leave it out")


def prepare_compiler(device: torch.device) -> None:
    """Makes torch's compiler ready for `--compile`.

    Raises:
        OptionError: there is no compiler for the device's code here.
    """
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise OptionError("--compile: needs a C++ compiler, and there is none; install g++, or leave it out")
    # Beyond its limit torch would go on without compiling and say nothing.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)


def _compiled(network: FastHAT | FastCNN, device: torch.device) -> FastHAT | FastCNN:
    prepare_compiler(device)
    for block in network.blocks():
        # Were shapes left open after the second one, the order in which they come would be in the result.
        block.compile(dynamic=False)
    return network
