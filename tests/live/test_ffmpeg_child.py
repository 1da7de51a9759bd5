"""FFmpeg's program at the end of a pipe: what it is asked, and what is said where it is not there."""

from __future__ import annotations

import threading
import time
from fractions import Fraction
from typing import Any

import av
import pytest

from hat_video.errors import OutputError, SourceError
from hat_video.media.ffmpeg_child import FfmpegChild, find_ffmpeg, push_command
from tests.live.cameras import draw
from tests.live.leftovers import free_port
from tests.live.test_capture import Watch, refused

pytestmark = pytest.mark.usefixtures("no_leftovers")


def test_what_is_said_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAT_VIDEO_FFMPEG", "/nowhere/ffmpeg")
    said = refused("srt://127.0.0.1:9?passphrase=secret-secret")
    assert "srt:// needs the program ffmpeg, and /nowhere/ffmpeg is not there: install FFmpeg with libsrt" in said
    with pytest.raises(OutputError, match="install FFmpeg with libsrt"):
        find_ffmpeg(is_output=True)
    monkeypatch.setenv("HAT_VIDEO_FFMPEG", "true")
    with pytest.raises(SourceError, match="is not built into"):
        find_ffmpeg()


def test_last_words_and_end() -> None:
    with FfmpegChild(["sh", "-c", "echo one >&2; echo two >&2; sleep 60"]) as child:
        while child.last_words != "two":
            assert child.process.poll() is None
    assert child.process.poll() is not None
    child.close()


@pytest.mark.live
def test_what_is_pushed_arrives() -> None:
    """NUT into a child that calls, a transport stream out of one that listens."""
    port = free_port()
    url = f"srt://127.0.0.1:{port}"
    watch = Watch(f"{url}?mode=listener", open_timeout=15.0)
    with FfmpegChild(push_command(url, find_ffmpeg(is_output=True)), reads=True) as child:
        out = av.open(_Unclosed(child.stdin), "w", format="nut", options={"flush_packets": "1"})
        video: Any = out.add_stream(
            "libx264", rate=15, options={"preset": "ultrafast", "tune": "zerolatency", "g": "5"}
        )
        video.width, video.height, video.pix_fmt = 320, 176, "yuv420p"
        stop = threading.Event()

        def push() -> None:
            k = 0
            while not stop.wait(1 / 15):
                frame = av.VideoFrame.from_ndarray(draw(k, int(time.time() * 1000), False), "rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 15)
                k += 1
                try:
                    out.mux(video.encode(frame))
                except OSError:
                    return

        thread = threading.Thread(target=push)
        thread.start()
        try:
            with watch:
                watch.wait_for_frames(20)
        finally:
            stop.set()
            thread.join()


class _Unclosed:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        self._file.write(data)
        return len(data)
