"""Segments become a film: exact times, the same bytes twice, and a clear word where it cannot be done."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from hat_video.errors import CancelledError, OutputError, WorkError
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.media.encoder import SegmentWriter, plan_encoder
from hat_video.media.mux import JoinFacts, SegmentFile, fit_dts, join, regenerate_dts
from hat_video.media.passthrough import plan_streams
from hat_video.media.probe import Probe, probe
from hat_video.media.source import open_source
from hat_video.media.verify import Verdict, verify
from tests.clips import make_clip
from tests.command import upscale

SUFFIX = {"mp4": ".mp4", "mov": ".mov", "matroska": ".mkv", "webm": ".webm"}


@dataclass(frozen=True)
class Film:
    """The segments of a clip, each frame doubled in size, and all that join and verify ask for."""

    source: Probe
    segments: list[SegmentFile]
    video: VideoInfo
    durations: dict[int, int]
    starts: tuple[int, ...]

    @property
    def pts(self) -> tuple[int, ...]:
        return self.source.index.pts


def segments_of(
    clip: Path,
    folder: Path,
    container: str,
    *,
    parts: int = 3,
    slip: int = 0,
    without: Sequence[int] = (),
    crf: int = 16,
) -> Film:
    """Encodes `clip` in `parts` segments; `slip` plants pictures that late, `without` leaves frames out."""
    source = probe(clip)
    info, index = source.video, source.index
    spec, video = plan_encoder(
        container, info, info.width * 2, info.height * 2, preset=None if container == "webm" else "ultrafast", crf=crf
    )
    with open_source(clip, probe=source) as frames:
        pictures = [
            tuple(p.repeat_interleave(2, 1).repeat_interleave(2, 2) for p in batch.planes) for batch in frames.read()
        ]
    assert len(pictures) == len(index.pts)
    cuts = [len(pictures) * k // parts for k in range(parts + 1)]
    segments = []
    for n in range(parts):
        path = folder / f"{clip.stem}-{container}-{slip}-{len(without)}-{crf}-{n}.mkv"
        with SegmentWriter(path, spec, video) as writer:
            for i in range(cuts[n], cuts[n + 1]):
                if i not in without:
                    writer.write(FrameBatch(pictures[max(0, i - slip)], (index.pts[i],)))
            facts = writer.close()
        segments.append(SegmentFile(path, facts.pts))
    durations = {p: index.duration_of(i) for i, p in enumerate(index.pts)}
    return Film(source, segments, video, durations, tuple(index.pts[c] for c in cuts[:-1]))


def join_film(film: Film, output: Path, container: str, *, source: Path | None = None) -> JoinFacts:
    path = source or film.source.path
    plans = plan_streams(path, container, video_index=film.source.stream_index)
    return join(
        output, container, film.segments, source=path, streams=plans, video=film.video, durations=film.durations
    )


def verify_film(film: Film, output: Path, container: str) -> Verdict:
    plans = plan_streams(film.source.path, container, video_index=film.source.stream_index)
    return verify(
        film.source,
        output,
        video=film.video,
        pts=film.pts,
        durations=film.durations,
        streams=plans,
        segment_starts=film.starts,
    )


def joined(clip: Path, container: str, folder: Path) -> Path:
    output = folder / f"joined-{clip.stem}{SUFFIX[container]}"
    join_film(segments_of(clip, folder, container, parts=1), output, container)
    return output


def promised(clip: Path, output: Path, container: str, folder: Path) -> Verdict:
    return verify_film(segments_of(clip, folder, container, parts=1), output, container)


def times_of(path: Path, kind: str = "video") -> list[Fraction]:
    with av.open(str(path)) as film:
        stream = next(s for s in film.streams if s.type == kind)
        return sorted(p.pts * p.time_base for p in film.demux(stream) if p.pts is not None and p.size)


def vfr_pts(count: int) -> list[int]:
    """10 to 30 frames a second, in ticks of 1/90000 s that no millisecond holds."""
    pts = [0]
    for i in range(count - 1):
        pts.append(pts[-1] + (3003, 9000, 4501, 6007)[i % 4])
    return pts


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rich") / "rich.mkv"
    return make_clip(path, audio=("aac", "aac"), subtitles=True, chapters=True, font=True, title="A film", bt709=True)


@pytest.mark.parametrize("container", SUFFIX)
def test_two_joins_give_the_same_bytes_and_are_proven(rich: Path, tmp_path: Path, container: str) -> None:
    film = segments_of(rich, tmp_path, container)
    one, two = tmp_path / f"one{SUFFIX[container]}", tmp_path / f"two{SUFFIX[container]}"
    facts = join_film(film, one, container)
    assert join_film(film, two, container) == facts
    assert one.read_bytes() == two.read_bytes()
    assert facts.frames == 30
    verdict = verify_film(film, one, container)
    assert verdict.is_ok, verdict.problems
    with av.open(str(one)) as done:
        assert done.metadata["title"] == "A film"
        assert next(s.language for s in done.streams.audio) == "eng"


@pytest.mark.parametrize("container", SUFFIX)
def test_variable_rate_keeps_every_timestamp(tmp_path: Path, container: str) -> None:
    clip = make_clip(
        tmp_path / "vfr.mp4", frames=24, pts=vfr_pts(24), time_base=Fraction(1, 90000), bt709=True, audio=()
    )
    film = segments_of(clip, tmp_path, container)
    output = tmp_path / f"out{SUFFIX[container]}"
    assert join_film(film, output, container).offset == 0
    wanted = [p * film.video.time_base for p in film.pts]
    slack = 0 if container in ("mp4", "mov") else Fraction(1, 2000)
    assert all(abs(a - b) <= slack for a, b in zip(times_of(output), wanted, strict=True))
    assert verify_film(film, output, container).is_ok


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_late_sound_stays_late(tmp_path: Path, container: str) -> None:
    clip = make_clip(tmp_path / "late.mkv", audio_offset=Fraction(3, 10), bt709=True)
    film = segments_of(clip, tmp_path, container)
    output = tmp_path / f"out{SUFFIX[container]}"
    facts = join_film(film, output, container)
    before = times_of(clip, "audio")[0] - times_of(clip)[0]
    after = times_of(output, "audio")[0] - times_of(output)[0]
    assert abs(after - before) <= Fraction(1, 1000)
    assert facts.offset == 0
    assert verify_film(film, output, container).is_ok


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_clock_far_from_zero_moves_once_for_all(tmp_path: Path, container: str) -> None:
    start = 30000 * 90000
    clip = make_clip(
        tmp_path / "late.ts",
        pts=[start + 3000 * i for i in range(30)],
        time_base=Fraction(1, 90000),
        audio_offset=Fraction(30000),
        bt709=True,
        container_format="mpegts",
    )
    film = segments_of(clip, tmp_path, container)
    output = tmp_path / f"out{SUFFIX[container]}"
    facts = join_film(film, output, container)
    assert -30002 < facts.offset < -29990
    assert 0 <= times_of(output)[0] < 1
    verdict = verify_film(film, output, container)
    assert verdict.is_ok, verdict.problems


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_shape_and_rotation_are_kept(tmp_path: Path, container: str) -> None:
    turned = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    clip = make_clip(
        tmp_path / "turned.mp4", bt709=True, sample_aspect_ratio=Fraction(4, 3), display_matrix=turned, audio=()
    )
    film = segments_of(clip, tmp_path, container)
    film = replace(film, video=replace(film.video, display_matrix=turned, sample_aspect_ratio=Fraction(4, 3)))
    output = tmp_path / f"out{SUFFIX[container]}"
    join_film(film, output, container)
    with av.open(str(output)) as done:
        assert done.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
        assert abs(next(done.decode(video=0)).rotation) == 90
    assert verify_film(film, output, container).is_ok
    upright = replace(film, video=replace(film.video, display_matrix=None))
    assert "display matrix" in verify_film(upright, output, container).line


def test_hevc_is_tagged_for_every_player(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "c.mp4", codec="libx265", frames=12, bt709=True, audio=())
    with av.open(str(clip)) as inp:
        packets = [p.pts for p in inp.demux(video=0) if p.pts is not None]
    film = segments_of(clip, tmp_path, "mp4", parts=1)
    # The clip itself serves as a segment of the same size.
    video = replace(film.video, width=64, height=48)
    film = replace(film, segments=[SegmentFile(clip, tuple(packets))], video=video)
    output = tmp_path / "out.mp4"
    join_film(film, output, "mp4")
    with av.open(str(output)) as done:
        assert done.streams.video[0].codec_context.codec_tag == "hvc1"
    assert verify_film(film, output, "mp4").is_ok


def test_dts_rise_and_are_never_late() -> None:
    order = [0, 400, 100, 200, 300, 900, 500, 700, 600]
    dts = regenerate_dts(order)
    assert all(a < b for a, b in itertools.pairwise(dts))
    assert all(d <= p for d, p in zip(dts, order, strict=True))
    assert dts[-1] == 600
    assert regenerate_dts([7]) == [7]
    with pytest.raises(WorkError, match="pts 5"):
        regenerate_dts([5, 6, 5])


def test_decode_times_add_up_to_what_is_shown() -> None:
    rng = random.Random(3)
    for _ in range(500):
        shown = list(
            itertools.accumulate(rng.choices((1, 2, 40, 3003), k=rng.randint(1, 12)), initial=rng.randint(-9, 9))
        )
        *order, end = shown
        # As encoders do: a picture that is needed goes before those that it is needed for.
        pts = []
        while order:
            group, order = order[: (n := rng.randint(1, 4))], order[n:]
            pts += [group[-1], *group[:-1]]
        dts, last = fit_dts(pts, regenerate_dts(pts), end)
        assert dts[-1] + last - dts[0] == end - min(pts)
        assert all(a < b for a, b in itertools.pairwise(dts))
        assert all(d <= p for d, p in zip(dts, pts, strict=True))
        assert 1 <= last <= end - pts[-1]
    steady = regenerate_dts([0, 300, 100, 200, 600, 400, 500])
    assert fit_dts([0, 300, 100, 200, 600, 400, 500], steady, 700) == (steady, 100)


def tagged(clip: Path, path: Path, tags: dict[str, str], movflags: str = "") -> Path:
    """The packets of `clip` in a file with other tags."""
    options = {"movflags": movflags} if movflags else {}
    with av.open(str(clip)) as inp, av.open(str(path), "w", options=options) as out:
        out.metadata.update(tags)
        streams = {stream.index: out.add_stream_from_template(stream) for stream in inp.streams}
        for packet in inp.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    return path


def tags_of(path: Path) -> dict[str, str]:
    with av.open(str(path)) as film:
        return dict(film.metadata)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_the_date_of_the_recording_is_kept(suffix: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{suffix}"
    tags = {"creation_time": "2019-07-14T10:11:12.000000Z"}
    dated = tagged(make_clip(tmp_path / "c.mp4", frames=4), tmp_path / "dated.mp4", tags)
    assert upscale(dated, "-o", output, "--model", "bicubic", "--scale", "2", "-q", "--strict") == 0
    assert tags_of(output).items() >= tags.items()


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_what_a_phone_says_of_a_recording_is_kept(suffix: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{suffix}"
    tags = {
        "com.apple.quicktime.make": "Apple",
        "com.apple.quicktime.location.ISO6709": "+48.8577+002.2950+035/",
        "com.apple.quicktime.creationdate": "2026-05-01T10:00:00+0200",
        "com.android.capture.fps": "60.000000",
        "title": "Café",
    }
    phone = tagged(make_clip(tmp_path / "c.mov", frames=4), tmp_path / "phone.mov", tags, "use_metadata_tags")
    assert tags_of(phone).items() >= tags.items()
    assert upscale(phone, "-o", output, "--model", "bicubic", "--scale", "2", "-q", "--strict") == 0
    assert tags_of(output).items() >= tags.items()


def test_a_title_stays_where_players_look_for_it(tmp_path: Path) -> None:
    """In iTunes' box, and not in that of phones, though a name of someone's own is lost then; that is said."""
    output = tmp_path / "out.mp4"
    tags = {"title": "Café", "my_own": "word"}
    named = tagged(make_clip(tmp_path / "c.mp4", frames=4), tmp_path / "named.mkv", tags)
    assert upscale(named, "-o", output, "--model", "bicubic", "--scale", "2", "-q", "--strict") == 1
    assert upscale(named, "-o", output, "--model", "bicubic", "--scale", "2", "-q") == 0
    assert b"\xa9nam" in output.read_bytes()


def test_the_last_packet_of_sound_without_durations_is_not_hidden(tmp_path: Path) -> None:
    """As Matroska has it: the edit list of an mp4 ends with the last duration that it knows."""
    clip, output = make_clip(tmp_path / "c.mkv", frames=120, rate=2, bt709=True), tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, "--model", "bicubic", "--scale", "2", "-q") == 0
    assert len(times_of(output, "audio")) == len(times_of(clip, "audio"))


@pytest.mark.parametrize("jitter", [1, 2, 3])
def test_phones_rates_have_the_right_length(jitter: int, tmp_path: Path) -> None:
    """Exposure changes the pace, and with B-frames the last packet is not the last picture."""
    rng = random.Random(jitter)
    pts = list(itertools.accumulate(rng.choices((2700, 3000, 3300, 9000), k=29), initial=0))
    clip = make_clip(tmp_path / "c.mp4", frames=30, pts=pts, time_base=Fraction(1, 90000), bt709=True, audio=())
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, "--model", "bicubic", "--scale", "2", "--preset", "veryfast", "-q") == 0
    index = probe(clip).index
    with av.open(str(output)) as done:
        assert any(packet.dts != packet.pts for packet in done.demux(video=0)), "no B-frames, nothing to see"
        ticks = done.streams.video[0].duration
    assert ticks == index.pts[-1] + index.last_duration - index.pts[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Film:
    folder = tmp_path_factory.mktemp("plain")
    return segments_of(make_clip(folder / "plain.mp4", frames=18, bt709=True), folder, "mp4")


def test_missing_segment(plain: Film, tmp_path: Path) -> None:
    gone = replace(plain.segments[1], path=tmp_path / "seg-00001.mkv")
    film = replace(plain, segments=[plain.segments[0], gone, plain.segments[2]])
    with pytest.raises(WorkError, match=r"seg-00001\.mkv: segment cannot be opened"):
        join_film(film, tmp_path / "out.mp4", "mp4")


@pytest.mark.parametrize("change", [lambda pts: pts[:-1], lambda pts: (*pts, pts[-1] + 1000)])
def test_segment_with_other_frames_than_recorded(plain: Film, tmp_path: Path, change: object) -> None:
    assert callable(change)
    film = replace(plain, segments=[*plain.segments[:2], replace(plain.segments[2], pts=change(plain.segments[2].pts))])
    film.durations.setdefault(film.segments[2].pts[-1], 1)
    with pytest.raises(WorkError, match=r"segment 2 holds 6 frames, its record says [57]"):
        join_film(film, tmp_path / "out.mp4", "mp4")


def test_segment_of_another_encoder(plain: Film, tmp_path: Path) -> None:
    spec, video = plan_encoder("mp4", plain.source.video, 96, 96, preset="slow")
    path = tmp_path / "odd.mkv"
    pts = plain.segments[1].pts
    sizes = video.pixel_format.plane_sizes(96, 96)
    with SegmentWriter(path, spec, video) as writer:
        for p in sorted(pts):
            writer.write(FrameBatch(tuple(torch.full((1, *size), 128, dtype=torch.uint8) for size in sizes), (p,)))
        facts = writer.close()
    film = replace(plain, segments=[plain.segments[0], SegmentFile(path, facts.pts), plain.segments[2]])
    with pytest.raises(OutputError, match=r"odd\.mkv: its codec headers differ"):
        join_film(film, tmp_path / "out.mp4", "mp4")


def test_no_place_to_write(plain: Film, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nowhere/out\.mp4: cannot be written"):
        join_film(plain, tmp_path / "nowhere" / "out.mp4", "mp4")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_full_disk_even_if_it_shows_at_the_end(plain: Film, container: str) -> None:
    with pytest.raises(OutputError, match="No space left"):
        join_film(plain, Path("/dev/full"), container)


def test_stopping(plain: Film, tmp_path: Path) -> None:
    asked = iter([False] * 10)
    plans = plan_streams(plain.source.path, "mp4", video_index=0)
    with pytest.raises(CancelledError):
        join(
            tmp_path / "out.mp4",
            "mp4",
            plain.segments,
            source=plain.source.path,
            streams=plans,
            video=plain.video,
            durations=plain.durations,
            should_stop=lambda: next(asked, True),
        )


def test_truncated_source_ends_its_sound_early(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "whole.mkv", frames=60, bt709=True)
    film = segments_of(clip, tmp_path, "matroska", parts=1)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    output = tmp_path / "out.mkv"
    assert join_film(film, output, "matroska", source=cut).frames == 60
    assert 0 < len(times_of(output, "audio")) < len(times_of(clip, "audio"))
