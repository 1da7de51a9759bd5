"""The whole road against the network alone, and peak memory against length.

    python benchmarks/road.py            # writes benchmarks/results/road.json

Model-bound: the sample clip through `upscale_file` with the default model, and the same decoded frames through the
network alone with as many frames in flight, in turns in one process; the same with a HAT of a size where the network is
nearly all of the work (one group of HAT-S), untrained, which is bilinear interpolation. The network alone is warm; the
road loads it, makes its plan and its proof. Memory: the peak resident size of the command on four copies of the sample
clip in a row (21 s, two segments) and on eighty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import av
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import machine, versions  # noqa: E402
from hat_video import UpscaleOptions, Upscaler, load_model, open_source, upscale_file  # noqa: E402
from hat_video.color import to_rgb  # noqa: E402
from hat_video.inference.double_buffer import map_in_flight  # noqa: E402
from hat_video.model.hat import HAT, HATConfig  # noqa: E402
from hat_video.training.export import save_network  # noqa: E402
from hat_video.training.networks import start_as_interpolation  # noqa: E402

CLIP = ROOT / "samples" / "bbb_320x180.mp4"
RESULT = ROOT / "benchmarks" / "results" / "road.json"
LARGE = HATConfig(embed_dim=144, depths=(6,), num_heads=(6,), upscale=2, compress_ratio=24, squeeze_factor=24)


def network_alone(upscaler: Upscaler, jobs: int) -> float:
    """Seconds for the network on the frames of the clip, decoded and converted beforehand."""
    with open_source(CLIP) as source:
        frames = [to_rgb(batch.planes, source.info.pixel_format, source.info.color) for batch in source.read()]
    upscaler(frames[0])
    began = time.perf_counter()
    for _ in map_in_flight(upscaler, frames, workers=jobs, stop=threading.Event()):
        pass
    return time.perf_counter() - began


def whole_road(options: UpscaleOptions) -> tuple[float, dict[str, float]]:
    """Seconds for the clip from file to proven file, and the report's stages."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        report = upscale_file(CLIP, Path(folder) / "out.mp4", options)
        return time.perf_counter() - began, report.seconds


def compare(upscaler: Upscaler, options: UpscaleOptions, rounds: int) -> dict[str, Any]:
    """The network alone and the whole road, in turns."""
    measured = []
    for _ in range(rounds):
        alone = network_alone(upscaler, options.jobs or 1)
        wall, stages = whole_road(options)
        measured.append({"network_seconds": alone, "road_seconds": wall, "ratio": wall / alone, "stages": stages})
        print(f"{upscaler.model.name}: network {alone:.2f} s, road {wall:.2f} s, ratio {wall / alone:.3f}")
    median = statistics.median(entry["ratio"] for entry in measured)  # type: ignore[type-var]
    return {"precision": upscaler.precision, "backend": upscaler.backend, "rounds": measured, "median_ratio": median}


def untrained(path: Path) -> Path:
    """A checkpoint of the larger HAT."""
    torch.manual_seed(0)
    network = HAT(LARGE)
    start_as_interpolation(network)
    save_network(network, path, {"name": "one RHAG of HAT-S"})
    return path


def repeated(times: int, path: Path) -> None:
    """Writes the sample's video `times` over, packets copied, with shifted timestamps."""
    with av.open(str(path), "w") as out:
        stream, shift = None, 0
        for _ in range(times):
            with av.open(str(CLIP)) as container:
                video = container.streams.video[0]
                stream = stream or out.add_stream_from_template(video, opaque=True)
                end = 0
                for packet in container.demux(video):
                    if packet.dts is None:
                        continue
                    end = max(end, packet.pts + packet.duration)
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    out.mux(packet)
                shift += end


def peak_mebibytes(source: Path, folder: Path) -> float:
    """Peak resident size of the command, in MiB, from the operating system's own account of the finished process."""
    output = folder / f"{source.stem}_out.mp4"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hat_video", "upscale", str(source), "-o", str(output), "-q"]
    command += ["--model", "bicubic", "--scale", "2", "--preset", "ultrafast", "--jobs", "2", "--overwrite"]
    # A child starts out with its parent's peak; so a small process starts it, and not this one with its network loaded.
    launcher = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", launcher, *command], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    small = compare(
        Upscaler(load_model("hat-nano", scale=2), in_flight=arguments.jobs),
        UpscaleOptions(jobs=arguments.jobs),
        arguments.rounds,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = untrained(folder / "large.safetensors")
        options = UpscaleOptions(model=str(path), jobs=arguments.jobs)
        large = compare(Upscaler(load_model(str(path)), in_flight=arguments.jobs), options, arguments.rounds)
        short, long = folder / "short.mp4", folder / "long.mp4"
        repeated(4, short)
        repeated(80, long)
        pairs = [(peak_mebibytes(short, folder), peak_mebibytes(long, folder)) for _ in range(arguments.rounds)]
    memory = {
        "short_mib": [pair[0] for pair in pairs],
        "long_mib": [pair[1] for pair in pairs],
        "median_ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
    }
    print(f"peak memory in MiB {memory}")
    result = {
        "command": "python benchmarks/road.py",
        "machine": machine(),
        "versions": versions("torch", "openvino", "av"),
        "clip": CLIP.name,
        "frames_in_flight": arguments.jobs,
        "hat-nano x2": small,
        "one RHAG of HAT-S, x2": large,
        "peak_memory": memory,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"median ratios {small['median_ratio']:.3f}, {large['median_ratio']:.3f}; written to {RESULT.relative_to(ROOT)}"
    )


if __name__ == "__main__":
    main()
