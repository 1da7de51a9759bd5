"""What Prometheus reads from a live run."""

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hat_video.live.figures import OutputFigures, RungFigures
from hat_video.live.metrics import make_registry, render
from tests.live.scene import Scene, figures


def read(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Sample name -> labels -> value, as Prometheus' own parser understands it."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample.name}{labels} twice"
            found[sample.name][labels] = sample.value
    return found


def scrape(**changes: object) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    told = figures(**changes)
    return read(render(make_registry(lambda: told), None)[0].decode())


def test_every_figure_is_there() -> None:
    found = scrape()
    assert found["hat_video_live_frames_in_total"] == {(): 1125}
    assert found["hat_video_live_frames_out_total"] == {(): 1000}
    assert found["hat_video_live_frames_dropped_total"] == {(("reason", "overload"),): 120, (("reason", "no_pts"),): 5}
    assert found["hat_video_live_source_up"] == {(): 1}
    assert found["hat_video_live_source_reconnects_total"] == {(): 1}
    assert found["hat_video_live_rung"][(("model", "hat-nano"),)] == 1
    assert found["hat_video_live_rung"][(("model", "bicubic"),)] == 0
    assert found["hat_video_live_rung_frames_total"][(("model", "bicubic"),)] == 100
    assert found["hat_video_live_stage_seconds_total"][(("stage", "model"),)] == 55
    assert found["hat_video_live_output_up"][(("output", "rec-%H.mp4"),)] == 1
    assert found["hat_video_live_output_dropped_total"][(("output", "rtmp://live/x?key=***"),)] == 600
    assert (("input_size", "160x90"), ("output_size", "320x180"), ("source", "rtsp://user:***@camera/1")) in found[
        "hat_video_live_run_info"
    ]
    assert found["process_resident_memory_bytes"][()] > 1e6


def test_latency_is_a_histogram() -> None:
    found = scrape()
    buckets = {dict(labels)["le"]: value for labels, value in found["hat_video_live_latency_seconds_bucket"].items()}
    assert buckets == {"0.05": 300, "0.1": 900, "0.25": 990, "+Inf": 1000}
    assert found["hat_video_live_latency_seconds_count"] == {(): 1000}
    assert found["hat_video_live_latency_seconds_sum"] == {(): 68.5}


def test_before_the_first_frame() -> None:
    found = scrape(
        frames_in=0, frames_out=0, dropped={}, rungs=(), outputs=(), latency_buckets={}, latency_sum_seconds=0.0
    )
    assert found["hat_video_live_latency_seconds_count"] == {(): 0}


def test_two_of_one_name_stay_two() -> None:
    found = scrape(
        rungs=(RungFigures("a.pth", 1, 0.1), RungFigures("a.pth", 2, 0.1)),
        outputs=(OutputFigures("x", True, 5), OutputFigures("x", False, 6), OutputFigures("x", False, 7)),
    )
    assert found["hat_video_live_output_frames_total"] == {
        (("output", "x"),): 5, (("output", "x #2"),): 6, (("output", "x #3"),): 7
    }  # fmt: skip
    assert sum(found["hat_video_live_rung_frames_total"].values()) == 3


def test_odd_names_are_escaped() -> None:
    name = 'C:\\a"b"\nhat_video_live_viewers 99'
    found = scrape(outputs=(OutputFigures(name, True),))
    assert (("output", name),) in found["hat_video_live_output_up"]
    assert found["hat_video_live_viewers"] == {(): 0}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene() as running:
        yield running


def test_prometheus_reads_it_from_the_page(scene: Scene) -> None:
    status, headers, body = scene.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert read(body.decode())["hat_video_live_frames_in_total"] == {(): 1125}
    status, headers, body = scene.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_registries_do_not_share() -> None:
    one, two = make_registry(lambda: figures(frames_in=1)), make_registry(lambda: figures(frames_in=2))
    assert b"frames_in_total 1.0" in render(one, None)[0]
    assert b"frames_in_total 2.0" in render(two, None)[0]
