"""Half a minute of damaged containers; `python -m tests.fuzz --minutes 60` goes on where this ends."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.fuzz.cases import SEEDS, mutate


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_damaged_containers_do_no_harm(seed: str) -> None:
    # The same files in every run, as far as the time reaches: a machine that is slower sees fewer, never others.
    # A process of its own: each case is a fork, and forks of a process that has threads may hang.
    command = [sys.executable, "-m", "tests.fuzz", "--seeds", seed, "--cases", "40", "--minutes", "0.08"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 0


def test_mutations_can_be_made_again() -> None:
    data = bytes(range(256)) * 16
    made = {mutate(data, random.Random(f"seed:{n}")) for n in range(50)}
    assert made == {mutate(data, random.Random(f"seed:{n}")) for n in range(50)}
    assert len(made - {data}) > 40
