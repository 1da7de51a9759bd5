"""How many processors there are for us, which in a container is not how many the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_count"]


def cpu_count(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs that this process may use: those it may run on, and no more than its cgroups' quotas pay for; at least 1.

    Args:
        groups: where control groups are mounted.
        own: which of them this process is in.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, `cpu.max`; v1's `cpu.cfs_quota_us`.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    paid = min(_quotas(groups, own), default=math.inf)
    # Of two and a half, three would take turns.
    return count if paid >= count else max(1, int(paid))


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """CPUs that each group around this process may use, as far as it is limited."""
    try:
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # Every ancestor limits, too. In a container the path may be the host's, and then only the root is there.
    names = [line.split(":", 2)[2] for line in lines if line.count(":") >= 2]
    folders = {groups, groups / "cpu", groups / "cpu,cpuacct"}
    for name in names:
        for base in (groups, groups / "cpu", groups / "cpu,cpuacct"):
            here = base / name.lstrip("/")
            folders |= {folder for folder in (here, *here.parents) if folder.is_relative_to(base)}
    for folder in folders:
        words = _words(folder / "cpu.max")
        if not words:
            words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            yield int(words[0]) / int(words[1])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
