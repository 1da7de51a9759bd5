"""Several processes on one film: the same bytes as from one, whoever dies meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.clips import make_clip
from tests.command import sidecars, start, upscale, wait_for_segments

WORDS = ("--model", "hat-nano", "--scale", "2", "--segment", "0.2", "--jobs", "2", "--preset", "ultrafast")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", width=96, height=64, frames=90, gop=15)


@pytest.fixture(scope="module")
def whole(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert upscale(clip, "-o", output, *WORDS, "-q") == 0
    return output.read_bytes()


def children_of(process: subprocess.Popen[str]) -> list[int]:
    """The workers: those of its children that are no helpers of multiprocessing."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if parent == process.pid and "spawn_main" in words:
            found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_processes_give_the_same_bytes(clip: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *WORDS, "--device", "cpu,cpu") == 0
    assert output.read_bytes() == whole


def test_one_goes_on_where_two_were(clip: Path, whole: bytes, tmp_path: Path) -> None:
    """Segments know nothing of how many there were to make them."""
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *WORDS, "--device", "cpu,cpu")
    wait_for_segments(process, output, 3)
    workers = children_of(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_until_gone(workers)
    kept = len(sidecars(output))
    assert kept >= 3
    again = start("upscale", clip, "-o", output, *WORDS, "-v")
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert output.read_bytes() == whole


def test_a_killed_process_loses_its_segment_to_another(clip: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *WORDS, "--device", "cpu,cpu")
    wait_for_segments(process, output, 2)
    os.kill(children_of(process)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "the process on cpu died (signal 9)" in said
    assert "was made again by another" in said
    assert output.read_bytes() == whole


def test_when_all_have_died_the_segments_are_kept(clip: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *WORDS, "--device", "cpu,cpu")
    wait_for_segments(process, output, 2)
    for worker in children_of(process):
        os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "every process that did the work has died" in said
    assert "segments are kept" in said
    assert upscale(clip, "-o", output, *WORDS) == 0
    assert output.read_bytes() == whole


def test_interrupt_leaves_no_process(clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *WORDS, "--device", "cpu,cpu")
    wait_for_segments(process, output, 1)
    workers = children_of(process)
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    wait_until_gone(workers)
    assert "Traceback" not in said


def test_an_error_of_one_ends_all(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The source is cut off while they work."""
    source = tmp_path / "clip.mp4"
    source.write_bytes(clip.read_bytes())
    process = start("upscale", source, "-o", tmp_path / "out.mp4", *WORDS, "--device", "cpu,cpu")
    wait_for_segments(process, tmp_path / "out.mp4", 1)
    workers = children_of(process)
    source.write_bytes(b"")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    wait_until_gone(workers)
    assert not (tmp_path / "out.mp4").exists()


def test_devices_that_are_not_there_are_refused(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upscale(clip, "-o", tmp_path / "out.mp4", *WORDS, "--device", "cpu,tpu") == 2
    assert "--device tpu: must be" in capsys.readouterr().err
