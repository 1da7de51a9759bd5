"""Pushing to servers: RTMP, RTSP, TCP and UDP for real; servers that refuse, are mute, die, and come back."""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from hat_video.errors import OutputError
from hat_video.live.encode import AudioLine, LiveEncoder
from hat_video.live.network import _Child
from hat_video.live.outputs import FanOut, OutputEvent, parse_output
from tests.command import ROOT
from tests.live.feeding import RATE, STEP, head_of, made_encoder, make_sound, picture, sound, wait_until
from tests.live.leftovers import children, free_port, nothing_left


class Receiver:
    """The server's process, and what it has said."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def times(self, what: str = "picture") -> list[float]:
        return [float(line.split()[1]) for line in list(self.lines) if line.startswith(what)]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def receiver(url: str, form: str, *options: str) -> Iterator[Receiver]:
    made = Receiver([sys.executable, "-m", "tests.live.receiver", url, form, *options])
    try:
        wait_until(lambda: "listening" in made.lines)
        time.sleep(0.5)  # it listens a moment later, and cannot say so
        yield made
    finally:
        made.kill()


@contextmanager
def feeding(
    encoder: LiveEncoder, outputs: FanOut, heard: list[Any] | None = None
) -> Iterator[Callable[[], tuple[int, float]]]:
    """Feeds in real time, on a thread; gives what says how many pictures, and the longest time that `send` took."""
    stop, told, left = threading.Event(), [0, 0.0], list(heard or [])

    def run() -> None:
        start, number = time.monotonic(), 0
        while not stop.wait(max(0.0, start + number / RATE - time.monotonic())):
            made = encoder.encode(picture(number), number * STEP, time.monotonic())
            before = time.monotonic()
            outputs.send(made)
            while left and left[0].pts <= number * STEP:
                outputs.send([left.pop(0)])
            told[1] = max(told[1], time.monotonic() - before)
            number += 1
            told[0] = number

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lambda: (int(told[0]), float(told[1]))
    finally:
        stop.set()
        thread.join()


def opened(encoder: LiveEncoder, *urls: str, on_event: Callable[[OutputEvent], None] | None = None) -> FanOut:
    return FanOut(encoder, [parse_output(url) for url in urls], stop=threading.Event(), on_event=on_event)


@pytest.mark.parametrize(
    ("url", "form", "options"),
    [
        ("rtmp://127.0.0.1:{}/live/cam", "flv", ["listen=1"]),
        ("rtsp://127.0.0.1:{}/cam", "rtsp", ["rtsp_flags=listen", "listen_timeout=20"]),
        ("tcp://127.0.0.1:{}", "mpegts", []),
        ("udp://127.0.0.1:{}", "mpegts", []),
    ],
    ids=["rtmp", "rtsp", "tcp", "udp"],
)
def test_a_server_gets_pictures_and_sound(url: str, form: str, options: list[str], tmp_path: Path) -> None:
    url = url.format(free_port())
    tone = make_sound(tmp_path / "tone.mkv", 30)
    line = AudioLine(head_of(tone), "copy", containers=["flv", "mpegts", "rtsp"])
    encoder = made_encoder(line)
    listening = f"{url}?listen=1" if form == "mpegts" and url.startswith("tcp") else url
    with nothing_left(), receiver(listening, form, *options) as server:
        with opened(encoder, url) as outputs, feeding(encoder, outputs, sound(line, tone)) as fed:
            wait_until(lambda: len(server.times()) >= 30 and len(server.times("sound")) >= 60, 30)
            assert outputs.figures[0].is_up
            assert outputs.figures[0].error is None
        count, longest = fed()
        assert longest < 0.5
        if form != "mpegts" or url.startswith("tcp"):
            wait_until(lambda: server.process.poll() is not None, 10)
            assert len(server.times()) >= count - 16
        times, heard = server.times(), server.times("sound")
        assert "open h264 96x64 1 1" in server.lines
        steps = [b - a for a, b in itertools.pairwise(times)]
        assert all(0.06 < step < 0.075 for step in steps), steps
        assert all(0.015 < b - a < 0.028 for a, b in itertools.pairwise(heard))
        # Together as they were: a picture and the sound of its time are both there.
        assert abs(times[0] - heard[0]) < 1.1
        figures = outputs.figures[0]
        assert figures.frames == count
        assert figures.dropped == figures.reconnects == 0
        assert figures.error is None, "a server that goes when we have ended is no error"
    encoder.close()


def refused(url: str) -> str:
    """What is said when it cannot be opened, in less than five seconds."""
    encoder = made_encoder()
    with nothing_left():
        before = time.monotonic()
        with pytest.raises(OutputError) as caught, opened(encoder, url):
            pytest.fail("was opened")
        assert time.monotonic() - before < 5
    encoder.close()
    assert "\n" not in str(caught.value)
    assert "geheim" not in str(caught.value)
    return str(caught.value)


def test_nobody_listens() -> None:
    port = free_port()
    for scheme in ("rtmp", "rtsp", "tcp"):
        said = refused(f"{scheme}://user:geheim@127.0.0.1:{port}/live")
        assert said.startswith(f"{scheme}://user:***@127.0.0.1:{port}/live: ")
        assert "refused" in said.lower()


def test_no_such_host() -> None:
    assert refused("rtmp://no-such-host.invalid/live/x").startswith("rtmp://no-such-host.invalid/live/x: ")


@contextmanager
def tcp_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Runs `serve` for each connection, one after the other."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        held: list[socket.socket] = []

        def run() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                try:
                    serve(connection)
                except OSError:
                    continue

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in held:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            thread.join(5)


def test_a_server_that_accepts_and_never_answers_fails_at_the_start() -> None:
    with tcp_server(lambda connection: None) as port:
        assert "no answer within" in refused(f"rtmp://user:geheim@127.0.0.1:{port}/live/x")


def test_a_wrong_password() -> None:
    def serve(connection: socket.socket) -> None:
        while request := connection.recv(4096):
            number = next(line for line in request.split(b"\r\n") if line.lower().startswith(b"cseq"))
            connection.sendall(
                b'RTSP/1.0 401 Unauthorized\r\n%s\r\nWWW-Authenticate: Basic realm="cam"\r\n\r\n' % number
            )

    with tcp_server(serve) as port:
        assert "401" in refused(f"rtsp://user:geheim@127.0.0.1:{port}/live")


def test_a_server_that_stops_reading_stalls_nobody_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hat_video.live.network._STALL_SECONDS", 2.0)
    monkeypatch.setattr("hat_video.live.output._LONGEST_DELAY", 1.0)
    reads = threading.Event()
    taken: list[int] = []

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        taken.append(0)
        place = len(taken) - 1

        def take() -> None:
            try:
                while reads.wait(30) and (data := connection.recv(4096)):
                    taken[place] += len(data)
            except OSError:
                return

        threading.Thread(target=take, daemon=True).start()

    events: list[OutputEvent] = []
    # Large pictures: what the kernel keeps for the connection has to run full.
    encoder = made_encoder(crf=0, preset="ultrafast")
    path = tmp_path / "beside.mkv"
    with nothing_left(), tcp_server(serve) as port:
        with opened(encoder, f"tcp://127.0.0.1:{port}", str(path), on_event=events.append) as outputs:
            numbers = iter(range(1 << 20))
            longest = 0.0

            def feed() -> None:
                nonlocal longest
                number = next(numbers)
                made = encoder.encode(picture(number, noise=True), number * STEP, time.monotonic())
                before = time.monotonic()
                outputs.send(made)
                longest = max(longest, time.monotonic() - before)
                time.sleep(0.004)

            def until(is_so: Callable[[], bool]) -> None:
                give_up = time.monotonic() + 60
                while not is_so():
                    assert time.monotonic() < give_up, outputs.figures
                    feed()

            until(lambda: any(event.kind == "down" for event in events))
            assert "nothing for 2 s" in events[0].message
            assert outputs.figures[0].dropped > 0
            reads.set()
            until(lambda: outputs.figures[0].is_up and outputs.figures[0].reconnects > 0 and taken[-1] > 100_000)
            assert outputs.figures[1].is_up
            assert longest < 0.5
            count = next(numbers)
        assert outputs.figures[1].frames == count
        assert outputs.figures[1].dropped == 0
    encoder.close()


def test_a_server_that_is_killed_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hat_video.live.output._LONGEST_DELAY", 1.0)
    url = f"rtmp://127.0.0.1:{free_port()}/live/cam"
    events: queue.Queue[OutputEvent] = queue.Queue()
    encoder = made_encoder(key_seconds=3600)
    with nothing_left():
        with receiver(url, "flv", "listen=1") as server:
            outputs = opened(encoder, url, on_event=events.put)
            outputs.__enter__()
            stack = feeding(encoder, outputs)
            fed = stack.__enter__()
            wait_until(lambda: len(server.times()) > 10)
        assert events.get(timeout=20).kind == "down"
        assert not outputs.figures[0].is_up
        with receiver(url, "flv", "listen=1") as server:
            assert events.get(timeout=20).kind == "up"
            # Although key frames are an hour apart.
            wait_until(lambda: len(server.times()) > 10)
            assert server.times()[0] < 1, "a new stream begins at 0"
            stack.__exit__(None, None, None)
            outputs.close()
        figures = outputs.figures[0]
        assert figures.reconnects == 1
        assert figures.dropped > 0
        assert figures.frames + figures.dropped == fed()[0]
        assert fed()[1] < 0.5
    encoder.close()


def test_a_child_that_is_killed_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    others = children()
    monkeypatch.setattr("hat_video.live.output._LONGEST_DELAY", 1.0)
    url = f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    events: list[OutputEvent] = []
    encoder = made_encoder()
    with nothing_left(), opened(encoder, url, on_event=events.append) as outputs, feeding(encoder, outputs):
        (child,) = children() - others
        wait_until(lambda: outputs.figures[0].frames > 5)
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: outputs.figures[0].reconnects == 1)
        assert events[0].message == "its process has ended (signal 9)"
        before = outputs.figures[0].frames
        wait_until(lambda: outputs.figures[0].frames > before + 5)
    encoder.close()


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("exit 0", None),
        ("echo what goes wrong; exit 3", "what goes wrong"),
        ("kill -KILL $$", r"its process has ended \(signal 9\)"),
        ("exec sleep 60", "was not finished in time; the last pictures may not have arrived"),
    ],
)
def test_a_child_that_fails_at_its_end(last: str, said: str | None) -> None:
    child = _Child({"exec": ["sh", "-c", f"cat >/dev/null; {last}"]}, threading.Event())
    with nullcontext() if said is None else pytest.raises(OutputError, match=f"^{said}$"):
        child.finish()
    assert child.process.poll() is not None


def test_a_child_that_hangs_at_the_end_is_told() -> None:
    others = children()
    url = f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    events: list[OutputEvent] = []
    encoder = made_encoder()
    with nothing_left(), opened(encoder, url, on_event=events.append) as outputs:
        with feeding(encoder, outputs):
            wait_until(lambda: outputs.figures[0].frames > 5)
        (child,) = children() - others
        os.kill(child, signal.SIGSTOP)
    encoder.close()
    said = "was not finished in time; the last pictures may not have arrived"
    assert outputs.figures[0].error == said
    assert [(event.kind, event.message) for event in events] == [("down", said)]


def test_a_service_that_is_ended_as_a_whole_sends_all_it_has() -> None:
    """A service manager sends SIGTERM to every process of it."""
    others = children()
    url = f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    encoder = made_encoder()
    with nothing_left(), opened(encoder, url) as outputs, feeding(encoder, outputs):
        wait_until(lambda: outputs.figures[0].frames > 5)
        (child,) = children() - others
        os.kill(child, signal.SIGTERM)
        frames = outputs.figures[0].frames
        wait_until(lambda: outputs.figures[0].frames > frames + 5)
    encoder.close()
    assert outputs.figures[0].error is None
    assert outputs.failed == []


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    url = f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.live.recorder", "60", "-", url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    for _ in range(5):
        parent.stdout.readline()
    lines = [path.read_text(encoding="ascii") for path in Path(f"/proc/{parent.pid}/task").glob("*/children")]
    pids = [int(word) for line in lines for word in line.split()]
    assert len(pids) == 1
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not Path(f"/proc/{pids[0]}").exists())


def test_no_secret_is_among_the_words_of_the_child() -> None:
    others = children()
    url = f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}?token=geheim"
    encoder = made_encoder()
    with opened(encoder, url) as outputs:
        (child,) = children() - others
        assert b"geheim" not in Path(f"/proc/{child}/cmdline").read_bytes()
        assert "geheim" not in outputs.figures[0].name
    encoder.close()


@pytest.mark.live
def test_srt() -> None:
    ffmpeg = shutil.which("ffmpeg")
    assert ffmpeg is not None, "apt install ffmpeg"
    port = free_port(socket.SOCK_DGRAM)
    words = ["-v", "error", "-i", f"srt://127.0.0.1:{port}?mode=listener", "-f", "framecrc", "-map", "v", "-"]
    encoder = made_encoder()
    with nothing_left():
        server = Receiver([ffmpeg, "-nostdin", *words])
        try:
            time.sleep(1)
            with (
                opened(encoder, f"srt://127.0.0.1:{port}?passphrase=") as outputs,
                feeding(encoder, outputs),
            ):
                wait_until(lambda: len([line for line in server.lines if line.startswith("0,")]) > 20, 30)
                assert outputs.figures[0].is_up
            assert outputs.figures[0].error is None
        finally:
            server.kill()
        assert "srt://" in refused(f"srt://127.0.0.1:{port}?passphrase=geheimgeheim")
    encoder.close()
