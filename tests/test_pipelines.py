"""The scripts that people copy: they run, and give what the command gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import pytest

from tests.clips import make_clip
from tests.command import ROOT, upscale


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "pipelines" / script, *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_upscale_file_gives_the_commands_bytes(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    make_clip(clip, frames=8)
    by_command, by_script = tmp_path / "command.mp4", tmp_path / "script.mp4"
    assert upscale(clip, "-o", by_command, "-q") == 0
    done = run("upscale_file.py", clip, by_script)
    assert done.returncode == 0, done.stderr
    assert by_script.read_bytes() == by_command.read_bytes()


def test_upscale_directory_gives_the_commands_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "shelf"
    (folder / "deep").mkdir(parents=True)
    make_clip(folder / "a.mp4", frames=6)
    make_clip(folder / "deep" / "b.mkv", frames=6)
    assert upscale(folder, "-o", tmp_path / "by_command", "-q") == 0
    done = run("upscale_directory.py", folder, tmp_path / "by_script")
    assert done.returncode == 0, done.stderr
    for name in ("a.mp4", "deep/b.mkv"):
        assert (tmp_path / "by_script" / name).read_bytes() == (tmp_path / "by_command" / name).read_bytes()


def test_stream_camera_records(tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    done = run("stream_camera.py", "test:", out, 2)
    assert done.returncode == 0, done.stderr
    assert "frames in" in done.stdout
    with av.open(str(out)) as container:
        frames = [(frame.width, frame.height) for frame in container.decode(video=0)]
    assert len(frames) > 5
    assert set(frames) == {(640, 360)}


@pytest.mark.parametrize("script", ["upscale_file.py", "upscale_directory.py", "stream_camera.py"])
def test_wrong_use_is_one_line(tmp_path: Path, script: str) -> None:
    assert run(script).returncode == 2
    wrong = run(script, tmp_path / "missing", tmp_path / "out.mp4")
    assert wrong.returncode == 1
    assert "missing" in wrong.stderr
    assert "Traceback" not in wrong.stderr
