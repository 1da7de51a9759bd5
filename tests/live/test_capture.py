"""Pictures of real cameras, and of none: wrong addresses, refusals, silence. Nothing waits, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import av
import pytest
import torch
from av.packet import Packet

from hat_video.errors import CancelledError, OptionError, OutputError, SourceError
from hat_video.live.audio_line import open_decoder
from hat_video.live.capture import Capture, Captured, CaptureEvent, Roi
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.sources import CameraSource, parse_source
from tests.clips import make_clip
from tests.live.cameras import (
    RATE,
    ROOT,
    Camera,
    is_flashing,
    mute_server,
    read_clock,
    refusing_server,
    slow,
)
from tests.live.leftovers import free_port

pytestmark = pytest.mark.usefixtures("no_leftovers")


class Watch:
    """A capture, and all that it gives. A context manager."""

    def __init__(self, source: CameraSource | str, **options: Any) -> None:
        self.frames: list[Captured] = []
        self.seen_at: list[float] = []
        self.sounds: list[Packet[Any]] = []
        self.events: list[CaptureEvent] = []
        self.capture = Capture(
            parse_source(source) if isinstance(source, str) else source,
            on_frame=self._see,
            on_audio=self.sounds.append,
            on_event=self.events.append,
            **options,
        )

    def __enter__(self) -> Self:
        self.capture.__enter__()
        return self

    def __exit__(self, *words: Any) -> None:
        began = time.monotonic()
        self.capture.__exit__(*words)
        assert time.monotonic() - began < 2

    def _see(self, captured: Captured) -> None:
        self.frames.append(captured)
        self.seen_at.append(time.time())

    def wait(self, is_there: Callable[[], bool], seconds: float = 30) -> None:
        """Returns once it is; fails if that takes too long."""
        deadline = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < deadline, (self.events, self.capture.figures)
            time.sleep(0.02)

    def wait_for_frames(self, count: int) -> None:
        """Returns once so many more have come."""
        goal = len(self.frames) + count
        self.wait(lambda: len(self.frames) >= goal)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def assert_rises(watch: Watch) -> None:
    ticks = [captured.ticks for captured in watch.frames]
    assert all(a < b for a, b in pairwise(ticks))
    sounds = [packet.pts or 0 for packet in watch.sounds]
    assert all(a < b for a, b in pairwise(sounds))


@pytest.mark.parametrize("kind", ["udp", "tcp", "rtmp", "mjpeg", "rtsp", *slow("hls", "srt")])
def test_a_camera_is_seen_as_it_is(kind: str) -> None:
    words = ("--sound",) if kind in ("udp", "tcp", "rtmp", "srt") else ()
    with Camera(kind, *words) as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(2 * RATE)
        info = watch.capture.info
        assert (info.width, info.height, info.time_base) == (320, 176, LIVE_TIME_BASE)
        assert info.color.is_full_range == (kind == "mjpeg")
        late = sorted(
            seen - read_clock(frame.planes[0].numpy()) / 1000
            for frame, seen in zip(watch.frames, watch.seen_at, strict=False)
        )
        # What the camera's encoder and container keep is in it; here it is 0.01 s (mjpeg) to 0.5 s (srt).
        assert -0.1 < late[len(late) // 2] < (8 if kind == "hls" else 1.5)
        figures = watch.capture.figures
        assert figures.is_up
        assert (figures.decode_errors, figures.reconnects, figures.reanchored) == (0, 0, 0)
        # The picture says when it was taken; the ticks agree.
        frames = watch.frames[5 : 5 + RATE]
        taken = [read_clock(frame.planes[0].numpy()) for frame in frames]
        given = [frame.ticks / 90 for frame in frames]
        off = [(t - taken[0]) - (g - given[0]) for t, g in zip(taken, given, strict=True)]
        assert max(map(abs, off)) < (250 if kind == "mjpeg" else 60)
        if words:
            head = watch.capture.audio
            assert head is not None
            assert (head.codec, head.sample_rate, head.layout) == ("aac", 48000, "mono")
            decoder = open_decoder(head)
            heard = [frame for packet in watch.sounds for frame in decoder.decode(packet)]
            assert sum(frame.samples for frame in heard) > 48000
    figures = watch.capture.figures
    assert not figures.is_up
    assert figures.frames == len(watch.frames) + sum(figures.dropped.values())
    assert watch.frames[0].ticks == 0
    assert_rises(watch)


@pytest.mark.parametrize("kind", ["tcp", pytest.param("rtmp", marks=pytest.mark.live)])
def test_sound_keeps_the_place_that_it_has_in_the_source(kind: str) -> None:
    with Camera(kind, "--sound") as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(4 * RATE)
        assert abs(beep_after_flash(watch)) < 0.15


def beep_after_flash(watch: Watch, since: int = 0) -> float:
    """Seconds from a flash to its beep, the median of those that were seen whole."""
    flashes, beeps = [], []
    was = True
    for frame in watch.frames[since:]:
        flashing = is_flashing(frame.planes[0].numpy())
        if flashing and not was:
            flashes.append(frame.ticks / 90000)
        was = flashing
    assert watch.capture.audio is not None
    decoder = open_decoder(watch.capture.audio)
    was = True
    for packet in watch.sounds:
        for sound in decoder.decode(packet):
            loud = bool(abs(sound.to_ndarray()).max() > 0.1)
            if loud and not was:
                beeps.append((packet.pts or 0) / 90000)
            was = loud
    assert flashes
    assert beeps
    offs = sorted((min(((beep - flash) for beep in beeps), key=abs) for flash in flashes), key=abs)
    return offs[len(offs) // 2]


def test_the_test_picture() -> None:
    with Watch(parse_source("test:", size="64x48", fps="20")) as watch:
        watch.wait_for_frames(20)
        assert watch.capture.info.rate == 20
        assert watch.capture.audio is not None
        steps = [b.ticks - a.ticks for a, b in pairwise(watch.frames)]
        assert set(steps) == {4500}
        assert [tuple(plane.shape) for plane in watch.frames[0].planes] == [(48, 64), (24, 32), (24, 32)]
        assert all(plane.dtype == torch.uint8 for plane in watch.frames[0].planes)
    assert_rises(watch)


def test_a_graph_ends() -> None:
    with Watch("test:testsrc2=s=64x48:r=25:d=1,format=gbrp") as watch:
        watch.wait(lambda: watch.capture.is_ended)
        assert watch.capture.error is None
        assert watch.kinds()[-1] == "ended"
    assert [frame.ticks for frame in watch.frames] == [k * 3600 for k in range(25)]
    assert watch.capture.info.pixel_format.name == "gbrp"


def test_transparency_and_odd_formats_become_planes() -> None:
    for name, planar in (("bgra", "gbrp"), ("yuva420p", "yuv420p"), ("nv12", "yuv420p"), ("yuyv422", "yuv422p")):
        with Watch(f"test:testsrc2=s=64x48:r=25:d=0.2,format={name}") as watch:
            assert watch.capture.info.pixel_format.name == planar
            assert len(watch.frames[0].planes) == 3


def test_woven_pictures_are_told_of() -> None:
    with Watch("test:testsrc2=s=64x48:r=50:d=1,setfield=tff,realtime") as watch:
        assert any("interlaced" in event.message and "not deinterlaced" in event.message for event in watch.events)
        assert watch.capture.info.is_interlaced


def test_a_part_is_cut_out_and_moved() -> None:
    with Watch("test:testsrc2=s=64x48:r=25,format=yuv420p,realtime", roi=Roi(5, 3, 33, 17)) as watch:
        info = watch.capture.info
        assert (info.width, info.height) == (32, 16)
        assert (watch.capture.source_info.width, watch.capture.source_info.height) == (64, 48)
        assert watch.capture.roi == Roi(4, 2, 32, 16)
        assert [tuple(plane.shape) for plane in watch.frames[0].planes] == [(16, 32), (8, 16), (8, 16)]
        assert watch.capture.move_roi(9, 11) == (8, 10)
        assert watch.capture.move_roi(-7, 1000) == (0, 32)
        watch.wait_for_frames(3)
        assert [tuple(plane.shape) for plane in watch.frames[-1].planes] == [(16, 32), (8, 16), (8, 16)]
    with (
        Watch("test:testsrc2=s=64x48:r=25:d=0.1,format=yuv420p") as whole,
        Watch("test:testsrc2=s=64x48:r=25:d=0.1,format=yuv420p", roi=Roi(4, 2, 32, 16)) as part,
    ):
        for k, (y, x, h, w) in enumerate(((2, 4, 16, 32), (1, 2, 8, 16), (1, 2, 8, 16))):
            assert torch.equal(part.frames[0].planes[k], whole.frames[0].planes[k][y : y + h, x : x + w])
        with pytest.raises(OptionError, match="only a part"):
            whole.capture.move_roi(0, 0)
    with pytest.raises(OptionError, match="does not fit into the camera's picture of 64x48"):
        Watch("test:testsrc2=s=64x48:r=25:d=0.1", roi=Roi(40, 0, 32, 16)).__enter__()


def test_a_bare_stream_goes_by_arrival(tmp_path: Path) -> None:
    """H.264 without a container has no times; FFmpeg would make up 25 frames a second."""
    code = (
        "import sys, time; from tests.live.cameras import bare_h264\n"
        "for packet in bare_h264(): sys.stdout.buffer.write(packet); sys.stdout.buffer.flush(); time.sleep(0.1)\n"
    )
    with piped([sys.executable, "-c", code]) as watch:
        watch.wait(lambda: watch.capture.is_ended)
        assert watch.capture.error is None
    steps = [(b.ticks - a.ticks) / 90000 for a, b in pairwise(watch.frames)]
    assert 0.07 < sum(steps[2:]) / len(steps[2:]) < 0.3


class piped:  # noqa: N801 - reads as a phrase: with piped(command) as watch
    """Watches what a command writes to this process's standard input."""

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def __enter__(self) -> Watch:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, cwd=ROOT)
        assert self._process.stdout is not None
        self._before = sys.stdin
        sys.stdin = self._process.stdout  # type: ignore[assignment]
        self._watch = Watch("-")
        try:
            return self._watch.__enter__()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *words: Any) -> None:
        try:
            self._watch.__exit__(*words)
        finally:
            self._leave()

    def _leave(self) -> None:
        sys.stdin = self._before
        self._process.kill()
        self._process.communicate()


