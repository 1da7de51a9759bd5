"""VMAF by libvmaf itself, inside an FFmpeg that has it: the wheels of PyAV have not."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from hat_video.errors import WorkError

__all__ = ["HOW_TO_GET_VMAF", "find_vmaf", "vmaf"]

HOW_TO_GET_VMAF = "no ffmpeg with libvmaf is on the PATH; `pip install imageio-ffmpeg` brings one"


def find_vmaf() -> Path | None:
    """An `ffmpeg` with the filter libvmaf: on the PATH, else the one that the package imageio-ffmpeg brings."""
    candidates = [shutil.which("ffmpeg")]
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        # On some platforms the package brings no program.
        with suppress(RuntimeError):
            candidates.append(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    for candidate in candidates:
        if candidate is not None:
            filters = subprocess.run([candidate, "-hide_banner", "-filters"], capture_output=True, text=True)
            if " libvmaf " in filters.stdout:
                return Path(candidate)
    return None


def vmaf(ffmpeg: Path, output: Tensor, original: Tensor) -> tuple[float, float]:
    """VMAF and VMAF-NEG, which does not reward sharpening beyond the original; means over the frames.

    Both are trained for 1080 lines watched from three picture heights: on smaller pictures they order candidates well,
    but their level means little.

    Args:
        ffmpeg: from `find_vmaf`.
        output: (N, H, W) luma in code values of 8 bits, any dtype; H and W even.
        original: likewise.

    Returns:
        (VMAF, VMAF-NEG), 0 to 100.

    Raises:
        WorkError: FFmpeg refuses, with its reason.
    """
    count, height, width = output.shape
    models = r"version=vmaf_v0.6.1\:name=vmaf|version=vmaf_v0.6.1neg\:name=vmaf_neg"
    words = [str(ffmpeg), "-hide_banner", "-nostdin", "-loglevel", "error"]
    with tempfile.TemporaryDirectory(prefix="hat-video-") as folder:
        for name, luma in (("output", output), ("original", original)):
            _write_planar(Path(folder) / name, luma)
            words += ["-f", "rawvideo", "-pixel_format", "yuv420p", "-video_size", f"{width}x{height}", "-i", name]
        words += ["-lavfi", f"libvmaf=model='{models}':log_fmt=json:log_path=log", "-f", "null", "-"]
        # Paths within a filter's options would need escaping; relative ones do not.
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise WorkError(f"VMAF of {count} frames of {width}x{height} by {ffmpeg}: {said}")
        pooled = json.loads((Path(folder) / "log").read_text(encoding="utf-8"))["pooled_metrics"]
    return float(pooled["vmaf"]["mean"]), float(pooled["vmaf_neg"]["mean"])


def _write_planar(path: Path, luma: Tensor) -> None:
    """As raw 4:2:0, gray: given gray pictures, FFmpeg would take them for full range and convert."""
    count, height, width = luma.shape
    gray = torch.full((height * width // 2,), 128, dtype=torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        for i in range(count):
            file.write(luma[i].round().clamp(0, 255).to(torch.uint8).numpy().tobytes())
            file.write(gray)
