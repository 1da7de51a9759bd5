"""What becomes of the streams beside the picture, and that what is called a copy is one."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from hat_video.errors import SourceError
from hat_video.media.passthrough import StreamPlan, plan_streams
from hat_video.media.probe import probe
from tests.clips import make_clip
from tests.test_mux import joined, promised, times_of

CONTAINERS = {"mp4": ".mp4", "mov": ".mov", "matroska": ".mkv", "webm": ".webm"}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rich") / "rich.mkv"
    return make_clip(path, audio=("aac", "ac3"), subtitles=True, chapters=True, font=True, title="A film")


def actions(plans: tuple[StreamPlan, ...]) -> list[tuple[str, str, str | None]]:
    return [(p.kind, p.action, p.target) for p in plans]


@pytest.mark.parametrize(
    ("container", "sound", "text", "font"),
    [
        ("mp4", [("copy", None), ("copy", None)], ("convert", "mov_text"), "drop"),
        ("mov", [("copy", None), ("copy", None)], ("convert", "mov_text"), "drop"),
        ("matroska", [("copy", None), ("copy", None)], ("copy", None), "attach"),
        ("webm", [("convert", "libopus"), ("convert", "libopus")], ("convert", "webvtt"), "drop"),
    ],
)
def test_each_container_takes_what_it_can(
    rich: Path, container: str, sound: list[tuple[str, str | None]], text: tuple[str, str | None], font: str
) -> None:
    plans = plan_streams(rich, container, video_index=0)
    assert actions(plans) == [
        ("video", "video", None),
        *(("audio", *s) for s in sound),
        ("subtitle", *text),
        ("attachment", font, None),
    ]
    assert [p.language for p in plans[1:3]] == ["eng", "deu"] or [p.language for p in plans[1:3]] == ["eng", "ger"]
    # Whatever is not a plain copy says why.
    assert all(p.reason for p in plans if p.action in ("convert", "drop"))
    assert all(p.reason is None for p in plans if p.action in ("video", "copy"))


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.mp4: cannot be opened"):
        plan_streams(tmp_path / "gone.mp4", "mp4", video_index=0)


def test_chapter_track_is_rebuilt_not_copied(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "c.mp4", chapters=True)
    plans = plan_streams(clip, "matroska", video_index=0)
    assert [p.target for p in plans if p.action == "rebuild"] == ["chapters"]
    output = joined(clip, "matroska", tmp_path)
    with av.open(str(output)) as film:
        assert [c["metadata"]["title"] for c in film.chapters()] == ["One", "Two"]
        assert not film.streams.data


def test_text_survives_conversion(rich: Path, tmp_path: Path) -> None:
    output = joined(rich, "mp4", tmp_path)
    with av.open(str(output)) as film:
        packets = [bytes(p)[2:] for p in film.demux(film.streams.subtitles[0]) if p.size > 2]
        assert film.streams.subtitles[0].language == "eng"
    assert [p.split(b"\0")[0].decode() for p in packets] == ["first line", "second — ünïcode"]


def test_lossless_sound_stays_lossless(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "f.mkv", audio=("flac",))
    plans = plan_streams(clip, "mov", video_index=0)
    assert (plans[1].action, plans[1].target) == ("convert", "alac")
    output = joined(clip, "mov", tmp_path)
    assert np.array_equal(sound_of(clip), sound_of(output))


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_pcm_without_named_speakers_is_copied(tmp_path: Path, container: str) -> None:
    clip = make_clip(tmp_path / "pcm.mkv", audio=("pcm_s16le", "pcm_s24le"), bt709=True)
    assert [p.action for p in plan_streams(clip, container, video_index=0)] == ["video", "copy", "copy"]
    output = joined(clip, container, tmp_path)
    assert np.array_equal(sound_of(clip), sound_of(output))
    verdict = promised(clip, output, container, tmp_path)
    assert verdict.is_ok, verdict.line


def test_a_time_that_is_said_twice_reaches_a_container_that_takes_it_once(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "whole.mkv", bt709=True)
    clip = tmp_path / "twice.mkv"
    with av.open(str(whole)) as inp, av.open(str(clip), "w") as out:
        streams = {s: out.add_stream_from_template(s) for s in inp.streams}
        last = None
        for packet in inp.demux():
            if packet.pts is None:
                continue
            if packet.stream.type == "audio":
                if packet.pts > 400 and last is not None:
                    packet.pts = packet.dts = last
                    last = None
                else:
                    last = packet.pts
            packet.stream = streams[packet.stream]
            out.mux_one(packet)
    times = times_of(clip, "audio")
    assert len(set(times)) < len(times)
    for container in ("matroska", "mp4"):
        output = joined(clip, container, tmp_path)
        verdict = promised(clip, output, container, tmp_path)
        assert verdict.is_ok, verdict.line
        assert len(times_of(output, "audio")) == len(times)


def test_a_stream_that_shows_up_on_the_way_disturbs_nothing(tmp_path: Path) -> None:
    parts = [
        make_clip(
            tmp_path / f"{n}.ts",
            pts=[200_000 * n + 3000 * k for k in range(30)],
            time_base=Fraction(1, 90000),
            audio=audio,
            audio_offset=Fraction(20 * n, 9),
        ).read_bytes()
        for n, audio in enumerate([("aac",), ("aac", "aac"), ("aac",)])
    ]
    clip = tmp_path / "both.ts"
    # FFmpeg looks for streams in the first five million bytes and the last few; a stuffing packet counts as any other.
    clip.write_bytes(((b"\x47\x1f\xff\x10" + b"\xff" * 184) * 40_000).join(parts))
    found = probe(clip)
    assert len(found.streams) == 2
    assert len(found.index.pts) == 90
    output = joined(clip, "matroska", tmp_path)
    verdict = promised(clip, output, "matroska", tmp_path)
    assert verdict.is_ok, verdict.line


def sound_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as film:
        resampler = av.AudioResampler(format="s16", layout="stereo")
        frames = [g for f in film.decode(audio=0) for g in resampler.resample(f)]
        return np.concatenate([f.to_ndarray() for f in frames], axis=1)


def with_cover(clip: Path, path: Path) -> Path:
    """A copy of `clip` that has a cover picture."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 32, 32, "yuvj420p", Fraction(1, 25)
    picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24").reformat(
        format="yuvj420p", threads=1
    )
    jpeg = bytes(encoder.encode(picture)[0])
    with av.open(str(clip)) as inp, av.open(str(path), "w") as out:
        pairs = {s.index: out.add_stream_from_template(s, opaque=True) for s in inp.streams if s.codec_context}
        if path.suffix == ".mkv":
            out.add_attachment("cover.jpg", "image/jpeg", jpeg)
        else:
            cover = out.add_stream("mjpeg", rate=25)
            cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
            cover.disposition = Disposition.attached_pic
        for packet in inp.demux():
            if packet.dts is not None and packet.stream.index in pairs:
                packet.stream = pairs[packet.stream.index]
                out.mux(packet)
        if path.suffix != ".mkv":
            packet = av.Packet(jpeg)
            packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 25)
            out.mux(packet)
    return path


@pytest.mark.parametrize(
    ("suffix", "container", "action"),
    [
        (".mp4", "mp4", "copy"),
        (".mp4", "matroska", "attach"),
        (".mkv", "matroska", "attach"),
        (".mkv", "mp4", "copy"),
        (".mkv", "webm", "drop"),
    ],
)
def test_covers(tmp_path: Path, suffix: str, container: str, action: str) -> None:
    clip = with_cover(make_clip(tmp_path / "plain.mp4"), tmp_path / f"cover{suffix}")
    cover = next(p for p in plan_streams(clip, container, video_index=0) if p.kind == "cover")
    assert cover.action == action
    output = joined(clip, container, tmp_path)
    with av.open(str(output)) as film:
        assert sum(bool(s.disposition & Disposition.attached_pic) for s in film.streams) == (action != "drop")
    verdict = promised(clip, output, container, tmp_path)
    assert verdict.is_ok, verdict.line
