"""Which shape of a small network is best for its time: measured microseconds against what short trainings reached.

    hat-video train --config search --set ... -o runs/NAME      # one for each shape; see docs/shape.md
    python benchmarks/shapes.py runs                            # writes results/shapes.json and docs/images/shapes.png

Each network of the runs goes through OpenVINO in bf16 on one thread, all of them in turns, round by round. The
yardstick is a Compact of 16 layers x 64 in the same run.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import in_turns, machine, versions  # noqa: E402
from hat_video.model.checkpoint import METADATA_KEY  # noqa: E402
from hat_video.training.log import OTHER_COLUMNS  # noqa: E402
from hat_video.training.networks import BranchedCNN, build_network  # noqa: E402
from hat_video.training.recipe import NetworkShape  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "shapes.json"
PLOT = ROOT / "docs" / "images" / "shapes.png"
HEIGHT, WIDTH = 176, 320
YARDSTICK = NetworkShape(kind="compact", embed_dim=64, depths=(16,))


def as_it_ships(shape: NetworkShape, scale: int) -> nn.Module:
    """Untrained, and without the branches that a CNN has in training only."""
    network = build_network(shape, scale).eval()
    return network.folded().eval() if isinstance(network, BranchedCNN) else network


def compiled(
    shape: NetworkShape, scale: int, size: tuple[int, int] = (HEIGHT, WIDTH), precision: str = "bf16"
) -> openvino.InferRequest:
    """The network in OpenVINO on one thread, for frames of (H, W)."""
    with torch.no_grad():
        network = as_it_ships(shape, scale)
        model = openvino.convert_model(network, example_input=torch.rand(1, 3, *size), input=[1, 3, *size])
    hint = {"bf16": "bf16", "fp32": "f32"}[precision]
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def timed(shapes: Mapping[str, NetworkShape], rounds: int) -> dict[str, list[float]]:
    """Seconds of a frame of x2 networks on one thread, all of them in turns."""
    requests = {name: compiled(shape, 2) for name, shape in shapes.items()}
    frame = np.random.default_rng(0).random((1, 3, HEIGHT, WIDTH), np.float32)
    return in_turns(
        {name: lambda request=request: request.infer({0: frame}) for name, request in requests.items()},  # type: ignore[misc]
        rounds,
    )


def read_run(folder: Path) -> tuple[NetworkShape, dict[str, Any]]:
    """The shape of a finished run, and what it reached."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
    shape = TypeAdapter(NetworkShape).validate_python(facts["network"])
    parameters = sum(parameter.numel() for parameter in as_it_ships(shape, 2).parameters())
    return shape, {"parameters": parameters, **read_log(folder / "log.csv")}


def read_log(path: Path) -> dict[str, Any]:
    """What a training reached in the end."""
    with path.open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {
        "iterations": int(last["iteration"]),
        "training_seconds": int(last["seconds"]),
        "y_psnr": {name: float(value) for name, value in last.items() if name not in OTHER_COLUMNS},
    }


def plot(points: Mapping[str, tuple[float, float]], path: Path, across: str, up: str, others: Collection[str]) -> None:
    """A point with its name for each network; those of `others` in another colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, place in points.items():
        axes.plot(*place, "o", color="tab:orange" if name in others else "tab:blue")
        axes.annotate(name, place, fontsize=8, xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color="0.9")
    axes.margins(x=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plot", default="Set14", help="the set that the plot shows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = {path.parent.name: read_run(path.parent) for path in sorted(arguments.runs.glob("*/model.safetensors"))}
    shapes = {"yardstick": YARDSTICK} | {name: shape for name, (shape, _) in runs.items()}
    times = timed(shapes, arguments.rounds)
    yardstick = times.pop("yardstick")
    pixels = HEIGHT * WIDTH
    rows = {}
    for name, values in times.items():
        shape, reached = runs[name]
        rows[name] = {
            "network": TypeAdapter(NetworkShape).dump_python(shape, mode="json"),
            **reached,
            "us_per_lr_pixel": statistics.median(values) * 1e6 / pixels,
            "times_the_yardstick": statistics.median(a / b for a, b in zip(values, yardstick, strict=True)),
        }
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["times_the_yardstick"]))
    for name, row in rows.items():
        scores = " / ".join(f"{value:.2f}" for value in row["y_psnr"].values())
        speed = f"{row['us_per_lr_pixel']:.2f} | {row['times_the_yardstick']:.2f}"
        print(f"| {name} | {row['parameters']:,} | {speed} | {row['iterations']:,} | {scores} |")
    result = {
        "command": "python benchmarks/shapes.py RUNS",
        "machine": machine(),
        "versions": versions("torch", "openvino"),
        "threads": 1,
        "input": [HEIGHT, WIDTH],
        "yardstick": {"network": "Compact 16x64", "us_per_lr_pixel": statistics.median(yardstick) * 1e6 / pixels},
        "shapes": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(
        {name: (row["times_the_yardstick"], row["y_psnr"][arguments.plot]) for name, row in rows.items()},
        PLOT,
        "time per pixel, Compact 16x64 = 1",
        f"{arguments.plot} x2, Y-PSNR, dB",
        [name for name, row in rows.items() if row["network"]["kind"] != "hat"],
    )


if __name__ == "__main__":
    main()
