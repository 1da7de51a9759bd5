"""Still pictures: PNG, JPEG, WebP and TIFF of 8 and 16 bits, with their ICC profile and EXIF.

libvips reads and writes them, since it keeps what belongs to a picture besides its pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hat_video.errors import OptionError, OutputError, SourceError, StrictError, UsageError
from hat_video.files import write_atomically
from hat_video.frames import ColorInfo, PixelFormat, VideoInfo
from hat_video.media.opening import Limits

__all__ = ["STILL_SUFFIXES", "Still", "is_still", "read_still", "write_still"]

STILL_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")

# What a picture carries, as libvips names it; the rest is about its own file.
_KEPT = ("icc-profile-data", "exif-data", "xmp-data", "iptc-data", "image-description", "orientation")
# Then the keyword: a PNG may have several texts of one keyword, and libvips numbers them.
_TEXT = re.compile("png-comment-[0-9]+-(.*)", re.DOTALL)
_SAVE: dict[str, dict[str, object]] = {
    ".jpg": {"Q": 95, "subsample_mode": "off"},
    ".jpeg": {"Q": 95, "subsample_mode": "off"},
    ".webp": {"lossless": True},
    ".png": {"compression": 6},
    ".tif": {"compression": "deflate", "predictor": "horizontal"},
    ".tiff": {"compression": "deflate", "predictor": "horizontal"},
}
_KINDS = {
    ("b-w", "uchar"): "gray",
    ("grey16", "ushort"): "gray16le",
    ("srgb", "uchar"): "gbrp",
    ("rgb16", "ushort"): "gbrp16le",
}


@dataclass(frozen=True, slots=True)
class Still:
    """One picture, as planes, and what else it carries."""

    info: VideoInfo
    planes: tuple[Tensor, ...]
    """(1, H, W) each, as `info.pixel_format` says."""
    carried: dict[str, Any]
    """libvips' name -> value: profile, EXIF, XMP, IPTC, orientation, a PNG's texts."""
    dots_per_mm: tuple[float, float]


def is_still(path: Path) -> bool:
    """Whether a file is one picture, by its name; an animated PNG is a clip."""
    if path.suffix.lower() not in STILL_SUFFIXES or not path.is_file():
        return False
    with path.open("rb") as file:
        # The chunk that makes a PNG move comes before the first picture.
        return b"acTL" not in file.read(1 << 16).partition(b"IDAT")[0]


def _vips() -> ModuleType:
    try:
        import pyvips
    except ImportError:
        raise UsageError("still pictures need libvips: pip install 'hat-video[stills]'") from None
    module: ModuleType = pyvips
    return module


def read_still(path: Path, limits: Limits | None = None) -> Still:
    """Reads a picture.

    Args:
        path: the picture.
        limits: how large it may be; the defaults if None.

    Raises:
        SourceError: it cannot be read, or is of a kind that is not upscaled here (CMYK, floating point, several pages).
        UsageError: libvips is not installed.
    """
    vips = _vips()
    try:
        image = vips.Image.new_from_file(str(path.absolute()), fail_on="truncated")
        (limits or Limits()).check_size(path, image.width, image.height)
        pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
        if pages > 1:
            raise SourceError(f"{path}: has {pages} pages; give them one by one")
        has_alpha = image.hasalpha()
        name = _KINDS.get((image.interpretation, image.format))
        if name is None or image.bands != (3 if name.startswith("gbr") else 1) + has_alpha:
            raise SourceError(
                f"{path}: is {image.interpretation} of {image.bands} bands, {image.format};"
                " gray and RGB of 8 and 16 bits can be upscaled"
            )
        pixels: np.ndarray[Any, Any] = image.numpy()
    except vips.Error as error:
        said = " ".join(str(error).split())
        raise SourceError(f"{path}: not a picture that can be read ({said})") from None
    pixels = pixels.reshape(image.height, image.width, image.bands)
    if has_alpha:
        name = {"gray": "gbrap", "gray16le": "gbrap16le"}.get(name, name.replace("gbrp", "gbrap"))
        if image.bands == 2:
            pixels = np.concatenate([pixels[..., :1].repeat(3, 2), pixels[..., 1:]], 2)
    order = [0] if pixels.shape[2] == 1 else [1, 2, 0, 3][: pixels.shape[2]]
    planes = tuple(torch.from_numpy(pixels[..., k].copy())[None] for k in order)
    is_gray = name.startswith("gray")
    info = VideoInfo(
        width=image.width,
        height=image.height,
        time_base=Fraction(1),
        rate=None,
        pixel_format=PixelFormat.parse(name),
        color=ColorInfo(matrix=6 if is_gray else 0, primaries=2, transfer=2, is_full_range=True),
    )
    return Still(info, planes, _carried(image), (image.xres, image.yres))


def _carried(image: Any) -> dict[str, Any]:
    fields = image.get_fields()
    names = [*(field for field in _KEPT if field in fields), *filter(_TEXT.fullmatch, fields)]
    return {field: image.get(field) for field in names}


def write_still(
    path: Path, planes: tuple[Tensor, ...], info: VideoInfo, still: Still, *, is_strict: bool = False
) -> tuple[list[str], list[str]]:
    """Writes a picture, whole or not at all, with what its format keeps of all that `still` carries.

    Args:
        path: its suffix says the format.
        planes: (1, H, W) each, as `info.pixel_format` says.
        info: their facts.
        still: the source.
        is_strict: nothing that `still` carries may get lost.

    Returns:
        What besides pixels the written file holds of it, and what its format could not keep, one line each.

    Raises:
        OutputError: it cannot be written.
        OptionError: the suffix is of no format that is known.
        StrictError: `is_strict`, and the format does not keep something; nothing is written.
    """
    vips = _vips()
    suffix = path.suffix.lower()
    if suffix not in _SAVE:
        raise OptionError(f"{path}: cannot write {suffix or 'a file without a suffix'}; use {' '.join(STILL_SUFFIXES)}")
    stacked = [plane[0].numpy() for plane in planes]
    pixels = np.stack([stacked[0]] if len(stacked) == 1 else [stacked[k] for k in (2, 0, 1, 3)[: len(stacked)]], 2)
    notes = []
    is_deep, is_gray = info.pixel_format.bit_depth > 8, info.pixel_format.kind == "gray"
    if is_deep and suffix in (".jpg", ".jpeg", ".webp"):
        pixels, is_deep = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8), False
        notes.append(f"{suffix} holds 8 bits; the source has 16")
    if len(planes) == 4 and suffix in (".jpg", ".jpeg"):
        pixels = pixels[..., :3]
        notes.append(f"{suffix} has no transparency; it is left out")
    kinds = {(True, True): "grey16", (True, False): "b-w", (False, True): "rgb16", (False, False): "srgb"}
    scale = (info.width / still.info.width, info.height / still.info.height)
    try:
        image = vips.Image.new_from_array(np.ascontiguousarray(pixels), interpretation=kinds[is_gray, is_deep])
        image = image.copy(xres=still.dots_per_mm[0] * scale[0], yres=still.dots_per_mm[1] * scale[1])
        types = {int: vips.GValue.gint_type, str: vips.GValue.gstr_type}
        for field, value in still.carried.items():
            if _TEXT.fullmatch(field) and not f"{field}{value}".isascii():
                continue  # libvips would write UTF-8 where every reader expects Latin-1
            image.set_type(types.get(type(value), vips.GValue.blob_type), field, value)
        # libvips would name the unfinished file, and not what hinders it.
        data = image.write_to_buffer(suffix, **_SAVE[suffix])
        # What a writer leaves out it does not say.
        kept, lost = _compare(still.carried, _carried(vips.Image.new_from_buffer(data, "")))
    except vips.Error as error:
        raise OutputError(f"{path}: cannot be written: {' '.join(str(error).split())}") from None
    if lost and is_strict:
        raise StrictError(f"{path}: --strict refuses to drop {', '.join(lost)}, not kept in {suffix}")
    if lost:
        notes.append(f"not kept in {suffix}: {', '.join(lost)}")
    write_atomically(path, data)
    return kept, notes


def _compare(wanted: dict[str, Any], there: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What is there of what was wanted, and what is not, by the names that people are told."""

    def named(carried: dict[str, Any]) -> Counter[tuple[str, Any]]:
        texts = {field: match[1] for field in carried if (match := _TEXT.fullmatch(field))}
        # A writer gives texts other numbers, and EXIF the new size.
        return Counter(
            (f"text {texts[field]}", value) if field in texts else (field, None) for field, value in carried.items()
        )

    before, after = named(wanted), named(there)
    kept, lost = before & after, before - after
    return sorted({name for name, _ in kept}), sorted({name.removesuffix("-data") for name, _ in lost})
