"""`python -m tests.fuzz --minutes 60 --keep findings/`: mutates and runs until time is up; findings make it fail."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.fuzz.cases import SEEDS, make_seeds, run_case


def main() -> int:
    """Runs cases; prints each finding as it comes, and a count at the end."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="mutations of each clip; no end but the time's by default")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--seeds", default=",".join(SEEDS), help="kinds of clips, with commas")
    parser.add_argument("--keep", type=Path, help="folder for the files that were findings")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    names = tuple(chosen.seeds.split(","))
    numbers = itertools.islice(itertools.count(chosen.first), chosen.cases)
    cases = findings = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder) / "seeds", names)
        ends = time.monotonic() + 60 * chosen.minutes
        for number, (name, original) in ((n, seed) for n in numbers for seed in seeds.items()):
            if time.monotonic() > ends:
                break
            case = run_case(name, number, original, Path(folder))
            cases, slowest = cases + 1, max(slowest, case.seconds)
            mutated = Path(folder) / f"{name}-{number}{original.suffix}"
            if case.fault is not None:
                findings += 1
                sys.stdout.write(f"{mutated.name}: {case.fault} ({case.seconds:.1f} s) {case.said}\n")
                sys.stdout.flush()
                if chosen.keep is not None:
                    chosen.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(mutated, chosen.keep)
            mutated.unlink()
            shutil.rmtree(Path(folder) / ".hat-video", ignore_errors=True)
    sys.stdout.write(f"{cases} cases, {findings} findings, the slowest {slowest:.1f} s\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
