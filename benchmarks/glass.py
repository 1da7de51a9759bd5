"""From the camera's clock to the browser's picture: what `benchmarks/live.py` calls glass to glass."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.live.cameras import HEIGHT, RATE, WIDTH, Camera
from tests.live.leftovers import free_port

__all__ = ["glass_to_glass"]

ROOT = Path(__file__).parents[1]
CHROMIUM = "/usr/bin/chromium"
# Reads the 44 cells that the camera draws, as `tests.live.cameras.read_clock` does, each time a picture is shown.
READER = """
(scale) => {
  window.glass = [];
  const video = document.querySelector('video');
  const canvas = document.createElement('canvas');
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  const read = () => {
    const now = Date.now();
    canvas.width = 320 * scale; canvas.height = 176 * scale;
    pen.drawImage(video, 0, 0, canvas.width, canvas.height);
    const data = pen.getImageData(0, 0, canvas.width, 48 * scale).data;
    let shown = 0;
    for (let bit = 0; bit < 44; bit++) {
      const x = Math.floor((12 + (bit % 22) * 14) * scale), y = Math.floor((15 + Math.floor(bit / 22) * 16) * scale);
      if (data[4 * (y * canvas.width + x) + 1] > 128) shown += 2 ** bit;
    }
    const late = now - shown;
    if (late > 0 && late < 60000) window.glass.push(late);
    video.requestVideoFrameCallback(read);
  };
  video.requestVideoFrameCallback(read);
}
"""


def glass_to_glass(model: str, seconds: float = 40.0) -> dict[str, Any]:
    """Milliseconds from the moment that a camera draws a picture to the moment that Chromium shows it, upscaled."""
    from playwright.sync_api import sync_playwright

    port = free_port()
    with Camera("udp") as camera:
        words = [camera.url, "--serve", f"127.0.0.1:{port}", "--model", model, "--audio", "none", "-q"]
        run = subprocess.Popen(
            [sys.executable, "-m", "hat_video", "camera", *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/healthz")
            with sync_playwright() as tool:
                browser = tool.chromium.launch(
                    executable_path=CHROMIUM,
                    args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--disable-gpu"],
                )
                # The page allows no scripts but its own.
                page = browser.new_page(viewport={"width": 900, "height": 700}, bypass_csp=True)
                page.goto(f"http://127.0.0.1:{port}/")
                page.wait_for_function("document.querySelector('video')?.readyState >= 2", timeout=30_000)
                time.sleep(5)
                page.evaluate(READER, 2)
                time.sleep(seconds)
                values = sorted(page.evaluate("window.glass"))
                name = browser.version
                browser.close()
        finally:
            run.terminate()
            run.wait(20)
    found = {
        "browser": f"Chromium {name}",
        "camera": f"MPEG-TS over UDP, {WIDTH}x{HEIGHT} at {RATE} frames a second",
        "pictures": len(values),
        "p50_ms": statistics.median(values),
        "p95_ms": values[int(0.95 * len(values))],
        "p99_ms": values[int(0.99 * len(values))],
        "least_ms": values[0],
    }
    print("glass to glass", model, found, flush=True)
    return found


def _wait_for(url: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (OSError, urllib.error.URLError):
            time.sleep(0.25)
        else:
            return
    raise TimeoutError(f"{url} did not come up within a minute")
