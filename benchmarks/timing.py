"""What the benchmarks share: forms timed in turns, the peak of the processor, and what a result says of its machine."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

__all__ = ["in_turns", "machine", "peak_gflops", "processor_name", "seconds", "slug", "versions"]


def processor_name() -> str:
    """The processor's own name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, object]:
    """The processor, how many of its CPUs there are for us, and the instructions that torch uses."""
    from hat_video.inference.processors import cpu_count

    return {"processor": processor_name(), "cpus": cpu_count(), "cpu": torch.backends.cpu.get_cpu_capability()}


def slug(name: str) -> str:
    """A processor's or GPU's name as part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python and of packages; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def seconds(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(
    forms: Mapping[str, Callable[[], object]], rounds: int, *, is_warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each form, round by round, A B C A B C: a machine whose speed drifts slows them all.

    Unless they are warm, each runs once before.
    """
    for work in () if is_warm else forms.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, work in forms.items():
            times[name].append(seconds(work))
    return times


def peak_gflops(dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product, the best of several, by whichever of torch's libraries is faster."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    # In fp32 a product goes to MKL, but the same as a 1x1 convolution of 16 pictures goes to oneDNN.
    pictures, kernel = a.view(16, 128, 1, 2048).permute(0, 3, 1, 2), b[:, :, None, None]
    forms: dict[str, Callable[[], object]] = {
        "product": lambda: F.linear(a, b),
        "convolution": lambda: F.conv2d(pictures, kernel),
    }
    with torch.inference_mode():
        times = in_turns(forms, 8)
    return 2 * 2048**3 / min(min(values) for values in times.values()) / 1e9
