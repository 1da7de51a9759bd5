"""The encoder of a live run: key frames by time and when asked for, exact ticks, and the sound beside it."""

from __future__ import annotations

import itertools
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest

from hat_video import CameraOptions, upscale_camera
from hat_video.live.audio_line import open_decoder
from hat_video.live.captured import AudioHead
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.encode import AudioLine, LivePacket
from hat_video.live.muxing import check_container
from tests.live.feeding import AAC, STEP, Head, head_of, made_encoder, make_sound, packets, picture, sound


def test_each_picture_comes_out_at_once_with_its_time() -> None:
    encoder = made_encoder(threads=2)
    times = [0, 6000, 12003, 13000, 90_007, 91_000]
    for number, ticks in enumerate(times):
        now = time.monotonic()
        (packet,) = encoder.encode(picture(number), ticks, now)
        assert (packet.pts, packet.dts, packet.captured, packet.kind) == (ticks, ticks, now, "video")
        assert packet.time_base == LIVE_TIME_BASE
    assert encoder.flush() == []
    encoder.close()


def test_key_frames_go_by_time_and_not_by_count() -> None:
    encoder = made_encoder()
    # 15 frames a second, then 2 frames a second, as under load.
    ticks = [k * STEP for k in range(30)] + [180_000 + k * 45_000 for k in range(8)]
    keys = [at for k, at in enumerate(ticks) if encoder.encode(picture(k), at, 0.0)[0].is_key]
    assert keys == [0, 90_000, 180_000, 270_000, 360_000, 450_000]
    encoder.close()


def test_a_key_frame_that_is_asked_for_comes_next() -> None:
    encoder = made_encoder(key_seconds=60)
    made = [packet for batch in packets(encoder, range(5)) for packet in batch]
    encoder.ask_for_key()
    made += [packet for batch in packets(encoder, range(5, 10)) for packet in batch]
    assert [packet.is_key for packet in made] == [True, *[False] * 4, True, *[False] * 4]
    encoder.close()


@pytest.mark.parametrize("name", ["libx265", "libvpx-vp9", "libsvtav1"])
def test_other_encoders_give_key_frames_too(name: str) -> None:
    options = {
        "libx265": {"tune": "zerolatency"},
        "libvpx-vp9": {"deadline": "realtime", "lag-in-frames": "0", "cpu-used": "8"},
        "libsvtav1": {"svtav1-params": "pred-struct=1"},
    }
    preset = {"libx265": "ultrafast", "libvpx-vp9": None, "libsvtav1": "12"}[name]
    encoder = made_encoder(name=name, options=options[name], preset=preset)
    made = [packet for batch in packets(encoder, range(40)) for packet in batch] + encoder.flush()
    assert [packet.pts for packet in made] == [k * STEP for k in range(40)]
    assert [packet.pts for packet in made if packet.is_key] == [0, 90_000, 180_000]
    assert encoder.primer().is_key
    encoder.close()


def test_a_time_that_has_been_is_moved_behind_it() -> None:
    encoder = made_encoder()
    assert [encoder.encode(picture(k), at, 0.0)[0].pts for k, at in enumerate((0, 10, 10, 5))] == [0, 10, 11, 12]
    encoder.close()


def test_planes_of_another_size_are_refused() -> None:
    encoder = made_encoder()
    with pytest.raises(ValueError, match="planes are"):
        encoder.encode(tuple(plane[:-2] for plane in picture(0)), 0, 0.0)
    encoder.close()


def rising(made: list[LivePacket]) -> bool:
    return all(a.pts < b.pts for a, b in itertools.pairwise(made)) and made[0].pts >= 0


def test_aac_is_copied(tmp_path: Path) -> None:
    tone = make_sound(tmp_path / "tone.mkv", 2)
    line = AudioLine(head_of(tone), "copy", containers=["mp4", "flv", "mpegts"])
    made = sound(line, tone)
    assert line.action == "copy"
    assert rising(made)
    assert len(made) > 90
    assert line.notes == []


def test_aac_out_of_a_transport_stream_loses_its_heads(tmp_path: Path) -> None:
    tone = make_sound(tmp_path / "tone.ts", 1)
    line = AudioLine(head_of(tone), "copy", containers=["mp4"])
    made = sound(line, tone)
    assert line.action == "copy"
    assert line.template.codec_context.extradata == AAC.extradata
    assert all(packet.data[:1] != b"\xff" for packet in made)
    assert rising(made)
    again = AudioLine(head_of(tone), "aac")
    assert len(sound(again, tone)) >= len(made) - 2


def test_what_a_container_cannot_hold_becomes_aac_at_the_same_times(tmp_path: Path) -> None:
    tone = make_sound(tmp_path / "tone.nut", 2, codec="pcm_alaw", rate=8000, layout="mono")
    line = AudioLine(head_of(tone), "copy", containers=["nut", "mp4"])
    assert line.action == "aac"
    assert line.notes == ["the sound is pcm_alaw, which mp4 cannot hold: it becomes AAC"]
    made = sound(line, tone) + line.flush()
    assert rising(made)
    assert abs(made[-1].pts + made[-1].duration - 180_000) < 90_000 * 0.3
    assert {packet.duration for packet in made} == {round(1024 / 8000 * 90_000)}


