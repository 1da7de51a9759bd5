"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from hat_video.errors import OptionError, OutputError

__all__ = ["UNFINISHED", "check_place", "remove_unfinished", "write_atomically"]

UNFINISHED = ".tmp-"
"""What the names of files and folders begin with that are not whole yet, or no longer."""


def check_place(path: Path, option: str) -> None:
    """Raises `OptionError` where no file can be written."""
    folder = path.absolute().parent
    try:
        is_file = folder.is_dir() and not path.is_dir()
    except OSError:
        is_file = False  # a name that no file can have
    if not is_file:
        raise OptionError(f"{option} {path}: not a file in an existing folder; give another name")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OptionError(f"{option} {path}: you may not write there; give another name")


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` to `path` so that any reader, at any moment, sees all of it or none.

    A link stays one; what is no file (a pipe, a device) has no name that could change, and is written to.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    there = Path(os.path.realpath(path))
    part = there.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        if there.exists() and not there.is_file():
            there.write_bytes(data)
            return
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(there)
        _sync_folder(there.parent)
    except OSError as error:
        # A file system that is read-only does not even let a missing file be removed.
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def remove_unfinished(folder: Path) -> None:
    """Removes what a process that was killed had begun to write; only where no other process writes."""
    for left_over in folder.glob(f"{UNFINISHED}*"):
        # What cannot be removed is in nobody's way; whether anything can be written shows soon enough.
        with suppress(OSError):
            left_over.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
