"""Building the training set: packages and folders in, one tile file out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from multiprocessing.process import BaseProcess
from pathlib import Path

from PIL import Image

from hat_video.analysis.pictures import deeper_than_8_bits
from hat_video.errors import OutputError, SourceError, UsageError
from hat_video.training.harvest import FINGERPRINT, PICTURES, VECTORS, Harvest, Task, distance, fingerprint, harvest
from hat_video.training.sources import PACKAGES, Package, fetch
from hat_video.training.tiles import TILE, TileWriter

__all__ = ["BuildReport", "build_tiles", "choose_packages"]

_SAME_PICTURE_BITS = 16
_EVALUATION_BITS = 40
"""Of 256. Wider than among training pictures: a photograph less costs nothing, an evaluated picture a lot."""
_VALIDATION_EVERY = 50
_VECTOR_FILES = 2500
_LIKE_ANOTHER = "its like was there already"


@dataclass(slots=True)
class BuildReport:
    """What went into the tile file, and what did not."""

    path: Path
    tiles: Counter[str] = field(default_factory=Counter)
    """By group."""
    files_used: Counter[str] = field(default_factory=Counter)
    """By package or folder."""
    files_seen: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    kept_out: list[str] = field(default_factory=list)
    """Pictures that resemble one of an evaluation set."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why files gave no tile, the kept out and the duplicates among them."""

    @property
    def megapixels(self) -> float:
        """Of all tiles."""
        return self.tiles.total() * TILE * TILE / 1e6


def choose_packages(only: str) -> list[Package]:
    """`all`, `none`, or names with commas between them.

    Raises:
        UsageError: an unknown name.
    """
    if only in ("all", "none"):
        return list(PACKAGES) if only == "all" else []
    known = {package.name: package for package in PACKAGES}
    unknown = [name for name in only.split(",") if name not in known]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: must be all, none or of {', '.join(known)}")
    return [known[name] for name in only.split(",")]


