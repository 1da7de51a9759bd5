"""Cameras that are real processes: they can be killed, frozen and started again, as cameras are.

`with Camera("udp") as camera:` starts one, `camera.url` is what to open. By hand:
`python -m tests.live.cameras udp 5000`.

The picture has the wall clock in it, in milliseconds since 1970, as 44 black and white cells (`read_clock` reads
them): what a picture says, subtracted from the time at which it is seen, is how late it is. Once a second, for a tenth
of it, a square flashes at the lower right and the sound beeps: the two belong together.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import io
import os
import random
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import pytest

from tests.live.leftovers import free_port

__all__ = [
    "KINDS",
    "Camera",
    "bare_h264",
    "is_flashing",
    "mute_server",
    "read_clock",
    "refusing_server",
]

ROOT = Path(__file__).parents[2]
KINDS = ("udp", "tcp", "rtmp", "mjpeg", "hls", "rtsp", "srt")
WIDTH, HEIGHT, RATE = 320, 176, 15
SOUND_RATE, FLASH_SECONDS = 48000, 0.1
_BITS, _ACROSS = 44, 22
_TIMES = Fraction(1, 90000)
_FLUSH = {"flush_packets": "1"}


def draw(number: int, milliseconds: int, flashes: bool, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W, 3) uint8: the clock in cells, something that moves, and the flash."""
    picture = np.full((height, width, 3), 40, np.uint8)
    left = (number * 4) % (width - 80)
    picture[100:140, left : left + 40] = (220, 60, 60)
    for bit in range(_BITS):
        row, column = divmod(bit, _ACROSS)
        value = 255 if milliseconds >> bit & 1 else 0
        picture[8 + row * 16 : 22 + row * 16, 6 + column * 14 : 18 + column * 14] = value
    picture[-32:, -32:] = 255 if flashes else 0
    return picture


def read_clock(luma: np.ndarray, scale: float = 1) -> int:
    """The wall clock that a picture shows, in milliseconds since 1970.

    Args:
        luma: (H, W), 8 bits, of the picture `scale` times as large as the camera's.
    """
    found = 0
    for bit in range(_BITS):
        row, column = divmod(bit, _ACROSS)
        y, x = int((15 + row * 16) * scale), int((12 + column * 14) * scale)
        found |= int(luma[y - 1 : y + 2, x - 1 : x + 2].mean() > 128) << bit
    return found


def is_flashing(luma: np.ndarray) -> bool:
    """Whether the square at the lower right is white."""
    height, width = luma.shape
    scale = width / WIDTH
    part = int(8 * scale)
    return bool(luma[height - 3 * part : height - part, width - 3 * part : width - part].mean() > 128)


def slow(*words: str) -> list[Any]:
    """Cases for `make test-live` only: each takes seconds, and the others go through the same code."""
    return [pytest.param(word, marks=pytest.mark.live) for word in words]


class Camera:
    """A camera in a process of its own. A context manager; it is killed at the end.

    Args:
        kind: one of KINDS. `rtmp` comes to us (`camera.url` listens), the others are called; `srt` needs Debian's
            ffmpeg.
        words: further ones of this file's command line (`--gop 15`, `--jump 100@3`, `--password secret`).
    """

    def __init__(self, kind: str, *words: str, port: int | None = None) -> None:
        self.kind, self.words, self.port = kind, words, port or free_port()
        self.url = {
            "udp": f"udp://127.0.0.1:{self.port}",
            "tcp": f"tcp://127.0.0.1:{self.port}",
            "rtmp": f"rtmp://127.0.0.1:{self.port}/live/cam?listen=1",
            "mjpeg": f"http://127.0.0.1:{self.port}/video.mjpg",
            "hls": f"http://127.0.0.1:{self.port}/live.m3u8",
            "rtsp": f"rtsp://127.0.0.1:{self.port}/stream",
            "srt": f"srt://127.0.0.1:{self.port}",
        }[kind]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Starts it, and returns when it is there."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.cameras", self.kind, str(self.port), *self.words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            # One group: what it starts itself is killed and frozen with it.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready", f"the {self.kind} camera did not start"

    def signal(self, number: int) -> None:
        """Sends a signal to the camera and what it has started."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def freeze(self) -> None:
        """Stops it: connections stay open, and nothing comes."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        if self._process is None:
            return
        self.signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None


