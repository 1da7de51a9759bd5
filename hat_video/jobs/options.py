"""What a caller may choose, declared once: the API takes it, the command line is made from it, TOML files fill it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import TypeAdapter, ValidationError

from hat_video.errors import OptionError
from hat_video.presets import read_preset

__all__ = ["UpscaleOptions", "load_config"]


@dataclass(frozen=True, slots=True)
class UpscaleOptions:
    """How a clip is upscaled. Every `None` and `auto` is settled by the plan and written down in the manifest.

    Raises:
        OptionError: a value is out of range.
    """

    # The text beside a type is the option's documentation, and its help on the command line.
    model: Annotated[
        str | None, "a model's name (hat-video models lists them) or a HAT checkpoint; default: hat-nano"
    ] = None
    scale: Annotated[Literal[1, 2, 3, 4] | None, "times wider and higher; default: the model's own, else 2"] = None
    device: Annotated[str, "auto, cpu, cuda or cuda:N"] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], "the network's arithmetic; auto: the fastest safe one"
    ] = "auto"
    decoder: Annotated[Literal["auto", "pyav", "dali", "nvdec"], "who decodes; by name: or refuse, with the reason"] = (
        "auto"
    )
    encoder: Annotated[str | None, "FFmpeg's name of the encoder; default: libx264, libvpx-vp9 in webm"] = None
    crf: Annotated[int | None, "constant quality, lower is better; default: 16 for libx264"] = None
    preset: Annotated[str | None, "the encoder's preset; default: medium for libx264"] = None
    encoder_option: Annotated[
        tuple[str, ...], "KEY=VALUE for the encoder, can be repeated; an unknown key is an error"
    ] = ()
    tile: Annotated[int | None, "side of a tile in source pixels; default: whole frames where they fit in memory"] = (
        None
    )
    batch: Annotated[int, "frames that go through the network together"] = 1
    segment: Annotated[float, "seconds in a segment: the most that a crash can cost"] = 10.0
    jobs: Annotated[int | None, "frames in flight on a CPU; default: one a core"] = None
    work_dir: Annotated[Path | None, "where segments are kept meanwhile; default: .hat-video beside the output"] = None
    keep_work: Annotated[bool, "keep the segments after the file is finished"] = False
    overwrite: Annotated[bool, "replace an output that these settings did not make"] = False
    strict: Annotated[bool, "fail rather than lose anything: a frame, a stream, the end of a truncated file"] = False

    def __post_init__(self) -> None:
        for name, lowest in (("tile", 16), ("batch", 1), ("jobs", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise OptionError(f"--{name} {value}: must be {lowest} or more")
        if not self.segment > 0 or self.segment == float("inf"):
            raise OptionError(f"--segment {self.segment:g}: must be a number of seconds above 0; 10 is the default")
        for item in self.encoder_option:
            if "=" not in item or item.startswith("="):
                raise OptionError(f"--encoder-option {item!r}: must be KEY=VALUE, for instance tune=film")

    def encoder_options(self) -> dict[str, str]:
        """`encoder_option` as a mapping."""
        return dict(item.split("=", 1) for item in self.encoder_option)


def load_config(name_or_path: str | os.PathLike[str], base: UpscaleOptions | None = None) -> UpscaleOptions:
    """The options of a preset or a TOML file, over those of `base`.

    Args:
        name_or_path: a name from `preset_names("upscale")`, or the path of a TOML file whose keys are option names.
        base: what the file leaves out; the defaults if None.

    Raises:
        OptionError: no such preset or file, a key that is no option, or a value that is not allowed.
    """
    path, table = read_preset("upscale", name_or_path)
    known = {field.name for field in fields(UpscaleOptions)}
    values = {key.replace("-", "_"): value for key, value in table.items()}
    for name in values.keys() - known:
        raise OptionError(f"--config {path}: unknown key {name!r}; known: {', '.join(sorted(known))}")
    try:
        return TypeAdapter(UpscaleOptions).validate_python({**asdict(base or UpscaleOptions()), **values})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # our own check of the ranges
            raise OptionError(f"--config {path}: {first['ctx']['error']}") from None
        name = ".".join(map(str, first["loc"]))
        raise OptionError(f"--config {path}: {name} = {first['input']!r}: {first['msg'].lower()}") from None
