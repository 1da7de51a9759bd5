"""A sheet of pictures: the same crops as the low resolution, every candidate and the original show them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hat_video.analysis.metrics import luma, psnr
from hat_video.analysis.pictures import pillow
from hat_video.errors import OutputError, UsageError
from hat_video.files import write_atomically
from hat_video.model.resample import resize

__all__ = ["Sheet", "parse_crop"]

_LEFT, _CAPTION, _GAP = 8, 18, 8
"""Pixels of the sheet: its margin, the height of a caption, between cells."""


def parse_crop(text: str) -> tuple[int, int, int, int]:
    """`x,y,width,height`, in pixels of the original.

    Raises:
        UsageError: `text` is not of that form.
    """
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--crop {text}: must be x,y,width,height in pixels, for instance 64,32,96,96") from None
    return x, y, width, height


@dataclass(slots=True)
class _Row:
    label: str
    place: tuple[int, int, int, int]
    """x, y, width, height in the original."""
    detail: float
    cells: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    """Column -> crop (3, h, w) in [0, 1] and what is written below it."""


class Sheet:
    """Collects crops while candidates are evaluated; only the crops are kept in memory.

    Args:
        scale: of the candidates.
        crop: x, y, width, height in the original; the most detailed place of each picture if None.
        size: side of a crop that is chosen, in pixels of the original.
        rows: so many pictures, those with the most detail.
        zoom: pixels of the sheet to a pixel of the original.
    """

    def __init__(
        self,
        scale: int,
        *,
        crop: tuple[int, int, int, int] | None = None,
        size: int = 96,
        rows: int = 8,
        zoom: int = 2,
    ) -> None:
        pillow()
        self._scale, self._crop, self._size, self._limit, self._zoom = scale, crop, size, rows, zoom
        self._rows: dict[tuple[str, int], _Row] = {}
        self._shown = Counter[tuple[str, str]]()

    def add(self, candidate: str, label: str, low: Tensor, output: Tensor, high: Tensor) -> None:
        """One picture by one candidate; every candidate is to be shown the same pictures.

        Args:
            candidate: becomes a column, in the order of the first call.
            label: of the picture; becomes a row.
            low: (1, 3, h, w) in [0, 1].
            output: (1, 3, H, W) in [0, 1].
            high: likewise, the original.

        Raises:
            UsageError: the crop that was asked for lies outside the picture.
        """
        # Two folders, or clips, may have one name: shown again by the same candidate, it is another picture.
        self._shown[candidate, label] += 1
        key = (label, self._shown[candidate, label])
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = self._new_row(label, low, high)
        mine, theirs = (_cut(picture, row.place) for picture in (output, high))
        decibels = psnr(luma(mine[None]), luma(theirs[None]))
        row.cells[candidate] = (mine, f"{candidate}  {decibels:.2f} dB")

    def _new_row(self, label: str, low: Tensor, high: Tensor) -> _Row:
        height, width = high.shape[2:]
        missing = luma(high) - luma(resize(low.double(), (height, width)))
        if self._crop is not None:
            x, y, w, h = self._crop
            if min(x, y) < 0 or min(w, h) < self._scale or x + w > width or y + h > height:
                raise UsageError(f"--crop {x},{y},{w},{h}: {label} is {width}x{height}; the crop must lie within it")
        else:
            x, y, w, h = _most_detailed(missing, min(self._size, width), min(self._size, height))
        # On whole pixels of the low resolution, so that its crop shows the same.
        x, y, w, h = (value // self._scale * self._scale for value in (x, y, w, h))
        row = _Row(label, (x, y, w, h), float(missing[:, y : y + h, x : x + w].square().mean()))
        small = _cut(low, (x // self._scale, y // self._scale, w // self._scale, h // self._scale))
        row.cells["low"] = (small, f"low resolution, 1/{self._scale}")
        row.cells["original"] = (_cut(high, row.place), "original")
        return row

    def write(self, path: Path) -> None:
        """Writes the sheet as PNG.

        Raises:
            OutputError: the file cannot be written.
            UsageError: there is no picture.
        """
        rows = sorted(self._rows.values(), key=lambda row: row.detail, reverse=True)[: self._limit]
        if not rows:
            raise UsageError(f"--sheet {path}: no picture was evaluated; give --stills or --clips")
        columns = len(rows[0].cells)
        cells = [(row.place[2] * self._zoom, row.place[3] * self._zoom + 2 * _CAPTION) for row in rows]
        width = 2 * _LEFT + max(columns * (w + _GAP) - _GAP for w, _ in cells)
        sheet = pillow().Image.new("RGB", (width, 2 * _LEFT + sum(h for _, h in cells)), "white")
        top = _LEFT
        for row, (w, h) in zip(rows, cells, strict=True):
            self._draw(sheet, row, top, w)
            top += h
        image = BytesIO()
        sheet.save(image, format="PNG")
        try:
            write_atomically(path, image.getvalue())
        except OutputError as error:
            raise OutputError(f"--sheet {error}") from None

    def _draw(self, sheet: Any, row: _Row, top: int, width: int) -> None:
        image = pillow().Image
        draw = pillow().ImageDraw.Draw(sheet)
        font = pillow().ImageFont.load_default(12)
        x, y, w, h = row.place
        draw.text((_LEFT, top), f"{row.label}  at {x},{y}, {w}x{h}", "black", font)
        names = ["low", *(name for name in row.cells if name not in ("low", "original")), "original"]
        for i, name in enumerate(names):
            crop, caption = row.cells[name]
            pixels = (crop * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
            left = _LEFT + i * (width + _GAP)
            size = (w * self._zoom, h * self._zoom)
            sheet.paste(image.fromarray(pixels).resize(size, image.Resampling.NEAREST), (left, top + _CAPTION))
            draw.text((left, top + _CAPTION + size[1]), caption, "black", font)


def _cut(picture: Tensor, place: tuple[int, int, int, int]) -> Tensor:
    """(3, h, w) of (1, 3, H, W), with memory of its own."""
    x, y, width, height = place
    return picture[0, :, y : y + height, x : x + width].float().clone()


def _most_detailed(missing: Tensor, width: int, height: int) -> tuple[int, int, int, int]:
    """Where the most is lost between the low resolution and the original: (x, y, width, height).

    Args:
        missing: (1, H, W), the original less bicubic's enlargement.
        width: of the place, in pixels.
        height: likewise.
    """
    stride = 8
    lost = F.avg_pool2d(missing.abs()[None], (height, width), stride=stride)[0, 0]
    best = int(lost.argmax())
    return best % lost.shape[1] * stride, best // lost.shape[1] * stride, width, height
