"""The training set: one memory-mapped file of high-resolution tiles, and how batches are drawn from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hat_video.errors import OutputError, SourceError, UsageError

__all__ = ["HELD_OUT", "TILE", "TileRecord", "TileSet", "TileWriter"]

TILE = 256
"""Side of a tile, in pixels."""

HELD_OUT = "validation"
"""The group that no batch contains."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TileRecord:
    """Where a tile is from."""

    group: str
    """`photo`, `vector`, `images` (the user's own) or `HELD_OUT`."""
    source: str
    """Package or folder."""
    file: str
    factor: float
    """The picture was made this many times smaller before it was cut."""
    x: int
    y: int
    sharpness_db: float
    """PSNR of the luma after bicubic x2 down and up: the lower, the more there is to lose."""


class TileWriter:
    """Appends tiles to `path`, a .npy file of (N, 256, 256, 3) uint8; beside it, .json says where each is from.

    A context manager: both files get their names when it is left without an error; else nothing stays behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[TileRecord] = []
        self._seen: set[bytes] = set()
        self._part = path.with_name(path.name + ".part")

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._write_header()
        return self

    def add(self, tile: Pixels, record: TileRecord) -> bool:
        """False if the very same pixels are there already."""
        digest = hashlib.blake2b(tile.tobytes(), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        try:
            self._file.write(np.ascontiguousarray(tile).data)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.records.append(record)
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        index = self.path.with_suffix(".json")
        index_part = index.with_name(index.name + ".part")
        try:
            if kind is None:
                # numpy leaves room in the header for the first axis to grow.
                self._file.seek(0)
                self._write_header()
                self._file.close()
                facts = {"tile": TILE, "sha256": _sha256(self._part), "tiles": [asdict(one) for one in self.records]}
                index_part.write_text(json.dumps(facts) + "\n", encoding="utf-8")
                # Should a kill fall between the two, the file and its index are seen not to belong together.
                self._part.replace(self.path)
                index_part.replace(index)
        except OSError as failed:
            raise OutputError(f"{self.path}: cannot be written: {failed.strerror}") from None
        finally:
            with suppress(OSError):
                self._file.close()
            self._part.unlink(missing_ok=True)
            index_part.unlink(missing_ok=True)

    def _write_header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.records), TILE, TILE, 3)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TileSet:
    """A tile file, opened for reading.

    Args:
        path: the .npy file that `hat-video train-data` made.
        mix: share of each group in a batch, any positive numbers. A group that the file lacks is an error.
        richest_db: leaves out tiles that are smoother; see `TileRecord.sharpness_db`.

    Raises:
        SourceError: the file or its index is missing or damaged.
        UsageError: the mix names a group that is not there, or the one that is held out.
    """

    def __init__(self, path: Path, mix: Mapping[str, float], richest_db: float = math.inf) -> None:
        try:
            index: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            self.tiles: Pixels = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            reason = (
                f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else "damaged"
            )
            raise SourceError(
                f"{path}: no tile file ({reason}); make one with `hat-video train-data -o FILE.npy`"
            ) from None
        try:
            records: list[dict[str, Any]] = index["tiles"]
            self.sha256 = str(index["sha256"])
            groups = [str(record["group"]) for record in records]
            kept = [
                group == HELD_OUT or float(record["sharpness_db"]) <= richest_db
                for group, record in zip(groups, records, strict=True)
            ]
        except (KeyError, TypeError, ValueError):
            raise SourceError(f"{path.with_suffix('.json')}: is not the index of a tile file; make both anew") from None
        if self.tiles.shape != (len(records), TILE, TILE, 3) or self.tiles.dtype != np.uint8:
            raise SourceError(
                f"{path}: {self.tiles.shape} of {self.tiles.dtype} does not go with {len(records)} tiles in its index;"
                " make it anew"
            )
        self._path = path
        what = [[group, record["sharpness_db"]] for group, record in zip(groups, records, strict=True)]
        self.groups_sha256 = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        """Of the groups and the sharpness of all tiles, which decide as much of what is drawn as the pixels."""
        self._groups: dict[str, NDArray[np.int64]] = {}
        for name in dict.fromkeys(groups):
            self._groups[name] = np.array([i for i in range(len(records)) if groups[i] == name and kept[i]], np.int64)
        if HELD_OUT in mix:
            raise UsageError(f"mix {dict(mix)}: {HELD_OUT!r} is held out; take other groups")
        missing = [name for name in mix if not len(self._groups.get(name, ()))]
        if missing or not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
            smooth = [name for name in missing if name in groups]
            if smooth:
                raise UsageError(
                    f"mix {dict(mix)}: no tile of {smooth[0]!r} is as sharp as richest_db = {richest_db:g}; raise it"
                )
            has = ", ".join(f"{name} ({len(members)})" for name, members in self._groups.items() if name != HELD_OUT)
            raise UsageError(f"mix {dict(mix)}: must give positive shares of groups that {path} has: {has}")
        self._names = list(mix)
        self._shares = np.array([mix[name] for name in self._names]) / sum(mix.values())

    def check(self) -> None:
        """Reads all of the file.

        Raises:
            SourceError: its pixels are not those that its index was written for.
        """
        if _sha256(self._path) != self.sha256:
            raise SourceError(f"{self._path}: its pixels are not those of its index; make both anew")

    def __len__(self) -> int:
        return len(self.tiles)

    def pick(self, rng: np.random.Generator) -> Pixels:
        """One (256, 256, 3) tile, by the mix."""
        members = self._groups[self._names[int(rng.choice(len(self._names), p=self._shares))]]
        tile: Pixels = self.tiles[int(members[rng.integers(len(members))])]
        return tile

    def crops(self, count: int, side: int, rng: np.random.Generator) -> Pixels:
        """(count, 3, side, side): random places of random tiles, in one of the 8 orientations each."""
        batch = np.empty((count, 3, side, side), np.uint8)
        for out in batch:
            tile = self.pick(rng)
            y, x = rng.integers(TILE - side + 1, size=2)
            out[:] = orient(tile[y : y + side, x : x + side].transpose(2, 0, 1), int(rng.integers(8)))
        return batch

    def held_out(self, limit: int = 32) -> Pixels:
        """(n, 256, 256, 3): tiles that no batch contains, of photographs that no batch contains."""
        members = self._groups.get(HELD_OUT, np.array([], np.int64))
        return np.asarray(self.tiles[members[:: max(1, len(members) // limit)][:limit]])


def orient(picture: Pixels, which: int) -> Pixels:
    """One of the 8 flips and transposes of a square (C, n, n) picture; 0 leaves it as it is."""
    if which & 1:
        picture = picture[:, ::-1]
    if which & 2:
        picture = picture[:, :, ::-1]
    return picture.transpose(0, 2, 1) if which & 4 else picture