@pytest.mark.parametrize("container", ["mp4", "matroska", "nut", "mpegts", "flv"])
@pytest.mark.parametrize("codec", ["aac", "mp3", "mp2", "ac3", "eac3", "opus", "flac", "pcm_s16le", "pcm_alaw"])
def test_what_is_copied_can_be_held(tmp_path: Path, container: str, codec: str) -> None:
    name = {"mp3": "libmp3lame", "opus": "libopus"}.get(codec, codec)
    line = AudioLine(head_of(make_sound(tmp_path / "tone.nut", 0.3, codec=name)), "copy", containers=[container])
    assert line.action == "copy" or container in line.notes[0]
    encoder = made_encoder(line)
    check_container(container, encoder)
    encoder.close()


def test_gaps_stay_gaps_in_aac(tmp_path: Path) -> None:
    tone = make_sound(tmp_path / "tone.mkv", 1, codec="pcm_s16le")
    line = AudioLine(head_of(tone), "aac")
    made = sound(line, tone) + sound(line, tone, shift=5 * 90_000) + line.flush()
    assert rising(made)
    steps = [b.pts - a.pts for a, b in itertools.pairwise(made)]
    assert sum(step > 90_000 for step in steps) == 1, "one gap"
    assert max(steps) > 3.8 * 90_000
    assert {step for step in steps if step < 90_000} == {1920}
    # The second tone begins at its own time, but for a frame that the encoder looks back.
    after = made[next(k for k, step in enumerate(steps) if step > 90_000) + 1]
    assert abs(after.pts - 5 * 90_000) <= 1920


def test_time_that_has_been_is_not_said_twice(tmp_path: Path) -> None:
    tone = make_sound(tmp_path / "tone.mkv", 1)
    modes: tuple[Literal["copy", "aac"], ...] = ("copy", "aac")
    for mode in modes:
        line = AudioLine(head_of(tone), mode)
        made = sound(line, tone) + sound(line, tone, shift=45_000) + line.flush()
        assert rising(made)
        assert 1.4 * 90_000 < made[-1].pts + made[-1].duration < 1.7 * 90_000


def test_sound_of_another_format_after_a_reconnect(tmp_path: Path) -> None:
    first = make_sound(tmp_path / "first.mkv", 1)
    other = make_sound(tmp_path / "other.nut", 1, codec="pcm_mulaw", rate=8000, layout="mono")
    copied = AudioLine(head_of(first), "copy")
    made = sound(copied, first)
    count = len(made)
    copied.connected(head_of(other))
    made += sound(copied, other, shift=3 * 90_000)
    assert rising(made)
    assert len(made) > count + 40, "encoded as what it was"
    assert len(copied.notes) == 1
    assert copied.notes[0].startswith("the sound is now pcm_mulaw 8000 Hz")
    assert copied.notes[0].endswith("it is encoded as the AAC that the outputs expect")
    copied.connected(head_of(first))
    made += sound(copied, first, shift=6 * 90_000)
    assert rising(made)
    assert len(made) > 2 * count + 40, "copied again"

    aac = AudioLine(head_of(first), "aac")
    made = sound(aac, first)
    aac.connected(head_of(other))
    made += sound(aac, other, shift=3 * 90_000) + aac.flush()
    assert rising(made)
    assert len(made) > count + 40


def test_sound_that_outputs_do_not_expect_is_left_out(tmp_path: Path) -> None:
    opus, other = make_sound(tmp_path / "opus.mkv", 1, codec="libopus"), make_sound(tmp_path / "other.mkv", 1)
    line = AudioLine(head_of(opus), "copy")
    made = sound(line, opus)
    line.connected(head_of(other))
    assert sound(line, other, shift=3 * 90_000) == []
    assert line.notes[0].endswith("it is left out")
    line.connected(head_of(opus))
    assert rising(made + sound(line, opus, shift=6 * 90_000))


def decoded(line: AudioLine, made: list[LivePacket]) -> list[av.AudioFrame]:
    """What a player hears of AAC, who knows of it what the outputs were told."""
    context = line.template.codec_context
    decoder = open_decoder(Head("aac", context.sample_rate, context.layout.name, context.extradata))
    return [frame for packet in made for frame in decoder.decode(av.Packet(packet.data))]


