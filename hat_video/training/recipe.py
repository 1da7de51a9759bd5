"""What a training is: the network's shape, the data, and the stages, as one TOML file says it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hat_video.errors import OptionError
from hat_video.model.hat import HAT, HATConfig
from hat_video.presets import read_preset
from hat_video.training.tiles import HELD_OUT, TILE

__all__ = ["SHOT", "NetworkShape", "Stage", "TrainRecipe", "load_recipe", "read_changes"]

_STRICT = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)

SHOT = 4
"""Crops that one encoded shot gives: compressing is what costs."""

# Strict, or `true` would be 1.
_Count = Annotated[int, Field(strict=True, ge=1)]
_CountOrNone = Annotated[int, Field(strict=True, ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """A HAT of any size, or one of the convolutional networks that it is compared with."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    kind: Literal["hat", "cnn", "compact", "rcan"] = "hat"
    embed_dim: _Count = 32
    """Channels, of a convolutional network too."""
    depths: Annotated[tuple[_Count, ...], Field(min_length=1)] = (2, 2)
    """HABs of each RHAG; of a convolutional network, its layers (`rcan`: its blocks) are their sum."""
    heads: _Count = 1
    window_size: Annotated[int, Field(strict=True, ge=2)] = 8
    compress_ratio: _Count = 1
    squeeze_factor: _Count = 8
    overlap_ratio: _Share = 0.5
    mlp_ratio: _Positive = 2.0
    num_feat: _Count = 16
    unshuffle: Literal[1, 2] = 1
    patch_norm: bool = True
    without: tuple[Literal["cab", "ocab"], ...] = ()
    """For ablations: leaves out what makes it a HAT. Such a network is not for use."""

    def hat_config(self, scale: int) -> HATConfig:
        """With `conv_scale` 1: upstream's 0.01 starves the channel attention in short trainings. Folded at export."""
        return HATConfig(
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=(self.heads,) * len(self.depths),
            window_size=self.window_size,
            compress_ratio=self.compress_ratio,
            squeeze_factor=self.squeeze_factor,
            conv_scale=1.0,
            overlap_ratio=self.overlap_ratio,
            mlp_ratio=self.mlp_ratio,
            patch_norm=self.patch_norm,
            upscale=scale,
            num_feat=self.num_feat,
            unshuffle=self.unshuffle,
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the learning rate from warm-up to nearly nothing. The optimiser starts anew with each."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    """`pretrain` and `finetune`, as the paper has them; any name will do."""
    iterations: _Count
    rate: _Positive
    """Peak learning rate."""
    batch: _Count = 8
    patch: _Count = 48
    """Side of the low-resolution crops, in pixels."""
    warmup: _CountOrNone = 150
    final_rate: _Share = 1e-3
    """Share of the peak at the end of the cosine."""
    mix: Mapping[str, _NotNegative] = field(default_factory=lambda: {"photo": 0.85, "vector": 0.15})
    """Share of each group of tiles."""
    richest_db: float = 99.0
    """Only tiles at least this sharp; see `TileRecord.sharpness_db`. 28 leaves the richest half of the photographs."""
    loss: Literal["l1", "l2", "psnr"] = "l1"
    """Distance to the original: `l1` as the paper has it; the squared one, to which the hard pictures contribute most;
    or minus the PSNR of each picture, to which all contribute alike."""
    frequency: _NotNegative = 0.0
    """Weight of the L1 distance of the spectra."""
    luma: _Share = 0.0
    """0..1: share of the distance that is measured on luma alone."""
    attention_pool: _CountOrNone = 0
    """`HATConfig.attention_pool` from this stage on; `patch` must be a multiple of it."""


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """All that decides the weights, but for the tiles."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    scale: Annotated[int, Field(strict=True, ge=1, le=4)]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    network: NetworkShape = field(default_factory=NetworkShape)
    degradation: Literal["bicubic", "video"] = "bicubic"
    purpose: str = ""
    """For the model's card."""
    start: str = ""
    """A checkpoint whose tensors are taken over where their shapes agree: x4 starts from x2's body. RHAGs that it lacks
    begin as copies of its last one that add nothing: hat-micro starts from hat-nano."""
    teacher: str = ""
    """A larger HAT checkpoint of the same scale, whose output is half of the target."""
    teacher_share: _Share = 0.5
    precision: Literal["fp32", "bf16"] = "bf16"
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: _NotNegative = 0.0
    clip: _Positive = 1.0
    """Largest norm of the gradient."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    evaluate_every: _Count = 2000
    save_every_seconds: _NotNegative = 120.0

    @property
    def iterations(self) -> int:
        """Of all stages."""
        return sum(stage.iterations for stage in self.stages)

    def stage_at(self, iteration: int) -> tuple[Stage, int]:
        """The stage that an iteration is in, and its number there."""
        for stage in self.stages:
            if iteration < stage.iterations:
                return stage, iteration
            iteration -= stage.iterations
        return self.stages[-1], self.stages[-1].iterations


def read_changes(words: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words to what `load_recipe` takes; the value is TOML, or else a string.

    Raises:
        OptionError: a word without `=`.
    """
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise OptionError(f"--set {word}: must be KEY=VALUE, as in network.embed_dim=48")
        try:
            table = tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            table = {"value": value}
        if len(table) > 1:
            raise OptionError(f"--set {word!r}: must be one KEY=VALUE")
        changes[key.strip()] = table["value"]
    return changes


def load_recipe(name_or_path: str | Path, changes: Mapping[str, Any] | None = None) -> TrainRecipe:
    """Reads and checks a recipe.

    Args:
        name_or_path: a name from `preset_names("train")`, or a TOML file whose keys are the fields of `TrainRecipe`.
        changes: values to use instead, by dotted name: `{"network.embed_dim": 48, "stages.0.rate": 1e-3}`.

    Raises:
        OptionError: no such file, not TOML, an unknown key, or a value that is not allowed.
    """
    path, table = read_preset("train", name_or_path)
    for name, value in (changes or {}).items():
        _change(table, name, value)
    try:
        recipe = TypeAdapter(TrainRecipe).validate_python(table)
    except ValidationError as error:
        raise OptionError(f"--config {path}: {_told(error)}") from None
    _check(recipe, path)
    return recipe


def _told(error: ValidationError) -> str:
    """The first of what is wrong; a key that is misspelt before one that is missing for it."""
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "unexpected_keyword_argument"), errors[0])
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{name}: is missing"
    if first["type"] == "unexpected_keyword_argument":
        tables: dict[Any, Any] = {"stages": Stage, "network": NetworkShape}
        table = tables[first["loc"][0]] if first["loc"][1:] else TrainRecipe
        return f"{name}: no such key; there are {', '.join(one.name for one in fields(table))}"
    value = "" if isinstance(first["input"], dict | list) else f" = {first['input']!r}"
    return f"{name}{value}: {first['msg'].lower().replace('tuple', 'list')}"


