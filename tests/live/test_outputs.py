"""The fan-out: what an output may be called, queues that make nobody wait, and starts and ends that are clean."""

from __future__ import annotations

import os
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hat_video.errors import CancelledError, OptionError, OutputError
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.encode import AudioLine, LivePacket
from hat_video.live.output import Output, PacketQueue
from hat_video.live.outputs import FanOut, _Order, parse_output
from tests.live.feeding import (
    HEIGHT,
    STEP,
    WIDTH,
    head_of,
    look,
    made_encoder,
    make_sound,
    packets,
    picture,
    wait_until,
)
from tests.live.leftovers import free_port, nothing_left


@pytest.mark.parametrize(
    ("text", "kind", "container", "name"),
    [
        ("-", "stdout", "nut", "-"),
        ("a.mp4", "file", "mp4", "a.mp4"),
        ("a.MKV", "file", "matroska", "a.MKV"),
        ("cam-%Y%m%d.ts", "file", "mpegts", "cam-%Y%m%d.ts"),
        ("hls/", "hls", "mpegts", "hls/"),
        ("live.m3u8", "hls", "mpegts", "live.m3u8"),
        ("rtmp://host/app/x?token=abc", "network", "flv", "rtmp://host/app/x?token=***"),
        ("rtsp://me:pw@host/x", "network", "rtsp", "rtsp://me:***@host/x"),
        ("srt://host:1?passphrase=abc", "network", "mpegts", "srt://host:1?passphrase=***"),
        ("udp://[::1]:5000", "network", "mpegts", "udp://[::1]:5000"),
        ("vcam:", "vcam", None, "vcam"),
        ("vcam:/dev/video7", "vcam", None, "vcam:/dev/video7"),
    ],
)
def test_names(
    text: str, kind: str, container: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = parse_output(text)
    assert (plan.kind, plan.container, plan.name) == (kind, container, name)
    assert "abc" not in repr(plan)
    assert "pw" not in repr(plan)
    assert list(tmp_path.iterdir()) == [], "nothing is made"


@pytest.mark.parametrize(
    ("text", "options", "error", "match"),
    [
        ("", {}, OptionError, "is empty"),
        ("a.avi", {}, OptionError, r"-o a.avi: must be a file \(.mp4, .mkv, .ts\)"),
        ("folder", {}, OptionError, "is a folder; write folder/"),
        ("nowhere/a.mp4", {}, OutputError, "there is no folder nowhere"),
        ("nowhere/deep/", {}, OutputError, "there is no folder nowhere"),
        ("there.mp4", {}, OutputError, "exists; use --overwrite or another -o"),
        ("pipe.ts", {"may_replace": True}, OutputError, "is a device, a pipe"),
        ("link.ts", {"may_replace": True}, OutputError, "a broken link"),
        ("ftp://me:pw@host/x", {}, OptionError, r"ftp://me:\*\*\*@host/x: ftp:// is not known"),
        ("udp://host", {}, OptionError, "names no host and port"),
        ("rtmp:///live", {}, OptionError, "names no host"),
        ("rtmp://host:99999/x", {}, OptionError, "its port must be a number below 65536"),
        ("tcp://0.0.0.0:5?listen=1", {}, OptionError, "waits for none"),
        ("srt://0.0.0.0:5?mode=listener", {}, OptionError, "waits for none"),
        ("a.mp4", {"segment_seconds": 10.0}, OptionError, r"for instance a-%Y%m%d-%H%M%S.mp4"),
        ("a-%S.mp4", {"keep_seconds": 10.0}, OptionError, "give --segment too"),
        ("a-%S.mp4", {"segment_seconds": 0.5}, OptionError, "must be 1 s or more"),
        ("a-%S.mp4", {"segment_seconds": 60.0, "keep_seconds": 10.0}, OptionError, "must not be less than --segment"),
        ("-", {"stdout_format": "y4m"}, OptionError, "nut or mkv"),
    ],
)
def test_names_that_are_refused(
    text: str,
    options: dict[str, Any],
    error: type[Exception],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.mp4").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.ts")
    (tmp_path / "link.ts").symlink_to("nothing")
    with pytest.raises(error, match=match) as caught:
        parse_output(text, **options)
    assert "\n" not in str(caught.value)
    assert ":pw@" not in str(caught.value)


def test_a_folder_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="you may not write into"):
        parse_output(str(tmp_path / "a.mp4"))


