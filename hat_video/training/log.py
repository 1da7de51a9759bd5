"""What a training says of itself: `log.csv`, a row for each evaluation, and `curve.png`."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TrainLog"]

_OTHER_COLUMNS = ("stage", "iteration", "loss", "rate", "seconds")


class TrainLog:
    """The log of one training.

    Args:
        folder: of the training.
        iteration: where it goes on; rows beyond it, of a run that was killed, are dropped.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        self._path, self._curve = folder / "log.csv", folder / "curve.png"
        self._rows: list[dict[str, Any]] = []
        if self._path.exists():
            with self._path.open(encoding="utf-8", newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["iteration"]) <= iteration]

    def add(
        self, stage: str, iteration: int, loss: float, rate: float, seconds: float, scores: Mapping[str, float]
    ) -> None:
        """Writes a row, and draws the curve anew."""
        row = {"stage": stage, "iteration": iteration, "loss": f"{loss:.6f}", "rate": f"{rate:.3e}"}
        row |= {"seconds": f"{seconds:.0f}"} | {name: f"{value:.4f}" for name, value in scores.items()}
        self._rows.append(row)
        part = self._path.with_suffix(".part")
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)
        part.replace(self._path)
        self._draw()

    def _draw(self) -> None:
        """Loss and Y-PSNR over iterations."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        iterations = [int(row["iteration"]) for row in self._rows]
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        left = figure.subplots()
        left.semilogy(iterations, [float(row["loss"]) for row in self._rows], color="0.6", label="loss")
        left.set_xlabel("iteration")
        left.set_ylabel("loss")
        right = left.twinx()
        for name in self._rows[0]:
            if name not in _OTHER_COLUMNS:
                values = [float(row.get(name) or "nan") for row in self._rows]
                right.plot(iterations, values, marker=".", label=name)
        right.set_ylabel("Y-PSNR, dB")
        for one, two in itertools.pairwise(self._rows):
            if one["stage"] != two["stage"]:
                left.axvline(int(one["iteration"]), color="0.8")
        right.legend(loc="lower right")
        figure.savefig(self._curve, dpi=100)
