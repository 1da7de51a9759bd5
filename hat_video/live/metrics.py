"""The figures of a live run for Prometheus: read when it asks, kept nowhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hat_video.live.figures import LiveFigures, OutputFigures

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

__all__ = ["make_registry", "render"]

_PREFIX = "hat_video_live"


class _Collector:
    """Prometheus' custom collector: one snapshot a scrape, so that the numbers fit each other."""

    def __init__(self, figures: Callable[[], LiveFigures]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        yield from _source(figures)
        yield from _frames(figures)
        yield from _ladder(figures)
        yield from _times(figures)
        yield from _outputs(figures.outputs)
        yield _gauge("viewers", "Who look at the page at this moment.", [((), figures.viewers)])


def make_registry(figures: Callable[[], LiveFigures]) -> CollectorRegistry:
    """A registry of its own, so that nothing of another program in this process is in it; with memory and CPU time."""
    from prometheus_client import CollectorRegistry, ProcessCollector

    registry = CollectorRegistry()
    registry.register(_Collector(figures))
    ProcessCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry, accept: str | None) -> tuple[bytes, str]:
    """The text of a scrape, in the format that `accept` (the header) asks for, and its content type."""
    from prometheus_client.exposition import choose_encoder

    encode, content_type = choose_encoder(accept or "")
    return encode(registry), content_type


def _gauge(name: str, text: str, samples: Iterable[tuple[Sequence[str], float]], labels: Sequence[str] = ()) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(
    name: str, text: str, samples: Iterable[tuple[Sequence[str], float]], labels: Sequence[str] = ()
) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _source(figures: LiveFigures) -> Iterator[Metric]:
    from prometheus_client.core import InfoMetricFamily

    facts = {
        "source": figures.source,
        "input_size": "x".join(map(str, figures.input_size)),
        "output_size": "x".join(map(str, figures.output_size)),
    }
    yield InfoMetricFamily(f"{_PREFIX}_run", "What is upscaled to what.", value=facts)
    yield _gauge("source_up", "1 while frames come from the camera.", [((), figures.is_source_up)])
    yield _counter("source_reconnects", "Times that the camera was opened again.", [((), figures.reconnects)])
    yield _gauge("uptime_seconds", "Since the first frame.", [((), figures.seconds)])


def _frames(figures: LiveFigures) -> Iterator[Metric]:
    yield _counter("frames_in", "Frames decoded.", [((), figures.frames_in)])
    yield _counter("frames_out", "Frames upscaled and encoded.", [((), figures.frames_out)])
    yield _counter("frames_held", "Frames repeated while the camera was silent.", [((), figures.frames_held)])
    yield _counter("frames_reused", "Frames that took the result of the one before.", [((), figures.reused_frames)])
    dropped = [((reason,), count) for reason, count in sorted(figures.dropped.items())]
    yield _counter("frames_dropped", "Frames that were not upscaled, by reason.", dropped, ["reason"])


def _ladder(figures: LiveFigures) -> Iterator[Metric]:
    names = _distinct([rung.model for rung in figures.rungs])
    pairs = list(zip(names, figures.rungs, strict=True))
    now = [((name,), rung.model == figures.rung) for name, rung in pairs]
    yield _gauge("rung", "1 for the model that makes the frames now.", now, ["model"])
    made = [((name,), rung.frames) for name, rung in pairs]
    yield _counter("rung_frames", "Frames made, by model.", made, ["model"])
    cost = [((name,), rung.cost_seconds) for name, rung in pairs]
    yield _gauge("rung_cost_seconds", "Of one frame on one thread, as measured last.", cost, ["model"])
    yield _counter("rung_changes", "Changes of the model.", [((), figures.rung_changes)])


def _times(figures: LiveFigures) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    bounds = sorted(bound for bound in figures.latency_buckets if not math.isinf(bound))
    most = max([figures.latency_buckets.get(math.inf, 0), *(figures.latency_buckets[bound] for bound in bounds)])
    buckets = [*((str(float(bound)), figures.latency_buckets[bound]) for bound in bounds)]
    family = HistogramMetricFamily(f"{_PREFIX}_latency_seconds", "From a frame's arrival to its encoded picture.")
    family.add_metric([], [*buckets, ("+Inf", max(most, figures.frames_out))], figures.latency_sum_seconds)
    yield family
    stages = [((stage,), seconds) for stage, seconds in sorted(figures.stage_seconds.items())]
    yield _counter("stage_seconds", "Time spent, by stage.", stages, ["stage"])


def _outputs(outputs: Sequence[OutputFigures]) -> Iterator[Metric]:
    pairs = list(zip(_distinct([output.name for output in outputs]), outputs, strict=True))
    up = [((name,), output.is_up) for name, output in pairs]
    yield _gauge("output_up", "1 while the output takes packets.", up, ["output"])
    for name, text in {
        "frames": "Pictures that the output has taken.",
        "bytes": "Bytes that the output has taken.",
        "dropped": "Pictures that the output did not get, because it was slow or down.",
        "reconnects": "Times that the output was opened again.",
    }.items():
        yield _counter(f"output_{name}", text, [((key,), getattr(output, name)) for key, output in pairs], ["output"])


def _distinct(names: Sequence[str]) -> list[str]:
    """Two of one name would be one time series with two values, which Prometheus refuses."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return distinct
