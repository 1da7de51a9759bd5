"""A proof is worth what it catches: each planted fault must be named."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from hat_video.media.mux import SegmentFile, join
from hat_video.media.passthrough import plan_streams
from hat_video.media.verify import verify
from tests.clips import make_clip
from tests.test_mux import SUFFIX, Film, join_film, segments_of, verify_film

CONTAINERS = ["mp4", "matroska", "webm"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", audio=("aac", "aac"), chapters=True, bt709=True)


@pytest.fixture(scope="module", params=CONTAINERS)
def film(request: pytest.FixtureRequest, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Film, str]:
    return segments_of(clip, tmp_path_factory.mktemp("film"), request.param), request.param


def test_a_true_copy_is_proven(film: tuple[Film, str], tmp_path: Path) -> None:
    made, container = film
    output = tmp_path / "out.part"  # the proof comes before the name
    join_film(made, output, container)
    verdict = verify_film(made, output, container)
    assert verdict.is_ok, verdict.problems
    assert verdict.line.startswith("proven: 30 frames, every timestamp, 2 streams")
    assert "2 chapters, colour bt709, picture checked at 9 places" in verdict.line
    assert verdict.checked["places"] == 9


@pytest.mark.parametrize("container", CONTAINERS)
def test_pictures_slipped_by_one_frame(clip: Path, tmp_path: Path, container: str) -> None:
    slipped = segments_of(clip, tmp_path, container, slip=1)
    output = tmp_path / f"out{SUFFIX[container]}"
    join_film(slipped, output, container)
    verdict = verify_film(slipped, output, container)
    assert not verdict.is_ok
    assert "shows the picture of the source's frame" in verdict.line


def test_a_slip_is_seen_through_hard_compression(clip: Path, tmp_path: Path) -> None:
    for slip in (0, 1):
        made = segments_of(clip, tmp_path, "mp4", slip=slip, crf=34)
        output = tmp_path / f"{slip}.mp4"
        join_film(made, output, "mp4")
        verdict = verify_film(made, output, "mp4")
        assert verdict.is_ok is (slip == 0), verdict.line


def test_dropped_frame(film: tuple[Film, str], clip: Path, tmp_path: Path) -> None:
    made, container = film
    short = segments_of(clip, tmp_path, container, without=[13])
    output = tmp_path / f"out{SUFFIX[container]}"
    join_film(short, output, container)
    verdict = verify_film(made, output, container)
    assert verdict.line.startswith("DIFFERS: 29 frames, the source has 30")
    assert any(p.startswith("frame 13 has pts") for p in verdict.problems)


def test_missing_sound(film: tuple[Film, str], tmp_path: Path) -> None:
    made, container = film
    plans = plan_streams(made.source.path, container, video_index=0)
    fewer = [replace(p, action="drop") if p.index == 2 else p for p in plans]
    output = tmp_path / f"out{SUFFIX[container]}"
    join(
        output,
        container,
        made.segments,
        source=made.source.path,
        streams=fewer,
        video=made.video,
        durations=made.durations,
    )
    assert "1 audio streams, 2 were planned" in verify_film(made, output, container).problems


def shifted_sound(clip: Path, path: Path, seconds: Fraction) -> Path:
    with av.open(str(clip)) as inp, av.open(str(path), "w") as out:
        pairs = {s.index: out.add_stream_from_template(s, opaque=True) for s in inp.streams if s.codec_context}
        for packet in inp.demux():
            if packet.dts is None or packet.stream.index not in pairs:
                continue
            if packet.stream.type == "audio":
                packet.pts = packet.dts = int(packet.pts + seconds / packet.time_base)
            packet.stream = pairs[packet.stream.index]
            out.mux(packet)
    return path


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_sound_off_by_40_ms(clip: Path, tmp_path: Path, container: str) -> None:
    made = segments_of(clip, tmp_path, container)
    output = tmp_path / f"out{SUFFIX[container]}"
    join_film(made, output, container, source=shifted_sound(clip, tmp_path / "off.mp4", Fraction(40, 1000)))
    verdict = verify_film(made, output, container)
    # The planting file keeps a late start to a millisecond.
    off = [p for p in verdict.problems if re.search(r"\+(39|40)\.\d ms off against the picture", p)]
    assert len(off) == 2, verdict.problems


def test_sound_with_one_changed_byte(clip: Path, tmp_path: Path) -> None:
    made = segments_of(clip, tmp_path, "mp4")
    output = tmp_path / "out.mp4"
    join_film(made, output, "mp4")
    with av.open(str(output)) as done:
        packet = next(p for p in done.demux(done.streams.audio[1]) if p.size > 50)
        position = packet.pos
    data = bytearray(output.read_bytes())
    assert position is not None
    data[position + 20] ^= 1
    output.write_bytes(data)
    assert "audio stream 2 (aac) differs from the source" in verify_film(made, output, "mp4").line


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [("matrix", 6, "colour matrix"), ("transfer", 16, "colour transfer"), ("is_full_range", True, "colour range")],
)
def test_wrong_colour_tag(film: tuple[Film, str], tmp_path: Path, field: str, value: int, word: str) -> None:
    made, container = film
    output = tmp_path / f"out{SUFFIX[container]}"
    join_film(made, output, container)
    color = replace(made.video.color, **{field: value})
    verdict = verify_film(replace(made, video=replace(made.video, color=color)), output, container)
    assert word in verdict.line


def test_one_moved_timestamp(film: tuple[Film, str], tmp_path: Path) -> None:
    made, container = film
    tick = made.video.time_base
    step = 1 if container == "mp4" else max(1, int(Fraction(2, 1000) / tick))
    victim = made.pts[14]
    segments = [SegmentFile(s.path, tuple(p + step if p == victim else p for p in s.pts)) for s in made.segments]
    durations = {**made.durations, victim + step: made.durations[victim]}
    output = tmp_path / f"out{SUFFIX[container]}"
    join_film(replace(made, segments=segments, durations=durations), output, container)
    verdict = verify_film(made, output, container)
    assert len(verdict.problems) == 1
    assert verdict.line.startswith("DIFFERS: frame 14 has pts 0.4")


def test_wrong_size(film: tuple[Film, str], tmp_path: Path) -> None:
    made, container = film
    output = tmp_path / f"out{SUFFIX[container]}"
    join_film(made, output, container)
    verdict = verify_film(replace(made, video=replace(made.video, width=256)), output, container)
    assert "size is (128, 96), not (256, 96)" in verdict.line


def test_a_still_film_is_proven_but_says_so(tmp_path: Path) -> None:
    picture = np.full((48, 64, 3), 120, np.uint8)
    clip = make_clip(tmp_path / "still.mp4", frames=20, pictures=[picture] * 20, bt709=True, audio=())
    made = segments_of(clip, tmp_path, "mp4", slip=1)
    output = tmp_path / "out.mp4"
    join_film(made, output, "mp4")
    verdict = verify_film(made, output, "mp4")
    assert verdict.is_ok
    assert verdict.checked["places"] == 0
    assert "without motion" in verdict.line


def test_lost_frames_are_left_out_and_counted(clip: Path, tmp_path: Path) -> None:
    made = segments_of(clip, tmp_path, "mp4", without=[4])
    output = tmp_path / "out.mp4"
    join_film(made, output, "mp4")
    lost = made.pts[4]
    kept = [p for p in made.pts if p != lost]
    verdict = verify(
        made.source,
        output,
        video=made.video,
        pts=kept,
        durations=made.durations,
        streams=plan_streams(clip, "mp4", video_index=0),
        segment_starts=made.starts,
        lost=[lost],
    )
    assert verdict.is_ok, verdict.problems
    assert "1 lost or corrupt frames left out" in verdict.line


def test_a_file_that_is_none(film: tuple[Film, str], tmp_path: Path) -> None:
    made, container = film
    output = tmp_path / f"out{SUFFIX[container]}"
    output.write_bytes(b"nothing of the kind")
    verdict = verify_film(made, output, container)
    assert not verdict.is_ok
    assert "cannot be read back" in verdict.line
