"""The whole matrix, run and written down: docs/conformance.md."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from tests.conformance import kinds_files, kinds_streams, kinds_time
from tests.conformance.cell import CONTAINERS, Outcome, run_cell
from tests.conformance.kinds import KINDS, Kind

__all__ = ["ALL_KINDS", "markdown", "outcomes", "words_of"]

# Importing a file of kinds declares them.
_CHAPTERS = (
    *(kinds_time.TIME, kinds_time.SHORT, kinds_time.RAW),
    *(kinds_files.FILES, kinds_streams.STREAMS, kinds_streams.PICTURE, kinds_files.DAMAGED),
)
ALL_KINDS: tuple[Kind, ...] = tuple(sorted(KINDS.values(), key=lambda kind: _CHAPTERS.index(kind.chapter)))

_INTRODUCTION = """\
# Conformance

What becomes of each kind of source in each container. This page is made by `python -m tests.conformance`; the same
cells are tests (`tests/conformance/`), so a cell that changes fails the build.

Each clip is made by FFmpeg's own program, upscaled by the real command, and judged by ffprobe, which shares no code
with the library: the number of frames, every timestamp (as exact fractions in mp4 and mov; within half a millisecond,
never adding up, in mkv and webm), one constant offset for all streams at most, the sound against the picture within a
millisecond by laying the decoded waves upon each other, every stream, tag, language, chapter, disposition, the colour
tags, the shape of samples and the rotation.

- **exact**: everything is as in the source, but for what was asked for: the size, and the codec of the video. Where all
  times are moved, they are moved alike.
- **converted**: so is all that the container can hold. What was changed to fit, or is damaged in the source, is listed
  here and in the run's report; nothing is left out in silence.
- **refused**: there is no output, and the command said why in one line.

"""


def words_of(document: str) -> dict[tuple[str, str], str]:
    """(title of the kind, container) -> the word in its cell, from the page."""
    found = {}
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == len(CONTAINERS) + 1 and not set(cells[0]) <= {"-", ":"}:
            for container, cell in zip(CONTAINERS, cells[1:], strict=True):
                found[cells[0], container] = cell.split(" ")[0].strip("*")
    return found


def _run(name: str) -> list[Outcome]:
    torch.set_num_threads(1)
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "source").mkdir()
        source = kind.make(Path(folder) / "source")
        results = []
        for container in CONTAINERS:
            place = Path(folder) / container
            place.mkdir()
            results.append(run_cell(kind, source, container, place))
    return results


def outcomes() -> Iterator[tuple[Kind, list[Outcome]]]:
    """Every kind with its outcomes, in the order of `CONTAINERS`; two at a time."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield from zip(ALL_KINDS, pool.map(_run, (kind.name for kind in ALL_KINDS)), strict=True)


def markdown(table: list[tuple[Kind, list[Outcome]]]) -> str:
    """The page."""
    cells = [outcome for _, row in table for outcome in row]
    counts = ", ".join(
        f"{sum(cell.word == word for cell in cells)} {word}" for word in ("exact", "converted", "refused")
    )
    lines = [f"{len(table)} kinds of source, {len(cells)} cells: {counts}.\n"]
    for chapter in _CHAPTERS:
        lines += [f"## {chapter}\n", f"| source | {' | '.join(CONTAINERS)} |", "|---" * (len(CONTAINERS) + 1) + "|"]
        for kind, row in table:
            if kind.chapter == chapter:
                lines.append(f"| {kind.title} | {' | '.join(map(_cell, row))} |")
        lines.append("")
    return _INTRODUCTION + "\n".join(lines).rstrip() + "\n"


def _cell(outcome: Outcome) -> str:
    what = "; ".join(outcome.what).replace("|", "/")
    return f"{outcome.word} ({what})" if what else outcome.word
