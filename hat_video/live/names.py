"""Names of a row of recordings, and the memory of which files were made under them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hat_video.errors import OptionError

__all__ = ["Made", "RowNames", "is_pattern"]

_DIRECTIVE = re.compile(r"%[-_^#0]?[A-Za-z]")


def is_pattern(path: Path) -> bool:
    """Whether a name is a pattern of `strftime`."""
    return _DIRECTIVE.search(str(path).replace("%%", "")) is not None


class RowNames:
    """Names by `strftime`, of the folders too, as in `%Y-%m-%d/cam-%H%M%S.mp4`.

    A name that is taken gets a number, `cam-120000-2.mp4`: nothing is overwritten.

    Args:
        pattern: with at least one `%` directive.
    """

    def __init__(self, pattern: Path) -> None:
        parts = pattern.parts
        count = next(i for i, part in enumerate(parts) if is_pattern(Path(part)))
        self.base = Path(*parts[:count])
        """The folder that does not change."""
        self._pattern = str(Path(*parts[count:]))
        self.made = Made(self.base, self._pattern)

    @staticmethod
    def check(pattern: Path, option: str) -> None:
        """Raises `OptionError` where the names would all be the same, or cannot be made."""
        moments = datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 30, 17, 48, 39)
        try:
            first, second = (moment.strftime(str(pattern)) for moment in moments)
        except ValueError:
            first = second = ""
        if first == second:
            raise OptionError(
                f"{option}: is no pattern of times; for instance {pattern.stem or 'cam'}-%Y%m%d-%H%M%S.mp4"
            )

    def free(self, wall: float) -> Path:
        """A name for a file that begins at `wall`, seconds since 1970; makes its folders."""
        named = self.base / datetime.fromtimestamp(wall).astimezone().strftime(self._pattern)
        if not self.base.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.base))  # as of a disk taken away
        named.parent.mkdir(parents=True, exist_ok=True)
        path, number = named, 1
        while path.exists() or path.is_symlink():
            number += 1
            path = named.with_stem(f"{named.stem}-{number}")
        return path


class Made:
    """Which files were made under a pattern, in this run and before: only those are ever deleted.

    It is a file beside them with a line for each: its name, its number on the disk, and its size once it was closed, so
    that a file which somebody else has put in its place is not taken for it.

    Args:
        base: the folder that does not change.
        pattern: of the names, below `base`.
    """

    def __init__(self, base: Path, pattern: str) -> None:
        self._base = base
        self._allowed = re.compile(_regex(pattern))
        self._file = base / f".hat-video-{hashlib.blake2b(pattern.encode(), digest_size=4).hexdigest()}.made"

    @property
    def is_there(self) -> bool:
        """Whether anything was ever made."""
        return self._file.exists()

    def add(self, path: Path, *, is_closed: bool = False) -> None:
        """Remembers a file that has just been made, or closed."""
        status = path.stat()
        entry = {"name": str(path.relative_to(self._base)), "inode": status.st_ino}
        if is_closed:
            entry["size"] = status.st_size
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def prune(self, *, older_than: float, besides: Collection[Path] = ()) -> None:
        """Deletes what was last written before `older_than`, seconds since 1970; never fails."""
        with suppress(OSError):
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
            known = {entry["name"]: entry for entry in map(_parsed, lines) if entry is not None}
            kept = {name: entry for name, entry in known.items() if self._stays(entry, older_than, besides)}
            if len(kept) < len(lines):
                part = self._file.with_name(f"{self._file.name}.{os.getpid()}.part")
                part.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept.values()), encoding="utf-8")
                part.replace(self._file)

    def _stays(self, entry: dict[str, Any], older_than: float, besides: Collection[Path]) -> bool:
        name = entry["name"]
        if not self._allowed.fullmatch(name) or ".." in Path(name).parts:
            return False
        path = self._base / name
        if path in besides:
            return True
        try:
            status = path.lstat()
        except OSError:
            return False
        is_same = status.st_ino == entry.get("inode") and status.st_size == entry.get("size", status.st_size)
        if not stat.S_ISREG(status.st_mode) or not is_same:
            return False  # somebody else's now
        if status.st_mtime >= older_than:
            return True
        try:
            path.unlink()
        except OSError:
            return True
        for folder in path.parents:
            if folder == self._base or not _removed(folder):
                break
        return False


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        return {"name": str(entry["name"]), **{key: int(entry[key]) for key in ("inode", "size") if key in entry}}
    except (ValueError, KeyError, TypeError):
        return None


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _regex(pattern: str) -> str:
    """What names of a `strftime` pattern look like, with the number of a name that was taken."""
    parts = [re.escape(part) for part in _DIRECTIVE.split(pattern.replace("%%", "\0"))]
    stem, dot, suffix = r"[^/]+".join(parts).replace("\0", "%").rpartition(r"\.")
    return rf"{stem}(?:-\d+)?{dot}{suffix}"
