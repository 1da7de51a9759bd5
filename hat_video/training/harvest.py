"""From a picture to the tiles of it that are worth learning from."""

from __future__ import annotations

import gzip
import io
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hat_video.analysis.pictures import deeper_than_8_bits
from hat_video.training.tiles import TILE, Pixels, TileRecord

__all__ = [
    "FINGERPRINT",
    "PICTURES",
    "VECTORS",
    "Harvest",
    "Task",
    "distance",
    "fingerprint",
    "harvest",
    "orientations",
    "sharpness_map",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
VECTORS = (".svg", ".svgz")

_RICH_DB = (20.0, 36.0)
"""Of photographs. Below lies noise; above, there is nothing to lose by making it smaller."""
_SMOOTH_DB = (36.0, 42.0)
"""A few of these, so that the network also knows skies."""
_SMOOTH_SHARE = 0.08
_VECTOR_DB = (18.0, 34.0)
_TILES_A_PHOTO, _TILES_A_VECTOR = 40, 3
_LOWEST_JPEG_QUALITY = 68
_LARGEST_SVG = 400_000
_LARGEST_SIDE = 2500

# The luminance table of the JPEG standard (Annex K), sorted.
# fmt: off
_JPEG_TABLE = np.sort([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120,
    101, 72, 92, 95, 98, 112, 100, 103, 99,
])
# fmt: on


@dataclass(frozen=True, slots=True)
class Task:
    """One file to harvest."""

    path: Path
    group: str
    source: str


@dataclass(frozen=True, slots=True)
class Harvest:
    """What one file gave."""

    task: Task
    fingerprints: bytes
    """Of a photograph, see `orientations`; empty for vector art, whose white ground makes all alike."""
    tiles: list[tuple[Pixels, TileRecord]]
    why_none: str = ""


def harvest(task: Task) -> Harvest:
    """Reads one file and cuts its rich tiles; the same file gives the same tiles. A bad file gives none."""
    try:
        if task.path.suffix.lower() in VECTORS:
            return _from_vector(task)
        with warnings.catch_warnings():
            # Of large ones, which are welcome; those that are too large are an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _from_photo(task)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Harvest(task, b"", [], f"unreadable: {error}")


FINGERPRINT = 32
"""Bytes of one."""


def fingerprint(picture: Image.Image) -> bytes:
    """A 256-bit difference hash: survives resizing and compression. Compare with `distance`."""
    small = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes()


def orientations(picture: Image.Image) -> bytes:
    """The fingerprints of a picture as it is, mirrored, upside down and turned: training shows all eight."""
    luma = picture.convert("L")
    small = luma.resize((272, 272), Image.Resampling.BOX)
    return fingerprint(luma) + b"".join(fingerprint(small.transpose(turn)) for turn in Image.Transpose)


def distance(mine: bytes, others: Sequence[bytes]) -> NDArray[np.int64]:
    """Bits in which each of the other fingerprints differs from the one of `mine`, of any number, that is nearest."""
    if not others:
        return np.array([], np.int64)
    ours = np.unpackbits(np.frombuffer(mine, np.uint8)).reshape(-1, 1, 256)
    theirs = np.unpackbits(np.frombuffer(b"".join(others), np.uint8)).reshape(1, -1, 256)
    nearest: NDArray[np.int64] = (ours != theirs).sum(2).min(0)
    return nearest


def sharpness_map(picture: Image.Image) -> NDArray[np.float32]:
    """(H, W) squared error of the luma after bicubic x2 down and up: what half the resolution cannot hold."""
    luma = picture.convert("L")
    width, height = luma.width // 2 * 2, luma.height // 2 * 2
    luma = luma.crop((0, 0, width, height))
    half = luma.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    back = half.resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(luma, np.float32) - np.asarray(back, np.float32)) ** 2


def _places(picture: Image.Image) -> list[tuple[float, int, int]]:
    """(sharpness in dB, x, y) of tiles that cover the picture."""
    error = sharpness_map(picture)
    found = []
    for y in _starts(error.shape[0]):
        for x in _starts(error.shape[1]):
            mean = float(error[y : y + TILE, x : x + TILE].mean())
            found.append((10 * float(np.log10(255**2 / max(mean, 1e-2))), x, y))
    return found


def _starts(length: int) -> list[int]:
    """Tiles may overlap a little, rather than leave out up to a third of one."""
    count = max(1, int(np.ceil(length / TILE - 0.35)))
    return [0] if count == 1 else [round(i * (length - TILE) / (count - 1)) for i in range(count)]


