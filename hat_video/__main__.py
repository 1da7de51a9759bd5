"""The command's entry, also as `python -m hat_video`."""

import sys

__all__ = ["main"]


def main() -> int:
    """Imports the command, which takes a while, and runs it; returns the exit code."""
    try:
        from hat_video.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("hat-video: interrupted\n")
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
