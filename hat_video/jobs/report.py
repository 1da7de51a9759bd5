"""What a run says while it works, and what it says in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hat_video.errors import OptionError
from hat_video.files import check_place
from hat_video.jobs.plan import CONTAINERS
from hat_video.media.stills import STILL_SUFFIXES
from hat_video.paths import JsonPath

__all__ = ["FileReport", "Progress", "Stage", "check_report"]

Stage = Literal["plan", "work", "join", "verify", "done"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; given to `on_progress` now and then."""

    stage: Stage
    source: JsonPath
    output: JsonPath
    frames_done: int
    """Frames in committed segments and in the one at work, those of an earlier run among them."""
    frames_total: int
    frames_reused: int
    """Frames that an earlier, interrupted run had committed."""
    fps: float | None
    """Frames a second of this run since its first frame."""
    eta_seconds: float | None
    """Seconds until the last frame, at that pace."""
    clip: int = 1
    """Number of the clip, from 1."""
    clips: int = 1


@dataclass(frozen=True, slots=True)
class FileReport:
    """What was done to one clip."""

    status: Literal["done", "already done", "failed"]
    source: JsonPath
    output: JsonPath
    error: str | None = None
    frames: dict[str, int] = field(default_factory=dict)
    """in, out, lost, corrupt, reused (of an earlier run), same (as the one before)."""
    segments: dict[str, int] = field(default_factory=dict)
    """total, reused."""
    seconds: dict[str, float] = field(default_factory=dict)
    """plan, decode, model (summed over the frames in flight), encode, work, join, verify, total."""
    fps: float | None = None
    """Frames a second, over the frames that this run made."""
    model: dict[str, object] = field(default_factory=dict)
    """name, sha256, scale, purpose."""
    recipe: dict[str, object] = field(default_factory=dict)
    streams: list[dict[str, object]] = field(default_factory=list)
    """Each stream of the source: what became of it, and why."""
    verification: str | None = None
    """The line that says what was proven."""
    checked: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_report(path: Path | None, option: str = "--report") -> None:
    """Raises `OptionError` where a report cannot be written, or would replace what is none: now, not after an hour."""
    if path is None:
        return
    check_place(path, option)
    if path.suffix.lower() in (*CONTAINERS, *STILL_SUFFIXES):
        raise OptionError(f"{option} {path}: is a name for a film or a picture; give one that ends in .json")
    try:
        # Not of a pipe or a terminal, which would wait.
        if not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(64).lstrip()
    except OSError:
        return  # it may be written, and not read
    if head and not head.startswith((b"{", b"[")):
        raise OptionError(f"{option} {path}: holds something else than JSON, which would be lost; give another name")
