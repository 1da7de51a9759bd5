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
from hat_video.live.figures import OutputFigures, RungFigures
from tests.live.scene import SMALL, TOKEN, Coder, Scene, State

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
        pytest.skip(f"{CHROMIUM} is missing; `make test-live` installs it")
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


def until(tab, expression: str) -> None:  # type: ignore[no-untyped-def]
    """Playwright's own way of waiting needs `eval`, which the page's policy forbids."""
    deadline = time.monotonic() + 30
    while not tab.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


def wait_for_video(tab) -> None:  # type: ignore[no-untyped-def]
    until(tab, "document.getElementById('video').readyState >= 2")


def test_video_plays_at_the_live_edge(browser, record_property) -> None:  # type: ignore[no-untyped-def]
    with scene() as running:
        watched = Watched(browser)
        opened = time.monotonic()
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
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


def test_uneven_pictures_play_and_none_waits_for_a_key_frame(browser) -> None:  # type: ignore[no-untyped-def]
    pauses = [0.0, 0.02, 0.15, 0.0, 0.3, 0.05, 0.0, 0.7]

    def uneven(index: int, info: VideoInfo) -> list[Tensor]:
        time.sleep(pauses[index % len(pauses)])
        return clock(index, info)

    with scene(draw=uneven, fps=30) as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
        watched.delays(3)
        sent, shown = running.page.output_figures.frames, watched.tab.evaluate("live.pictures")
        decoded = watched.tab.evaluate("video.getVideoPlaybackQuality().totalVideoFrames")
        delays = watched.delays(6)
        sent, shown = running.page.output_figures.frames - sent, watched.tab.evaluate("live.pictures") - shown
        decoded = watched.tab.evaluate("video.getVideoPlaybackQuality().totalVideoFrames") - decoded
        print(sent, shown, decoded, statistics.median(delays), watched.tab.evaluate("live.seeks"))  # noqa: T201
        # What it got was decoded: no gap has thrown the player back to waiting for a key frame.
        assert shown >= sent - 8
        assert decoded >= 0.8 * shown
        assert watched.complaints == []
        watched.context.close()


def test_after_a_silence_the_picture_is_live_again(browser) -> None:  # type: ignore[no-untyped-def]
    with scene() as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
        watched.delays(1)
        running.is_paused.set()
        time.sleep(7)
        until(watched.tab, "document.getElementById('state').textContent === 'waiting'")
        assert "No picture was made for" in watched.tab.locator("#note").inner_text()
        watched.picture("silence")
        running.is_paused.clear()
        watched.delays(4)
        delays = watched.delays(3)
        print(statistics.median(delays))  # noqa: T201
        assert statistics.median(delays) < 1000
        assert watched.tab.locator("#note").is_hidden()
        watched.context.close()


def test_a_run_that_comes_back_is_found_again(browser) -> None:  # type: ignore[no-untyped-def]
    with scene() as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
        port = running.port
    until(watched.tab, "document.getElementById('state').textContent === 'no connection'")
    watched.picture("ended")
    with scene(address=f"127.0.0.1:{port}") as running:
        until(watched.tab, "document.getElementById('state').textContent === 'live'")
        watched.delays(8)
        assert statistics.median(watched.delays(3)) < 1000
        watched.context.close()


def test_without_mediasource_there_are_jpegs(browser) -> None:  # type: ignore[no-untyped-def]
    with scene() as running:
        watched = Watched(browser)
        watched.context.add_init_script("delete self.MediaSource; delete self.ManagedMediaSource;")
        watched.tab.goto(running.page.url)
        until(watched.tab, "document.getElementById('moving').naturalWidth === 640")
        watched.delays(1)
        delays = watched.delays(4)
        print(statistics.median(delays))  # noqa: T201
        assert statistics.median(delays) < 2000
        assert len(running.page.mjpeg_viewers) == 1
        assert watched.complaints == []
        watched.context.close()


def test_before_and_after_of_one_frame(browser) -> None:  # type: ignore[no-untyped-def]
    read = READ.replace("const picture =", "const picture = document.getElementById(WHICH); const unused =").replace(
        "() =>", "WHICH =>"
    )
    with scene() as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
        watched.tab.click("#compare")
        until(watched.tab, "document.getElementById('before').naturalWidth === 320")
        box = watched.tab.locator("#seam").bounding_box()
        watched.tab.mouse.move(box["x"] + 22, box["y"] + 100)
        watched.tab.mouse.down()
        watched.tab.mouse.move(box["x"] + 222, box["y"] + 100)
        watched.tab.mouse.up()
        assert 55 < float(watched.tab.get_attribute("#seam", "aria-valuenow")) < 80
        watched.tab.focus("#seam")
        watched.tab.keyboard.press("Home")
        assert watched.tab.get_attribute("#seam", "aria-valuenow") == "0"
        watched.tab.click("#freeze")
        until(watched.tab, "frozen && document.getElementById('still-after').naturalWidth === 640")
        until(
            watched.tab,
            "document.getElementById('before').src.startsWith('blob:') && document.getElementById('before').complete",
        )
        at = "document.getElementById('video').currentTime"
        one, other = (
            watched.tab.evaluate(f"({read})(WHICH) - Date.now()".replace("(WHICH)", f"('{name}')"))
            for name in ("before", "still-after")
        )
        assert abs(one - other) < 1000 / 15 / 2, "not the same frame"
        before = watched.tab.evaluate(at)
        watched.tab.click("#freeze")
        until(watched.tab, f"!frozen && {at} > {before}")
        assert watched.complaints == []
        watched.context.close()


