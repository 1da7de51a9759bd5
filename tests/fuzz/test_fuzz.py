"""A minute of damaged containers; `python -m tests.fuzz --minutes 60` goes on where this ends."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.fuzz.cases import SEEDS, make_seeds, mutate, run_case

# The same files in every run, as far as the time reaches: a machine that is slower sees fewer, never others.
MUTATIONS = 40
SECONDS_A_SEED = 10.0


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_damaged_containers_do_no_harm(seed: str, tmp_path: Path) -> None:
    original = make_seeds(tmp_path / "seeds", (seed,))[seed]
    began = time.monotonic()
    for number in range(MUTATIONS):
        case = run_case(seed, number, original, tmp_path)
        assert case.fault is None, f"python -m tests.fuzz --seeds {seed} --first {number}: {case.fault}; {case.said}"
        if time.monotonic() - began > SECONDS_A_SEED:
            break


def test_mutations_can_be_made_again() -> None:
    data = bytes(range(256)) * 16
    made = {mutate(data, random.Random(f"seed:{n}")) for n in range(50)}
    assert made == {mutate(data, random.Random(f"seed:{n}")) for n in range(50)}
    assert len(made - {data}) > 40
