"""`hat-video preview` and the estimate of a long run: real seconds, real measures, two files to look at."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import hat_video.jobs.estimate as estimate_module
from hat_video.cli import main
from hat_video.frames import FrameBatch
from hat_video.jobs.estimate import Estimate, Pace, Trial, film_bytes, peak_memory_bytes
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.plan import plan_file
from hat_video.jobs.preview import preview_file
from hat_video.media.probe import probe
from tests.clips import make_clip
from tests.command import tree, upscale

FAST = UpscaleOptions(model="bicubic", scale=2, preset="ultrafast")
QUARTER_TURN = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)


def preview(*words: object) -> int:
    return main(["preview", *map(str, words)])


def read_png(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "png"
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds with two sounds, text and chapters."""
    path = tmp_path_factory.mktemp("preview") / "clip.mkv"
    return make_clip(path, width=96, height=64, frames=120, audio=["aac", "ac3"], subtitles=True, chapters=True)


def test_what_it_shows(clip: Path, tmp_path: Path) -> None:
    made = preview_file(clip, tmp_path / "shown.mp4", FAST, at="1.02", seconds="1.5")
    assert (made.clip, made.picture) == (tmp_path / "shown.mp4", tmp_path / "shown.png")
    assert made.frames == 45
    assert abs(made.start_seconds - 1.033) < 0.002
    assert made.verification.startswith("proven: 45 frames")
    assert tree(tmp_path) == {"shown.mp4", "shown.png"}, "nothing else is left behind"
    shown = probe(made.clip)
    assert (shown.video.width, shown.video.height, len(shown.index.pts)) == (384, 128, 45)
    assert [info.kind for info in shown.streams].count("audio") == 2
    assert abs(shown.duration_seconds - Fraction(3, 2)) < Fraction(1, 25)


def test_left_is_the_source_right_is_the_result(clip: Path, tmp_path: Path) -> None:
    made = preview_file(clip, tmp_path / "a.mp4", replace(FAST, crf=1), at="1", seconds="0.5")
    picture = read_png(made.picture).astype(float)
    assert picture.shape == (128, 384, 3)
    left, right = picture[:, :192], picture[:, 192:]
    # Bicubic beside bicubic: the same frame on both sides, but for the encoder's loss.
    assert np.abs(left - right).mean() < 3
    index = len(probe(made.clip).index.pts) // 2 + 30
    with av.open(str(clip)) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    small = left.reshape(64, 2, 96, 2, 3).mean(axis=(1, 3))
    errors = [np.abs(small - frame).mean() for frame in frames]
    assert int(np.argmin(errors)) == index
    with av.open(str(made.clip)) as container:
        shown = [frame.to_ndarray(format="gray").astype(float) for frame in container.decode(video=0)]
    assert all(np.abs(frame[:, :192] - frame[:, 192:]).mean() < 4 for frame in shown), "side by side in every frame"


def test_the_network_is_on_the_right(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=64, height=48, frames=10)
    made = preview_file(clip, options=UpscaleOptions(preset="ultrafast", crf=1), seconds="0.2")
    assert made.clip == tmp_path / "clip_preview.mp4"
    picture = read_png(made.picture).astype(float)
    left, right = picture[:, :128], picture[:, 128:]

    def detail(side: np.ndarray) -> float:
        return float(np.abs(np.diff(side, axis=1)).mean())

    assert detail(right) > 1.01 * detail(left)


