"""`--start` and `--duration`: exactly the frames of the range, everything else cut with them, one offset for all."""

from __future__ import annotations

import json
import os
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hat_video.errors import OptionError
from hat_video.jobs.options import UpscaleOptions, parse_time
from hat_video.jobs.plan import plan_file
from hat_video.media.probe import probe
from hat_video.media.span import Span, advance_timecode
from hat_video.media.verify import verify
from tests.clips import SUBTITLES, make_clip
from tests.command import start, upscale, wait_for_segments

FAST = ("--model", "bicubic", "--scale", "2", "--preset", "ultrafast", "-q")
QUARTER_TURN = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
MILLISECOND = Fraction(1, 1000)


def seconds_of(path: Path) -> list[Fraction]:
    found = probe(path)
    return [tick * found.video.time_base for tick in found.index.pts]


def packets_of(path: Path, kind: str, number: int = 0) -> list[tuple[Fraction, Fraction, bytes]]:
    """(start, length, data) of each packet of one stream that a player would play."""
    with av.open(str(path)) as container:
        stream = [s for s in container.streams if s.type == kind][number]
        return [
            (p.pts * p.time_base, (p.duration or 0) * p.time_base, bytes(p))
            for p in container.demux(stream)
            if p.size
            and p.pts is not None
            and not p.is_discard
            and not (kind == "subtitle" and bytes(p)[:2] == b"\0\0")
        ]


