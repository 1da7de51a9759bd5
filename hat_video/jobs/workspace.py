"""The folder beside an output: unfinished work, and the receipts of what is finished."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hat_video.errors import OutputError, WorkError
from hat_video.files import UNFINISHED, write_atomically

__all__ = [
    "WORK_FOLDER",
    "Receipt",
    "clean",
    "discard",
    "is_product",
    "locked",
    "made_folder",
    "read_receipt",
    "remove_empty",
    "sweep",
    "write_receipt",
]

WORK_FOLDER = ".hat-video"
"""Name of the folder beside an output that holds unfinished work and receipts."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was made of which request, so that the same request again finds it done."""

    key: str
    bytes: int
    sha256: str
    mtime_ns: int
    frames: dict[str, int]
    verification: str

    @classmethod
    def of(cls, path: Path, key: str, frames: dict[str, int], verification: str) -> Receipt:
        """A receipt for a finished file.

        Raises:
            OutputError: the file cannot be read.
        """
        try:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            stat = path.stat()
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from None
        return cls(key, stat.st_size, sha256, stat.st_mtime_ns, frames, verification)

    def is_of(self, path: Path) -> bool:
        """Whether the file is still the one that this receipt was written for."""
        stat = path.stat()
        if stat.st_size != self.bytes:
            return False
        if stat.st_mtime_ns == self.mtime_ns:
            return True
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


def _receipt_path(output: Path) -> Path:
    return output.parent / WORK_FOLDER / output.name / "receipt.json"


def is_product(path: Path) -> bool:
    """Whether `path` is a file that a run of ours finished, and not another film that lies there now."""
    if not _receipt_path(path).is_file():
        return False
    receipt = read_receipt(path)
    # One that cannot be read, of another version, is a receipt all the same.
    return receipt is None or not path.is_file() or receipt.is_of(path)


def read_receipt(output: Path) -> Receipt | None:
    """The receipt of an output; None if there is none that can be read."""
    try:
        return TypeAdapter(Receipt).validate_json(_receipt_path(output).read_bytes())
    except (OSError, ValidationError):
        return None


def write_receipt(output: Path, receipt: Receipt) -> None:
    """Writes the receipt of an output.

    Raises:
        OutputError: it cannot be written.
    """
    path = _receipt_path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, TypeAdapter(Receipt).dump_json(receipt, indent=1))


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the one lock of an output, whatever the recipe and wherever the work is kept.

    Raises:
        WorkError: another run holds it.
        OutputError: the folder beside the output cannot be made.
    """
    folder = _receipt_path(output).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror or error}") from None
    try:
        try:
            # The kernel lets go of it when the process ends, however it ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WorkError(f"{output}: another run is at work on it; wait for it, or give another -o") from None
        yield
    finally:
        os.close(handle)
        remove_empty(folder)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes `folder` where it is missing; takes it away again if the block fails and left nothing in it.

    Raises:
        OutputError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror or error}") from None
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def sweep(base: Path) -> None:
    """Removes what a killed `discard` has left."""
    for doomed in base.glob(f"{UNFINISHED}*"):
        shutil.rmtree(doomed, ignore_errors=True)


def remove_empty(base: Path) -> None:
    """Removes the folder of an output, and the work folder that it is in, where nothing is left in them."""
    for folder in (base, base.parent):
        if folder.name == WORK_FOLDER or folder.parent.name == WORK_FOLDER:
            try:
                folder.rmdir()
            except OSError:
                return


def discard(folder: Path) -> None:
    """Removes a work folder so that no half of it is ever found: it loses its name first."""
    doomed = folder.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        folder.rename(doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def clean(path: str | os.PathLike[str], on_note: Callable[[str], None] | None = None) -> list[Path]:
    """Removes left-over work: of one output, or of every output below a folder. Receipts stay.

    Args:
        path: an output, or a folder.
        on_note: called with one line for each output that a run is at work on; what it has made is left alone.

    Returns:
        The folders that were removed.

    Raises:
        OutputError: there is no such path, or it cannot be removed.
    """
    target = Path(path)
    if target.is_dir():
        bases = sorted(_bases(target))
    elif target.is_file() or _receipt_path(target).parent.is_dir():
        bases = [_receipt_path(target).parent]
    else:
        raise OutputError(f"{target}: no such file or folder, and no work left over for it")
    removed = []
    for base in bases:
        if not base.is_dir():
            continue
        output = base.parent.parent / base.name
        try:
            with locked(output):
                for folder in sorted(base.iterdir()):
                    if folder.is_dir():
                        shutil.rmtree(folder)
                        removed.append(folder)
        except WorkError:
            if on_note is not None:
                on_note(f"{output}: is being worked on; left")
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{error.filename or base}: cannot be removed: {error.strerror or error}") from None
    return removed


def _bases(folder: Path) -> Iterator[Path]:
    """The folders of all outputs at or below `folder`. Work within work goes with it, and is under its lock."""
    roots = [folder] if folder.name == WORK_FOLDER else []
    if not roots:
        for root, folders, _ in os.walk(folder):
            if WORK_FOLDER in folders:
                folders.remove(WORK_FOLDER)
                roots.append(Path(root) / WORK_FOLDER)
    for work in roots:
        yield from (base for base in work.iterdir() if base.is_dir())