def test_turned_and_anamorphic_clips_are_shown_as_they_are_seen(tmp_path: Path) -> None:
    clip = make_clip(
        tmp_path / "phone.mp4",
        width=96,
        height=64,
        frames=12,
        display_matrix=QUARTER_TURN,
        sample_aspect_ratio=Fraction(4, 3),
    )
    made = preview_file(clip, options=replace(FAST, crf=1), seconds="0.2")
    # 96x64 at 4:3 is 128x64, upright 64x128, doubled 128x256, and that twice.
    shown = probe(made.clip).video
    assert (shown.width, shown.height, shown.sample_aspect_ratio, shown.display_matrix) == (256, 256, 1, None)
    picture = read_png(made.picture).astype(float)
    with av.open(str(clip)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    # Players turn this matrix clockwise by a quarter.
    turned = [np.rot90(frame, -1).astype(float) for frame in frames]
    small = picture[:, :128].reshape(128, 2, 64, 2, 3).mean(axis=(1, 3))
    widths = [np.repeat(frame, 4, axis=0).reshape(128, 3, 64, 3).mean(axis=1) for frame in turned]
    assert min(np.abs(small - frame).mean() for frame in widths) < 6
    assert min(np.abs(small[::-1] - frame).mean() for frame in widths) > 12


def test_variable_rate_and_webm(tmp_path: Path) -> None:
    pts = [*range(0, 1000, 100), *(1000 + round(i * 1000 / 30) for i in range(30))]
    clip = make_clip(tmp_path / "vfr.mp4", pts=pts, time_base=Fraction(1, 1000), rate=30)
    made = preview_file(
        clip, tmp_path / "shown.webm", UpscaleOptions(model="bicubic", size="80p"), at="0.55", seconds="0.8"
    )
    shown = probe(made.clip)
    wanted = [tick for tick in pts if 550 <= tick < 1350]
    ours = [round((tick - shown.index.pts[0]) * shown.video.time_base * 1000) for tick in shown.index.pts]
    assert len(ours) == len(wanted)
    assert max(abs(a - (b - wanted[0])) for a, b in zip(ours, wanted, strict=True)) <= 1
    assert shown.codec == "vp9"


def test_a_clip_shorter_than_the_preview_is_shown_whole(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "short.mp4", frames=7)
    made = preview_file(clip, options=FAST)
    assert (made.frames, made.whole.frames) == (7, 7)


def test_a_clock_that_begins_late_is_counted_on(tmp_path: Path) -> None:
    """As of MPEG program streams, whose first frame is half a second on."""
    pts = [16 + number for number in range(18)]
    clip = make_clip(tmp_path / "late.mkv", frames=18, pts=pts, time_base=Fraction(1, 30), audio=())
    made = preview_file(clip, options=FAST, seconds="0.4")
    assert made.frames == 12
    assert 0.53 < made.start_seconds < 0.7


def test_the_promise_is_near_what_comes(tmp_path: Path) -> None:
    """Size only: time and memory on a busy machine are for `benchmarks/estimate.py`."""
    clip = make_clip(tmp_path / "clip.mp4", width=128, height=96, frames=240)
    options = replace(FAST, preset="medium")
    made = preview_file(clip, options=options, seconds="2")
    assert made.whole.frames == 240
    assert made.whole.fps == made.fps > 0
    assert made.whole.seconds > 240 / made.fps
    upscale_file(clip, tmp_path / "film.mp4", options)
    assert 0.8 < made.whole.bytes / (tmp_path / "film.mp4").stat().st_size < 1.2
    assert 50e6 < made.whole.memory_bytes <= peak_memory_bytes()


def test_the_command(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "bicubic", "--scale", "2", "--preset", "ultrafast")
    assert preview(clip, "-o", tmp_path / "p.mp4", "--at", "0:01", "--seconds", "0.5", *words) == 0
    out = capsys.readouterr().out
    assert "15 frames from 1.000 s" in out
    assert "the whole clip: 120 frames at" in out
    assert "enlarged by bicubic" in out
    assert preview(clip, "-o", tmp_path / "p.mp4", "--seconds", "0.5", *words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert preview(clip, "-o", tmp_path / "p.mp4", "--seconds", "0.5", *words, "--overwrite", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["frames"] == 15
    assert found["whole"]["frames"] == 120


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("--at", "-1"), 2, "--at -1"),
        (("--at", "9"), 2, "--at 9"),
        (("--at", "soon"), 2, "--at soon"),
        (("--seconds", "0"), 2, "--seconds 0"),
        (("--seconds", "-2"), 2, "--seconds -2"),
        (("--size", "10p"), 2, "--size 10p"),
        (("-o", "shown.gif"), 2, "shown.gif"),
        (("--start", "1"), 2, "--start"),
    ],
)
def test_wrong_words(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, line: str
) -> None:
    given = () if "-o" in words else ("-o", tmp_path / "p.mp4")
    assert preview(clip, *given, *words, "--model", "bicubic") == code
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text]
    assert line in said
    assert tree(tmp_path) == set()


