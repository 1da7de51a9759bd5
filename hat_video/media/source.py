"""Opening a source: who decodes it, and why."""

from __future__ import annotations

import os
from pathlib import Path

from hat_video.errors import OptionError
from hat_video.media.probe import Probe
from hat_video.media.probe import probe as probe_file
from hat_video.media.pyav_source import PyavSource

__all__ = ["open_source"]


def open_source(
    path: str | os.PathLike[str], *, decoder: str = "auto", probe: Probe | None = None, batch: int = 1
) -> PyavSource:
    """Opens the frames of a file, as planes with integer timestamps.

    Args:
        path: the file.
        decoder: `auto` or `pyav`.
        probe: what `hat_video.probe` said of the file, if it has been asked already.
        batch: frames to a batch.

    Returns:
        A context manager; iterate it, or call `read(start_pts, end_pts)`.

    Raises:
        SourceError: the file cannot be read.
        OptionError: the decoder is not there.
    """
    if decoder not in ("auto", "pyav"):
        raise OptionError(f"--decoder {decoder}: is not part of this version; use auto or pyav")
    return PyavSource(probe or probe_file(Path(path)), batch=batch)