def test_snapshot_is_saved(browser) -> None:  # type: ignore[no-untyped-def]
    with scene() as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
        with watched.tab.expect_download() as download:
            watched.tab.click("#save")
        assert download.value.suggested_filename.endswith(".jpg")
        assert Path(download.value.path()).read_bytes()[:2] == b"\xff\xd8"
        watched.context.close()


@pytest.mark.parametrize("camera", [True, False])
def test_the_part_is_dragged(browser, camera: bool) -> None:  # type: ignore[no-untyped-def]
    state = State(roi=(0, 0, 320, 180), source_size=(1280, 720))
    with scene(state=state, camera=camera) as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        watched.tab.wait_for_selector("#roi:not([hidden])")
        image = "camera" if camera else "inside"
        until(watched.tab, f"document.getElementById('{image}').naturalWidth > 0")
        box = watched.tab.locator("#part").bounding_box()
        watched.tab.mouse.move(box["x"] + 20, box["y"] + 20)
        watched.tab.mouse.down()
        watched.tab.mouse.move(box["x"] + 60, box["y"] + 40, steps=5)
        watched.tab.mouse.up()
        scale = 1280 / watched.tab.locator("#whole").bounding_box()["width"]
        running.wait(
            lambda: abs(running.state.told.roi[0] - 40 * scale) < 8 and abs(running.state.told.roi[1] - 20 * scale) < 8
        )  # type: ignore[index]
        until(watched.tab, "!sending && !wanted")
        watched.tab.focus("#part")
        x = running.state.told.roi[0]  # type: ignore[index]
        watched.tab.keyboard.press("ArrowRight")
        running.wait(lambda: running.state.told.roi[0] == x + 16)  # type: ignore[index]
        watched.picture(f"part-{image}")
        assert watched.complaints == []
        watched.context.close()


def test_the_token_is_asked_for_once_and_leaves_the_address(browser) -> None:  # type: ignore[no-untyped-def]
    with scene(token=TOKEN) as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        watched.picture("token")
        watched.tab.fill("#token", TOKEN)
        watched.tab.click("button")
        wait_for_video(watched.tab)
        assert TOKEN not in watched.tab.url
        assert TOKEN not in str(watched.context.cookies())
        assert watched.tab.evaluate("document.cookie") == ""
        watched.tab.reload()
        wait_for_video(watched.tab)
        other = watched.context.new_page()
        other.goto(running.page.url)
        wait_for_video(other)
        watched.context.close()


def test_nobody_takes_bicubic_for_hat(browser) -> None:  # type: ignore[no-untyped-def]
    rungs = (RungFigures("hat-nano", 100, 0.08), RungFigures("bicubic", 300, 0.002))
    with scene(state=State(rung="bicubic", rungs=rungs)) as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
        watched.tab.wait_for_selector("#warning:not([hidden])")
        assert "This picture is bicubic, not HAT." in watched.tab.locator("#warning").inner_text()
        assert watched.tab.locator("#tag-after").inner_text() == "bicubic, not HAT"
        assert "75 %" in watched.tab.locator("#rungs").inner_text()
        running.state.told = State(rung="hat-nano", rungs=rungs).told
        watched.tab.wait_for_selector("#warning", state="hidden")
        assert "75 % of all frames were plain enlarging, not HAT" in watched.tab.locator("#changes").inner_text()
        watched.context.close()


def test_names_are_shown_and_not_run(browser) -> None:  # type: ignore[no-untyped-def]
    name = "<img src=x onerror=alert(1)><b>&amp;"
    state = State(
        source=name, rung=name, rungs=(RungFigures(name, 3, 0.1),), outputs=(OutputFigures(name, False, error=name),)
    )
    with scene(state=state) as running:
        watched = Watched(browser)
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
        watched.tab.wait_for_selector("#outputs tr")
        assert watched.tab.locator("#source").inner_text() == name
        assert name in watched.tab.locator("#outputs").inner_text()
        assert watched.complaints == []
        watched.context.close()


def test_a_narrow_phone(browser) -> None:  # type: ignore[no-untyped-def]
    state = State(
        roi=(0, 0, 320, 180), source_size=(640, 360), source="rtsp://user:***@" + "a-very-long-name." * 8 + "example/1"
    )
    with scene(state=state, camera=True) as running:
        watched = Watched(browser, 360, 740, device_scale_factor=2, is_mobile=True, has_touch=True)
        watched.tab.goto(running.page.url)
        wait_for_video(watched.tab)
        watched.tab.tap("#compare")
        watched.delays(2)
        assert watched.tab.evaluate("document.documentElement.scrollWidth") == 360
        watched.picture("phone")
        watched.context.close()