def test_values_are_looked_at_before_names(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.mp4").write_bytes(b"made before")
    for words in (("--at", "x"), ("--seconds", "0")):
        assert preview(clip, "-o", tmp_path / "p.mp4", *words, "--model", "bicubic") == 2
        assert f"{' '.join(words)}: must be" in capsys.readouterr().err


def test_the_default_name_says_the_moment(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", frames=30)
    for at in (None, "0.1", "0:00.50"):
        preview_file(clip, options=FAST, at=at, seconds="0.2")
    made = {f"clip_preview{moment}{suffix}" for moment in ("", "_0.1s", "_0.5s") for suffix in (".mp4", ".png")}
    assert tree(tmp_path) == {"clip.mp4"} | made


def test_the_source_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = make_clip(tmp_path / "clip.mp4", frames=5)
    before = clip.read_bytes()
    assert preview(clip, "-o", clip, "--overwrite") == 1
    assert "the input itself" in capsys.readouterr().err
    assert clip.read_bytes() == before


def test_a_long_run_says_so_once_and_a_short_one_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=128, height=96, frames=150)
    words = ("--model", "lanczos", "--scale", "4", "--preset", "ultrafast", "--progress", "json")
    assert upscale(clip, "-o", tmp_path / "short.mp4", *words) == 0
    assert '"estimate"' not in capsys.readouterr().err
    monkeypatch.setattr(estimate_module, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(estimate_module, "_LOOK_SECONDS", 0.0)
    assert upscale(clip, "-o", tmp_path / "long.mp4", *words) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    (said,) = [event for event in events if event["event"] == "estimate"]
    assert said["frames"] == 150
    assert 0.75 < said["bytes"] / (tmp_path / "long.mp4").stat().st_size < 1.25
    assert said["seconds"] > 0
    assert said["memory_bytes"] > 50e6
    assert (tmp_path / "long.mp4").read_bytes() == (tmp_path / "short.mp4").read_bytes(), "and the result is the same"


def test_an_unfinished_trial_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(estimate_module, "_LOOK_SECONDS", 0.0)
    clip = make_clip(tmp_path / "clip.mp4", frames=30)
    manifest = plan_file(clip, tmp_path / "out.mkv", FAST).manifest
    sizes = manifest.video.pixel_format.plane_sizes(manifest.video.width, manifest.video.height)
    planes = tuple(torch.zeros(1, *size, dtype=torch.uint8) for size in sizes)
    with Trial(
        manifest, probe(clip), tmp_path, in_flight=1, to_do=manifest.segments, began=time.perf_counter()
    ) as trial:
        for tick in manifest.index.pts[:5]:
            assert trial.feed(FrameBatch(planes, (tick,))) is None
        assert list(tmp_path.glob(".tmp-trial-*")), "it is at work"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_pace_counts_from_when_all_are_in_flight() -> None:
    pace = Pace(2)
    for _ in range(2):
        pace.count(1)
    assert pace.frames == 0
    pace._began -= 1.0
    for _ in range(4):
        pace.count(1)
    assert pace.frames == 4
    assert 3.5 < pace.fps <= 4.0


def test_size_of_intra_only_codecs(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=96, height=64, frames=60)
    options = UpscaleOptions(model="bicubic", scale=2, encoder="ffv1", encoder_option=("g=1",))
    part = upscale_file(clip, tmp_path / "part.mkv", replace(options, start="0.5", duration="0.5"))
    whole = upscale_file(clip, tmp_path / "whole.mkv", options)
    found, manifest = probe(clip), plan_file(clip, tmp_path / "o.mkv", options).manifest
    pts = [tick for tick in found.index.pts if Fraction(1, 2) <= tick * found.video.time_base < 1]
    promised = film_bytes(probe(part.output), pts, found, manifest)
    assert 0.9 < promised / sum(probe(whole.output).frame_bytes) < 1.1


def test_the_line_is_for_people() -> None:
    line = Estimate(200000, 2.5, 80000.0, 3_400_000_000, 650_000_000).line
    assert line == "200000 frames at 2.50 frames/s: about 22 h 13 min, a file of 3.4 GB, 650 MB of memory"
    assert "about 1 min 05 s" in Estimate(10, 1.0, 65.2, 1000, 1000).line
