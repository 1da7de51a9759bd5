"""A camera that is killed, frozen, started again or changed: the run goes on, and so does its time."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import av
import pytest

from hat_video.errors import SourceError
from tests.live.cameras import RATE, Camera, read_clock, slow
from tests.live.leftovers import free_port
from tests.live.test_capture import Watch, assert_rises, beep_after_flash

pytestmark = pytest.mark.usefixtures("no_leftovers")


def assert_time_went_on(watch: Watch, gap_at: int) -> None:
    """The ticks say of the gap what the clock in the pictures says of it."""
    assert_rises(watch)
    before, after = watch.frames[gap_at - 1], watch.frames[gap_at]
    # From 0.5 s after the gap on: what had piled up in the connection is through by then.
    gap = (after.ticks - before.ticks) / 90000
    seen = (read_clock(after.planes[0].numpy()) - read_clock(before.planes[0].numpy())) / 1000
    assert abs(gap - seen) < 2.5, (gap, seen)


@pytest.mark.parametrize("kind", ["tcp", *slow("udp", "rtmp", "mjpeg", "rtsp", "srt")])
def test_a_killed_camera_comes_back(kind: str) -> None:
    with Camera(kind) as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(RATE)
        camera.kill()
        watch.wait(lambda: "down" in watch.kinds())
        watch.wait(lambda: not watch.capture.figures.is_up)
        count = len(watch.frames)
        camera.start()
        watch.wait_for_frames(RATE)
        figures = watch.capture.figures
        assert figures.reconnects == 1
        assert figures.is_up
        assert [kind for kind in watch.kinds() if kind != "down"] == ["up"]
    assert_time_went_on(watch, count)


@pytest.mark.parametrize("kind", ["tcp", *slow("rtmp")])
def test_sound_and_pictures_stay_together(kind: str) -> None:
    with Camera(kind, "--sound") as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(2 * RATE)
        camera.kill()
        watch.wait(lambda: "down" in watch.kinds())
        count = len(watch.frames)
        camera.start()
        watch.wait_for_frames(4 * RATE)
    assert_rises(watch)
    assert abs(beep_after_flash(watch, count)) < 0.15


@pytest.mark.parametrize("kind", ["tcp", *slow("rtsp", "mjpeg")])
def test_a_frozen_camera_is_noticed_and_comes_back(kind: str) -> None:
    with Camera(kind) as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(RATE)
        camera.freeze()
        watch.wait(lambda: "down" in watch.kinds())
        assert any(event.message.startswith("silent for 2 s") for event in watch.events), watch.events
        count = len(watch.frames)
        time.sleep(1)
        camera.thaw()
        watch.wait_for_frames(RATE)
    assert_time_went_on(watch, count)


@pytest.mark.live
def test_a_short_freeze_breaks_nothing() -> None:
    with Camera("tcp") as camera, Watch(camera.url, stall_seconds=8) as watch:
        watch.wait_for_frames(RATE)
        camera.freeze()
        time.sleep(2)
        camera.thaw()
        watch.wait_for_frames(2 * RATE)
        assert watch.capture.figures.reconnects == 0
        assert watch.kinds() == []
    assert_rises(watch)
    gap = max(b.ticks - a.ticks for a, b in pairwise(watch.frames)) / 90000
    assert 1.5 < gap < 4


@pytest.mark.parametrize("kind", ["tcp", "rtsp", *slow("rtmp", "udp", "mjpeg")])
def test_a_silent_source_can_be_left(kind: str) -> None:
    """`Watch` asserts that leaving takes less than two seconds; here the camera says nothing, in a read that waits."""
    with Camera(kind) as camera, Watch(camera.url, stall_seconds=60) as watch:
        watch.wait_for_frames(2)
        camera.freeze()
        time.sleep(0.5)


@pytest.mark.live
def test_an_unreachable_source_can_be_left() -> None:
    """The same, in the middle of a try to connect: the camera's port takes calls, and nobody answers."""
    with Camera("rtsp") as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(2)
        camera.freeze()
        watch.wait(lambda: "down" in watch.kinds())
        time.sleep(1)


def test_retries_end() -> None:
    with Camera("tcp") as camera, Watch(camera.url, retries=2) as watch:
        watch.wait_for_frames(2)
        camera.kill()
        watch.wait(lambda: watch.capture.is_ended)
        assert isinstance(watch.capture.error, SourceError)
        assert "connection refused" in str(watch.capture.error)
        assert "given up after 2 more tries" in str(watch.capture.error)
        assert watch.kinds() == ["down", "down", "failed"]


@pytest.mark.live
def test_the_pauses_grow() -> None:
    with Camera("tcp") as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(2)
        camera.kill()
        watch.wait(lambda: watch.kinds().count("down") == 4)
        pauses = [float(event.message.rsplit("again in ", 1)[1].split()[0]) for event in watch.events]
    for pause, least in zip(pauses, (0.125, 0.25, 0.5, 1.0), strict=True):
        assert least - 0.05 <= pause <= 3 * least + 0.05


@pytest.mark.parametrize("jump", ["3600", *slow("-1.5")])
def test_a_camera_that_sets_its_clock(jump: str) -> None:
    with Camera("tcp", f"--jump={jump}@3") as camera, Watch(camera.url) as watch:
        watch.wait(lambda: watch.capture.figures.reanchored > 0 or "down" in watch.kinds())
        watch.wait_for_frames(RATE)
        assert_rises(watch)
        ticks = [frame.ticks / 90000 for frame in watch.frames]
        assert max(b - a for a, b in pairwise(ticks)) < 2.5


def test_a_camera_that_comes_back_with_another_picture() -> None:
    port = free_port()
    with Camera("tcp", port=port) as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(5)
        camera.kill()
        # What it had sent before is still on its way.
        watch.wait(lambda: "down" in watch.kinds())
        count = len(watch.frames)
        with Camera("tcp", "--width", "384", "--height", "192", port=port):
            watch.wait(lambda: watch.capture.is_ended)
        figures = watch.capture.figures
        assert figures.dropped["changed"] > 5
        assert len(watch.frames) == count
        said = str(watch.capture.error)
        assert "its picture is 384x192 yuv420p now; the run began with 320x176 yuv420p" in said


@pytest.mark.live
def test_another_picture_for_a_moment_is_passed_over() -> None:
    port = free_port()
    with Camera("tcp", port=port) as camera, Watch(camera.url) as watch:
        watch.wait_for_frames(5)
        camera.kill()
        with Camera("tcp", "--width", "384", "--height", "192", port=port):
            watch.wait(lambda: watch.capture.figures.dropped["changed"] > 5)
        camera.start()
        watch.wait_for_frames(RATE)
        assert watch.capture.error is None
    assert_rises(watch)


def test_a_recording_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "source.mkv"
    with Camera("tcp", "--sound", "--gop", "5") as camera, Watch(camera.url, record=path) as watch:
        watch.wait_for_frames(RATE)
        camera.kill()
        watch.wait(lambda: "down" in watch.kinds())
        camera.start()
        watch.wait_for_frames(RATE)
    with av.open(str(path)) as film:
        pictures = [frame for frame in film.decode(video=0) if frame.pts is not None]
    times = [frame.pts for frame in pictures]
    assert all(a < b for a, b in pairwise(times))
    assert len(pictures) > len(watch.frames) - 12
    recorded = float(pictures[-1].time or 0) - float(pictures[0].time or 0)
    assert abs(recorded - (watch.frames[-1].ticks - watch.frames[0].ticks) / 90000) < 0.5