@contextlib.contextmanager
def mute_server() -> Iterator[int]:
    """A port on which connections are accepted, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


class _Refusal(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while request := self.request.recv(65536).decode():
            number = next((line for line in request.splitlines() if line.startswith("CSeq")), "X-None: 0")
            protocol = "RTSP/1.0" if "RTSP/1.0" in request else "HTTP/1.1"
            refusal = (
                f"{protocol} 401 Unauthorized",
                number,
                'WWW-Authenticate: Basic realm="cam"',
                "Content-Length: 0",
            )
            self.request.sendall("\r\n".join((*refusal, "", "")).encode())


@contextlib.contextmanager
def refusing_server() -> Iterator[int]:
    """A port on which every request, of RTSP or HTTP, is answered with 401."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Refusal) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def bare_h264() -> list[bytes]:
    """Forty pictures of noise, 64x48, each a packet of its own."""
    context: Any = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt, context.time_base = 64, 48, "yuv420p", Fraction(1, 25)
    context.options = {"preset": "ultrafast", "tune": "zerolatency", "threads": "1"}
    packets = []
    noise = random.Random(7)
    for k in range(40):
        frame = av.VideoFrame(64, 48, "yuv420p")
        for plane in frame.planes:
            plane.update(noise.randbytes(plane.buffer_size))
        frame.pts = k
        packets += [bytes(packet) for packet in context.encode(frame)]
    return packets


# From here on: the camera's own process.


class _Gone(Exception):  # noqa: N818 - it is how a viewer leaves
    """Nobody watches any more."""


class _Pictures:
    """What the camera sees, in time with the clock."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.began = time.monotonic()
        self._number = 0
        jump, _, at = asked.jump.partition("@")
        self._jump, self._jump_at = (float(jump), float(at)) if jump else (0.0, float("inf"))

    def seconds(self) -> float:
        """The camera's clock: it begins when the camera is started."""
        passed = time.monotonic() - self.began
        return passed + (self._jump if passed > self._jump_at else 0)

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        """(seconds, picture) for ever."""
        while True:
            due = self.began + self._number / self.asked.rate
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            else:
                # Late, or nobody watched: pictures of the past are not made up.
                self._number = int((time.monotonic() - self.began) * self.asked.rate)
            self._number += 1
            now = self.seconds()
            flashes, asked = now % 1 < FLASH_SECONDS, self.asked
            yield now, draw(self._number, int(time.time() * 1000), flashes, asked.width, asked.height)


def _ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _video_frame(picture: np.ndarray, seconds: float, pixel_format: str = "yuv420p") -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pixel_format, threads=1)
    frame.pts, frame.time_base = round(seconds / _TIMES), _TIMES
    return frame


def _set_up(context: Any, asked: argparse.Namespace) -> None:
    context.width, context.height, context.pix_fmt = asked.width, asked.height, "yuv420p"
    context.time_base, context.framerate = _TIMES, Fraction(asked.rate, 1)
    context.gop_size, context.max_b_frames = asked.gop, asked.bframes
    options = {"preset": "ultrafast", "threads": "1", "bf": str(asked.bframes)}
    context.options = options | ({} if asked.bframes else {"tune": "zerolatency"})


def _film(out: Any, pictures: _Pictures, asked: argparse.Namespace) -> None:
    """Pictures, and sound in time with them, into a container for as long as somebody takes them."""
    video = out.add_stream("libx264", rate=asked.rate)
    _set_up(video.codec_context, asked)
    sound = out.add_stream("aac", rate=SOUND_RATE, layout="mono") if asked.sound else None
    heard: int | None = None
    shift = 0.0
    for seconds, picture in pictures:
        for packet in video.encode(_video_frame(picture, seconds)):
            out.mux(packet)
        if sound is None:
            continue
        if heard is None or abs(heard / SOUND_RATE - seconds) > 1:
            heard = int(seconds * SOUND_RATE)
        count = int(seconds * SOUND_RATE) - heard
        if count <= 0:
            continue
        times = (heard + np.arange(count)) / SOUND_RATE
        wave = np.where((times + shift) % 1 < FLASH_SECONDS, 0.6 * np.sin(2 * np.pi * 1000 * times), 0)
        frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, heard, Fraction(1, SOUND_RATE)
        heard += count
        for packet in sound.encode(frame):
            out.mux(packet)


