"""One still picture through the network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from hat_video.errors import OutputError, StrictError
from hat_video.inference.upscaler import Upscaler
from hat_video.jobs.options import UpscaleOptions, refuse_idle
from hat_video.jobs.picture import upscale_planes
from hat_video.media.stills import read_still, write_still
from hat_video.paths import JsonPath

__all__ = ["StillReport", "upscale_still"]

_EIGHT_BITS = (".jpg", ".jpeg", ".webp")
_FOR_CLIPS = (
    *("size", "start", "duration", "rate", "decoder", "encoder", "crf", "preset", "encoder_option", "pixel_format"),
    *("alpha", "deinterlace", "batch", "segment", "work_dir", "keep_work", "verify", "trace"),
)


@dataclass(frozen=True, slots=True)
class StillReport:
    """What was made."""

    source: JsonPath
    output: JsonPath
    size: tuple[int, int]
    bit_depth: int
    kept: list[str]
    """What besides pixels the output holds of the source's: `exif-data`, `icc-profile-data`, `text Title`, ..."""
    notes: list[str] = field(default_factory=list)


def upscale_still(source: Path, output: Path | None, options: UpscaleOptions, upscaler: Upscaler) -> StillReport:
    """Upscales one picture; gray stays gray, 16 bits stay 16, transparency, profile and EXIF stay.

    Args:
        source: PNG, JPEG, WebP or TIFF.
        output: likewise; `<stem>_x<scale>` beside the source if None.
        options: `strict` and `overwrite` are heeded; what is about video does nothing.
        upscaler: the network.

    Raises:
        SourceError, OutputError: it cannot be read or written.
        OptionError: the output's suffix is of no picture, or an option is for clips.
        StrictError: `options.strict`, and the format would lose something.
    """
    refuse_idle(options, _FOR_CLIPS, "is for clips; a picture takes --scale, --model, --tile, --overwrite, --strict")
    output = output or source.with_name(f"{source.stem}_x{upscaler.scale}{source.suffix}")
    if output.exists() and output.samefile(source):
        raise OutputError(f"{output}: is the input itself; give another -o")
    if output.exists() and not options.overwrite:
        raise OutputError(f"{output}: exists; use --overwrite or another -o")
    still = read_still(source, options.limits())
    small = still.info
    large = replace(small, width=small.width * upscaler.scale, height=small.height * upscaler.scale)
    planes = upscale_planes(still.planes, small, large, upscaler)
    if options.strict:
        _refuse_losses(output, len(planes) == 4, small.pixel_format.bit_depth)
    kept, notes = write_still(output, planes, large, still, is_strict=options.strict)
    depth = 8 if output.suffix.lower() in _EIGHT_BITS else small.pixel_format.bit_depth
    return StillReport(source, output, (large.width, large.height), depth, kept, notes)


def _refuse_losses(output: Path, has_alpha: bool, depth: int) -> None:
    suffix = output.suffix.lower()
    if suffix in (".jpg", ".jpeg") and has_alpha:
        raise StrictError(f"{output}: --strict refuses to drop transparency; .png, .webp and .tif hold it")
    if suffix in _EIGHT_BITS and depth > 8:
        raise StrictError(f"{output}: --strict refuses to make 8 bits of {depth}; .png and .tif hold 16")
