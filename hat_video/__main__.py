"""`python -m hat_video` is the command `hat-video`."""

import sys

__all__ = ["run"]


def run() -> int:
    """The command; returns the exit code. Ctrl-C is heard even while the library is being imported."""
    try:
        from hat_video.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("hat-video: interrupted\n")
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