def test_standard_input_that_falls_silent_can_be_left() -> None:
    code = "import sys, time; from tests.live.cameras import bare_h264\n"
    code += "for p in bare_h264(): sys.stdout.buffer.write(p)\nsys.stdout.flush(); time.sleep(60)\n"
    with piped([sys.executable, "-c", code]) as watch:
        # All of them may have come before this line is reached.
        watch.wait(lambda: bool(watch.frames))


@pytest.mark.parametrize("suffix", ["nut", "mkv"])
def test_standard_input_that_falls_silent_is_left_without_a_word(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """These demuxers ask once more after an error."""
    film = make_clip(tmp_path / f"film.{suffix}", width=64, height=48, frames=10, rate=20)
    with piped(["sh", "-c", f"cat '{film}'; exec sleep 60"]) as watch:
        watch.wait(lambda: len(watch.frames) > 7)
    assert watch.capture.error is None
    assert capfd.readouterr().err == ""


def test_standard_input_that_is_no_video() -> None:
    with pytest.raises(SourceError, match=r"standard input: .*no video"), piped(["head", "-c", "100000", "/dev/zero"]):
        pass


WRONG: dict[str, tuple[Callable[[int], str], str]] = {
    "refused": (lambda port: f"rtsp://user:secret@127.0.0.1:{port}/1", "connection refused: nothing listens there"),
    "refused, tcp": (lambda port: f"tcp://127.0.0.1:{port}", "connection refused"),
    "refused, http": (lambda port: f"http://user:secret@127.0.0.1:{port}/video", "connection refused"),
    "refused, rtmp": (lambda port: f"rtmp://127.0.0.1:{port}/live/1", "refused|input/output"),
    "no such host": (lambda port: f"rtsp://user:secret@no-such-host.invalid:{port}/1", "check the host's name"),
    "no such device": (lambda port: "/dev/video97", "no such device"),
    "nobody sends": (lambda port: f"udp://127.0.0.1:{port}", "no picture within 2 s"),
    "nobody comes": (lambda port: f"rtmp://127.0.0.1:{port}/live/1?listen=1", "no picture within 2 s"),
    "no such screen": (lambda port: "screen::4711", "screen cannot be grabbed"),
    "no such graph": (lambda port: "test:nonsense=1", ""),
    "no picture in the graph": (lambda port: "test:sine=d=1", "no video"),
    "srt": (lambda port: f"srt://127.0.0.1:{port}?passphrase=secret-secret", ""),
}


def refused(source: str, **options: float) -> str:
    """The message with which a source cannot be opened; in time, in one line, without its password."""
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        Watch(source, **options).__enter__()
    assert time.monotonic() - began < options.get("open_timeout", 5) + 0.5
    said = str(caught.value)
    assert "\n" not in said
    assert "secret" not in said
    return said


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.live) if case == "srt" else case for case in WRONG]
)
def test_what_is_not_there(case: str) -> None:
    url, said = WRONG[case]
    message = refused(url(free_port()), **({"open_timeout": 2.0} if "nobody" in case else {}))
    assert any(part in message.lower() for part in said.lower().split("|"))


