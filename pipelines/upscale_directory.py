"""Upscale a directory of clips with the public API: `python pipelines/upscale_directory.py IN_DIR OUT_DIR [SCALE]`.

Run it again after an interruption, or after new clips have come: finished ones are skipped.
"""

import signal
import sys
import threading

from hat_video import FileReport, HatVideoError, UpscaleOptions, upscale_directory


def show(report: FileReport) -> None:
    """Called after each clip."""
    print(f"{report.status}: {report.source} -> {report.output} {report.error or ''}".rstrip(), file=sys.stderr)


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    source, output = sys.argv[1:3]
    scale = int(sys.argv[3]) if len(sys.argv) == 4 else 2
    if scale not in (1, 2, 3, 4):
        print(f"scale {scale}: must be 1, 2, 3 or 4", file=sys.stderr)
        return 2

    # Setting the event from anywhere stops the run within a moment; what is committed is kept.
    cancel = threading.Event()
    signal.signal(signal.SIGINT, lambda number, frame: cancel.set())
    try:
        report = upscale_directory(source, output, UpscaleOptions(scale=scale), on_report=show, cancel=cancel)
    except HatVideoError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{len(report.clips) - len(report.failed)} of {len(report.clips)} clips are done, {len(report.skipped)} skipped"
    )
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
