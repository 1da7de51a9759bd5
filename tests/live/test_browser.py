"""The page in a real browser: pictures from a real encoder that show the time at which they were drawn.

Needs Chromium and playwright; `make test-live` installs them.
"""

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hat_video.frames import VideoInfo
from tests.live.scene import SMALL, Coder, Scene

pytestmark = pytest.mark.live

CHROMIUM = "/usr/bin/chromium"
INFO = replace(SMALL, width=320, height=180)
BITS, ACROSS, CELL = 44, 22, 28

# What the page shows at this moment, read as the clock that was drawn; and how many milliseconds ago that was.
READ = """() => {
  const video = document.getElementById("video");
  const picture = video.hidden ? document.getElementById("moving") : video;
  if (picture === video ? video.readyState < 2 : !picture.naturalWidth) return null;
  const canvas = document.createElement("canvas"); canvas.width = 640; canvas.height = 360;
  const pen = canvas.getContext("2d"); pen.drawImage(picture, 0, 0, 640, 360);
  const now = Date.now(), data = pen.getImageData(0, 0, 640, 360).data;
  let drawn = 0;
  for (let bit = 0; bit < 44; bit++) {
    const x = 12 + bit % 22 * 28 + 14, y = 40 + Math.floor(bit / 22) * 40 + 16;
    if (data[(y * 640 + x) * 4 + 1] > 128) drawn += 2 ** bit;
  }
  return now - drawn;
}"""


def clock(index: int, info: VideoInfo) -> list[Tensor]:
    """Gray, with the wall clock's milliseconds as black and white cells."""
    planes = [
        torch.full(size, 128, dtype=torch.uint8) for size in info.pixel_format.plane_sizes(info.width, info.height)
    ]
    planes[0][200:] = torch.arange(info.width, dtype=torch.float).mul(200 / info.width).add(16).to(torch.uint8)
    planes[0][220:300, (index * 8) % 600 :][:, :40] = 235
    now = int(time.time() * 1000)
    for bit in range(BITS):
        row, column = divmod(bit, ACROSS)
        y, x = 40 + row * 40, 12 + column * CELL
        planes[0][y : y + 32, x : x + CELL - 2] = 235 if now >> bit & 1 else 16
    return planes


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.fail(f"{CHROMIUM} is missing; `make test-live` installs it", pytrace=False)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"],
        )
        yield chromium
        chromium.close()


class Watched:
    """A tab, and everything that it complained about."""

    def __init__(self, browser, width: int = 1400, height: int = 860, **options) -> None:  # type: ignore[no-untyped-def]
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.tab = self.context.new_page()
        self.complaints: list[str] = []
        self.tab.on(
            "console", lambda message: self.complaints.append(message.text) if message.type == "error" else None
        )
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))

    def delays(self, seconds: float) -> list[float]:
        """Milliseconds from drawing to what the tab shows, a few times a second."""
        read = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self.tab.evaluate(READ)
            if value is not None and -100 < value < 1e6:
                read.append(value)
            time.sleep(0.1)
        return read

    def picture(self, name: str) -> None:
        """Kept where HAT_VIDEO_SCREENSHOTS says, for people to look at."""
        folder = os.environ.get("HAT_VIDEO_SCREENSHOTS")
        if folder:
            self.tab.screenshot(path=f"{folder}/{name}.png")


def scene(**options: object) -> Scene:
    coder = Coder(INFO)
    return Scene(**{"coder": coder, "draw": clock, **options})  # type: ignore[arg-type]


def test_video_plays_at_the_live_edge(browser, record_property) -> None:  # type: ignore[no-untyped-def]
    with scene() as running:
        watched = Watched(browser)
        opened = time.monotonic()
        watched.tab.goto(running.page.url)
        watched.tab.wait_for_function("document.getElementById('video').readyState >= 2", timeout=20000)
        first = time.monotonic() - opened
        watched.delays(3)
        delays = watched.delays(8)
        shown = watched.tab.evaluate("video.getVideoPlaybackQuality().totalVideoFrames")
        told = watched.tab.locator("#screen").inner_text()
        watched.picture("desktop")
        facts = {
            "first_picture_seconds": round(first, 2), "median_ms": statistics.median(delays), "most_ms": max(delays),
            "frames_shown": shown, "page_says": told, "seeks": watched.tab.evaluate("live.seeks"),
        }  # fmt: skip
        print(facts)  # noqa: T201
        for name, value in facts.items():
            record_property(name, value)
        assert watched.complaints == []
        assert len(delays) > 20
        assert statistics.median(delays) < 1000
        assert shown > 60
        watched.context.close()