def packet(number: int, *, is_key: bool = False, size: int = 100, kind: Any = "video") -> LivePacket:
    return LivePacket(kind, bytes(size), number * STEP, number * STEP, STEP, LIVE_TIME_BASE, is_key, None)


def taken(queue: PacketQueue) -> list[int]:
    numbers = []
    while (got := queue.get(0)) is not None:
        numbers.append(got.pts // STEP)
    return numbers


@pytest.mark.parametrize("keeps_old", [True, False])
def test_a_full_queue_drops_up_to_a_key_frame(keeps_old: bool) -> None:
    asked: list[int] = []
    queue = PacketQueue(seconds=60, size=1000, keeps_old=keeps_old, ask_for_key=lambda: asked.append(1))
    for number in range(40):
        queue.put(packet(number, is_key=number % 8 == 0))
    assert len(asked) >= 1
    numbers = taken(queue)
    if keeps_old:
        assert numbers == list(range(11))
        assert queue.dropped == 29
        queue.put(packet(41))
        queue.put(packet(42, is_key=True))
        assert taken(queue) == [42], "room alone is no reason: it cannot be decoded"
    else:
        assert numbers[0] % 8 == 0
        assert numbers[-1] == 39, "what is new"
        assert numbers == list(range(numbers[0], 40))
        assert queue.dropped == numbers[0]


def test_a_queue_that_nobody_empties_holds_no_more_than_it_may() -> None:
    for keeps_old in (True, False):
        queue = PacketQueue(seconds=0.05, size=1 << 30, keeps_old=keeps_old, ask_for_key=lambda: None)
        for number in range(40):
            queue.put(packet(number, is_key=number % 3 == 0))
            time.sleep(0.005)
        assert 0 < queue.dropped < 40
        assert len(taken(queue)) + queue.dropped == 40


def test_sound_waits_for_its_pictures_and_pictures_wait_for_nothing() -> None:
    order = _Order()
    assert order.put(packet(3, kind="audio")) == []
    assert order.put(packet(4, kind="audio")) == []
    assert [p.pts // STEP for p in order.put(packet(0, is_key=True))] == [0]
    assert [(p.kind, p.pts // STEP) for p in order.put(packet(4))] == [("audio", 3), ("video", 4)]
    assert [p.pts // STEP for p in order.put(packet(5, kind="audio"))] == [4]
    assert [p.pts // STEP for p in order.rest()] == [5]


def test_sound_goes_on_when_pictures_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hat_video.live.outputs._HELD_SECONDS", 0.05)
    order = _Order()
    assert order.put(packet(1, kind="audio")) == []
    time.sleep(0.1)
    assert [p.pts // STEP for p in order.put(packet(2, kind="audio"))] == [1]


class Stuck(Output):
    """An output whose write never returns, as on a disk that has gone away."""

    def __init__(self, ask_for_key: Callable[[], None]) -> None:
        super().__init__("stuck", ask_for_key=ask_for_key, queue_seconds=0.2)
        self.free = threading.Event()
        self.bytes = 0

    def connect(self) -> Any:
        return self

    def write(self, packet: LivePacket) -> bool:
        self.free.wait(30)
        return True

    def finish(self) -> None: ...
    def abandon(self) -> None: ...


def test_an_output_that_never_returns_is_felt_by_nobody(tmp_path: Path) -> None:
    encoder = made_encoder()
    with nothing_left():
        outputs = FanOut(encoder, [parse_output(str(tmp_path / "a.mkv"))], stop=threading.Event())
        stuck = Stuck(encoder.ask_for_key)
        with outputs:
            outputs._outputs.append(stuck)
            stuck.start()
            outputs.add(stuck)
            longest = 0.0
            for made in packets(encoder, range(100)):
                before = time.monotonic()
                outputs.send(made)
                longest = max(longest, time.monotonic() - before)
                time.sleep(0.01)
            assert longest < 0.5
            before = time.monotonic()
        assert time.monotonic() - before < 2.5
        assert stuck.figures.dropped > 50
        assert outputs.figures[0].frames == 100
        stuck.free.set()
    encoder.close()
    assert look(tmp_path / "a.mkv").frames == 100


def test_one_that_cannot_be_opened_leaves_nothing_of_the_others(tmp_path: Path) -> None:
    encoder = made_encoder()
    names = [str(tmp_path / "a.mp4"), str(tmp_path / "hls.m3u8"), f"tcp://127.0.0.1:{free_port()}"]
    before = time.monotonic()
    with nothing_left(), pytest.raises(OutputError, match="Connection refused"):
        FanOut(encoder, [parse_output(name) for name in names], stop=threading.Event()).__enter__()
    assert time.monotonic() - before < 5
    assert not (tmp_path / "a.mp4").exists()
    assert not list(tmp_path.glob("*.ts"))
    encoder.close()


def test_a_stop_while_opening() -> None:
    encoder = made_encoder()
    stop = threading.Event()
    stop.set()
    with nothing_left(), pytest.raises(CancelledError):
        FanOut(encoder, [parse_output(f"udp://127.0.0.1:{free_port()}")], stop=stop).__enter__()
    encoder.close()


def test_a_container_that_cannot_hold_the_stream(tmp_path: Path) -> None:
    encoder = made_encoder(name="libsvtav1", preset="12", options={})
    with pytest.raises(OutputError, match=r"a.ts: mpegts cannot hold the stream: av1 has no place in it"):
        FanOut(encoder, [parse_output(str(tmp_path / "a.ts"))], stop=threading.Event()).__enter__()
    encoder.close()
    assert list(tmp_path.iterdir()) == []


def test_the_same_twice_is_refused_and_names_are_told_apart(tmp_path: Path) -> None:
    encoder = made_encoder()
    plan = parse_output(str(tmp_path / "a.mkv"))
    with pytest.raises(OptionError, match="is given 2 times"):
        FanOut(encoder, [plan, plan], stop=threading.Event())
    urls = [f"udp://127.0.0.1:5001?token={secret}" for secret in ("one", "two")]
    outputs = FanOut(encoder, [parse_output(url) for url in urls], stop=threading.Event())
    assert outputs._names() == ["udp://127.0.0.1:5001?token=***", "udp://127.0.0.1:5001?token=*** (2)"]
    encoder.close()


def test_the_page_is_a_sink_like_others_and_late_ones_get_a_key_frame(tmp_path: Path) -> None:
    class Page:
        def __init__(self) -> None:
            self.got: list[LivePacket] = []
            self.is_closed = False

        def send(self, packet: LivePacket) -> None:
            self.got.append(packet)

        def close(self) -> None:
            self.is_closed = True

    tone = make_sound(tmp_path / "tone.mkv", 1)
    encoder = made_encoder(AudioLine(head_of(tone), "copy"), key_seconds=3600)
    page = Page()
    with FanOut(encoder, [], stop=threading.Event()) as outputs:
        for made in packets(encoder, range(5)):
            outputs.send(made)
        outputs.add(page)
        for made in packets(encoder, range(5, 10)):
            outputs.send(made)
        assert outputs.ended is None
        assert outputs.figures == ()
    encoder.close()
    assert [p.is_key for p in page.got] == [True, False, False, False, False]
    assert page.is_closed


class Camera:
    """In place of pyvirtualcam's, whose driver no test machine has."""

    made: Camera

    def __init__(self, *, width: int, height: int, fps: float, fmt: str, device: str | None) -> None:
        self.facts = (width, height, fps, fmt, device)
        self.shown: list[np.ndarray] = []
        self.is_closed = False
        Camera.made = self

    def send(self, picture: np.ndarray) -> None:
        self.shown.append(picture.copy())

    def close(self) -> None:
        self.is_closed = True


def test_a_virtual_camera_shows_the_newest_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("pyvirtualcam")
    library.Camera = Camera  # type: ignore[attr-defined]
    library.PixelFormat = types.SimpleNamespace(I420="I420")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyvirtualcam", library)
    encoder = made_encoder()
    with nothing_left(), FanOut(encoder, [parse_output("vcam:/dev/video7")], stop=threading.Event()) as outputs:
        for number in range(10):
            outputs.show(picture(number))
            outputs.send(encoder.encode(picture(number), number * STEP, 0.0))
        wait_until(lambda: outputs.figures[0].frames + outputs.figures[0].dropped == 10)
    camera = Camera.made
    assert camera.facts == (WIDTH, HEIGHT, 15.0, "I420", "/dev/video7")
    assert camera.is_closed
    expected = torch.cat([plane.reshape(-1) for plane in picture(9)]).numpy()
    assert np.array_equal(camera.shown[-1], expected)
    encoder.close()


def test_a_virtual_camera_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvirtualcam", None)
    encoder = made_encoder()
    with (
        nothing_left(),
        pytest.raises(OutputError, match=r"vcam: needs pyvirtualcam; pip install 'hat-video\[vcam\]'"),
    ):
        FanOut(encoder, [parse_output("vcam:")], stop=threading.Event()).__enter__()
    encoder.close()