@pytest.mark.parametrize(("scheme", "seconds"), [("rtsp", 5.0), ("rtmp", 2.0), ("http", 2.0), ("tcp", 2.0)])
def test_a_server_that_says_nothing(scheme: str, seconds: float) -> None:
    with mute_server() as port:
        said = refused(f"{scheme}://user:secret@127.0.0.1:{port}/live/1", open_timeout=seconds)
    assert f"no picture within {seconds:g} s" in said


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_wrong_password(scheme: str) -> None:
    with refusing_server() as port:
        said = refused(f"{scheme}://user:secret@127.0.0.1:{port}/video")
    assert f"{scheme}://user:***@127.0.0.1:{port}/video: " in said
    assert "refuses this user and password (401" in said


def test_the_right_password() -> None:
    with Camera("mjpeg", "--password", "secret") as camera:
        assert "401" in refused(camera.url)
        assert "401" in refused(camera.url.replace("127", "user:other@127"))
        with Watch(camera.url.replace("127", "user:secret@127")) as watch:
            watch.wait_for_frames(5)


def test_what_is_no_video() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Zeros) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            assert "no video that FFmpeg knows" in refused(f"tcp://127.0.0.1:{server.server_address[1]}")
        finally:
            server.shutdown()
            thread.join()


class Zeros(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.request.sendall(bytes(100_000))


def test_stop_ends_the_wait_for_the_first_picture() -> None:
    stop = threading.Event()
    with mute_server() as port:
        watch = Watch(f"tcp://127.0.0.1:{port}", stop=stop)
        threading.Timer(0.5, stop.set).start()
        began = time.monotonic()
        with pytest.raises(CancelledError):
            watch.__enter__()
        assert time.monotonic() - began < 3


def test_a_callback_that_fails_ends_the_capture_and_is_told() -> None:
    seen: list[Captured] = []

    def fail(captured: Captured) -> None:
        seen.append(captured)
        if len(seen) > 3:
            raise ZeroDivisionError("of the callback")

    capture = Capture(parse_source("test:"), on_frame=fail, on_event=lambda event: None)
    with capture:
        deadline = time.monotonic() + 10
        while not capture.is_ended and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(capture.error, ZeroDivisionError)
        assert not capture.figures.is_up


def test_a_slow_consumer_does_not_slow_the_camera() -> None:
    """Frames are handed over as they come: none is waited for, and nothing piles up in the connection."""
    with Camera("tcp") as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(RATE)
        # The consumer of a real run takes the newest, or none; here nobody takes any.
        before = time.time()
        watch.wait_for_frames(RATE)
        assert time.time() - before < 5
        newest = watch.frames[-1]
        assert time.time() * 1000 - read_clock(newest.planes[0].numpy()) < 1500


@pytest.mark.parametrize("suffix", [".mkv", *slow(".mp4", ".ts")])
def test_the_source_is_recorded_as_it_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"source{suffix}"
    with Camera("tcp", "--sound", "--gop", "5") as camera, Watch(camera.url, record=path) as watch:
        watch.wait_for_frames(3 * RATE)
    assert watch.capture.figures.record_dropped == 0
    with av.open(str(path)) as film:
        assert [stream.codec_context.name for stream in film.streams] == ["h264", "aac"]
        pictures = list(film.decode(video=0))
    assert len(watch.frames) - 6 < len(pictures) <= len(watch.frames) + 1
    # The same pictures, at the same distances.
    first = [read_clock(frame.to_ndarray(format="gray")) for frame in pictures[:10]]
    seen = [read_clock(frame.planes[0].numpy()) for frame in watch.frames]
    assert set(first) <= set(seen)
    place = seen.index(first[0])
    for k, picture in enumerate(pictures[:10]):
        expected = (watch.frames[place + k].ticks - watch.frames[place].ticks) / 90000
        assert abs(float((picture.time or 0) - (pictures[0].time or 0)) - expected) < 0.002


def test_a_recording_of_mjpeg_goes_by_arrival(tmp_path: Path) -> None:
    path = tmp_path / "source.mkv"
    with Camera("mjpeg") as camera, Watch(camera.url, record=path) as watch:
        watch.wait_for_frames(2 * RATE)
    with av.open(str(path)) as film:
        times = [float(frame.time or 0) for frame in film.decode(video=0)]
    assert len(times) > RATE
    assert abs((times[-1] - times[0]) - (watch.frames[-1].ticks - watch.frames[0].ticks) / 90000) < 0.5


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"raw pictures \(wrapped_avframe\)"):
        Watch("test:", record=tmp_path / "a.mkv").__enter__()
    assert not (tmp_path / "a.mkv").exists()
    with pytest.raises(OptionError, match="must end in"):
        Watch("test:", record=tmp_path / "a.avi")
    (tmp_path / "there.mkv").touch()
    with pytest.raises(OutputError, match="is there already"):
        Watch("test:", record=tmp_path / "there.mkv")
    with pytest.raises(OutputError, match="folder"):
        Watch("test:", record=tmp_path / "no" / "a.mkv")