@pytest.mark.parametrize("suffix", ["mp2", "mp3", "ac3", "aac"])
@pytest.mark.parametrize("promised", ["mono", "stereo"])
def test_sound_that_changes_within_the_stream_stays_what_was_promised(
    tmp_path: Path, suffix: str, promised: str
) -> None:
    """As on television: other channels or another rate from one packet to the next."""
    codec = {"mp3": "libmp3lame"}.get(suffix, suffix)
    kinds = {"mono": (48000, "mono"), "stereo": (48000, "stereo"), "slow": (44100, "stereo")}
    files = {
        name: make_sound(tmp_path / f"{name}.{suffix}", 1, codec=codec, rate=rate, layout=layout)
        for name, (rate, layout) in kinds.items()
    }
    first, *others = (promised, *(name for name in kinds if name != promised), promised)
    line = AudioLine(head_of(files[first]), "aac")
    made = sound(line, files[first])
    for number, name in enumerate(others, 1):
        made += sound(line, files[name], shift=number * 105_000)
    made += line.flush()
    assert rising(made)
    assert line.dropped <= 1, "what the encoder looks back at the start"
    heard = decoded(line, made)
    assert {(frame.layout.name, frame.sample_rate) for frame in heard} == {(promised, 48000)}
    # Four tones of a second, with a little silence between them.
    loud = [frame for frame in heard if np.abs(frame.to_ndarray()).max() > 0.1]
    assert 3.9 < sum(frame.samples for frame in loud) / 48000 < 4.7


@pytest.mark.parametrize("codec", ["mp2", "libmp3lame", "ac3"])
def test_sound_is_copied_under_the_name_of_its_codec(tmp_path: Path, codec: str) -> None:
    """And not under that of the decoder, which for MP3 is mp3float."""
    tone = make_sound(tmp_path / "tone.mkv", 1, codec=codec)
    with av.open(str(tone)) as container:
        head = AudioHead(container.streams.audio[0])
        assert head.is_like(container.streams.audio[0])
    line = AudioLine(head, "copy", containers=["matroska"])
    assert (line.action, line.notes) == ("copy", [])


def test_sound_that_cannot_be_mixed_is_left_out(tmp_path: Path) -> None:
    """Nobody can say which of so many channels is the left one."""
    odd = make_sound(tmp_path / "odd.nut", 0.5, codec="pcm_s16le", layout="17 channels")
    with av.open(str(odd)) as container:
        count = sum(1 for packet in container.demux(audio=0) if packet.size)
    line = AudioLine(head_of(odd), "aac")
    assert sound(line, odd) + line.flush() == []
    assert line.dropped == count > 0


def film_whose_sound_changes(path: Path, *tones: Path) -> Path:
    """A transport stream of one second a tone; the stream's head says what the first one is."""
    pieces: list[tuple[float, str, av.Packet[Any]]] = []
    for number, tone in enumerate(tones):
        with av.open(str(tone)) as source:
            for packet in source.demux(audio=0):
                if packet.pts is not None and (at := float(packet.pts * packet.time_base)) < 1:
                    pieces.append((number + at, "audio", av.Packet(bytes(packet))))
    with av.open(str(path), "w", format="mpegts") as out:
        video = out.add_stream("libx264", rate=10, options={"tune": "zerolatency", "g": "5"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        head = head_of(tones[0])
        audio = out.add_stream(head.codec, rate=head.sample_rate)
        audio.codec_context.layout = head.layout
        for number in range(10 * len(tones)):
            frame = av.VideoFrame.from_ndarray(np.full((96, 96), 60 + 5 * number, np.uint8), "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            pieces += [(number / 10, "video", packet) for packet in video.encode(frame)]
        for at, kind, packet in sorted(pieces, key=lambda piece: piece[0]):
            packet.stream = video if kind == "video" else audio
            packet.time_base, packet.pts, packet.dts = LIVE_TIME_BASE, round(at * 90_000), round(at * 90_000)
            out.mux(packet)
    return path


@pytest.mark.parametrize("mode", ["aac", "copy"])
def test_a_run_goes_on_when_its_sound_changes(
    tmp_path: Path, mode: Literal["aac", "copy"], monkeypatch: pytest.MonkeyPatch
) -> None:
    tones = [make_sound(tmp_path / f"{layout}.mp2", 1, codec="mp2", layout=layout) for layout in ("mono", "stereo")]
    film = film_whose_sound_changes(tmp_path / "film.ts", *tones, tones[0])
    out = tmp_path / "out.mkv"
    with film.open("rb") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        report = upscale_camera("-", [str(out)], CameraOptions(model="bicubic", audio=mode, policy="queue:100"))
    assert report.settings["audio"] == mode
    assert report.figures.frames_out == 30
    assert report.figures.reconnects == 0
    with av.open(str(out)) as container:
        layouts = [frame.layout.name for frame in container.decode(audio=0)]
    # What is copied says in each of its frames what it is.
    assert [name for name, _ in itertools.groupby(layouts)] == (
        ["mono"] if mode == "aac" else ["mono", "stereo", "mono"]
    )
    # But for what comes before the first picture is ready.
    assert len(layouts) * (1024 if mode == "aac" else 1152) > 2.5 * 48000


def test_time_base() -> None:
    assert Fraction(1, 90_000) == LIVE_TIME_BASE
