"""Cutting into segments, the manifest on disk, and the machine's CPUs."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from hat_video.errors import OptionError
from hat_video.inference.processors import cpu_count
from hat_video.jobs.options import UpscaleOptions, load_config
from hat_video.jobs.plan import Manifest, cut_segments, plan_file
from hat_video.media.probe import FrameIndex
from hat_video.presets import preset_names
from tests.clips import make_clip


def index(pts: list[int], keys: list[int]) -> FrameIndex:
    return FrameIndex(pts=tuple(pts), key_pts=tuple(keys), last_duration=1)


def cuts(pts: list[int], keys: list[int], ticks: int) -> list[int]:
    return [segment.start_pts for segment in cut_segments(index(pts, keys), ticks)]


def test_segments_start_at_key_frames_in_reach() -> None:
    assert cuts(list(range(100)), [0, 12, 33, 45, 80], 10) == [0, 12, 22, 33, 45, 55, 65, 75, 85, 95]


def test_a_single_key_frame_does_not_make_a_single_segment() -> None:
    assert cuts(list(range(100)), [0], 30) == [0, 30, 60, 90]


@pytest.mark.parametrize("ticks", [1, 7, 40, 10_000])
@pytest.mark.parametrize("step", [[1], [1, 5, 2], [1000]])
def test_segments_cover_every_frame_once(ticks: int, step: list[int]) -> None:
    pts = list(itertools.accumulate(itertools.islice(itertools.cycle(step), 90), initial=-7))
    segments = cut_segments(index(pts, pts[::13]), ticks)
    assert [tick for segment in segments for tick in segment.pts] == pts
    assert all(a.end_pts == b.start_pts for a, b in itertools.pairwise(segments))
    assert all(segment.start_pts == segment.pts[0] and segment.pts[-1] < segment.end_pts for segment in segments)


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    make_clip(clip)
    plan = plan_file(clip, tmp_path / "out.mkv", UpscaleOptions(model="bicubic", scale=2, segment=0.3))
    assert Manifest.from_json(plan.manifest.to_json()) == plan.manifest


def test_key_follows_what_changes_the_bytes_and_nothing_else(tmp_path: Path) -> None:
    clip, other = tmp_path / "clip.mp4", tmp_path / "other.mp4"
    make_clip(clip, frames=30)
    make_clip(other, frames=31)

    def key(source: Path = clip, name: str = "out.mp4", **choices: object) -> str:
        options = UpscaleOptions(**{"model": "bicubic", "scale": 2, **choices})  # type: ignore[arg-type]
        return plan_file(source, tmp_path / name, options).manifest.key

    same = key()
    assert key(name="another.mp4") == same
    assert key(jobs=5) == same
    assert key(work_dir=tmp_path) == same
    assert key(strict=True) == same
    renamed = clip.rename(tmp_path / "renamed.mp4")
    assert key(renamed) == same
    different = [
        key(other),
        key(renamed, crf=17),
        key(renamed, preset="fast"),
        key(renamed, scale=3),
        key(renamed, model="lanczos"),
        key(renamed, model="hat-nano"),
        key(renamed, batch=2),
        key(renamed, segment=0.2),
        key(renamed, name="out.mkv"),
        key(renamed, encoder_option=("tune=film",)),
    ]
    assert len({same, *different}) == 1 + len(different)


@pytest.mark.parametrize(
    ("files", "group", "allowed"),
    [
        ({"cpu.max": "100000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "max 100000\n"}, "0::/\n", 1000),
        ({"cpu.max": "250000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "10000 100000\n"}, "0::/\n", 1),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, "0::/a/b\n", 1),
        ({"cpu.max": "100000 100000"}, "0::/of/the/host\n", 1),
        ({"cpu/docker/x/cpu.cfs_quota_us": "100000", "cpu/docker/x/cpu.cfs_period_us": "100000"}, "3:cpu:/docker/x", 1),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/", 1000),
        ({}, "", 1000),
    ],
)
def test_a_container_gets_as_many_workers_as_it_pays_for(
    files: dict[str, str], group: str, allowed: int, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(group)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    there = len(os.sched_getaffinity(0))
    assert cpu_count(tmp_path / "groups", tmp_path / "own") == min(there, allowed)


def test_cpu_count_is_not_more_than_the_machines() -> None:

    assert 1 <= cpu_count() <= (os.cpu_count() or 1)


def test_presets_load_and_typed_options_come_from_toml(tmp_path: Path) -> None:
    assert preset_names("upscale") == ["archive", "draft", "lossless"]
    for name in preset_names("upscale"):
        assert load_config(name) != UpscaleOptions()
    file = tmp_path / "mine.toml"
    file.write_text('encoder-option = ["tune=film", "aq-mode=3"]\nsegment = 5\nwork-dir = "w"\nkeep_work = true\n')
    assert load_config(file) == UpscaleOptions(
        encoder_option=("tune=film", "aq-mode=3"), segment=5.0, work_dir=Path("w"), keep_work=True
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("scale = 7", "scale = 7"),
        ("crf = 'good'", "crf = 'good'"),
        ("colour = 1", "unknown key 'colour'"),
        ("segment = 0", "--segment 0"),
        ("segment =", "not a TOML file"),
    ],
)
def test_bad_toml_is_one_line_with_the_value(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(OptionError) as error:
        load_config(file)
    assert line in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
