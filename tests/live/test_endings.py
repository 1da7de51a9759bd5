"""How a live run ends: by its duration, its source, its outputs, its readers or Ctrl-C, and when two of them meet."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from hat_video import CameraOptions, LiveFigures, upscale_camera
from hat_video.errors import CancelledError, OutputError
from hat_video.jobs import camera as camera_module
from hat_video.jobs.camera import CameraEvent, CameraReport
from hat_video.live.mailbox import Mailbox
from hat_video.live.muxing import Muxer
from tests.command import ROOT
from tests.live.cameras import Camera

pytestmark = pytest.mark.usefixtures("no_leftovers")

FAST = ("--model", "bicubic", "--audio", "none")
_SET_PIPE_SIZE = 1031


def run(source: str, *outputs: Path | str, **choices: object) -> CameraReport:
    options = {"model": "bicubic", "audio": "none", "duration": "2", **choices}
    return upscale_camera(source, [str(output) for output in outputs], CameraOptions(**options))  # type: ignore[arg-type]


def pictures_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def piped(out: Path, *words: str) -> subprocess.Popen[bytes]:
    """The command, with standard input that stays open; pictures are 160x96 of y4m."""
    command = [sys.executable, "-m", "hat_video", "camera", "-", "-o", str(out), *FAST, *words]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"YUV4MPEG2 W160 H96 F10:1 Ip A1:1 C420jpeg\n")
    process.stdin.flush()
    return process


def give(process: subprocess.Popen[bytes], *pictures: int) -> None:
    assert process.stdin is not None
    for grey in pictures:
        process.stdin.write(b"FRAME\n" + bytes([grey]) * (160 * 96 * 3 // 2))
    process.stdin.flush()


def test_a_closed_mailbox_takes_nothing() -> None:
    box: Mailbox[int] = Mailbox(2)
    assert box.put(1)
    box.close()
    assert not box.put(2)
    assert (box.take(0), box.take(0), box.is_over) == (1, None, True)


def test_a_duration_ends_a_run_that_cannot_keep_up(tmp_path: Path) -> None:
    stop = threading.Event()
    timer = threading.Timer(15, stop.set)
    timer.start()
    options = CameraOptions(
        model="lanczos", audio="none", jobs=1, duration="2", policy="queue:5", size="640x360", fps="60"
    )
    report = upscale_camera("test:", [str(tmp_path / "out.mkv")], options, cancel=stop)
    timer.cancel()
    assert not stop.is_set()
    figures = report.figures
    assert figures.dropped["overload"] > 0
    assert figures.frames_in == figures.frames_out + sum(figures.dropped.values())


def test_every_frame_is_accounted_for_after_ctrl_c(tmp_path: Path) -> None:
    stop = threading.Event()
    seen: list[LiveFigures] = []

    def figures(now: LiveFigures) -> None:
        seen.append(now)
        stop.set()

    options = CameraOptions(
        model="lanczos", audio="none", jobs=2, policy="queue:20", size="640x360", fps="60", duration="30"
    )
    made = upscale_camera("test:", [str(tmp_path / "out.mkv")], options, cancel=stop, on_figures=figures).figures
    assert seen
    assert made.frames_in == made.frames_out + sum(made.dropped.values())
    assert pictures_in(tmp_path / "out.mkv") == made.frames_out


@pytest.mark.parametrize("raiser", ["figures", "events"])
def test_what_a_caller_raises_ends_nothing(tmp_path: Path, raiser: str) -> None:
    calls = []

    def broken(what: LiveFigures | CameraEvent) -> None:
        calls.append(what)
        raise BrokenPipeError("nobody reads this")

    options = CameraOptions(model="bicubic", audio="none", duration="3")
    given: dict[str, Callable[[object], None]] = {f"on_{'figures' if raiser == 'figures' else 'event'}": broken}  # type: ignore[dict-item]
    report = upscale_camera("test:", [str(tmp_path / "out.mkv")], options, **given)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert report.failed_outputs == []
    assert any("broken raised BrokenPipeError" in event.text for event in report.events)
    assert pictures_in(tmp_path / "out.mkv") == report.figures.frames_out


def test_a_caller_that_stands_still_is_not_waited_for(tmp_path: Path) -> None:
    go_on = threading.Event()
    began = time.monotonic()
    options = CameraOptions(model="bicubic", audio="none", duration="2")
    report = upscale_camera(
        "test:", [str(tmp_path / "out.mkv")], options, on_event=lambda event: go_on.wait(60) and None
    )
    took = time.monotonic() - began
    go_on.set()
    assert pictures_in(tmp_path / "out.mkv") == report.figures.frames_out
    assert took < 15


def test_a_camera_comes_back_though_nobody_reads_the_log(tmp_path: Path) -> None:
    """As after `2>&1 | head`: the first line that is said then fails."""
    out = tmp_path / "out.mkv"
    read, write = os.pipe()
    with Camera("tcp") as camera:
        words = ["camera", camera.url, "-o", str(out), *FAST, "--duration", "7", "--progress", "json"]
        process = subprocess.Popen([sys.executable, "-m", "hat_video", *words], cwd=ROOT, stderr=write)
        os.close(write)
        with os.fdopen(read, "rb") as said:
            while b'"figures"' not in said.readline():
                pass
        camera.kill()
        time.sleep(0.5)
        camera.start()
        process.wait(40)
    with av.open(str(out)) as container:
        times = [float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.pts is not None]
    assert times[-1] > 5


def test_a_log_that_stands_still_holds_up_no_recording(tmp_path: Path) -> None:
    """A pager that waits for a key."""
    out = tmp_path / "out.mkv"
    read, write = os.pipe()
    fcntl.fcntl(write, _SET_PIPE_SIZE, 4096)
    words = ["camera", "test:", "-o", str(out), *FAST, "--duration", "60", "--progress", "json"]
    process = subprocess.Popen([sys.executable, "-m", "hat_video", *words], cwd=ROOT, stderr=write)
    os.close(write)
    while _waiting_in(read) < 2500:  # a line of figures more, and it is full
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    give_up = time.monotonic() + 15
    while not _is_finished(out):
        assert time.monotonic() < give_up
        time.sleep(0.2)
    os.close(read)
    process.wait(10)


def _waiting_in(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def _is_finished(path: Path) -> bool:
    """Only a finished Matroska file says how long it is."""
    with av.open(str(path)) as container:
        return container.duration is not None


def test_an_output_that_cannot_be_finished_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when the last bytes are written."""

    def full(self: Muxer) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Muxer, "close", full)
    report = run("test:", tmp_path / "out.mp4")
    (line,) = report.failed_outputs
    assert "out.mp4" in line
    assert "No space left" in line


