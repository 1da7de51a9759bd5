"""`python -m hat_video` is the command `hat-video`."""

import sys

from hat_video.cli import main

if __name__ == "__main__":
    sys.exit(main())
