"""What a training is: the network's shape, the data, and the stages, as one TOML file says it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hat_video.errors import OptionError
from hat_video.model.hat import HATConfig
from hat_video.presets import read_preset
from hat_video.training.tiles import TILE

__all__ = ["NetworkShape", "Stage", "TrainRecipe", "load_recipe", "read_changes"]

_STRICT = ConfigDict(extra="forbid", strict=False)


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """A HAT of any size, or one of the convolutional networks that it is compared with."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    kind: Literal["hat", "cnn", "compact", "rcan"] = "hat"
    embed_dim: int = 32
    """Channels, of a convolutional network too."""
    depths: tuple[int, ...] = (2, 2)
    """HABs of each RHAG; of a convolutional network, its layers (`rcan`: its blocks) are their sum."""
    heads: int = 1
    window_size: int = 8
    compress_ratio: int = 1
    squeeze_factor: int = 8
    overlap_ratio: float = 0.5
    mlp_ratio: float = 2.0
    num_feat: int = 16
    unshuffle: int = 1
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
    iterations: int
    rate: float
    """Peak learning rate."""
    batch: int = 8
    patch: int = 48
    """Side of the low-resolution crops, in pixels."""
    warmup: int = 150
    final_rate: float = 1e-3
    """Share of the peak at the end of the cosine."""
    mix: Mapping[str, float] = field(default_factory=lambda: {"photo": 0.85, "vector": 0.15})
    """Share of each group of tiles."""
    richest_db: float = 99.0
    """Only tiles at least this sharp; see `TileRecord.sharpness_db`. 28 leaves the richest half of the photographs."""
    loss: Literal["l1", "l2"] = "l1"
    """Distance to the original: `l1` as the paper has it, or the squared one, which is PSNR's."""
    frequency: float = 0.0
    """Weight of the L1 distance of the spectra."""
    luma: float = 0.0
    """0..1: share of the distance that is measured on luma alone."""
    attention_pool: int = 0
    """`HATConfig.attention_pool` from this stage on; `patch` must be a multiple of it."""


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """All that decides the weights, but for the tiles."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    scale: int
    stages: tuple[Stage, ...]
    network: NetworkShape = field(default_factory=NetworkShape)
    degradation: Literal["bicubic", "video"] = "bicubic"
    purpose: str = ""
    """For the model's card."""
    start: str = ""
    """A checkpoint whose tensors are taken over where their shapes agree: x4 starts from x2's body."""
    teacher: str = ""
    """A larger HAT checkpoint of the same scale, whose output is half of the target."""
    teacher_share: float = 0.5
    precision: Literal["fp32", "bf16"] = "bf16"
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    seed: int = 0
    evaluate_every: int = 2000
    save_every_seconds: float = 120.0

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
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value
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
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise OptionError(f"--config {path}: {name} = {first['input']!r}: {first['msg'].lower()}") from None
    _check(recipe, path)
    return recipe


def _change(table: dict[str, Any], name: str, value: Any) -> None:
    *way, last = name.split(".")
    place: Any = table
    for step in way:
        if isinstance(place, list) and not (step.isdigit() and int(step) < len(place)):
            raise OptionError(f"--set {name}: {step!r} must be 0 to {len(place) - 1}")
        place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
    if not isinstance(place, dict):
        raise OptionError(f"--set {name}: no such key")
    place[last] = value


def _check(recipe: TrainRecipe, path: Path) -> None:
    """Ranges that types do not say."""
    if recipe.scale not in (1, 2, 3, 4):
        raise OptionError(f"--config {path}: scale = {recipe.scale}: must be 1, 2, 3 or 4")
    if not recipe.stages:
        raise OptionError(f"--config {path}: no stages; write at least one [[stages]]")
    for stage in recipe.stages:
        for name in ("iterations", "batch", "patch", "rate"):
            if not getattr(stage, name) > 0:
                raise OptionError(
                    f"--config {path}: {name} = {getattr(stage, name)} in {stage.name!r}: must be above 0"
                )
        if stage.patch * recipe.scale > TILE:
            raise OptionError(
                f"--config {path}: patch = {stage.patch} in {stage.name!r}: must be at most {TILE // recipe.scale} at"
                f" x{recipe.scale}, since tiles are {TILE} pixels wide"
            )
        multiple = recipe.network.window_size * recipe.network.unshuffle
        if recipe.network.kind == "hat" and stage.patch % multiple:
            raise OptionError(
                f"--config {path}: patch = {stage.patch} in {stage.name!r}: must be a multiple of {multiple}"
            )
        box = stage.attention_pool
        if box and (box % recipe.network.window_size or stage.patch // recipe.network.unshuffle % box):
            raise OptionError(
                f"--config {path}: attention_pool = {box} in {stage.name!r}: must be a multiple of the window,"
                f" {recipe.network.window_size}, and patch = {stage.patch} a multiple of it"
            )
        if not 0 <= stage.luma <= 1 or stage.frequency < 0:
            raise OptionError(f"--config {path}: luma must be within 0 and 1, frequency not below 0, in {stage.name!r}")
