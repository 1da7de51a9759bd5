"""What a caller may choose, declared once: the API takes it, the command line is made from it, TOML files fill it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import TypeAdapter, ValidationError

from hat_video.errors import OptionError
from hat_video.jobs.size import parse_size
from hat_video.media.opening import Limits
from hat_video.media.sequence import parse_rate
from hat_video.presets import read_preset

__all__ = ["UpscaleOptions", "encoder_options_of", "load_config", "parse_time", "refuse_idle"]

_TIME = re.compile(r"(?:(?:([0-9]{1,3}):)?([0-9]{1,3}):)?([0-9]{1,9}(?:\.[0-9]{1,12})?)")


@dataclass(frozen=True, slots=True)
class UpscaleOptions:
    """How a clip is upscaled. Every `None` and `auto` is settled by the plan and written down in the manifest.

    Raises:
        OptionError: a value is out of range.
    """

    # The text beside a type is the option's documentation, and its help on the command line.
    model: Annotated[
        str | None, "a model's name (hat-video models lists them) or a HAT checkpoint; default: hat-nano-video"
    ] = None
    scale: Annotated[Literal[1, 2, 3, 4] | None, "times wider and higher; default: the model's own, else 2"] = None
    size: Annotated[
        str | None, "1080p, 1440p, 4k, 8k, or WxH to fit into: reached by the network and a last Lanczos resample"
    ] = None
    start: Annotated[str | None, "first moment: seconds or HH:MM:SS.mmm, from the clip's beginning"] = None
    duration: Annotated[str | None, "seconds or HH:MM:SS.mmm from there; default: to the end"] = None
    rate: Annotated[str | None, "frames a second of a sequence of pictures (frame_%04d.png): 24, 23.976"] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:N; several with commas, or all GPUs: all"] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], "the network's arithmetic; auto: the fastest safe one"
    ] = "auto"
    backend: Annotated[
        Literal["auto", "torch", "openvino"], "who computes the network; auto: on a CPU OpenVINO, where it is installed"
    ] = "auto"
    compile: Annotated[
        bool, "the network's blocks by torch.compile: minutes at first, kept on disk; for long films on a GPU"
    ] = False
    attention_pool: Annotated[
        str | None, "global, or box:N tokens: what the channel attention averages over; default: the model's own"
    ] = None
    reuse: Annotated[
        Literal["auto", "same", "changed"],
        "same: a frame equal to the one before is not computed; changed: nor are unchanged parts, where the model pools"
        " over boxes; auto: changed on a CPU; the result is the same, to the bit",
    ] = "auto"
    decoder: Annotated[Literal["auto", "pyav", "dali", "nvdec"], "who decodes; by name: or refuse, with the reason"] = (
        "auto"
    )
    encoder: Annotated[
        str | None, "FFmpeg's name; auto: the GPU's where it opens; default: libx264, libvpx-vp9 in webm"
    ] = None
    quality: Annotated[
        Literal["archive", "draft", "lossless"] | None,
        "what the encoder aims at, by whatever options it has; --crf, --preset and --encoder-option win over it",
    ] = None
    crf: Annotated[int | None, "constant quality, lower is better; default: 16 for libx264"] = None
    preset: Annotated[str | None, "the encoder's preset; default: medium for libx264"] = None
    encoder_option: Annotated[
        tuple[str, ...], "KEY=VALUE for the encoder, can be repeated; an unknown key is an error"
    ] = ()
    pixel_format: Annotated[
        str, "FFmpeg's name of a format that the encoder has; auto: depth and chroma as in the source"
    ] = "auto"
    alpha: Annotated[Literal["auto", "drop"], "transparency; auto: kept, or an error that says which encoder can"] = (
        "auto"
    )
    deinterlace: Annotated[
        Literal["auto", "off", "frame", "field"],
        "by bwdif, one frame of every frame or of every field; auto: frame where frames are marked as interlaced",
    ] = "auto"
    tile: Annotated[int | None, "side of a tile in source pixels; default: whole frames where they fit in memory"] = (
        None
    )
    batch: Annotated[int | None, "frames that go through the network together; default: 1, on a GPU what fits"] = None
    segment: Annotated[float, "seconds in a segment: the most that a crash can cost"] = 10.0
    jobs: Annotated[int | None, "frames in flight on a CPU; default: one a core"] = None
    work_dir: Annotated[Path | None, "where segments are kept meanwhile; default: .hat-video beside the output"] = None
    trace: Annotated[Path | None, "write when each stage was busy, as a Chrome trace (ui.perfetto.dev)"] = None
    keep_work: Annotated[bool, "keep the segments after the file is finished"] = False
    overwrite: Annotated[bool, "replace an output that these settings did not make"] = False
    verify: Annotated[
        Literal["quick", "full"],
        "full: also decode every frame, and compare it with what was encoded or with the source",
    ] = "quick"
    max_pixels: Annotated[int, "largest frame of a source, in pixels; larger ones are refused"] = Limits.pixels
    max_streams: Annotated[int, "most streams of a source"] = Limits.streams
    max_frames: Annotated[int, "most frames of a source"] = Limits.frames
    strict: Annotated[bool, "fail rather than lose anything: a frame, a stream, the end of a truncated file"] = False

    def __post_init__(self) -> None:
        for name, lowest in (("tile", 16), ("batch", 1), ("jobs", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise OptionError(f"--{name} {value}: must be {lowest} or more")
        if not self.segment > 0 or self.segment == float("inf"):
            raise OptionError(f"--segment {self.segment:g}: must be a number of seconds above 0; 10 is the default")
        if self.size is not None:
            parse_size(self.size)
        for name in ("start", "duration"):
            parse_time(getattr(self, name), f"--{name}", is_above_zero=name == "duration")
        if self.rate is not None:
            parse_rate(self.rate)
        if self.compile and self.backend == "openvino":
            raise OptionError("--compile: compiles for torch; leave it out, or --backend openvino")
        self.limits()
        self.attention_box()
        self.encoder_options()

    def attention_box(self) -> int | None:
        """`attention_pool` as `HATConfig` has it; None for the model's own.

        Raises:
            OptionError: neither `global` nor `box:N`.
        """
        text = self.attention_pool
        if text is None or text == "global":
            return None if text is None else 0
        kind, _, number = text.partition(":")
        if kind != "box" or not number.isdecimal() or not int(number):
            raise OptionError(
                f"--attention-pool {text}: must be global, or box:N with a multiple of the model's window"
            )
        return int(number)

    def limits(self) -> Limits:
        """What a source may ask of this machine."""
        return Limits(self.max_pixels, self.max_streams, self.max_frames)

    def encoder_options(self) -> dict[str, str]:
        """`encoder_option` as a mapping."""
        return encoder_options_of(self.encoder_option)


def encoder_options_of(items: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` words as a mapping.

    Raises:
        OptionError: a word is no such thing.
    """
    for item in items:
        if "=" not in item or item.startswith("="):
            raise OptionError(f"--encoder-option {item!r}: must be KEY=VALUE, for instance tune=film")
    options = dict(item.split("=", 1) for item in items)
    if len(options) < len(items):
        raise OptionError(f"--encoder-option {' '.join(items)}: gives a key twice; give each once, lists with commas")
    return options