def test_an_output_that_is_stuck_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close, go_on = Muxer.close, threading.Event()

    def stuck(self: Muxer) -> None:
        go_on.wait(30)
        close(self)

    monkeypatch.setattr(Muxer, "close", stuck)
    report = run("test:", tmp_path / "out.mp4")
    go_on.set()
    assert report.failed_outputs == [f"{tmp_path / 'out.mp4'}: was not finished in time"]


def test_a_server_that_stops_reading_is_told() -> None:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                until = time.monotonic() + 1.5
                while time.monotonic() < until and connection.recv(2048):
                    pass
                over.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        noise = "test:testsrc2=s=640x360:r=15,noise=alls=60:allf=t,format=yuv420p,realtime"
        report = run(noise, f"tcp://127.0.0.1:{server.getsockname()[1]}", duration="3", crf=18)
        over.set()
        thread.join()
    (line,) = report.failed_outputs
    assert "nobody reads it" in line or "in time" in line


def test_a_camera_that_goes_after_the_duration_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = Muxer.close
    with Camera("tcp") as camera:

        def slow(self: Muxer) -> None:
            camera.kill()
            time.sleep(0.8)
            close(self)

        monkeypatch.setattr(Muxer, "close", slow)
        report = run(camera.url, tmp_path / "out.mkv", duration="2", retries=0)
    assert report.failed_outputs == []
    assert pictures_in(tmp_path / "out.mkv") == report.figures.frames_out


def test_a_pipe_of_one_picture_that_stays_open_a_while(tmp_path: Path) -> None:
    process = piped(tmp_path / "out.mkv")
    give(process, 90)
    time.sleep(6)  # longer than it takes to be ready
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert pictures_in(tmp_path / "out.mkv") == 1


def test_a_pipe_keeps_its_first_pictures_and_its_duration_begins_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = piped(tmp_path / "out.mkv", "--report", str(tmp_path / "report.json"))
    give(process, 90, 91)
    time.sleep(6)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert pictures_in(tmp_path / "out.mkv") == 2


def test_a_pipe_is_let_go_when_the_run_fails_before_its_first_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """`no_leftovers` looks for the capture's thread."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stdin, os.fdopen(write, "wb") as camera:
        monkeypatch.setattr(sys, "stdin", stdin)
        camera.write(b"YUV4MPEG2 W16 H16 F10:1 Ip A1:1 C420jpeg\n")
        for grey in range(100):
            camera.write(b"FRAME\n" + bytes([90 + grey]) * (16 * 16 * 3 // 2))
        camera.flush()
        with pytest.raises(OutputError, match="refused"):
            run("-", "tcp://127.0.0.1:1")


def test_ctrl_c_while_the_networks_are_made_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    measure = camera_module.measure_costs

    def stopped(*given: object) -> None:
        stop.set()
        measure(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(camera_module, "measure_costs", stopped)
    began = time.monotonic()
    with pytest.raises(CancelledError, match="before the first frame"):
        upscale_camera("test:", [str(tmp_path / "out.mkv")], CameraOptions(audio="none", size="640x360"), cancel=stop)
    assert time.monotonic() - began < 20
    assert list(tmp_path.iterdir()) == []
