"""One pass from pipe to pipe: `cat clip.ts | hat-video upscale - -o - | mpv -`.

Nothing can be planned ahead, resumed or proven here; what can be counted is counted, and a difference is an error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, BinaryIO

from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream

from hat_video.errors import CancelledError, HatVideoError, OptionError, OutputError, StrictError, WorkError
from hat_video.frames import FrameBatch
from hat_video.inference.double_buffer import Prefetch, map_in_flight
from hat_video.inference.processors import cpu_count
from hat_video.inference.upscaler import choose_devices
from hat_video.jobs.choices import load_chosen_model, make_upscaler, size_notes
from hat_video.jobs.options import UpscaleOptions, refuse_idle
from hat_video.jobs.picture import FrameUpscaler, Task
from hat_video.jobs.plan import ENCODER_THREADS
from hat_video.jobs.size import parse_size, settle_size
from hat_video.media.encoder import plan_encoder
from hat_video.media.formats import encoder_losses
from hat_video.media.passthrough import StreamPlan
from hat_video.media.pipe import PipeSource
from hat_video.media.sinks import PIPE_FORMATS, Sink, Y4MWriter, open_sink, sink_losses

__all__ = ["StreamReport", "upscale_stream"]


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What went through."""

    frames: int
    seconds: float
    model: str
    scale: int
    streams: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """in, out, lost (in packets that cannot be decoded), corrupt, reused (of an earlier run: none)."""


def upscale_stream(
    source: BinaryIO,
    target: BinaryIO,
    options: UpscaleOptions,
    *,
    form: str = "mkv",
    source_name: str = "-",
    target_name: str = "-o -",
    on_frames: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
) -> StreamReport:
    """Upscales what `source` gives into `target`, while it comes.

    Args:
        source: any file; of a pipe any container that can be read from the front: ts, mkv, nut, flv, y4m, mp4 with its
            index in front or in fragments.
        target: is written to, never read or moved in.
        options: as for files; what only files have (segments, ranges, the full proof) is refused.
        form: `mkv`, `nut` or `y4m`.
        source_name: of the source, for messages.
        target_name: of the target, likewise.
        on_frames: called with 1 for each finished frame.
        cancel: set it to stop.

    Raises:
        SourceError, ModelError, OptionError, UsageError: the request cannot be met.
        OutputError: nobody reads `target` any more, or it cannot be written.
        StrictError: `options.strict`, and something would be lost; or was, which shows only at the end.
        CancelledError: `cancel` was set.
    """
    _refuse_idle_options(form, options)
    began = time.perf_counter()
    stop = cancel or threading.Event()
    pipe = PipeSource(
        source,
        source_name,
        limits=options.limits(),
        deinterlace=options.deinterlace,
        has_alpha=options.alpha != "drop",
    )
    with pipe as opened:
        small = opened.info
        goal = None if options.size is None else settle_size(parse_size(options.size), small)
        model = load_chosen_model(options, None if goal is None else goal.needed)
        opened.notes += size_notes(options, goal, model)
        upscaler = make_upscaler(model, options)
        spec, large = plan_encoder(
            "matroska",
            small if goal is None else replace(small, sample_aspect_ratio=Fraction(1)),
            small.width * model.scale if goal is None else goal.width,
            small.height * model.scale if goal is None else goal.height,
            name="ffv1" if form == "y4m" else None if options.encoder == "auto" else options.encoder,
            crf=options.crf,
            preset=options.preset,
            quality=options.quality,
            options=options.encoder_options(),
            pixel_format=options.pixel_format,
            threads=ENCODER_THREADS[choose_devices(options.device)[0].type],
        )
        losses = encoder_losses(small, large, spec.name, options.pixel_format) + sink_losses(form, small)
        if chapters := len(opened.container.chapters()):
            losses.append(f"{chapters} chapters are dropped: they do not go through a pipe")
        opened.notes += losses
        try:
            sink, planned = open_sink(target, form, opened, spec, large)
            plans = tuple(_dropped(plan) for plan in planned)
            if options.strict:
                _refuse_losses(source_name, plans, losses)
            frames = FrameUpscaler(upscaler, small, large, reuse=options.reuse)
            work = _Upscale(frames)
            frames_out = _pump(opened, work, sink, options.jobs or cpu_count(), stop, on_frames)
        except BrokenPipeError:
            raise OutputError(f"{target_name}: closed by its reader") from None
        except HatVideoError:
            raise
        except (FFmpegError, OSError) as error:
            raise OutputError(f"{target_name}: cannot be written: {error.strerror or error}") from None
        if work.frames != frames_out:
            raise WorkError(f"{source_name}: {work.frames} frames came in and {frames_out} went out")
        if isinstance(sink, Y4MWriter) and sink.uneven:
            opened.losses.append(f"{sink.uneven} frames have other times than y4m's constant rate gives them")
            opened.notes.append(opened.losses[-1])
        if options.strict and opened.losses:
            raise StrictError(f"{source_name}: {'; '.join(opened.losses)}; --strict refuses what has gone out")
        return StreamReport(
            frames=frames_out,
            seconds=time.perf_counter() - began,
            model=model.name,
            scale=model.scale,
            streams=[asdict(plan) for plan in plans],
            notes=opened.notes,
            counts={**opened.counts, "out": frames_out, "reused": 0},
        )


