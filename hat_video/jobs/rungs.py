"""The models of a ladder, loaded, of one output size, and warmed up before the first frame."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hat_video.errors import ModelError, UsageError
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.inference.double_buffer import Given, ThreadLane
from hat_video.inference.upscaler import Upscaler
from hat_video.jobs.camera_options import CameraOptions
from hat_video.jobs.picture import FrameUpscaler, Task, Upscaled
from hat_video.model.zoo import Model, default_model_name, list_models, load_model

__all__ = ["Rung", "choose_models", "load_rungs", "measure_costs"]

_FASTEST = "bicubic"
# Frames of each thread that a rung is measured by, after one that is not counted.
_FRAMES = 3


@dataclass(slots=True)
class Rung:
    """One model of the ladder, ready for the frames of one camera. Used by the threads of one run."""

    model: Model
    upscaler: Upscaler
    frames: FrameUpscaler
    made: int = 0
    """Frames of it that were encoded."""
    cost_seconds: float = 0.0
    """Of a frame on its thread, as it was measured last."""


def choose_models(options: CameraOptions) -> tuple[list[Model], int]:
    """The models from the best to the fastest, all of one scale, and which of them to begin with at the earliest.

    Raises:
        ModelError: unknown, damaged, or not of that scale.
        UsageError: no network is included for the scale, or `model` is not on the ladder.
    """
    if options.ladder is None and options.model is not None:
        return [load_model(options.model, scale=options.scale)], 0
    scale: int | None = options.scale
    if options.ladder is None:
        names = _default_names(scale or 2)
    else:
        names = [name.strip() for name in options.ladder.split(",")]
    if len(set(names)) < len(names):
        raise UsageError(f"--ladder {options.ladder}: has a model twice")
    models: list[Model] = []
    for name in names:
        # A checkpoint knows its own scale, and the others must be of the same.
        models.append(load_model(name, scale=scale))
        scale = models[0].scale
    if options.model is None:
        return models, 0
    if options.model not in names:
        raise UsageError(f"--model {options.model}: is not on --ladder {options.ladder}; leave one of them out")
    return models, names.index(options.model)


def _default_names(scale: int) -> list[str]:
    """The included network of a scale, then faster ones, then none."""
    rungs = [facts.name for facts in list_models() if facts.is_rung and scale in facts.scales]
    return [default_model_name(scale), *rungs, _FASTEST]


def load_rungs(
    models: Sequence[Model],
    options: CameraOptions,
    small: VideoInfo,
    large: VideoInfo,
    in_flight: int,
    stop: threading.Event,
) -> list[Rung]:
    """The models made ready for the device and for frames of one size; those before `stop` is set.

    Raises:
        OptionError: a device, a precision or a backend that is not there.
        ModelError: a model that computes pictures of another size than the others.
    """
    rungs = []
    for model in models:
        if stop.is_set():
            break
        if model.scale != models[0].scale:
            raise ModelError(
                f"{model.name} is x{model.scale} and {models[0].name} x{models[0].scale}: one size for all"
            )
        upscaler = Upscaler(
            model,
            device=options.device,
            precision=options.precision,
            backend=options.backend,
            in_flight=in_flight,
        )
        rungs.append(Rung(model, upscaler, FrameUpscaler(upscaler, small, large, reuse=options.reuse)))
    return rungs


def measure_costs(rungs: Sequence[Rung], planes: Sequence[torch.Tensor], in_flight: int, stop: threading.Event) -> None:
    """Computes some frames on every rung, as many at once as later: everything is compiled and its cost known.

    Args:
        rungs: their `cost_seconds` are set.
        planes: of a frame of the camera, (h, w) each.
        in_flight: frames at once.
        stop: once set, the rest is left out.
    """
    lane = ThreadLane("warm-up", in_flight)
    try:
        for rung in rungs:
            if stop.is_set():
                return
            # Whatever is compiled is compiled by this one.
            rung.frames(rung.frames.look(_batch(planes, 0)))
            # Nothing may be taken from the frame before.
            tasks = []
            for number in range(_FRAMES * in_flight):
                rung.frames.forget()
                tasks.append(rung.frames.look(_batch(planes, number)))
            tickets = [lane.submit(partial(_seconds, rung, stop), Given(task)) for task in tasks]
            rung.cost_seconds = statistics.median(ticket.wait() for ticket in tickets)
            rung.frames.forget()
            rung.frames.same = rung.frames.pixels = rung.frames.pixels_computed = 0
    finally:
        lane.close()


def _seconds(rung: Rung, stop: threading.Event, task: Task) -> float:
    if stop.is_set():
        return 0.0
    began = time.perf_counter()
    made: Upscaled = rung.frames(task)
    rung.frames.settled(made)
    return time.perf_counter() - began


def _batch(planes: Sequence[torch.Tensor], ticks: int) -> FrameBatch:
    return FrameBatch(tuple(plane[None] for plane in planes), (ticks,))
