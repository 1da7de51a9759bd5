"""What a training says of itself: `log.csv`, a row for each evaluation, and `curve.png`."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from hat_video.errors import UsageError
from hat_video.files import write_atomically

__all__ = ["OTHER_COLUMNS", "TrainLog", "TrainProgress"]

OTHER_COLUMNS = ("stage", "iteration", "loss", "rate", "seconds")
"""Those that hold no set's score."""


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where a training stands."""

    stage: str
    iteration: int
    iterations: int
    loss: float
    rate: float
    seconds: float
    """Of computing, over all sessions."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Y-PSNR by set, when it was just evaluated; none where there is nothing to evaluate on."""
    is_evaluated: bool = False


class TrainLog:
    """The log of one training.

    Args:
        folder: of the training.
        iteration: where it goes on; rows beyond it, of a run that was killed, are dropped.

    Raises:
        UsageError: matplotlib is not installed, or `log.csv` is no log.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        self._path, self._curve = folder / "log.csv", folder / "curve.png"
        self._rows: list[dict[str, Any]] = []
        if find_spec("matplotlib") is None:
            raise UsageError("the curve of a training is drawn by matplotlib: pip install 'hat-video[train]'")
        if self._path.exists():
            try:
                with self._path.open(encoding="utf-8", newline="") as file:
                    self._rows = [row for row in csv.DictReader(file) if int(row["iteration"]) <= iteration]
            except (OSError, ValueError, KeyError, TypeError, csv.Error):
                raise UsageError(f"{self._path}: is no log of a training; remove it") from None

    def has(self, iteration: int, sets: Iterable[str] = ()) -> bool:
        """Whether there is a row of it with a score of each of these sets."""
        row = next((row for row in self._rows if int(row["iteration"]) == iteration), None)
        return row is not None and all(row.get(name) for name in sets)

    def add(self, progress: TrainProgress) -> None:
        """Draws the curve anew and writes a row, in place of one of the same iteration.

        The row comes last: where it stands, nothing of that evaluation is missing.

        Raises:
            OutputError: they cannot be written.
        """
        row = {"stage": progress.stage, "iteration": progress.iteration, "loss": f"{progress.loss:.6f}"}
        row |= {"rate": f"{progress.rate:.3e}", "seconds": f"{progress.seconds:.0f}"}
        row |= {name: f"{value:.4f}" for name, value in progress.scores.items()}
        self._rows = [known for known in self._rows if int(known["iteration"]) != progress.iteration] + [row]
        self._draw()
        self._write()

    def _columns(self) -> list[str]:
        """Of all rows: sets may have joined later."""
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def _write(self) -> None:
        names = self._columns()
        text = StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self._path, text.getvalue().encode())

    def _draw(self) -> None:
        """Loss and Y-PSNR over iterations."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        iterations = [int(row["iteration"]) for row in self._rows]
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        left = figure.subplots()
        losses = [float(row["loss"]) for row in self._rows]
        left.plot(iterations, losses, color="0.6", label="loss")
        left.set_yscale("log" if min(losses) > 0 else "linear")
        left.set_xlabel("iteration")
        left.set_ylabel("loss")
        right = left.twinx()
        for name in self._columns():
            if name not in OTHER_COLUMNS:
                values = [float(row.get(name) or "nan") for row in self._rows]
                right.plot(iterations, values, marker=".", label=name)
        right.set_ylabel("Y-PSNR, dB")
        for one, two in itertools.pairwise(self._rows):
            if one["stage"] != two["stage"]:
                left.axvline(int(one["iteration"]), color="0.8")
        if right.lines:
            right.legend(loc="lower right")
        image = BytesIO()
        figure.savefig(image, dpi=100, format="png")
        write_atomically(self._curve, image.getvalue())
