"""Upscale one file with the public API. Copy this and change it: `python pipelines/upscale_file.py IN OUT [SCALE]`."""

import sys

from hat_video import HatVideoError, Progress, UpscaleOptions, upscale_file


def show(progress: Progress) -> None:
    """Called now and then from the thread that called `upscale_file`."""
    pace = f", {progress.fps:.1f} frames/s" if progress.fps else ""
    print(f"{progress.stage}: {progress.frames_done} of {progress.frames_total} frames{pace}", file=sys.stderr)


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    source, output = sys.argv[1:3]
    scale = int(sys.argv[3]) if len(sys.argv) == 4 else 2
    if scale not in (1, 2, 3, 4):
        print(f"scale {scale}: must be 1, 2, 3 or 4", file=sys.stderr)
        return 2
    try:
        report = upscale_file(source, output, UpscaleOptions(scale=scale), on_progress=show)
    except HatVideoError as error:
        # Whatever was committed is kept: the same call goes on from there.
        print(error, file=sys.stderr)
        return 1
    print(f"{report.output}: {report.verification}")
    for stream in report.streams:
        print(f"  stream {stream['index']} {stream['kind']}/{stream['codec']}: {stream['action']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
