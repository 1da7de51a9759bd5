"""The package's door: names that are found when they are asked for, and a command that hears Ctrl-C from its start."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hat_video
from tests.command import start


def test_every_name_is_found() -> None:
    assert set(hat_video.__all__) <= set(dir(hat_video))
    for name in hat_video.__all__:
        assert getattr(hat_video, name).__name__ == name
    with pytest.raises(AttributeError, match="'hat_video' has no attribute 'upscale'"):
        hat_video.upscale  # noqa: B018


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, hat_video; sys.exit(any(name in sys.modules for name in ('torch', 'av', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
@pytest.mark.parametrize("later", [0, 0.05, 0.1])
def test_ctrl_c_while_the_command_is_imported(later: float) -> None:
    """An exception may meet C++ there, which loses it or aborts."""
    process = start("probe", "none.mp4")
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(later)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "hat-video: interrupted\n")
