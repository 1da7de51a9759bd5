"""TOML files of settings: those that come with the package, by name, and the user's own, by path."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from hat_video.errors import OptionError

__all__ = ["preset_names", "read_preset"]


def preset_names(kind: str) -> list[str]:
    """The names that come with the package, of `upscale` or `train`."""
    return sorted(path.stem for path in (_folder() / kind).glob("*.toml"))


def read_preset(kind: str, name_or_path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The file that is meant, and what is in it.

    Raises:
        OptionError: no such file, nor a preset of that name; or it is not TOML.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = _folder() / kind / f"{name_or_path}.toml"
        if not path.is_file():
            names = ", ".join(preset_names(kind))
            raise OptionError(f"--config {name_or_path}: no such file, nor a preset; presets: {names}")
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise OptionError(f"--config {path}: not a TOML file: {error}") from None


def _folder() -> Path:
    # In a wheel the presets lie inside the package, in a checkout beside it.
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"
