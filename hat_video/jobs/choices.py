"""What the options come to for one clip: which model, which range, which name."""

from __future__ import annotations

from fractions import Fraction

from hat_video.errors import OptionError, UsageError
from hat_video.inference.processors import cpu_count
from hat_video.inference.upscaler import Upscaler, choose_devices
from hat_video.jobs.options import UpscaleOptions, parse_time
from hat_video.jobs.size import Target, parse_size
from hat_video.media.probe import Probe
from hat_video.media.span import Span
from hat_video.model.zoo import Model, default_model_name, list_models, load_model

__all__ = ["load_chosen_model", "make_upscaler", "output_label", "settle_span", "size_notes"]


def load_chosen_model(options: UpscaleOptions, needed: Fraction | None = None) -> Model:
    """The model that the options ask for; without a name, the shipped one of the scale.

    Args:
        options: the choices.
        needed: times that it should enlarge at least, where the options leave the scale open: the smallest scale that
            is enough is taken, else the largest.

    Raises:
        ModelError: unknown, damaged, or not of that scale.
        UsageError: no model is shipped for that scale.
        OptionError: a box that is no multiple of the model's window.
    """
    scale = options.scale if needed is None or options.scale is not None else _scale_for(options.model, needed)
    if options.model is not None:
        model = load_model(options.model, scale=scale)
    else:
        model = load_model(default_model_name(scale or 2), scale=scale or 2)
    box = options.attention_box()
    try:
        return model if box is None else model.pooled(box)
    except ValueError as error:
        raise OptionError(f"--attention-pool {options.attention_pool}: {error}") from None


def make_upscaler(model: Model, options: UpscaleOptions) -> Upscaler:
    """The model made ready for the first device of the options.

    Raises:
        OptionError: a device or a backend that is not there.
    """
    return Upscaler(
        model,
        device=str(choose_devices(options.device)[0]),
        precision=options.precision,
        tile=options.tile,
        backend="torch-compiled" if options.compile else options.backend,
        in_flight=options.jobs or cpu_count(),
    )


def _scale_for(model: str | None, needed: Fraction) -> int | None:
    """The included model's smallest scale that is enough, else its largest; None for a checkpoint, which has one."""
    choices = [facts for facts in list_models() if facts.is_included]
    scales = sorted(
        {
            scale
            for facts in choices
            if (facts.name == model if model is not None else facts.parameters)
            for scale in facts.scales
        }
    )
    return next((scale for scale in scales if scale >= needed), scales[-1]) if scales else None


def settle_span(options: UpscaleOptions, found: Probe) -> Span | None:
    """The range in the source's own time. Its beginning is 0, or the first frame where that is not near 0."""
    start = parse_time(options.start, "--start")
    duration = parse_time(options.duration, "--duration")
    if start is None and duration is None:
        return None
    # Transport streams begin anywhere; players show all of these as beginning at 0.
    begin = Fraction(0) if 0 <= found.start_seconds < 1 else found.start_seconds
    last = found.start_seconds + found.duration_seconds
    first = begin + (start or 0)
    span = Span(None if start is None else first, None if duration is None else first + duration)
    if first >= last:
        raise UsageError(
            f"--start {options.start}: {found.path} ends at {float(last - begin):.3f} s; start before that"
        )
    kept = span.frames(found.index.pts, found.video.time_base)
    if kept.start == kept.stop:
        raise UsageError(
            f"{found.path}: no frame begins {f'in the {options.duration} s' if options.duration else 'any more'}"
            f" from {options.start or 0} on; give a longer --duration or an earlier --start"
        )
    return span


def size_notes(options: UpscaleOptions, target: Target | None, model: Model) -> list[str]:
    """What must be said where the network does not go all the way to a size."""
    if target is None or target.needed <= model.scale:
        return []
    return [
        f"--size {options.size} is {float(target.needed):.2f} times the source, {model.name} makes {model.scale} times:"
        f" the last {float(target.needed / model.scale):.2f} times are a Lanczos resample"
    ]


def output_label(options: UpscaleOptions, model: Model | None = None) -> str:
    """What a default name says about the output: `x2` or `1080p`, and the range: `x2_90-95.5s`, `x2_90s-end`.

    Raises:
        ModelError, UsageError: as for `load_chosen_model`.
    """
    if options.size is not None:
        label = parse_size(options.size).text
    else:
        label = f"x{options.scale or (model or load_chosen_model(options)).scale}"
    start, duration = parse_time(options.start, "--start"), parse_time(options.duration, "--duration")
    if start is None and duration is None:
        return label
    first = f"{float(start or 0):.12g}"
    return f"{label}_{first}s-end" if duration is None else f"{label}_{first}-{float((start or 0) + duration):.12g}s"
