"""Static HDR metadata: out of frames, and into the encoders that can write it."""

from __future__ import annotations

import struct
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any, cast

from av.sidedata.sidedata import Type as SideDataType

from hat_video.frames import ContentLight, HdrInfo, MasteringDisplay

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

__all__ = ["dynamic_hdr_of", "hdr_of", "hdr_options", "hdr_written_by", "side_data_of"]

# Steps to one: of chromaticity, of the darkest and of the brightest luminance in cd/m2. SMPTE ST 2086 as H.264 and HEVC
# write it; and AV1's fixed point numbers.
_GRIDS = {
    "libx264": (50_000, 10_000, 10_000),
    "libx265": (50_000, 10_000, 10_000),
    "libsvtav1": (1 << 16, 1 << 14, 1 << 8),
}
_DYNAMIC = {
    "Dolby Vision": {SideDataType.DOVI_RPU_BUFFER, SideDataType.DOVI_METADATA},
    "HDR10+": {SideDataType.DYNAMIC_HDR_PLUS},
    "HDR Vivid": {SideDataType.DYNAMIC_HDR_VIVID},
}


def side_data_of(frame: VideoFrame) -> list[Any] | None:
    """What comes with a frame beside its pixels; None where PyAV cannot list it: it does not know all kinds."""
    try:
        return list(cast("Any", frame.side_data))  # iterable, whatever the stubs say
    except ValueError:
        return None


def hdr_of(frame: VideoFrame) -> HdrInfo | None:
    """The static HDR metadata that comes with a frame; None without any.

    Source: FFmpeg, libavutil/mastering_display_metadata.h, whose structures these are: ten AVRational (x and y of red,
    green, blue and white, darkest, brightest) and two flags; two unsigned.
    """
    blobs = {data.type: bytes(data) for data in side_data_of(frame) or ()}
    mastering = _mastering(blobs.get(SideDataType.MASTERING_DISPLAY_METADATA, b""))
    light = blobs.get(SideDataType.CONTENT_LIGHT_LEVEL, b"")
    content_light = ContentLight(*struct.unpack("=2I", light[:8])) if len(light) >= 8 else None
    if content_light == ContentLight(0, 0):
        content_light = None
    return None if mastering is None and content_light is None else HdrInfo(mastering, content_light)


def dynamic_hdr_of(frame: VideoFrame) -> list[str]:
    """The names of the HDR metadata that changes from scene to scene and is about the frame that it came with."""
    kinds = {data.type for data in side_data_of(frame) or ()}
    return [name for name, marks in _DYNAMIC.items() if kinds & marks]


def _mastering(blob: bytes) -> MasteringDisplay | None:
    if len(blob) < 88:
        return None
    numbers = struct.unpack("=22i", blob[:88])
    values = [Fraction(n, d) if d else Fraction(0) for n, d in zip(numbers[0:20:2], numbers[1:20:2], strict=True)]
    has_primaries, has_luminance = numbers[20:]
    primaries = tuple(zip(values[0:8:2], values[1:8:2], strict=True)) if has_primaries else None
    luminance = (values[8], values[9]) if has_luminance else None
    return None if primaries is None and luminance is None else MasteringDisplay(primaries, luminance)


def hdr_written_by(encoder: str, hdr: HdrInfo | None) -> HdrInfo | None:
    """What a decoder will read back: on the encoder's grid; None where the encoder cannot write it.

    A mastering display of which only a part is known is left out: the encoders' parameter has no way to say so.
    """
    if hdr is None or encoder not in _GRIDS:
        return None
    xy, dark, bright = _GRIDS[encoder]
    mastering = None
    if hdr.mastering is not None and hdr.mastering.primaries is not None and hdr.mastering.luminance is not None:
        mastering = MasteringDisplay(
            tuple((_on_grid(x, xy), _on_grid(y, xy)) for x, y in hdr.mastering.primaries),
            (_on_grid(hdr.mastering.luminance[0], dark), _on_grid(hdr.mastering.luminance[1], bright)),
        )
    written = HdrInfo(mastering, hdr.content_light)
    return None if written == HdrInfo() else written


def hdr_options(encoder: str, hdr: HdrInfo | None) -> dict[str, str]:
    """The private options by which an encoder writes `hdr`, as `hdr_written_by` gave it."""
    if hdr is None:
        return {}
    key, display, light = {
        "libx264": ("x264-params", "mastering-display", "cll"),
        "libx265": ("x265-params", "master-display", "max-cll"),
        "libsvtav1": ("svtav1-params", "mastering-display", "content-light"),
    }[encoder]
    params = []
    if hdr.mastering is not None and hdr.mastering.primaries is not None and hdr.mastering.luminance is not None:
        # x264 and x265 count in steps of the grid, SVT-AV1 reads decimals.
        xy, dark, bright = (1, 1, 1) if encoder == "libsvtav1" else _GRIDS[encoder]
        red, green, blue, white = (f"({_text(x * xy)},{_text(y * xy)})" for x, y in hdr.mastering.primaries)
        low, high = hdr.mastering.luminance
        luminance = f"({_text(high * bright)},{_text(low * dark)})"
        params.append(f"{display}=G{green}B{blue}R{red}WP{white}L{luminance}")
    if hdr.content_light is not None:
        params.append(f"{light}={hdr.content_light.max_cll},{hdr.content_light.max_fall}")
    return {key: ":".join(params)}


def _on_grid(value: Fraction, steps: int) -> Fraction:
    return Fraction(floor(value * steps + Fraction(1, 2)), steps)


def _text(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12f}"
