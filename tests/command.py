"""Runs the real command: in a process of its own, or inside the test's where nothing is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hat_video.cli import main

ROOT = Path(__file__).parents[1]


def upscale(*words: object) -> int:
    """`hat-video upscale` inside this process; returns the exit code."""
    return main(["upscale", *map(str, words)])


def start(*words: object) -> subprocess.Popen[str]:
    """`hat-video` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hat_video", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sidecars(output: Path) -> list[Path]:
    """The records of the committed segments of an unfinished output."""
    return sorted((output.parent / ".hat-video" / output.name).glob("*/seg-*.json"))


def wait_for_segments(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Returns once `count` segments are committed; fails if the run ends before that."""
    deadline = time.monotonic() + 120
    while len(sidecars(output)) < count:
        if process.poll() is not None:
            pytest.fail(f"ended before {count} segments: {process.communicate()}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("took longer than two minutes")
        time.sleep(0.002)


def tree(folder: Path) -> set[str]:
    """Every file and folder below `folder`, by relative name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