def _refuse_idle_options(form: str, options: UpscaleOptions) -> None:
    """What a pipe cannot do is refused rather than passed over."""
    if form not in PIPE_FORMATS:
        raise OptionError(f"--format {form}: must be {', '.join(PIPE_FORMATS)}")
    refuse_idle(options, ("start", "duration", "rate"), "what comes from a pipe is taken as it comes; give a file")
    files = ("verify", "segment", "work_dir", "keep_work", "trace")
    refuse_idle(options, files, "a pipe is neither proven nor resumed; give files")
    if form == "y4m":
        refuse_idle(options, ("encoder", "crf", "preset", "encoder_option"), "y4m is not encoded")


def _pump(
    source: PipeSource,
    work: _Upscale,
    sink: Sink,
    jobs: int,
    stop: threading.Event,
    on_frames: Callable[[int], None] | None,
) -> int:
    """Everything that comes, in order; returns how many frames went out."""
    frames = 0
    try:
        with (
            Prefetch(map(work.look, source.items()), depth=4 * jobs, stop=stop, name="hat-video-read") as items,
            closing(map_in_flight(work, items, workers=jobs, stop=stop)) as done,
        ):
            for item in done:
                sink.write(item)
                if isinstance(item, FrameBatch):
                    frames += 1
                    if on_frames is not None:
                        on_frames(1)
        if stop.is_set():
            raise CancelledError(f"after {frames} frames; the output ends there")
        sink.finish()
    except BaseException:
        sink.abandon()
        raise
    return frames


class _Upscale:
    """Frames are upscaled, packets pass."""

    def __init__(self, frames: FrameUpscaler) -> None:
        self._upscaler = frames
        self.frames = 0

    def look(self, item: FrameBatch | Packet[Stream]) -> Task | Packet[Stream]:
        """In the order in which they come, from one thread."""
        if isinstance(item, Packet):
            return item
        self.frames += 1
        return self._upscaler.look(item)

    def __call__(self, item: Task | Packet[Stream]) -> FrameBatch | Packet[Stream]:
        return item if isinstance(item, Packet) else self._upscaler.settled(self._upscaler(item))


def _dropped(plan: StreamPlan) -> StreamPlan:
    """The plan as it is carried out: only packets go through a pipe."""
    if plan.action not in ("attach", "rebuild"):
        return plan
    return replace(plan, action="drop", reason="does not go through a pipe")


def _refuse_losses(name: str, plans: tuple[StreamPlan, ...], losses: list[str]) -> None:
    if losses:
        raise StrictError(f"{name}: --strict refuses: {'; '.join(losses)}")
    dropped = [f"#{plan.index} {plan.kind}/{plan.codec}" for plan in plans if plan.action == "drop"]
    if dropped:
        raise StrictError(f"{name}: --strict refuses to drop {', '.join(dropped)}; give files instead of pipes")