def _from_photo(task: Task) -> Harvest:
    picture: Image.Image = Image.open(task.path)
    if depth := deeper_than_8_bits(picture):
        return Harvest(task, b"", [], f"is of {depth}: 8 bits a channel are read")
    quality = _jpeg_quality(picture)
    if min(picture.size) < TILE:
        return Harvest(task, b"", [], f"{picture.width}x{picture.height} is smaller than a tile")
    if quality is not None and quality < _LOWEST_JPEG_QUALITY:
        return Harvest(task, b"", [], f"JPEG of quality {quality:.0f}")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() < 250:
            return Harvest(task, b"", [], "is transparent")
    picture = picture.convert("RGB")
    best: tuple[int, float, Image.Image, list[tuple[float, int, int]]] | None = None
    for factor in _factors(picture.size, quality):
        smaller = picture if factor == 1 else picture.resize(_divided(picture.size, factor), Image.Resampling.LANCZOS)
        places = _places(smaller)
        count = sum(_is_within(place[0], _RICH_DB) for place in places)
        if count and (best is None or count > best[0]):
            best = (count, factor, smaller, places)
    if best is None:
        return Harvest(task, orientations(picture), [], "is nowhere sharp")
    _, factor, smaller, places = best
    rng = random.Random(task.path.name)
    rich = [place for place in places if _is_within(place[0], _RICH_DB)]
    smooth = [place for place in places if _is_within(place[0], _SMOOTH_DB)]
    rng.shuffle(rich)
    rng.shuffle(smooth)
    chosen = rich[:_TILES_A_PHOTO]
    chosen += smooth[: round(len(chosen) * _SMOOTH_SHARE)]
    return Harvest(task, orientations(picture), _cut(task, smaller, factor, chosen))


def _factors(size: tuple[int, int], quality: float | None) -> list[float]:
    """By how much a photograph may be made smaller; one that JPEG has touched must be, for its blocks to vanish."""
    if quality is None or quality >= 94:
        factors = [1, 1.5, 2, 3, 4]
    elif quality >= 90 and max(size) <= 640:
        factors = [1, 1.5, 2, 3]
    elif quality >= 84 and max(size) <= 1600:
        factors = [1.5, 2, 3, 4]
    else:
        factors = [2, 3, 4]
    return [factor for factor in factors if min(size) / factor >= TILE]


def _from_vector(task: Task) -> Harvest:
    import resvg_py

    data = task.path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) > _LARGEST_SVG:
        return Harvest(task, b"", [], f"{len(data)} bytes of drawing")
    rng = random.Random(task.path.name)
    ground = rng.choice(["white", f"#{rng.randrange(1 << 24):06x}"])
    width = rng.choice([512, 768, 1024])
    # Fonts differ from machine to machine.
    png = resvg_py.svg_to_bytes(
        svg_string=data.decode("utf-8", "replace"), width=width, background=ground, skip_system_fonts=True
    )
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if min(picture.size) < TILE or max(picture.size) > _LARGEST_SIDE:
        return Harvest(task, b"", [], f"{picture.width}x{picture.height} when drawn")
    places = [place for place in _places(picture) if _is_within(place[0], _VECTOR_DB)]
    rng.shuffle(places)
    return Harvest(task, b"", _cut(task, picture, 1.0, places[:_TILES_A_VECTOR]), "" if places else "has no edges")


def _cut(
    task: Task, picture: Image.Image, factor: float, places: list[tuple[float, int, int]]
) -> list[tuple[Pixels, TileRecord]]:
    pixels = np.asarray(picture)
    return [
        (
            pixels[y : y + TILE, x : x + TILE].copy(),
            TileRecord(task.group, task.source, task.path.name, factor, x, y, round(db, 2)),
        )
        for db, x, y in places
    ]


def _divided(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return round(size[0] / factor), round(size[1] / factor)


def _is_within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value < limits[1]


def _jpeg_quality(picture: Image.Image) -> float | None:
    """libjpeg's quality number, estimated from the file's luminance table; None for what is no JPEG."""
    tables: dict[int, list[int]] = getattr(picture, "quantization", None) or {}
    if 0 not in tables:
        return None
    scale = float(np.median(np.sort(tables[0]) / _JPEG_TABLE)) * 100
    return 100 - scale / 2 if scale < 100 else 5000 / scale
