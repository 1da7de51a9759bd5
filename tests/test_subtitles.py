"""Texts that are on the screen together, in a container whose tracks show one text at a time."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.packet import Packet
from av.stream import Stream

from hat_video.jobs.verification import verify_files
from hat_video.media.carry import ConvertText
from tests.clips import ASS_HEADER, make_clip
from tests.command import upscale
from tests.conformance.tools import ffmpeg
from tests.test_range import packets_of

FAST = ("--model", "bicubic", "--scale", "2", "--preset", "ultrafast", "-q")
BOLD = b"Style: Big,Arial,40,&Hff0000,&Hffffff,&H0,&H0,1,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1\n"
Shown = tuple[int, int, str]


def with_texts(folder: Path, cues: list[Shown], *, is_ass: bool = False) -> Path:
    """A clip of two seconds with `cues`: begin and end in milliseconds, text."""
    plain = make_clip(folder / "plain.mkv", frames=60, bt709=True)
    texts, clip = folder / ("texts.ass" if is_ass else "texts.srt"), folder / "clip.mkv"
    if is_ass:
        header = ASS_HEADER.decode().replace("Style: Default", f"{BOLD.decode()}Style: Default")
        lines = [f"Dialogue: 0,{_clock(a, 2)},{_clock(b, 2)},{text}" for a, b, text in cues]
        texts.write_text(header + "\n".join(lines) + "\n")
    else:
        blocks = [f"{n}\n{_clock(a, 3)} --> {_clock(b, 3)}\n{text}\n" for n, (a, b, text) in enumerate(cues, 1)]
        texts.write_text("\n".join(blocks))
    ffmpeg("-i", plain, "-i", texts, "-map", "0", "-map", "1", "-c", "copy", clip)
    return clip


def _clock(milliseconds: int, digits: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    mark = "," if digits == 3 else "."
    return f"0:00:{seconds:02}{mark}{rest // 10 ** (3 - digits):0{digits}}"


def shown_in(path: Path) -> list[Shown]:
    """Begin, end and text of what the subtitle track shows, in milliseconds from its first text on."""
    packets = packets_of(path, "subtitle")
    first = packets[0][0]
    return [
        (
            round((begin - first) * 1000),
            round((begin - first + length) * 1000),
            data[2 : 2 + int.from_bytes(data[:2], "big")].decode(),
        )
        for begin, length, data in packets
        if length
    ]


CASES: dict[str, tuple[list[Shown], list[Shown]]] = {
    "one into the next": (
        [(100, 900, "eins"), (800, 1600, "zwei")],
        [(0, 700, "eins"), (700, 800, "eins\nzwei"), (800, 1500, "zwei")],
    ),
    "starting together": (
        [(100, 900, "eins"), (100, 600, "zwei"), (900, 1500, "drei")],
        [(0, 500, "eins\nzwei"), (500, 800, "eins"), (800, 1400, "drei")],
    ),
    "at exactly the same time": (
        [(100, 900, "eins"), (100, 900, "zwei")],
        [(0, 800, "eins\nzwei")],
    ),
    "one inside another": (
        [(100, 1700, "<i>eins</i>"), (400, 600, "zwei"), (500, 900, "drei"), (1200, 1300, "vier")],
        [
            (0, 300, "eins"),
            (300, 400, "eins\nzwei"),
            (400, 500, "eins\nzwei\ndrei"),
            (500, 800, "eins\ndrei"),
            (800, 1100, "eins"),
            (1100, 1200, "eins\nvier"),
            (1200, 1600, "eins"),
        ],
    ),
    "one after another": (
        [(100, 500, "eins"), (500, 900, "zwei"), (1000, 1400, "drei")],
        [(0, 400, "eins"), (400, 800, "zwei"), (900, 1300, "drei")],
    ),
    "one without an end": (
        [(100, 100, "eins"), (500, 900, "zwei"), (1500, 1500, "drei")],
        [(0, 400, "eins"), (400, 800, "zwei"), (1400, 1900, "drei")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_shown_when(tmp_path: Path, case: str) -> None:
    cues, wanted = CASES[case]
    clip, output = with_texts(tmp_path, cues), tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST) == 0
    assert [text for _, _, text in shown_in(output)] == [text for _, _, text in wanted]
    for (begin, end, _), (begins, ends, _) in zip(shown_in(output), wanted, strict=True):
        # The last text without an end goes on until the film ends: with the sound's last packet.
        assert abs(begin - begins) <= 1
        assert abs(end - ends) <= (100 if end > 1800 else 1)
    verdict = verify_files(clip, output, is_full=True).verdict
    assert verdict.is_ok, verdict.problems


def test_styles_end_with_their_line(tmp_path: Path) -> None:
    cues = [
        (100, 900, r"Big,,0,0,0,,{\i1}eins"),
        (100, 900, "Default,,0,0,0,,zwei, drei"),
        (300, 900, "Default,,0,0,0,,vier"),
        (1000, 1500, "Big,,0,0,0,,fünf"),
    ]
    clip, output = with_texts(tmp_path, cues, is_ass=True), tmp_path / "out.mov"
    assert upscale(clip, "-o", output, *FAST) == 0
    assert shown_in(output) == [
        (0, 200, "eins\nzwei, drei"),
        (200, 800, "eins\nzwei, drei\nvier"),
        (900, 1400, "fünf"),
    ]
    _, _, first = packets_of(output, "subtitle")[0]
    boxes = first[2 + int.from_bytes(first[:2], "big") :]
    # A style box: its size and name, the number of records, then the first and the last character of each.
    assert boxes[4:8] == b"styl"
    assert int.from_bytes(boxes[8:10], "big") == 1
    assert (int.from_bytes(boxes[10:12], "big"), int.from_bytes(boxes[12:14], "big")) in ((0, 4), (0, 5))
    verdict = verify_files(clip, output).verdict
    assert verdict.is_ok, verdict.problems


def test_a_range_cuts_through_texts_that_overlap(tmp_path: Path) -> None:
    cues = [(100, 900, "eins"), (300, 1600, "zwei"), (1100, 1500, "drei"), (1550, 1900, "vier")]
    clip, output = with_texts(tmp_path, cues), tmp_path / "out.mp4"
    span = ("--start", "0.5", "--duration", "0.8")
    assert upscale(clip, "-o", output, *FAST, *span) == 0
    assert shown_in(output) == [(0, 400, "eins\nzwei"), (400, 600, "zwei"), (600, 800, "zwei\ndrei")]


@pytest.mark.parametrize(
    ("cues", "others", "said"),
    [
        # Two that start together, written one after the other: the first lasts no time.
        ([(100, 900, "eins"), (100, 600, "zwei")], None, "shows '(eins|zwei)' at 0.1.. s, not 'eins zwei'"),
        ([(100, 900, "eins"), (800, 1600, "zwei")], None, "shows|is shown for"),
        ([(100, 900, "eins"), (1000, 1600, "zwei")], [(100, 900, "eins")], "does not show 'zwei' at 1.0.. s"),
        ([(100, 900, "eins")], [(100, 900, "eins"), (1000, 1600, "zwei")], "shows 'zwei' at 1.0.. s, the source"),
        ([(100, 900, "eins")], [(100, 700, "eins")], "is shown for 0.600 s, not 0.800 s"),
        ([(100, 900, "eins")], [(200, 900, "eins")], r"is \+100.0 ms off"),
        ([(100, 900, "eins"), (1000, 1600, "zwei")], [(100, 900, "eins"), (1000, 1600, "two")], "shows 'two' at"),
    ],
)
def test_a_text_that_is_not_shown_is_found(
    tmp_path: Path, cues: list[Shown], others: list[Shown] | None, said: str
) -> None:
    clip, good, bad = with_texts(tmp_path, cues), tmp_path / "good.mp4", tmp_path / "bad.mp4"
    assert upscale(clip, "-o", good, *FAST) == 0
    (tmp_path / "other").mkdir()
    texts = clip if others is None else with_texts(tmp_path / "other", others)
    ffmpeg("-i", good, "-i", texts, "-map", "0:v", "-map", "0:a", "-map", "1:s", "-c", "copy", "-c:s", "mov_text", bad)
    verdict = verify_files(clip, bad, is_full=True).verdict
    assert not verdict.is_ok
    assert any(re.search(said, problem) for problem in verdict.problems), verdict.problems


def test_texts_that_do_not_overlap_keep_their_packets(tmp_path: Path) -> None:
    clip = with_texts(tmp_path, [(50 * n, 50 * n + 50, f"<b>{n}</b>") for n in range(1, 30)])
    with av.open(str(clip)) as source, av.open(str(tmp_path / "out.mp4"), "w") as out:
        stream = source.streams.subtitles[0]
        text = ConvertText(stream, out.add_stream("mov_text"))
        came: list[tuple[int | None, int | None, Fraction]] = []
        went: list[Packet[Stream]] = []
        for packet in source.demux(stream):
            if packet.size:
                came.append((packet.pts, packet.duration, packet.time_base))
                went += text.feed(packet)
                # Only what may still be on the screen is kept.
                assert len(came) - len(went) <= 1
        went += text.flush()
        assert [(p.pts, p.duration, p.time_base) for p in went] == came
        assert [bytes(p)[2 : 2 + bytes(p)[1]] for p in went] == [b"%d" % n for n in range(1, 30)]


def test_a_text_before_a_long_silence_is_beside_its_sound(tmp_path: Path) -> None:
    (tmp_path / "texts.srt").write_text(
        "1\n0:00:01,000 --> 0:00:02,000\neins\n\n2\n0:00:01,500 --> 0:00:58,000\nzwei\n\n"
        "3\n0:00:03,000 --> 0:00:04,000\ndrei\n\n4\n0:00:50,000 --> 0:00:51,000\nvier\n"
    )
    clip, output = tmp_path / "clip.mkv", tmp_path / "out.mp4"
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=s=64x48:r=5:d=60", "-f", "lavfi", "-i", "sine=d=60",
        "-i", tmp_path / "texts.srt", "-map", "0", "-map", "1", "-map", "2", "-c:v", "libx264",
        "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "aac", "-c:s", "srt", clip,
    )  # fmt: skip
    assert upscale(clip, "-o", output, *FAST) == 0
    assert [text for _, _, text in shown_in(output)] == [
        "eins", "eins\nzwei", "zwei", "zwei\ndrei", "zwei", "zwei\nvier", "zwei",
    ]  # fmt: skip
    with av.open(str(output)) as film:
        sounds = [(p.pts * p.time_base, p.pos) for p in film.demux(film.streams.audio[0]) if p.size and p.pts]
    with av.open(str(output)) as film:
        texts = {bytes(p)[2:]: p.pos for p in film.demux(film.streams.subtitles[0]) if p.size > 2}
    later = min(pos for seconds, pos in sounds if seconds > 30)
    assert next(pos for text, pos in texts.items() if text.startswith(b"zwei\ndrei")) < later
