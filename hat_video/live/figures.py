"""What a live run counts: one snapshot of plain values, from which the report, the page and the metrics are made."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LiveFigures", "OutputFigures", "RungFigures"]


@dataclass(frozen=True, slots=True)
class RungFigures:
    """One rung of the ladder."""

    model: str
    """As `--ladder` names it."""
    frames: int
    """Frames that it made and that were encoded."""
    cost_seconds: float
    """Of one frame on one thread, as it was measured last; 0 if never."""


@dataclass(frozen=True, slots=True)
class OutputFigures:
    """One output."""

    name: str
    """As it was given, credentials masked."""
    is_up: bool
    """Whether it takes packets at this moment."""
    frames: int = 0
    """Pictures that it has taken."""
    bytes: int = 0
    dropped: int = 0
    """Pictures that it did not get because it was slow or down."""
    reconnects: int = 0
    error: str | None = None
    """Why it is down, or was last; credentials masked."""


@dataclass(frozen=True, slots=True)
class LiveFigures:
    """Everything since the run began, and the rates of the last seconds."""

    source: str
    """For people: credentials masked."""
    seconds: float
    """Since the first frame."""
    is_source_up: bool
    """Whether frames come at this moment."""
    input_size: tuple[int, int]
    """(width, height) of what is upscaled: of the part, where only a part is."""
    output_size: tuple[int, int]
    frames_in: int
    """Frames decoded."""
    frames_out: int
    """Frames upscaled and encoded; repeated ones (`--on-stall hold`) are not among them."""
    frames_held: int
    """Frames repeated, or slates shown, while the source was silent."""
    dropped: dict[str, int]
    """Frames that were not upscaled, by reason: overload, late, no_pts, nonmonotonic, decode, changed."""
    fps_in: float
    """Over the last seconds."""
    fps_out: float
    latency_p50_seconds: float
    """From the arrival of a frame's packet to its encoded picture, over the last seconds; 0 before the first."""
    latency_p99_seconds: float
    rung: str
    """The model that makes the frames now."""
    rungs: tuple[RungFigures, ...]
    """From the best to the fastest."""
    rung_changes: int
    reused_frames: int
    """Frames that took the result of the one before: nothing had changed."""
    reconnects: int
    """Of the source."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Spent so far in: decode, model, encode."""
    latency_buckets: dict[float, int] = field(default_factory=dict)
    """How many frames took at most so many seconds from arrival to encoded; cumulative, as Prometheus has it."""
    latency_sum_seconds: float = 0.0
    outputs: tuple[OutputFigures, ...] = ()
    viewers: int = 0
    """Of the page."""
    roi: tuple[int, int, int, int] | None = None
    """(x, y, width, height) in the source's pixels, where only a part is upscaled."""
    source_size: tuple[int, int] = (0, 0)
    """(width, height) of the camera's picture."""