def refuse_idle(options: UpscaleOptions, names: Iterable[str], why: str) -> None:
    """Refuses options that were given and would do nothing.

    Raises:
        OptionError: one of `names` is not at its default.
    """
    usual = UpscaleOptions()
    for name in names:
        if getattr(options, name) != getattr(usual, name):
            raise OptionError(f"--{name.replace('_', '-')}: {why}")


def parse_time(text: str | None, name: str, *, is_above_zero: bool = False) -> Fraction | None:
    """A time as people write it, `90`, `90.5`, `1:30` or `00:01:30.500`, in seconds, exact; None for None.

    Args:
        text: what was written.
        name: the option's, for the error.
        is_above_zero: zero is refused, too.

    Raises:
        OptionError: it is no such time.
    """
    if text is None:
        return None
    match = _TIME.fullmatch(text.strip())
    # 61 seconds are 61; but 1:61 is a slip.
    if match is None or (match[2] and Fraction(match[3]) >= 60) or (match[1] and int(match[2]) >= 60):
        raise OptionError(f"{name} {text}: must be seconds or HH:MM:SS.mmm, for instance 90.5 or 00:01:30.500")
    seconds = 3600 * int(match[1] or 0) + 60 * int(match[2] or 0) + Fraction(match[3])
    if is_above_zero and not seconds:
        raise OptionError(f"{name} {text}: must be more than 0")
    return seconds


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
