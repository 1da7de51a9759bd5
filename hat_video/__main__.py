"""The command's entry, also as `python -m hat_video`."""

import os
import signal
import sys

__all__ = ["main"]


def main() -> int:
    """Imports the command, which takes a while, and runs it; returns the exit code."""
    # An exception would be lost, or end in abort(), where it meets the C++ of a library that is just being loaded.
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_heard:
        signal.signal(signal.SIGINT, _leave)
    from hat_video.cli import main as command

    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command()


def _leave(number: int, frame: object) -> None:
    """Nothing has been begun yet."""
    del number, frame
    os.write(2, b"hat-video: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