class _Socket:
    """A viewer's socket as a file to write to."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    def write(self, data: bytes) -> int:
        try:
            self._client.sendall(data)
        except OSError as error:
            raise _Gone from error
        return len(data)


def _push(url: str, form: str, options: dict[str, str], pictures: _Pictures, asked: argparse.Namespace) -> None:
    while True:
        with contextlib.suppress(av.FFmpegError, OSError), av.open(url, "w", format=form, options=options) as out:
            _film(out, pictures, asked)
        time.sleep(0.1)


def _serve(server: socket.socket, pictures: _Pictures, asked: argparse.Namespace) -> None:
    """A transport stream, to one viewer after the other."""
    while True:
        client, _ = server.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        watched = contextlib.suppress(_Gone, av.FFmpegError, OSError)
        with client, watched, av.open(_Socket(client), "w", format="mpegts", options=_FLUSH) as out:
            _film(out, pictures, asked)


def _serve_mjpeg(server: socket.socket, pictures: _Pictures, asked: argparse.Namespace) -> None:
    allowed = base64.b64encode(f"user:{asked.password}".encode()).decode()
    while True:
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            request = client.recv(65536).decode()
            if asked.password and f"Basic {allowed}" not in request:
                client.sendall(
                    b'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm="cam"\r\nContent-Length: 0\r\n'
                    b"Connection: close\r\n\r\n"
                )
                continue
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=cut\r\n\r\n")
            for seconds, picture in pictures:
                context: Any = av.CodecContext.create("mjpeg", "w")
                context.width, context.height, context.pix_fmt = asked.width, asked.height, "yuvj420p"
                context.time_base = Fraction(1, asked.rate)
                [packet] = context.encode(_video_frame(picture, seconds, "yuvj420p"))
                jpeg = bytes(packet)
                client.sendall(
                    b"--cut\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(jpeg), jpeg)
                )


class _Folder(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""


def _serve_hls(port: int, pictures: _Pictures, asked: argparse.Namespace) -> None:
    """A playlist of segments of one second."""
    with tempfile.TemporaryDirectory() as folder:
        handler = functools.partial(_Folder, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Thread(target=_say_when_there, args=(Path(folder, "live.m3u8"),), daemon=True).start()
        options = {"hls_time": "1", "hls_list_size": "4", "hls_flags": "delete_segments+temp_file"}
        with av.open(str(Path(folder, "live.m3u8")), "w", format="hls", options=options) as out:
            _film(out, pictures, asked)


def _say_when_there(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)
    _ready()


def _serve_rtsp(port: int, pictures: _Pictures, asked: argparse.Namespace) -> None:
    import rtsp

    server = rtsp.Server(f"127.0.0.1:{port}")
    server.start()
    context: Any = av.CodecContext.create("libx264", "w")
    _set_up(context, asked)
    context.options = context.options | {"x264-params": "repeat-headers=1:annexb=1"}
    _ready()
    last = 0.0
    for seconds, picture in pictures:
        for packet in context.encode(_video_frame(picture, seconds)):
            server.send_frame(bytes(packet), round((seconds - last) * 90000))
            last = seconds


def _serve_srt(port: int, pictures: _Pictures, asked: argparse.Namespace) -> None:
    """A transport stream through Debian's ffmpeg, which listens."""
    program = shutil.which("ffmpeg")
    assert program is not None, "SRT needs Debian's ffmpeg"
    while True:
        words = ["-loglevel", "quiet", "-fflags", "nobuffer", "-f", "mpegts", "-i", "pipe:0"]
        words += ["-c", "copy", "-f", "mpegts", "-flush_packets", "1"]
        with subprocess.Popen(
            [program, *words, f"srt://127.0.0.1:{port}?mode=listener&latency=50000"],
            stdin=subprocess.PIPE,
            bufsize=0,
        ) as child:
            threading.Thread(target=_say_when_bound, args=(port,), daemon=True).start()
            pipe = _Unclosed(child.stdin)
            with (
                contextlib.suppress(av.FFmpegError, OSError),
                av.open(pipe, "w", format="mpegts", options=_FLUSH) as out,
            ):
                _film(out, pictures, asked)
            child.kill()


def _say_when_bound(port: int) -> None:
    while f":{port:04X} " not in Path("/proc/net/udp").read_text(encoding="ascii"):
        time.sleep(0.05)
    _ready()


class _Unclosed:
    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        self._file.write(data)
        return len(data)


def main() -> None:
    """The camera."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("port", type=int)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--rate", type=int, default=RATE)
    parser.add_argument("--gop", type=int, default=RATE, help="frames from key frame to key frame")
    parser.add_argument("--bframes", type=int, default=0)
    parser.add_argument("--sound", action="store_true")
    parser.add_argument("--jump", default="", help="SECONDS@WHEN: its clock jumps by so much, so long after the start")
    parser.add_argument("--password", default="", help="mjpeg: that of the user `user`")
    asked = parser.parse_args()
    pictures = _Pictures(asked)
    if asked.kind == "hls":
        _serve_hls(asked.port, pictures, asked)
    elif asked.kind == "rtsp":
        _serve_rtsp(asked.port, pictures, asked)
    elif asked.kind == "srt":
        _serve_srt(asked.port, pictures, asked)
    elif asked.kind in ("udp", "rtmp"):
        _ready()
        if asked.kind == "udp":
            url, form, options = f"udp://127.0.0.1:{asked.port}?pkt_size=1316", "mpegts", _FLUSH
        else:
            url, form, options = f"rtmp://127.0.0.1:{asked.port}/live/cam", "flv", _FLUSH
        _push(url, form, options, pictures, asked)
    else:
        with socket.create_server(("127.0.0.1", asked.port)) as server:
            _ready()
            (_serve if asked.kind == "tcp" else _serve_mjpeg)(server, pictures, asked)


if __name__ == "__main__":
    main()