class Screen:
    """An X server without a screen to look at. A context manager."""

    def __init__(self) -> None:
        self.number = free_port() % 1000 + 100

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        # Its socket is there before it answers; it says when it does.
        words = ["Xvfb", f":{self.number}", "-screen", "0", "320x200x24", "-nolisten", "tcp", "-displayfd", "1"]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None
        assert int(self._process.stdout.readline()) == self.number

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()
        Path(f"/tmp/.X11-unix/X{self.number}").unlink(missing_ok=True)
        Path(f"/tmp/.X{self.number}-lock").unlink(missing_ok=True)


@pytest.mark.live
def test_a_screen_is_grabbed() -> None:
    with Screen() as screen, Watch(parse_source(f"screen::{screen.number}", fps="20", size="160x100")) as watch:
        watch.wait_for_frames(20)
        assert (watch.capture.info.width, watch.capture.info.height) == (160, 100)
        assert watch.capture.info.pixel_format.name == "gbrp"
        screen.kill()
        watch.wait(lambda: "down" in watch.kinds())
        screen.start()
        watch.wait_for_frames(20)
    assert_rises(watch)
    seconds = (watch.frames[19].ticks - watch.frames[0].ticks) / 90000
    assert 0.5 < seconds < 5


@pytest.mark.live
def test_a_screen_that_hangs_can_be_left() -> None:
    """Nothing ends a call into a driver; it is left alone, and its thread ends when it returns."""
    with Screen() as screen:
        with Watch(f"screen::{screen.number}") as watch:
            watch.wait_for_frames(3)
            screen.signal(signal.SIGSTOP)
            time.sleep(1)
        screen.signal(signal.SIGCONT)


@pytest.mark.live
def test_no_child_outlives_a_killed_run() -> None:
    with Camera("srt") as camera:
        code = (
            "import time; from hat_video.live.capture import Capture\n"
            "from hat_video.live.sources import parse_source\n"
            f"capture = Capture(parse_source({camera.url!r}), on_frame=print, on_event=print)\n"
            "with capture: print('seen', flush=True); time.sleep(60)\n"
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while "seen" not in process.stdout.readline():
            assert process.poll() is None
        [child] = (Path(f"/proc/{process.pid}/task").glob("*/children"),)
        started = {int(word) for path in child for word in path.read_text().split()}
        assert started
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in started):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_film_that_is_piped_in_keeps_its_pace(tmp_path: Path) -> None:
    film = make_clip(tmp_path / "film.mkv", width=64, height=48, frames=30, rate=20)
    began = time.monotonic()
    with piped(["cat", str(film)]) as watch:
        watch.wait(lambda: watch.capture.is_ended)
    assert time.monotonic() - began > 1.2
    assert [frame.ticks for frame in watch.frames] == [k * 4500 for k in range(30)]