def _change(table: dict[str, Any], name: str, value: Any) -> None:
    place: Any = table
    way = name.split(".")
    for depth, step in enumerate(way, 1):
        if isinstance(place, list) and not (step.isdecimal() and int(step) < len(place)):
            raise OptionError(f"--set {name}: {step!r} must be 0 to {len(place) - 1}")
        if not isinstance(place, list | dict):
            raise OptionError(f"--set {name}: no such key")
        key: Any = int(step) if isinstance(place, list) else step
        if depth == len(way):
            place[key] = value
        else:
            place = place[key] if isinstance(place, list) else place.setdefault(key, {})


def _check(recipe: TrainRecipe, path: Path) -> None:
    """What one value alone does not say."""
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) < len(names):
        raise OptionError(f"--config {path}: stages {', '.join(names)}: each must have a name of its own")
    if recipe.scale == 1 and recipe.degradation == "bicubic":
        raise OptionError(
            f'--config {path}: scale = 1: must have degradation = "video": bicubic leaves nothing to learn'
        )
    for stage in recipe.stages:
        _check_stage(recipe, stage, f"--config {path}: stage {stage.name!r}")
    shape = recipe.network
    if shape.kind != "hat":
        return
    if shape.embed_dim % shape.heads:
        raise OptionError(
            f"--config {path}: network.heads = {shape.heads}: must divide network.embed_dim, {shape.embed_dim}"
        )
    for name in ("compress_ratio", "squeeze_factor"):
        if getattr(shape, name) > shape.embed_dim:
            raise OptionError(
                f"--config {path}: network.{name} = {getattr(shape, name)}: must be at most network.embed_dim,"
                f" {shape.embed_dim}"
            )
    try:
        # Without memory: only to see whether the layers fit together.
        with torch.device("meta"):
            HAT(shape.hat_config(recipe.scale))
    except (ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"--config {path}: [network] is of a shape that no HAT has: {reason}") from None


def _check_stage(recipe: TrainRecipe, stage: Stage, where: str) -> None:
    shape, most = recipe.network, TILE // recipe.scale
    if stage.patch > most:
        raise OptionError(
            f"{where}: patch = {stage.patch}: must be at most {most} at x{recipe.scale}, since tiles are {TILE} pixels"
            " wide"
        )
    multiple = shape.window_size * shape.unshuffle
    if shape.kind == "hat" and stage.patch % multiple:
        raise OptionError(f"{where}: patch = {stage.patch}: must be a multiple of {multiple}")
    box = stage.attention_pool
    if box and (box % shape.window_size or stage.patch // shape.unshuffle % box):
        raise OptionError(
            f"{where}: attention_pool = {box}: must be a multiple of the window, {shape.window_size}, and patch ="
            f" {stage.patch} a multiple of it"
        )
    if HELD_OUT in stage.mix:
        raise OptionError(f"{where}: mix names {HELD_OUT!r}, which is held out; take other groups")
    if recipe.degradation == "video" and stage.batch % SHOT:
        raise OptionError(f"{where}: batch = {stage.batch}: must be a multiple of {SHOT}, the crops of a shot of video")
    if recipe.degradation == "video" and (stage.patch < 16 or stage.patch % 2):
        raise OptionError(f"{where}: patch = {stage.patch}: must be even and at least 16 for video")
