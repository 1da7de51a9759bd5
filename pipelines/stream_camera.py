"""Upscale a camera with the public API; to be copied: `python pipelines/stream_camera.py SOURCE OUT [SECONDS]`.

SOURCE is a camera (0, /dev/video0), an address (rtsp://...), screen: or test:; OUT is a file, a folder or an address.
"""

import signal
import sys
import threading

from hat_video import CameraOptions, HatVideoError, LiveFigures, upscale_camera


def show(figures: LiveFigures) -> None:
    """Called once a second, from a thread of its own."""
    print(
        f"in {figures.fps_in:.1f} out {figures.fps_out:.1f} frames/s, {1000 * figures.latency_p50_seconds:.0f} ms,"
        f" {figures.rung}",
        file=sys.stderr,
    )


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    source, output = sys.argv[1:3]
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        options = CameraOptions(duration=sys.argv[3] if len(sys.argv) == 4 else None)
        report = upscale_camera(source, [output], options, on_figures=show, cancel=stop)
    except HatVideoError as error:
        print(error, file=sys.stderr)
        return 1
    figures = report.figures
    print(f"{output}: {figures.frames_out} of {figures.frames_in} frames in {figures.seconds:.1f} s")
    for rung in figures.rungs:
        print(f"  {rung.model}: {rung.frames} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
