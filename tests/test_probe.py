"""Recordings that were joined end to end, and those that end early: found before any work, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest

from hat_video.errors import SourceError
from hat_video.media.probe import probe
from tests.clips import make_clip
from tests.command import upscale

TICK = Fraction(1, 30)
PACKET = 188


def part(path: Path, first: int, frames: int = 30, bframes: int = 2, codec: str = "libx264") -> Path:
    """A recording whose clock begins at frame `first`."""
    ticks = list(range(first, first + frames))
    return make_clip(path, pts=ticks, time_base=TICK, codec=codec, audio=(), bframes=bframes)


def joined(target: Path, *parts: Path) -> Path:
    target.write_bytes(b"".join(path.read_bytes() for path in parts))
    return target


def times_in(data: bytearray) -> Iterator[int]:
    """Where each picture of a transport stream has its times: its PES header's flags."""
    for at in range(0, len(data), PACKET):
        head = data[at : at + PACKET]
        body = 5 + head[4] if head[3] & 0x20 else 4
        if head[1] & 0x40 and head[body : body + 4] == b"\0\0\1\xe0":
            yield at + body + 7


def write_time(data: bytearray, at: int, ticks: int) -> None:
    """Over the 33 bits of a time, which leaves its mark alone."""
    data[at] = data[at] & 0xF0 | (ticks >> 29 & 0x0E) | 1
    data[at + 1 : at + 3] = (ticks >> 14 & 0xFFFE | 1).to_bytes(2, "big")
    data[at + 3 : at + 5] = (ticks << 1 & 0xFFFE | 1).to_bytes(2, "big")


@pytest.mark.parametrize(
    ("suffix", "codec", "second", "fall"),
    [
        (".ts", "libx264", 0, "0.967"),
        (".ts", "libx264", 14, "0.567"),
        (".ts", "mpeg2video", 0, "0.967"),
        (".vob", "mpeg2video", 0, "0.967"),
    ],
)
def test_time_that_jumps_back_is_refused(tmp_path: Path, suffix: str, codec: str, second: int, fall: str) -> None:
    parts = part(tmp_path / f"a{suffix}", 0, codec=codec), part(tmp_path / f"b{suffix}", second, codec=codec)
    both = joined(tmp_path / f"both{suffix}", *parts)
    with pytest.raises(SourceError) as caught:
        probe(both)
    said = str(caught.value)
    assert said.startswith(f"{both}: its time jumps back by {fall} s at frame 30, 1.000 s after its start: ")
    assert "concat demuxer" in said
    assert "\n" not in said


def test_nothing_is_begun_where_time_jumps_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part(tmp_path / f"{i}.ts", 0) for i in range(3)]
    both, output = joined(tmp_path / "both.ts", *parts), tmp_path / "out.mkv"
    before = set(tmp_path.iterdir())
    assert upscale(both, "--model", "bicubic", "-o", output) != 0
    assert "2 such jumps in all" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("second", [30, 90, 26])
def test_a_gap_and_a_small_overlap_are_no_jump(tmp_path: Path, second: int) -> None:
    both = joined(tmp_path / "both.ts", part(tmp_path / "a.ts", 0), part(tmp_path / "b.ts", second))
    assert len(probe(both).index.pts) == 60


@pytest.mark.parametrize("bframes", [0, 2])
def test_a_clock_that_wraps_is_no_jump(tmp_path: Path, bframes: int) -> None:
    """MPEG's clock has 33 bits of 1/90000 s: it starts over after 26 hours."""
    wrap = Fraction(1 << 33, 90000)
    found = probe(part(tmp_path / "clip.ts", int(wrap * 30) - 40, frames=60, bframes=bframes))
    assert len(found.index.pts) == 60
    assert found.duration_seconds == 2
    assert found.notes == ()


@pytest.mark.parametrize("frame", [1, 20, 59])
@pytest.mark.parametrize("wrong", [-5, 3000])
def test_a_lone_wrong_time_is_no_jump(tmp_path: Path, frame: int, wrong: int) -> None:
    clip = part(tmp_path / "clip.ts", 300, frames=60, bframes=0)
    data = bytearray(clip.read_bytes())
    at = list(times_in(data))[frame] + 2
    write_time(data, at, (10 + wrong) * 90000)
    clip.write_bytes(data)
    assert len(probe(clip).index.pts) == 60


@pytest.mark.parametrize("bframes", [0, 3])
def test_a_transport_stream_without_decode_times(tmp_path: Path, bframes: int) -> None:
    def stripped(name: str) -> Path:
        clip = part(tmp_path / name, 0, frames=40, bframes=bframes)
        data = bytearray(clip.read_bytes())
        for at in times_in(data):
            if data[at] & 0x40:
                data[at] &= 0xBF
                data[at + 2] = data[at + 2] & 0x0F | 0x20
                data[at + 7 : at + 12] = b"\xff" * 5
        clip.write_bytes(data)
        return clip

    one, two = stripped("a.ts"), stripped("b.ts")
    assert len(probe(one).index.pts) == 40
    with pytest.raises(SourceError, match=r"jumps back by 1\.\d+ s at frame 4\d"):
        probe(joined(tmp_path / "both.ts", one, two))


