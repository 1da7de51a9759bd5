"""Choosing the arithmetic of a network: by what the device has and by a probe, never by a stopwatch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hat_video.inference.optimize import optimize
from hat_video.model.cnn import CNN
from hat_video.model.hat import HAT

__all__ = ["DTYPES", "SAFER", "calibration_frame", "choose", "has_fast_bf16", "trunk_exponent"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SAFER = {"fp16": "bf16", "bf16": "fp32"}
"""What a batch that came out non-finite is computed again in."""

# fp16 ends at 65,504; a trunk that stays below this has room for frames that are worse than the calibration frame.
_TRUNK_LIMIT = 4096.0
_ENOUGH_DB = 50.0


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: by the processor's flags, or the GPU's generation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    words = set(flags.split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def calibration_frame(multiple: int) -> Tensor:
    """(1, 3, h, w) of edges, gradients and noise, the same every time: a picture that is hard on a network."""
    side = multiple * max(1, math.ceil(64 / multiple))
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, side, side, generator=generator)
    ramp = torch.linspace(0, 1, side).expand(1, 3, side, side)
    checks = ((torch.arange(side) // 4)[:, None] + (torch.arange(side) // 4)) % 2
    return torch.where(checks.bool(), noise, ramp).contiguous()


def trunk_exponent(network: HAT | CNN, frame: Tensor) -> int:
    """k such that the residual trunk, carried as 2^-k of itself, stays far inside fp16's range on that frame.

    Args:
        network: in fp32 on the CPU.
        frame: (N, 3, H, W) in [0, 1], H and W multiples of the network's.
    """
    if isinstance(network, CNN):
        return 0  # it has no trunk that grows from block to block
    fast = optimize(network, dtype=torch.float32, device=torch.device("cpu"))
    largest = 0.0

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(output.abs().max()))

    for module in (*fast.blocks(), *fast.groups()):
        module.register_forward_hook(watch)
    with torch.inference_mode():
        fast(frame)
    if not 0 < largest < math.inf:
        return 0
    return max(0, math.ceil(math.log2(largest / _TRUNK_LIMIT)))


def choose(
    network: HAT | CNN, device: torch.device, frame: Tensor, build: Callable[[str, int], Callable[[Tensor], Tensor]]
) -> tuple[str, int]:
    """The fastest precision of the device that agrees with fp32 on a frame, and the trunk exponent that goes with it.

    On a CPU: bf16 where the processor has it, else fp32. On a GPU: fp16 with a safe trunk, then bf16, then fp32.

    Args:
        network: the reference.
        device: where it will run.
        frame: (1, 3, H, W) to compare on.
        build: makes the network for a precision and an exponent, on the device.
    """
    if device.type == "cpu":
        return ("bf16" if has_fast_bf16(device) else "fp32"), 0
    exponent = trunk_exponent(network, frame)
    with torch.inference_mode():
        reference = build("fp32", 0)(frame.to(device))
        for name, k in (("fp16", exponent), ("fp16", exponent + 4), ("bf16", 0)):
            if name == "bf16" and not has_fast_bf16(device):
                continue
            output = build(name, k)(frame.to(device))
            error = float(((output - reference) ** 2).mean())
            if math.isfinite(error) and -10 * math.log10(max(error, 1e-20)) >= _ENOUGH_DB:
                return name, k
    return "fp32", 0
