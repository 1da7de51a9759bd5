"""The paper's ablations at hat-nano's shape: short trainings that differ in one thing, and what each costs in time.

python benchmarks/ablations.py RUNS --tiles tiles.npy --stills Set5 Set14    # trains what is missing, or was killed
python benchmarks/ablations.py RUNS                                         # results/ablations.json, a table, a plot

Where two differ by less than 0.05 dB, `--seed 1 --only NAME...` trains them once more from other random numbers; the
table has the means.

On a GPU that processes share (NVIDIA's multi-process service): `--jobs 8 --workers 1`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import machine, versions  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "ablations.json"
PLOT = ROOT / "docs" / "images" / "ablations.png"
BASE = "hat-nano"
_RICHEST = ("stages.1.mix={ photo = 0.9, vector = 0.1 }", "stages.1.richest_db=32.0")
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "no CAB": ('network.without=["cab"]',),
    "no OCAB": ('network.without=["ocab"]',),
    "no CAB, no OCAB": ('network.without=["cab", "ocab"]',),
    "overlap 0.25": ("network.overlap_ratio=0.25",),
    "overlap 0": ("network.overlap_ratio=0.0",),
    # All steps on the photographs that the second stage of the others has.
    "no pre-training": tuple(change.replace("stages.1", "stages.0") for change in _RICHEST),
    "window 16": ("network.window_size=16",),
}
"""Name -> what `hat-video train --set` changes of `configs/train/ablation.toml`."""
SEEDS = (0, 1)


def folder_of(name: str, seed: int) -> str:
    """Where a variant's training from a seed lies among the runs."""
    return name if seed == 0 else f"{name}, seed {seed}"


def train(folder: Path, tiles: Path, stills: list[Path], workers: int, changes: tuple[str, ...]) -> None:
    """One training, to its end, by the command."""
    words = ["train", "--config", str(ROOT / "configs" / "train" / "ablation.toml"), "--tiles", str(tiles)]
    words += ["-o", str(folder), "--threads", "1", "--workers", str(workers), *(f"--stills={path}" for path in stills)]
    words += [f"--set={change}" for change in changes]
    subprocess.run([sys.executable, "-m", "hat_video", *words], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--tiles", type=Path)
    parser.add_argument("--stills", type=Path, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0, choices=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare the batches of each")
    parser.add_argument("--plot", default="Set14", help="the set that the plot shows")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.tiles is not None:
        runs, tiles = arguments.runs.absolute(), arguments.tiles.absolute()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            trainings = [
                pool.submit(
                    train,
                    runs / folder_of(name, arguments.seed),
                    tiles,
                    arguments.stills,
                    arguments.workers,
                    (*VARIANTS[name], f"seed={arguments.seed}"),
                )
                for name in arguments.only
            ]
        for training in trainings:
            training.result()
        return
    # Not where one only trains: it needs OpenVINO.
    from benchmarks.shapes import HEIGHT, WIDTH, plot, read_log, read_run, timed

    torch.set_num_threads(1)
    runs = {name: read_run(arguments.runs / name) for name in VARIANTS if (arguments.runs / name / "log.csv").exists()}
    times = timed({name: shape for name, (shape, _) in runs.items()}, arguments.rounds)
    rows = {}
    for name, values in times.items():
        # Of other seeds the logs are enough.
        logs = [arguments.runs / folder_of(name, seed) / "log.csv" for seed in SEEDS]
        scores = [read_log(path)["y_psnr"] for path in logs if path.exists()]
        rows[name] = {
            **{key: runs[name][1][key] for key in ("parameters", "iterations")},
            "y_psnr": {key: round(statistics.mean(score[key] for score in scores), 4) for key in scores[0]},
            "y_psnr_of_seeds": scores,
            "us_per_lr_pixel": statistics.median(values) * 1e6 / (HEIGHT * WIDTH),
            "times_the_base": statistics.median(a / b for a, b in zip(values, times[BASE], strict=True)),
        }
    for name, row in rows.items():
        means = " / ".join(f"{value:.2f}" for value in row["y_psnr"].values())
        time, seeds = row["times_the_base"], len(row["y_psnr_of_seeds"])
        print(f"| {name} | {row['parameters']:,} | {time:.2f} | {seeds} | {means} |")
    result = {
        "command": "python benchmarks/ablations.py benchmarks/results/ablations",
        "machine": machine(),
        "versions": versions("torch", "openvino"),
        "threads": 1,
        "input": [HEIGHT, WIDTH],
        "variants": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(
        {name: (row["times_the_base"], row["y_psnr"][arguments.plot]) for name, row in rows.items()},
        PLOT,
        f"time per pixel, {BASE} = 1",
        f"{arguments.plot} x2, Y-PSNR, dB, after a short training",
        [BASE],
    )


if __name__ == "__main__":
    main()
