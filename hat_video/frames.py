"""What flows through the house: `VideoInfo` once, then `FrameBatch`es of planes with their integer timestamps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch

__all__ = [
    "ColorInfo",
    "ContentLight",
    "FrameBatch",
    "HdrInfo",
    "MasteringDisplay",
    "PixelFormat",
    "Siting",
    "VideoInfo",
]

Siting = Literal["left", "center", "topleft"]

_PLANAR = re.compile(r"(?P<kind>yuv[aj]?|gbra?p|gray)(?P<chroma>\d{3})?p?(?P<depth>\d{1,2})?(?:le)?")
_SUBSAMPLING = {"444": (0, 0), "422": (1, 0), "420": (1, 1), "440": (0, 1), "411": (2, 0), "410": (2, 2)}


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """A planar pixel format: the only kind that flows; sources convert others to the nearest of these."""

    name: str
    """FFmpeg's name, e.g. `yuv420p`, `yuva422p10le`, `gray`, `gbrp`."""
    kind: Literal["yuv", "gray", "rgb"]
    """Planes are (Y, U, V), (Y,) or, as FFmpeg orders `gbrp`, (G, B, R); then alpha, where there is one."""
    bit_depth: int
    """Bits a sample, 8 to 16; samples above 8 bits sit in the low bits of 16."""
    log2_chroma_w: int = 0
    """Chroma planes are ceil(width / 2**log2_chroma_w) wide."""
    log2_chroma_h: int = 0
    """Chroma planes are ceil(height / 2**log2_chroma_h) high."""
    has_alpha: bool = False
    """A last plane says how opaque each pixel is: 0 is transparent, 2^n-1 opaque. It is never subsampled."""

    @classmethod
    def parse(cls, name: str) -> PixelFormat:
        """The format that FFmpeg calls `name`.

        Raises:
            ValueError: `name` is not a planar YUV, gray or RGB format of 8 to 16 bits, little-endian.
        """
        match = _PLANAR.fullmatch(name)
        if match is not None:
            kind, chroma, depth = match["kind"], match["chroma"], int(match["depth"] or 8)
            if 8 <= depth <= 16 and (depth == 8) != name.endswith("le"):
                if kind in ("yuv", "yuva", "yuvj") and chroma in _SUBSAMPLING:
                    return cls(name, "yuv", depth, *_SUBSAMPLING[chroma], has_alpha=kind == "yuva")
                if kind == "gray" and chroma is None:
                    return cls(name, "gray", depth)
                if kind in ("gbrp", "gbrap") and chroma is None:
                    return cls(name, "rgb", depth, has_alpha=kind == "gbrap")
        raise ValueError(f"pixel format {name!r} is not planar YUV, gray or RGB of 8 to 16 bits")

    @property
    def opaque(self) -> PixelFormat:
        """The same format without its alpha."""
        return PixelFormat.parse(self.name.replace("yuva", "yuv").replace("gbrap", "gbrp"))

    @property
    def dtype(self) -> torch.dtype:
        """`torch.uint8` for 8 bits, else `torch.uint16`."""
        return torch.uint8 if self.bit_depth == 8 else torch.uint16

    def plane_sizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """(height, width) of each plane of a picture of `width` x `height` samples; odd sizes round up."""
        luma = (height, width)
        if self.kind == "gray":
            return (luma,)
        chroma = (-(-height >> self.log2_chroma_h), -(-width >> self.log2_chroma_w))
        return (luma, chroma, chroma, luma) if self.has_alpha else (luma, chroma, chroma)


@dataclass(frozen=True, slots=True)
class ColorInfo:
    """How code values stand for colours, in the code points of ITU-T H.273, which FFmpeg uses too; 2 is unspecified."""

    matrix: int
    """1 BT.709, 5 and 6 BT.601, 9 BT.2020, 0 RGB. Never 2: the probe settles what a file leaves open."""
    primaries: int
    """Colour primaries."""
    transfer: int
    """Transfer characteristics."""
    is_full_range: bool
    """True: 0..2^n-1 (JPEG). False: Y in 16..235 and C in 16..240, times 2^(n-8)."""
    siting: Siting = "left"
    """Where a 4:2:0 or 4:2:2 chroma sample lies among its luma samples."""
    assumed: tuple[str, ...] = ()
    """The names of the fields above that the file left open and the probe settled by rule."""


@dataclass(frozen=True, slots=True)
class MasteringDisplay:
    """The display that the film was graded on (SMPTE ST 2086). `None`: the file does not say."""

    primaries: tuple[tuple[Fraction, Fraction], ...] | None
    """CIE 1931 (x, y) of red, green, blue and white, exact."""
    luminance: tuple[Fraction, Fraction] | None
    """Darkest and brightest, in candela a square metre, exact."""


@dataclass(frozen=True, slots=True)
class ContentLight:
    """How bright the film is (CTA-861.3), in whole candela a square metre; 0 is unknown."""

    max_cll: int
    """Of the brightest pixel."""
    max_fall: int
    """Of the brightest frame, on average."""


@dataclass(frozen=True, slots=True)
class HdrInfo:
    """The static HDR metadata of a stream."""

    mastering: MasteringDisplay | None = None
    content_light: ContentLight | None = None


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The facts of one video stream; they travel once, ahead of its frames."""

    width: int
    """Coded width in samples, before rotation and sample aspect."""
    height: int
    """Coded height in samples."""
    time_base: Fraction
    """Seconds a tick of pts, exact."""
    rate: Fraction | None
    """Average frames a second, only ever a hint: time comes from pts."""
    pixel_format: PixelFormat
    """The planes that flow."""
    color: ColorInfo
    """What their code values mean."""
    sample_aspect_ratio: Fraction = Fraction(1)
    """Width of a sample over its height."""
    display_matrix: tuple[int, ...] | None = None
    """The nine fixed-point entries (16.16, last column 2.30) that turn the coded picture upright; None for none."""
    is_interlaced: bool = False
    """True where frames are woven of two fields, as the decoder or the container marks them."""
    hdr: HdrInfo | None = None
    """Mastering display and content light level; None where the file has neither."""
    stereo: str | None = None
    """How two views lie in the picture, by Matroska's name (`left_right`); None for a single view."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a picture of {self.width}x{self.height} samples has no pixel")
        if self.time_base <= 0:
            raise ValueError(f"time base {self.time_base} is not a positive fraction of a second")


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """Some frames in presentation order: their planes and their timestamps. Nothing else travels with pixels."""

    planes: tuple[torch.Tensor, ...]
    """One tensor a plane, (N, h, w), uint8 or uint16 as `PixelFormat.dtype` says, in `PixelFormat`'s plane order."""
    pts: tuple[int, ...]
    """One presentation timestamp a frame, in ticks of `VideoInfo.time_base`, strictly rising."""

    def __post_init__(self) -> None:
        for k, plane in enumerate(self.planes):
            if plane.ndim != 3 or plane.shape[0] != len(self.pts):
                raise ValueError(
                    f"plane {k} has shape {tuple(plane.shape)}; with {len(self.pts)} pts it must be (N, h, w)"
                )

    def __len__(self) -> int:
        return len(self.pts)
