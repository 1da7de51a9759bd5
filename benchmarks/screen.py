"""Records a real screen: a terminal at work, and a page that is scrolled.

    python benchmarks/screen.py FOLDER      # terminal.mkv, page.mkv: lossless; terminal_h264.mp4, page_h264.mp4

A virtual X server shows real programs, keys are pressed in them, and FFmpeg's x11grab records what is on the screen.
Needs Debian's xvfb, xterm, xdotool, dillo, xfonts-base and fonts-dejavu-core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

import av

WIDTH, HEIGHT, RATE = 1280, 720, 15
PROGRAMS = ("Xvfb", "xterm", "xdotool", "dillo")
PACKAGES = "xvfb xterm xdotool dillo xfonts-base fonts-dejavu-core"
ROOT = Path(__file__).parents[1]
COMMANDS = (
    "ls -l /usr/lib | head -30",
    "grep -rn return /usr/lib/python3/dist-packages --include=*.py | head -8",
    "for n in $(seq 1 12); do echo step $n of 12; sleep 0.2; done",
    "date; uname -a; df -h | head -5",
)


class Screen:
    """A virtual X server, and what runs in it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self.name = ""

    def __enter__(self) -> Screen:
        read, write = os.pipe()
        with os.fdopen(read) as told:
            command = ["Xvfb", "-displayfd", str(write), "-screen", "0", f"{WIDTH}x{HEIGHT}x24", "-nolisten", "tcp"]
            self._started(command, pass_fds=(write,))
            os.close(write)
            self.name = f":{told.readline().strip()}"
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(self, *command: str) -> None:
        """A program on this screen, until the screen closes."""
        self._started(list(command))

    def press(self, *words: str) -> None:
        """`xdotool` with these words."""
        subprocess.run(["xdotool", *words], check=True, env=self._environment(), capture_output=True)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "DISPLAY": self.name, "HOME": str(self._folder), "PS1": "$ ", "HISTFILE": "/dev/null"}

    def _started(self, command: list[str], pass_fds: tuple[int, ...] = ()) -> None:
        process = subprocess.Popen(
            command, env=self._environment(), pass_fds=pass_fds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)


def use_terminal(screen: Screen, stop: threading.Event) -> None:
    """Types commands as people do, and waits for what they say."""
    for command in COMMANDS:
        for letter in command:
            if stop.is_set():
                return
            screen.press("type", "--delay", "0", letter)
            time.sleep(0.07)
        screen.press("key", "Return")
        time.sleep(1.5)


def scroll_page(screen: Screen, stop: threading.Event) -> None:
    """Reads: some lines down, and a while of nothing."""
    while not stop.is_set():
        for _ in range(4):
            screen.press("key", "Down")
            time.sleep(1 / RATE)
        stop.wait(1.2)


def page(folder: Path) -> Path:
    """The README as a page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "")
    paragraphs = "".join(f"<p>{part}</p>" for part in text.split("\n\n"))
    path = folder / "page.html"
    path.write_text(f"<meta charset=utf-8><body bgcolor=white><font size=4>{paragraphs}", encoding="utf-8")
    return path


@contextmanager
def _writer(path: Path, codec: str, pixel_format: str, options: dict[str, str]) -> Iterator[Callable[..., None]]:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.codec_context.thread_count = 1

        def write(frame: av.VideoFrame, number: int) -> None:
            copy = frame.reformat(format=pixel_format, dst_colorspace="ITU709", threads=1)
            copy.pts, copy.time_base = number, Fraction(1, RATE)
            # Grabbed frames are marked as key frames, and would all be encoded as such.
            copy.pict_type = 0
            container.mux(stream.encode(copy))

        yield write
        container.mux(stream.encode(None))


def record(
    screen: Screen, folder: Path, name: str, frames: int, use: Callable[[Screen, threading.Event], None]
) -> None:
    """Writes `name`.mkv, lossless, and `name`_h264.mp4 of the same frames, while `use` does something."""
    stop = threading.Event()
    user = threading.Thread(target=use, args=(screen, stop))
    user.start()
    options = {"framerate": str(RATE), "video_size": f"{WIDTH}x{HEIGHT}", "draw_mouse": "0"}
    try:
        with (
            _writer(folder / f"{name}.mkv", "ffv1", "bgr0", {"level": "3"}) as exact,
            _writer(folder / f"{name}_h264.mp4", "libx264", "yuv420p", {"crf": "23", "preset": "veryfast"}) as usual,
            av.open(screen.name, format="x11grab", options=options) as camera,
        ):
            for number, frame in enumerate(camera.decode(video=0)):
                exact(frame, number)
                usual(frame, number)
                if number + 1 == frames:
                    break
    finally:
        stop.set()
        user.join()


def record_all(folder: Path, frames: int) -> None:
    """Both scenes, each on a screen of its own.

    Raises:
        SystemExit: a program is missing; says which.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)}: not found; apt-get install {PACKAGES}")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        with Screen(home) as screen:
            screen.start(
                "xterm", "-geometry", "150x48+20+20", "-bc", "-fa", "DejaVu Sans Mono", "-fs", "10", "-e", "sh", "-i"
            )
            time.sleep(2)
            record(screen, folder, "terminal", frames, use_terminal)
        with Screen(home) as screen:
            screen.start("dillo", "-f", "-g", f"{WIDTH}x{HEIGHT}", page(home).as_uri())
            time.sleep(3)
            screen.press("mousemove", str(WIDTH // 2), str(HEIGHT // 2), "click", "1")
            record(screen, folder, "page", frames, scroll_page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=150)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    record_all(arguments.folder, arguments.frames)


if __name__ == "__main__":
    main()
