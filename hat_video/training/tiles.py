"""The training set: one memory-mapped file of high-resolution tiles, and how batches are drawn from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hat_video.errors import OutputError, SourceError, UsageError

__all__ = ["TILE", "TileRecord", "TileSet", "TileWriter"]

TILE = 256
"""Side of a tile, in pixels."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TileRecord:
    """Where a tile is from."""

    group: str
    """`photo`, `vector`, `images` (the user's own) or `validation` (held out)."""
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
        self._file.write(np.ascontiguousarray(tile).data)
        self.records.append(record)
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                # numpy leaves room in the header for the first axis to grow.
                self._file.seek(0)
                self._write_header()
        finally:
            self._file.close()
        if kind is not None:
            self._part.unlink(missing_ok=True)
            return
        index = {"tile": TILE, "sha256": _sha256(self._part), "tiles": [asdict(record) for record in self.records]}
        self.path.with_suffix(".json").write_text(json.dumps(index) + "\n", encoding="utf-8")
        self._part.replace(self.path)

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
        UsageError: the mix names a group that is not there.
    """

    def __init__(self, path: Path, mix: Mapping[str, float], richest_db: float = math.inf) -> None:
        try:
            index: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            self.tiles: Pixels = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{path}: no tile file; make one with `hat-video train-data -o {path}` ({error})"
            ) from None
        records: list[dict[str, Any]] = index["tiles"]
        if self.tiles.shape != (len(records), TILE, TILE, 3):
            raise SourceError(
                f"{path}: {self.tiles.shape} does not go with {len(records)} tiles in its index; make it anew"
            )
        self.sha256: str = index["sha256"]
        self._groups: dict[str, NDArray[np.int64]] = {}
        for name in dict.fromkeys(str(record["group"]) for record in records):
            self._groups[name] = np.array(
                [i for i, record in enumerate(records) if record["group"] == name and self._is_kept(record, richest_db)]
            )
        missing = [name for name in mix if not len(self._groups.get(name, ()))]
        if missing or not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
            has = ", ".join(f"{name} ({len(members)})" for name, members in self._groups.items())
            raise UsageError(f"mix {dict(mix)}: must give positive shares of groups that {path} has: {has}")
        self._names = list(mix)
        self._shares = np.array([mix[name] for name in self._names]) / sum(mix.values())

    @staticmethod
    def _is_kept(record: Mapping[str, Any], richest_db: float) -> bool:
        return record["group"] == "validation" or float(record["sharpness_db"]) <= richest_db

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
        members = self._groups.get("validation", np.array([], np.int64))
        return np.asarray(self.tiles[members[:: max(1, len(members) // limit)][:limit]])


def orient(picture: Pixels, which: int) -> Pixels:
    """One of the 8 flips and transposes of a square (C, n, n) picture; 0 leaves it as it is."""
    if which & 1:
        picture = picture[:, ::-1]
    if which & 2:
        picture = picture[:, :, ::-1]
    return picture.transpose(0, 2, 1) if which & 4 else picture