def build_tiles(
    output: Path,
    *,
    packages: Sequence[Package] = PACKAGES,
    images: Sequence[Path] = (),
    keep_out: Sequence[Path] = (),
    downloads: Path,
    vector_files: int = _VECTOR_FILES,
    jobs: int = 1,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> BuildReport:
    """Builds the tile file; the same inputs give the same bytes.

    Args:
        output: the .npy file to write; a .json beside it says where each tile is from.
        packages: to download and use.
        images: folders of photographs of the user's own; they become the group `images`.
        keep_out: folders of pictures that must not be learnt from, besides Set5, Set14 and BSD100, which are known.
        downloads: folder for the packages; kept for the next time.
        vector_files: how many drawings of a vector package to render.
        jobs: processes.
        on_progress: called with a package or folder, the files done and the files there are.

    Raises:
        SourceError: a package cannot be had, or nothing gave a tile.
        UsageError: no source, or a folder that is not there or without pictures.
    """
    if output.suffix != ".npy":
        raise UsageError(f"-o {output}: must end in .npy")
    for option, folder in [("--images", one) for one in images] + [("--keep-out", one) for one in keep_out]:
        if not folder.is_dir():
            raise UsageError(f"{option} {folder}: no such folder")
        if not _pictures(folder):
            raise UsageError(f"{option} {folder}: has no pictures ({', '.join(PICTURES)})")
    plan = {package.name: _package_tasks(package, downloads, vector_files) for package in packages}
    for folder in images:
        # A folder may have a package's name.
        source = str(folder) if str(folder) not in plan else str(folder.absolute())
        plan[source] = _folder_tasks(folder, source)
    if not plan:
        raise UsageError("nothing to build from: name packages with --only, or folders with --images")
    forbidden = _known_evaluation_pictures() + [
        _fingerprint_of(path) for folder in keep_out for path in _pictures(folder)
    ]
    if output.is_dir() or output.with_suffix(".json").is_dir():
        raise OutputError(f"-o {output}: there is a folder of that name, or of the index's")
    report = BuildReport(output)
    with TileWriter(output) as writer, _pool(jobs) as pool:
        seen: list[bytes] = []
        for source, tasks in plan.items():
            report.files_seen[source] = len(tasks)
            for done, found in enumerate(_in_order(pool, tasks, jobs), 1):
                why_not = _why_not(found, seen, forbidden, report)
                kept = [] if why_not else [record for tile, record in found.tiles if writer.add(tile, record)]
                report.tiles.update(record.group for record in kept)
                if kept:
                    report.files_used[source] += 1
                else:
                    report.reasons[why_not or _LIKE_ANOTHER] += 1
                if on_progress is not None:
                    on_progress(source, done, len(tasks))
        if not writer.records:
            told = "; ".join(f"{count}: {reason}" for reason, count in report.reasons.most_common(3))
            raise SourceError(f"no tile in {sum(map(len, plan.values()))} files" + (f" ({told})" if told else ""))
    return report


def _why_not(found: Harvest, seen: list[bytes], forbidden: Sequence[bytes], report: BuildReport) -> str:
    """Why a file's tiles are not taken, or nothing."""
    if not found.tiles or not found.fingerprints:
        return found.why_none
    if (distance(found.fingerprints, forbidden) <= _EVALUATION_BITS).any():
        report.kept_out.append(str(found.task.path))
        return "resembles a picture to be kept out"
    if (distance(found.fingerprints, seen) <= _SAME_PICTURE_BITS).any():
        report.duplicates += 1
        return _LIKE_ANOTHER
    seen.append(found.fingerprints[:FINGERPRINT])
    return ""


def _package_tasks(package: Package, downloads: Path, vector_files: int) -> list[Task]:
    roots = fetch(package, downloads)
    if package.group == "vector":
        paths = sorted(path for root in roots for path in root.rglob("*") if path.suffix.lower() in VECTORS)
        # Spread over the subjects, which are folders.
        paths = paths[:: max(1, len(paths) // vector_files)][:vector_files] if vector_files else []
    else:
        paths = [path for root in roots for path in _pictures(root)]
    return _held_out([Task(path, package.group, package.name) for path in paths])


def _folder_tasks(folder: Path, source: str) -> list[Task]:
    return _held_out([Task(path, "images", source) for path in _pictures(folder)])


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())


def _held_out(tasks: list[Task]) -> list[Task]:
    """Every 50th photograph validates and is never learnt from."""
    if tasks and tasks[0].group == "vector":
        return tasks
    return [
        Task(task.path, "validation", task.source) if number % _VALIDATION_EVERY == _VALIDATION_EVERY // 2 else task
        for number, task in enumerate(tasks)
    ]


def _fingerprint_of(path: Path) -> bytes:
    try:
        picture = Image.open(path)
        depth = deeper_than_8_bits(picture)
        mine = fingerprint(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path}: not a picture that can be read, so it cannot be kept out: {error}") from None
    if depth:
        raise SourceError(f"{path}: is of {depth}, so it cannot be kept out: 8 bits a channel are read, convert it")
    return mine


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("forkserver"), initializer=_end_with_the_parent
    )


def _end_with_the_parent() -> None:
    """A worker outlives neither Ctrl-C, which the parent handles, nor the parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _in_order(pool: ProcessPoolExecutor, tasks: Sequence[Task], jobs: int) -> Iterator[Harvest]:
    """Harvests in the order of the tasks, a few ahead, so that memory does not depend on how many there are."""
    for start in range(0, len(tasks), 8 * jobs):
        yield from pool.map(harvest, tasks[start : start + 8 * jobs])


def _known_evaluation_pictures() -> list[bytes]:
    """Fingerprints of Set5, Set14 and BSD100."""
    text = (files("hat_video.training") / "evaluation_sets.txt").read_text(encoding="ascii")
    return [bytes.fromhex(line.split()[1]) for line in text.splitlines() if line and not line.startswith("#")]
