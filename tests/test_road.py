"""The whole road on material that other tools get wrong: time, colour, streams, the last frame."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import pytest

from hat_video.media.probe import probe
from tests.clips import color_bars, make_clip
from tests.command import upscale

FAST = ("--model", "bicubic", "--scale", "2", "-q")


def seconds_of(path: Path) -> list[Fraction]:
    found = probe(path)
    return [tick * found.video.time_base for tick in found.index.pts]


@pytest.fixture(scope="module")
def vfr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds at 10 frames a second, then two at 30, and a white frame at 3.000 s."""
    pts = [*range(0, 2000, 100), *(2000 + round(i * 1000 / 30) for i in range(60))]
    pts[50] = 3000
    return make_clip(
        tmp_path_factory.mktemp("vfr") / "vfr.mp4",
        pts=pts,
        time_base=Fraction(1, 1000),
        flash_at=Fraction(3),
        rate=30,
    )


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_vfr_stays_vfr_and_the_flash_stays_at_three_seconds(vfr: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    assert upscale(vfr, "-o", output, *FAST, "--segment", "1") == 0
    theirs, ours = seconds_of(vfr), seconds_of(output)
    if suffix in (".mp4", ".mov"):
        assert ours == theirs
    else:
        # Matroska starts no stream before zero, so sound that is primed before it moves everything by one constant.
        offset = ours[0] - theirs[0]
        assert 0 <= offset < Fraction(1, 20)
        assert max(abs(a - offset - b) for a, b in zip(ours, theirs, strict=True)) <= Fraction(1, 2000)
    with av.open(str(output)) as container:
        bright = [
            frame.pts * frame.time_base
            for frame in container.decode(video=0)
            if frame.to_ndarray(format="gray").mean() > 225
        ]
    assert len(bright) == 1
    assert abs(Fraction(bright[0]) - (ours[0] - theirs[0]) - 3) <= Fraction(1, 2000)


@pytest.mark.parametrize("bt709", [True, False, None])
@pytest.mark.parametrize("full_range", [False, True])
def test_colour_bars_keep_their_colours(tmp_path: Path, bt709: bool | None, full_range: bool) -> None:
    if bt709 is None and full_range:
        pytest.skip("nothing says that an untagged file is full range")
    bars = color_bars(128, 96)
    clip = make_clip(
        tmp_path / "bars.mp4",
        width=128,
        height=96,
        frames=3,
        pictures=[bars] * 3,
        bt709=bt709,
        full_range=full_range,
        options={"crf": "0"},
        audio=(),
    )
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST, "--crf", "0") == 0
    with av.open(str(clip)) as before, av.open(str(output)) as after:
        a, b = next(before.decode(video=0)), next(after.decode(video=0))
        assert b.colorspace == (1 if bt709 else 6)
        assert b.color_range == (2 if full_range else 1)
        small, large = a.to_ndarray(format="yuv444p"), b.to_ndarray(format="yuv444p")
    # Each bar's middle, where no filter reaches: rows 16 to 56, columns 4 to 12 of every 16.
    for k in range(3):
        for bar in range(8):
            x, y = 16 * bar, 16
            want = small[k, y : y + 40, x + 5 : x + 11].astype(float).mean()
            got = large[k, 2 * y : 2 * y + 80, 2 * x + 10 : 2 * x + 22].astype(float).mean()
            assert abs(got - want) <= 1.0, (k, bar)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_everything_comes_along_or_is_reported(tmp_path: Path, suffix: str) -> None:
    source = make_clip(
        tmp_path / "all.mkv",
        audio=["aac", "ac3", "libopus"],
        subtitles=True,
        chapters=True,
        font=True,
        title="A title",
        sample_aspect_ratio=Fraction(16, 11),
    )
    output, report = tmp_path / f"out{suffix}", tmp_path / "report.json"
    assert upscale(source, "-o", output, *FAST, "--report", report) == 0
    (made,) = json.loads(report.read_text())["clips"]
    actions = {stream["index"]: stream for stream in made["streams"]}
    assert len(actions) == 6
    assert all(stream["reason"] for stream in actions.values() if stream["action"] in ("convert", "drop"))
    with av.open(str(output)) as container:
        assert container.metadata.get("title") == "A title"
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["One", "Two"]
        kinds = [stream.type for stream in container.streams]
        assert kinds.count("audio") == 3
        assert kinds.count("subtitle") == 1
        languages = [stream.metadata.get("language") for stream in container.streams.audio]
        if suffix != ".mov":  # QuickTime's codes have no place for some
            assert languages == ["eng", "deu", "fra"]
    if suffix == ".mkv":
        assert {stream["action"] for stream in actions.values()} <= {"video", "copy", "attach"}
    assert (upscale(source, "-o", tmp_path / f"strict{suffix}", *FAST, "--strict") == 0) == all(
        stream["action"] != "drop" for stream in actions.values()
    )


def test_ten_bits_stay_ten_bits(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "deep.mkv", codec="libx265", pix_fmt="yuv420p10le", frames=6)
    assert upscale(clip, "-o", tmp_path / "out.mp4", *FAST) == 0
    assert probe(tmp_path / "out.mp4").video.pixel_format.name == "yuv420p10le"


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_very_short_clips(tmp_path: Path, frames: int) -> None:
    clip = make_clip(tmp_path / "short.mp4", frames=frames)
    for suffix in (".mp4", ".mkv", ".webm"):
        output = tmp_path / f"out{suffix}"
        assert upscale(clip, "-o", output, *FAST) == 0
        assert len(seconds_of(output)) == frames


def test_rotation_and_late_sound_are_kept(tmp_path: Path) -> None:
    matrix = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    clip = make_clip(tmp_path / "phone.mp4", display_matrix=matrix, audio_offset=Fraction(1, 3))
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST) == 0
    assert probe(output).video.display_matrix == matrix
    starts = []
    for path in (clip, output):
        with av.open(str(path)) as container:
            packet = next(
                packet for packet in container.demux(audio=0) if packet.pts is not None and not packet.is_discard
            )
            starts.append(packet.pts * packet.time_base)
    assert abs(starts[0] - starts[1]) <= Fraction(1, 1000)


@pytest.mark.parametrize("suffix", [".avi", ".ts", ".flv"])
def test_other_containers_become_matroska(tmp_path: Path, suffix: str) -> None:
    audio = {".avi": ("libmp3lame",)}.get(suffix, ("aac",))
    clip = make_clip(tmp_path / f"clip{suffix}", frames=20, audio=audio)
    assert upscale(clip, *FAST) == 0
    assert len(seconds_of(tmp_path / "clip_x2.mkv")) == 20


def test_frames_in_flight_and_batches_change_no_timestamp(vfr: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one.mp4", tmp_path / "many.mp4"
    assert upscale(vfr, "-o", one, *FAST, "--jobs", "1") == 0
    assert upscale(vfr, "-o", many, *FAST, "--jobs", "3") == 0
    assert one.read_bytes() == many.read_bytes(), "the number of cores is not in the result"
    batched = tmp_path / "batched.mp4"
    assert upscale(vfr, "-o", batched, *FAST, "--batch", "7") == 0
    assert seconds_of(batched) == seconds_of(one)