def test_avi_has_decode_times_only(tmp_path: Path) -> None:
    found = probe(make_clip(tmp_path / "clip.avi", codec="mpeg4", bframes=2, options={"bf": "2"}, audio=()))
    assert len(found.index.pts) == 30
    assert not found.is_truncated


def remuxed(clip: Path, target: Path, flags: str, skip: Fraction = Fraction(0)) -> Path:
    """The same packets; from `skip` on, which an edit list then says, since a key frame before that comes along."""
    with av.open(str(clip)) as inp, av.open(str(target), "w", options={"movflags": flags}) as out:
        streams = [out.add_stream_from_template(stream) for stream in inp.streams]
        for packet in inp.demux():
            if packet.dts is not None:
                shift = int(skip / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    return target


def ends(clip: Path) -> list[int]:
    """Where to cut: before the last bytes of the packets, up to 0.4 s of them."""
    with av.open(str(clip)) as container:
        found = [(packet.stream.type, packet.pos, packet.size) for packet in container.demux() if packet.size]
    end = max(at + size for _, at, size in found)
    sizes = [size for kind, _, size in found if kind == "video"]
    return [end - 1, end - 20, end - sizes[-1] // 2, end - sum(sizes[-6:]) - 1, end - sum(sizes[-12:]) - 1]


@pytest.mark.parametrize("audio", [(), ("aac",)])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".avi"])
def test_a_short_end_that_is_missing_is_noted(tmp_path: Path, suffix: str, audio: tuple[str, ...]) -> None:
    if suffix == ".avi":
        whole = make_clip(tmp_path / "whole.avi", frames=60, codec="mpeg4", bframes=0, audio=audio and ("mp2",))
    else:
        clip = make_clip(tmp_path / f"clip{suffix}", frames=60, audio=audio)
        whole = remuxed(clip, tmp_path / f"whole{suffix}", "faststart")
    assert not probe(whole).is_truncated
    for size in ends(whole):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(whole.read_bytes()[:size])
        found = probe(cut)
        assert found.is_truncated, size
        assert found.notes[-1].startswith("truncated: ")
        assert len(found.index.pts) > 60 - 15, "so little that its length alone does not show it"


def test_strict_refuses_a_file_whose_last_packet_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = remuxed(make_clip(tmp_path / "clip.mp4"), tmp_path / "whole.mp4", "faststart")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[:-100])
    assert upscale(cut, "--model", "bicubic", "--strict", "-o", tmp_path / "out.mkv") != 0
    assert "--strict refuses a truncated source" in capsys.readouterr().err


def test_a_fragment_that_is_cut(tmp_path: Path) -> None:
    whole = remuxed(make_clip(tmp_path / "clip.mp4"), tmp_path / "whole.mp4", "frag_keyframe+empty_moov")
    assert not probe(whole).is_truncated
    cut = tmp_path / "cut.mp4"
    # Behind the last packet is an index of the fragments, which nobody needs.
    data = whole.read_bytes()
    cut.write_bytes(data[: data.rindex(b"mfra") - 4])
    assert not probe(cut).is_truncated
    cut.write_bytes(data[: data.rindex(b"mfra") - 54])
    assert probe(cut).is_truncated


@pytest.mark.parametrize("flags", ["faststart", "frag_keyframe+empty_moov+delay_moov"])
@pytest.mark.parametrize("gop", [12, 1000])
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_what_an_edit_list_leaves_out_is_not_missing(tmp_path: Path, suffix: str, gop: int, flags: str) -> None:
    clip = make_clip(tmp_path / f"clip{suffix}", frames=60, gop=gop)
    found = probe(remuxed(clip, tmp_path / f"late{suffix}", flags, Fraction(7, 10)))
    assert len(found.index.pts) < 60 or "frag" in flags
    assert not found.is_truncated
    assert found.notes == ()


def test_whole_files_of_any_rhythm_and_sound_are_not_truncated(tmp_path: Path) -> None:
    gaps = [0, 3, 4, 9, 10, 11, 20, 95]
    for suffix in (".mp4", ".mov"):
        found = probe(make_clip(tmp_path / f"gaps{suffix}", pts=gaps, time_base=TICK, subtitles=True, chapters=True))
        assert not found.is_truncated
        sound = ("pcm_s16le",) if suffix == ".mov" else ("aac", "mp3")
        assert not probe(make_clip(tmp_path / f"sound{suffix}", audio=sound, audio_offset=Fraction(1))).is_truncated
    found = probe(make_clip(tmp_path / "sound.avi", codec="mpeg4", options={"bf": "2"}, audio=("pcm_s16le", "mp2")))
    assert not found.is_truncated