def check_range(source: Path, output: Path, first: Fraction, last: Fraction | None, *, exact: bool) -> Fraction:
    """Frames and copied sound of the output are those of the range, moved by one constant; gives it."""
    wanted = [t for t in seconds_of(source) if t >= first and (last is None or t < last)]
    ours = seconds_of(output)
    assert len(ours) == len(wanted)
    offset = ours[0] - wanted[0]
    tolerance = Fraction(0) if exact else MILLISECOND
    assert max(abs(a - b - offset) for a, b in zip(ours, wanted, strict=True)) <= tolerance
    with av.open(str(source)) as container:
        sounds = len(container.streams.audio)
    for number in range(sounds):
        theirs = [p for p in packets_of(source, "audio", number) if p[0] >= first and (last is None or p[0] < last)]
        kept = packets_of(output, "audio", number)
        # Without a start, what primes the decoder comes along; Matroska does not mark it as such.
        assert len(kept) - len(theirs) in ((0, 1) if first < 0 else (0,))
        kept = kept[len(kept) - len(theirs) :]
        assert [p[2] for p in kept] == [p[2] for p in theirs], "the sound of the range, byte for byte"
        assert max(abs(a[0] - b[0] - offset) for a, b in zip(kept, theirs, strict=True)) <= MILLISECOND
    return offset


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds with B-frames and two sounds; the single key frame is the first."""
    path = tmp_path_factory.mktemp("range") / "clip.mp4"
    return make_clip(path, frames=90, gop=1000, bframes=3, audio=["aac", "aac"])


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize(
    ("begin", "length"), [("1", "0.5"), ("0.517", "1.001"), ("2", None), (None, "0.7"), ("0", "9")]
)
def test_exactly_the_frames_of_the_range(
    clip: Path, tmp_path: Path, suffix: str, begin: str | None, length: str | None
) -> None:
    words = [*(["--start", begin] if begin else []), *(["--duration", length] if length else [])]
    output = tmp_path / f"out{suffix}"
    assert upscale(clip, "-o", output, *FAST, *words) == 0
    first = Fraction(begin) if begin else Fraction(-1)
    last = Fraction(begin or 0) + Fraction(length) if length else None
    check_range(clip, output, first, last, exact=suffix != ".mkv")
    if begin not in (None, "0"):
        assert 0 <= seconds_of(output)[0] < Fraction(1, 20), "a range starts at 0, but for what lies between its frames"


def test_variable_rate(tmp_path: Path) -> None:
    pts = [*range(0, 2000, 100), *(2000 + round(i * 1000 / 30) for i in range(60))]
    source = make_clip(tmp_path / "vfr.mp4", pts=pts, time_base=MILLISECOND, rate=30)
    for suffix in (".mp4", ".mkv"):
        output = tmp_path / f"out{suffix}"
        assert upscale(source, "-o", output, *FAST, "--start", "1.45", "--duration", "1.6", "--segment", "0.4") == 0
        check_range(source, output, Fraction("1.45"), Fraction("3.05"), exact=suffix == ".mp4")


def test_a_transport_stream_that_begins_anywhere(tmp_path: Path) -> None:
    """Its own clock says 1234 s; people and players say 0."""
    ticks = [1234 * 90000 + i * 3600 for i in range(75)]
    source = make_clip(
        tmp_path / "late.ts", pts=ticks, time_base=Fraction(1, 90000), rate=25, audio_offset=Fraction(1234), gop=10
    )
    begin = seconds_of(source)[0]
    assert begin > 1000
    output = tmp_path / "out.mkv"
    assert upscale(source, "-o", output, *FAST, "--start", "1", "--duration", "1") == 0
    wanted = [t for t in seconds_of(source) if begin + 1 <= t < begin + 2]
    ours = seconds_of(output)
    assert len(ours) == len(wanted) == 25
    assert 0 <= ours[0] < Fraction(1, 20)


def test_the_pictures_are_those_of_the_whole(clip: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.mkv", tmp_path / "part.mkv"
    lossless = [word for word in FAST if word not in ("--preset", "ultrafast")]
    assert upscale(clip, "-o", whole, *lossless, "--encoder", "ffv1") == 0
    assert upscale(clip, "-o", part, *lossless, "--encoder", "ffv1", "--start", "1.1", "--duration", "0.5") == 0

    def frames(path: Path) -> list[np.ndarray]:
        with av.open(str(path)) as container:
            return [frame.to_ndarray() for frame in container.decode(video=0)]

    a, b = frames(whole), frames(part)
    first = next(i for i, t in enumerate(seconds_of(clip)) if t >= Fraction("1.1"))
    assert len(b) == 15
    assert all(np.array_equal(x, y) for x, y in zip(a[first : first + 15], b, strict=True))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".webm"])
def test_subtitles_and_chapters_are_cut_with_it(tmp_path: Path, suffix: str) -> None:
    source = make_clip(tmp_path / "all.mkv", frames=60, subtitles=True, chapters=True, font=True, title="A title")
    output = tmp_path / f"out{suffix}"
    words = [word for word in FAST if suffix != ".webm" or word not in ("--preset", "ultrafast")]
    # The first text is shown from 0.2 to 0.7 s, the second from 0.9 to 1.5 s; the chapters meet at 1 s.
    assert upscale(source, "-o", output, *words, "--start", "0.4", "--duration", "0.8") == 0
    wanted = [t for t in seconds_of(source) if Fraction("0.4") <= t < Fraction("1.2")]
    offset = seconds_of(output)[0] - wanted[0]
    texts = packets_of(output, "subtitle")
    spans = [(Fraction("0.4"), Fraction("0.7")), (Fraction("0.9"), Fraction("1.2"))]
    assert len(texts) == len(SUBTITLES)
    for (begin, length, data), (first, last), (_, _, text) in zip(texts, spans, SUBTITLES, strict=True):
        assert abs(begin - offset - first) <= MILLISECOND
        assert abs(begin + length - offset - last) <= 2 * MILLISECOND
        assert text.encode() in data
    with av.open(str(output)) as container:
        chapters = [
            (c["metadata"]["title"], c["start"] * c["time_base"] - offset, c["end"] * c["time_base"] - offset)
            for c in container.chapters()
        ]
        assert container.metadata.get("title") == "A title"
    assert [title for title, _, _ in chapters] == ["One", "Two"]
    bounds = [abs(a - b) for a, b in zip((chapters[0][1], chapters[1][1]), (Fraction("0.4"), 1), strict=True)]
    assert max(bounds) <= 2 * MILLISECOND


def test_a_range_without_any_text_or_second_chapter(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "all.mkv", frames=60, subtitles=True, chapters=True)
    output = tmp_path / "out.mkv"
    assert upscale(source, "-o", output, *FAST, "--start", "0.72", "--duration", "0.1") == 0
    with av.open(str(output)) as container:
        assert len(container.chapters()) == 1
        assert len(container.streams.subtitles) == 1
    assert packets_of(output, "subtitle") == []


def test_rotation_and_aspect_are_kept(tmp_path: Path) -> None:
    source = make_clip(
        tmp_path / "phone.mp4",
        display_matrix=QUARTER_TURN,
        sample_aspect_ratio=Fraction(4, 3),
        audio_offset=Fraction(1, 3),
    )
    output = tmp_path / "out.mp4"
    assert upscale(source, "-o", output, *FAST, "--start", "0.2", "--duration", "0.5") == 0
    made = probe(output).video
    assert (made.display_matrix, made.sample_aspect_ratio) == (QUARTER_TURN, Fraction(4, 3))
    check_range(source, output, Fraction("0.2"), Fraction("0.7"), exact=True)


def test_sound_that_must_be_converted(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "pcm.mkv", audio=["pcm_s16le"], frames=60)
    output = tmp_path / "out.webm"
    words = [word for word in FAST if word not in ("--preset", "ultrafast")]
    assert upscale(source, "-o", output, *words, "--start", "0.5", "--duration", "1") == 0
    sound = packets_of(output, "audio")
    video = seconds_of(output)
    assert abs(sound[0][0] - video[0]) < Fraction(1, 10)
    assert abs(sound[-1][0] + sound[-1][1] - sound[0][0] - 1) < Fraction(1, 5)


def test_the_proof_knows_the_range(clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mkv"
    options = UpscaleOptions(model="bicubic", scale=2, preset="ultrafast", start="1", duration="0.5")
    assert upscale(clip, "-o", output, *FAST, "--start", "1", "--duration", "0.5") == 0
    plan = plan_file(clip, output, options)
    manifest = plan.manifest
    facts: dict[str, Any] = {
        "video": manifest.video,
        "pts": manifest.index.pts,
        "durations": {tick: manifest.index.duration_of(i) for i, tick in enumerate(manifest.index.pts)},
        "streams": manifest.streams,
        "segment_starts": [segment.start_pts for segment in manifest.segments],
    }
    assert verify(plan.probe, output, span=manifest.recipe.span, **facts).is_ok
    for wrong in (None, Span(Fraction(1), Fraction("1.6")), Span(Fraction("0.9"), Fraction("1.5"))):
        verdict = verify(plan.probe, output, span=wrong, **facts)
        assert not verdict.is_ok
        assert "audio" in verdict.line
    index = plan.probe.index
    later = [i for i, tick in enumerate(index.pts) if tick in manifest.index.pts]
    facts["pts"] = [index.pts[i + 1] for i in later]
    facts["durations"] = {tick: index.duration_of(i) for i, tick in enumerate(index.pts)}
    slid = verify(plan.probe, output, span=manifest.recipe.span, **facts)
    assert not slid.is_ok, "the same times, one frame later"


def test_range_is_in_the_key_and_in_the_name(clip: Path, tmp_path: Path) -> None:
    def key(**choices: str) -> str:
        return plan_file(clip, tmp_path / "o.mkv", UpscaleOptions(model="bicubic", scale=2, **choices)).manifest.key  # type: ignore[arg-type]

    assert (
        len({key(), key(start="1"), key(duration="1"), key(start="1", duration="1"), key(start="1", duration="2")}) == 5
    )
    assert key(start="1") == key(start="0:01.000") == key(start="00:00:01")
    source = tmp_path / "film.mp4"
    source.write_bytes(clip.read_bytes())
    for words, name in (
        (["--start", "0:01.5", "--duration", "0.5"], "film_x2_1.5-2s.mp4"),
        (["--start", "2.5"], "film_x2_2.5s-end.mp4"),
        (["--duration", "0.2"], "film_x2_0-0.2s.mp4"),
    ):
        assert upscale(source, *FAST, *words) == 0
        assert (tmp_path / name).is_file()
        assert upscale(source, *FAST, *words) == 0, "already done"


def test_killed_and_resumed(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "long.mp4", width=160, height=120, frames=240, audio=["aac"])
    whole, killed = tmp_path / "whole.mp4", tmp_path / "killed.mp4"
    words = ("--model", "bicubic", "--scale", "2", "--segment", "0.5", "--start", "1.3", "--duration", "6")
    assert upscale(source, "-o", whole, *words, "-q") == 0
    process = start("upscale", source, "-o", killed, *words, "--preset", "medium")
    wait_for_segments(process, killed, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not killed.exists()
    report = tmp_path / "report.json"
    assert upscale(source, "-o", killed, *words, "-q", "--report", report) == 0
    (made,) = json.loads(report.read_text())["clips"]
    assert made["segments"]["reused"] >= 2
    assert made["frames"]["in"] == 180
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        (" 5 ", 5),
        ("0.1", Fraction(1, 10)),
        ("90.5", Fraction(181, 2)),
        ("1:30", 90),
        ("00:01:30.001", Fraction(90001, 1000)),
        ("2:00:00", 7200),
        ("100:00", 6000),
    ],
)
def test_times_are_exact(text: str, seconds: Fraction | int) -> None:
    assert parse_time(text, "--start") == seconds


@pytest.mark.parametrize(
    "text", ["-1", "", "abc", "1:60", "1:60:00", "1::2", "1e3", "nan", "1,5", "5s", ":30", "٣", "9" * 5000]
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--start"):
        UpscaleOptions(start=text)
    with pytest.raises(OptionError, match="--duration"):
        UpscaleOptions(duration=text)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--start", "-1"), "--start -1"),
        (("--start", "3"), "--start 3: "),
        (("--start", "1:00:00"), "ends at 3.000 s"),
        (("--duration", "0"), "--duration 0: must be more than 0"),
        (("--start", "1.001", "--duration", "0.001"), "no frame begins"),
    ],
)
def test_wrong_ranges_are_one_line(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    assert upscale(clip, "-o", tmp_path / "out.mp4", *FAST, *words) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text]
    assert line in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "frames", "rate", "expected"),
    [
        ("01:00:00:00", 25, Fraction(25), "01:00:01:00"),
        ("01:00:00:24", 1, Fraction(25), "01:00:01:00"),
        ("23:59:59:24", 1, Fraction(25), "00:00:00:00"),
        ("00:00:59:29", 1, Fraction(30000, 1001), "00:01:00:00"),
        # Drop-frame: no 00 and 01 in a minute, but in each tenth one.
        ("00:00:59;29", 1, Fraction(30000, 1001), "00:01:00;02"),
        ("00:09:59;29", 1, Fraction(30000, 1001), "00:10:00;00"),
        ("00:00:00;00", 17982, Fraction(30000, 1001), "00:10:00;00"),
        ("00:00:00;00", 17981, Fraction(30000, 1001), "00:09:59;29"),
        ("00:00:00;00", 1800, Fraction(30000, 1001), "00:01:00;02"),
        ("00:00:59;59", 1, Fraction(60000, 1001), "00:01:00;04"),
        ("12:34:56;12", 0, Fraction(30000, 1001), "12:34:56;12"),
        ("noon", 1, Fraction(25), None),
    ],
)
def test_timecode_is_counted_on(text: str, frames: int, rate: Fraction, expected: str | None) -> None:
    assert advance_timecode(text, frames / rate, rate) == expected
    assert advance_timecode(text, frames / rate, None) is None


def test_the_range_has_its_own_timecode(tmp_path: Path) -> None:
    plain = make_clip(tmp_path / "plain.mov", frames=50, rate=25, audio=())
    source = tmp_path / "timed.mov"
    with av.open(str(plain)) as container, av.open(str(source), "w") as out:
        stream = out.add_stream_from_template(container.streams.video[0], opaque=True)
        stream.metadata["timecode"] = "10:00:00:00"
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    output = tmp_path / "out.mov"
    assert upscale(source, "-o", output, *FAST, "--start", "1.2") == 0
    with av.open(str(output)) as container:
        assert container.streams.video[0].metadata["timecode"] == "10:00:01:05"
