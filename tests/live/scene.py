"""A small live run for tests of the page: moving pictures, a real x264, packets as the run's encoder makes them."""

from __future__ import annotations

import io
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from types import TracebackType
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from websockets.sync.client import ClientConnection, connect

from hat_video.color import from_rgb
from hat_video.frames import ColorInfo, PixelFormat, VideoInfo
from hat_video.live.encode import LivePacket
from hat_video.live.figures import LiveFigures, OutputFigures, RungFigures
from hat_video.live.page import Page
from hat_video.media.encoder import add_video, plan_encoder
from hat_video.media.encoder_frames import EncoderFrames

TICKS = Fraction(1, 90000)
BT601 = ColorInfo(6, 6, 6, False)
SMALL = VideoInfo(160, 90, TICKS, Fraction(15), PixelFormat.parse("yuv420p"), BT601)
TOKEN = "0123456789abcdef"


def figures(**changes: object) -> LiveFigures:
    made = LiveFigures(
        source="rtsp://user:***@camera/1",
        seconds=75.0,
        is_source_up=True,
        input_size=(160, 90),
        output_size=(320, 180),
        frames_in=1125,
        frames_out=1000,
        frames_held=0,
        dropped={"overload": 120, "no_pts": 5},
        fps_in=15.0,
        fps_out=13.3,
        latency_p50_seconds=0.061,
        latency_p99_seconds=0.142,
        rung="hat-nano",
        rungs=(
            RungFigures("hat-nano", 700, 0.055),
            RungFigures("hat-pico", 200, 0.022),
            RungFigures("bicubic", 100, 0.002),
        ),
        rung_changes=4,
        reused_frames=12,
        reconnects=1,
        stage_seconds={"decode": 1.5, "model": 55.0, "encode": 9.25},
        latency_buckets={0.05: 300, 0.1: 900, 0.25: 990, float("inf"): 1000},
        latency_sum_seconds=68.5,
        outputs=(
            OutputFigures("rec-%H.mp4", True, 1000, 5_200_000),
            OutputFigures("rtmp://live/x?key=***", False, 400, 2_000_000, 600, 3, "connection refused"),
        ),
        source_size=(160, 90),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


class State:
    """What the run says about itself."""

    def __init__(self, **changes: object) -> None:
        self.told = figures(**changes)

    def figures(self) -> LiveFigures:
        return self.told

    def move_roi(self, x: int, y: int) -> tuple[int, int] | None:
        if self.told.roi is None:
            return None
        (width, height), (_, _, w, h) = self.told.source_size, self.told.roi
        at = max(0, min(width - w, x)) & ~1, max(0, min(height - h, y)) & ~1
        self.told = replace(self.told, roi=(*at, w, h))
        return at


class Coder:
    """x264 in a container in memory, as the run has it."""

    def __init__(
        self,
        info: VideoInfo = SMALL,
        scale: int = 2,
        *,
        name: str = "libx264",
        key_seconds: float = 1.0,
        crf: int | None = 23,
    ) -> None:
        tune = {"tune": "zerolatency"} if name in ("libx264", "libx265") else {}
        self.spec, self.info = plan_encoder(
            "matroska", info, info.width * scale, info.height * scale, name=name, crf=crf,
            preset="ultrafast" if tune else None, options=tune, threads=1,
        )  # fmt: skip
        self._hub = av.open(io.BytesIO(), "w", format="matroska")
        self.video_template: Any = add_video(self._hub, self.spec, self.info)
        self.video_template.codec_context.gop_size = 100000
        self._hub.start_encoding()
        self._frames = EncoderFrames(self.spec.pixel_format, self.info)
        self._asked = threading.Event()
        self._key_ticks, self._next_key = round(key_seconds * 90000), 0
        self.asked = 0

    def ask_for_key(self) -> None:
        self.asked += 1
        self._asked.set()

    def encode(self, planes: list[Tensor], ticks: int, captured: float) -> list[LivePacket]:
        frame = self._frames.frame(planes, ticks)
        if self._asked.is_set() or ticks >= self._next_key:
            self._asked.clear()
            self._next_key = ticks + self._key_ticks
            frame.pict_type = 1
        return self._packets(frame, captured)

    def flush(self) -> list[LivePacket]:
        """What the encoder still holds; nothing can be encoded after it."""
        return self._packets(None, None)

    def _packets(self, frame: av.VideoFrame | None, captured: float | None) -> list[LivePacket]:
        return [
            LivePacket("video", bytes(made), made.pts, made.dts, 0, made.time_base, made.is_keyframe, captured)
            for made in self.video_template.encode(frame)
        ]

    def close(self) -> None:
        self._hub.close()


def picture(index: int, info: VideoInfo, *, noise: bool = False) -> list[Tensor]:
    """Planes, (h, w) each, of a picture with a bar whose place says which frame it is; `noise` costs many bits."""
    y, x = np.mgrid[0 : info.height, 0 : info.width].astype(np.float32)
    rgb = np.stack([x / info.width, y / info.height, 1 - x / info.width])
    if noise:
        rgb = np.random.default_rng(index).random(rgb.shape, np.float32)
    left = index * 4 % (info.width - 8)
    rgb[:, : info.height // 4, left : left + 8] = 1
    return [plane[0] for plane in from_rgb(torch.from_numpy(rgb)[None], info.pixel_format, info.color)]


class Scene:
    """A page that is fed from a thread, `fps` pictures a second."""

    def __init__(
        self, *, address: str = "127.0.0.1:0", token: str | None = None, fps: float = 15, noise: bool = False,
        coder: Coder | None = None, state: State | None = None, camera: bool = False,
        draw: Callable[[int, VideoInfo], list[Tensor]] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.coder = coder or Coder()
        self.state = state or State()
        self.stop = threading.Event()
        self.page = Page(address, token=token, state=self.state, encoder=self.coder, stop=self.stop, **options)
        self._fps, self._noise, self._camera, self._draw = fps, noise, camera, draw
        self._is_done = threading.Event()
        self.is_paused = threading.Event()
        self.slowest = 0.0
        """Seconds that the slowest `send` took."""
        self.last_ticks = 0

    def __enter__(self) -> Scene:
        self.page.__enter__()
        self._thread = threading.Thread(target=self._feed, name="scene")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish_feeding()
        fault = self.page.output_figures.error
        threads = [thread for thread in (self.page._thread, *self.page.worker._threads) if thread is not None]
        self.page.close()
        self.coder.close()
        if kind is None:
            assert fault is None, fault
            self.wait(lambda: not any(thread.is_alive() for thread in threads))

    def finish_feeding(self) -> None:
        self._is_done.set()
        self._thread.join()

    def _feed(self) -> None:
        large = self.coder.info
        small = SMALL if self._draw is None else replace(large, width=large.width // 2, height=large.height // 2)
        made = [picture(k, large, noise=self._noise) for k in range(8)] if self._draw is None else None
        before = [picture(k, small) for k in range(8)]
        began, k = time.monotonic(), 0
        while not self._is_done.is_set():
            captured = time.monotonic()
            if not self.is_paused.is_set():
                planes = self._draw(k, large) if self._draw is not None else made[k % 8]  # type: ignore[index]
                ticks = round((captured - began) * 90000)
                for packet in self.coder.encode(planes, ticks, captured):
                    at = time.monotonic()
                    self.page.send(packet)
                    self.slowest = max(self.slowest, time.monotonic() - at)
                    self.last_ticks = ticks
                source = [plane[::2, ::2].contiguous() for plane in planes] if self._draw is not None else before[k % 8]
                self.page.show(source, small, planes, large, (source, small) if self._camera else None)
            k += 1
            self._is_done.wait(max(0, began + k / self._fps - time.monotonic()))

    # ---- Asking, as other programs do.

    @property
    def port(self) -> int:
        return int(self.page.url.rstrip("/").rpartition(":")[2])

    def get(
        self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers by lower-case name, body)."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body, method=method)
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    def wait(self, is_true: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, "took too long"
            time.sleep(0.01)

    def open(self, request: str, *, receive_buffer: int | None = None) -> socket.socket:
        """A connection on which `request` was sent, and from which nothing is read."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(request.replace("\n", "\r\n").encode())
        return connection


def watch(scene: Scene, **options: Any) -> ClientConnection:
    """A viewer of the coded video."""
    address = f"ws://127.0.0.1:{scene.port}/stream"
    return connect(address, compression=None, max_size=None, open_timeout=20, **options)


def pictures_of(data: bytes) -> list[np.ndarray]:
    """Decoded by FFmpeg, as (H, W) luma."""
    with av.open(io.BytesIO(data), format="mp4") as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def read_jpeg(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    with av.open(io.BytesIO(data), format="jpeg_pipe") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


WEBSOCKET = """GET {path} HTTP/1.1
Host: 127.0.0.1
Upgrade: websocket
Connection: Upgrade
Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==
Sec-WebSocket-Version: 13

"""
