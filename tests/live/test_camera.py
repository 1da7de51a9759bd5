"""The whole of a live run: from a real source through the loop to real files, and everything that may go wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks.live import marked_source, number_in, offsets_in
from hat_video import CameraOptions, HatVideoError, LiveFigures, upscale_camera
from hat_video.cli import main
from hat_video.errors import ModelError, OptionError, OutputError, SourceError, UsageError
from hat_video.jobs.camera import CameraEvent, CameraReport
from hat_video.live.audio_line import AudioLine
from hat_video.live.packet import LivePacket
from tests.command import ROOT, start
from tests.live.cameras import Camera, mute_server
from tests.live.leftovers import free_port

FAST = {"model": "bicubic", "audio": "none"}


pytestmark = pytest.mark.usefixtures("no_leftovers")


def run(source: str, *outputs: Path | str, **choices: object) -> CameraReport:
    options = CameraOptions(**{"duration": "2", **choices})  # type: ignore[arg-type]
    return upscale_camera(source, [str(output) for output in outputs], options)


def times_of(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.pts is not None]


def test_a_test_picture_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    report = run("test:", out, duration="3", **FAST)
    figures = report.figures
    assert (figures.input_size, figures.output_size) == ((320, 180), (640, 360))
    assert figures.frames_in >= 30
    assert figures.frames_out >= figures.frames_in - sum(figures.dropped.values()) - 4
    times = times_of(out)
    assert len(times) == figures.frames_out
    assert times[0] == 0
    # The camera's own clock, to the millisecond that Matroska has.
    assert all(abs(15 * t - round(15 * t)) < 0.02 for t in times)
    assert figures.rungs[0].frames == figures.frames_out
    assert report.failed_outputs == []
    assert 0 < report.latencies.p50_seconds <= report.latencies.p99_seconds <= report.latencies.most_seconds


def test_every_picture_and_every_sound_keeps_the_cameras_time_while_frames_are_dropped(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    # At x4 of a large picture the resampler is too slow for every frame, on any machine of today.
    report = upscale_camera(
        marked_source("960x540", 60), [str(out)], CameraOptions(model="lanczos", scale=2, jobs=1, duration="4", crf=30)
    )
    assert report.figures.dropped["overload"] > 0
    with av.open(str(out)) as container:
        frames = [(frame.time, number_in(frame)) for frame in container.decode(video=0)]
    first = frames[0][1]
    assert len(frames) > 8
    for shown, number in frames:
        assert abs(shown - (number - first) / 60) < 0.002
    offsets = offsets_in(out, fps=60)
    assert offsets
    assert max(map(abs, offsets)) < 0.07


def test_sound_that_is_heard_while_the_run_ends_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture goes on until the last packets are written; an encoder that was ended takes nothing more."""
    flush = AudioLine.flush

    def slow_flush(self: AudioLine) -> list[LivePacket]:
        ended = flush(self)
        time.sleep(0.4)  # for a dozen of the camera's packets
        return ended

    monkeypatch.setattr(AudioLine, "flush", slow_flush)
    out = tmp_path / "out.mp4"
    report = run(marked_source("160x96", 15), out, model="bicubic", duration="2", audio="aac")
    assert report.settings["audio"] == "aac"
    with av.open(str(out)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) > 1.5 * 48000


def test_frames_are_those_that_a_file_would_get(tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    run("test:testsrc2=s=160x96:r=10,format=yuv420p,realtime", out, model="hat-pico", audio="none", crf=0, jobs=1)
    source = tmp_path / "source.mkv"
    with av.open("testsrc2=s=160x96:r=10,format=yuv420p", format="lavfi") as given:
        frames = [frame for frame, _ in zip(given.decode(video=0), range(60), strict=False)]
    with av.open(str(source), "w") as made:
        stream = made.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 10)
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    assert (
        main(["upscale", str(source), "-o", str(tmp_path / "file.mkv"), "--model", "hat-pico", "--crf", "0", "-q"]) == 0
    )
    with av.open(str(tmp_path / "file.mkv")) as container:
        wanted = {frame.to_ndarray().tobytes() for frame in container.decode(video=0)}
    with av.open(str(out)) as container:
        found = [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]
    assert found
    assert sum(picture in wanted for picture in found) >= len(found) - 1


def test_a_part_of_the_picture_that_moves(tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    report = run("test:", out, roi="100,41,64,48", crf=0, **FAST)
    assert report.figures.input_size == (64, 48)
    assert report.figures.output_size == (128, 96)
    # Chroma is half as fine: the part begins at an even row.
    assert report.figures.roi == (100, 40, 64, 48)
    with pytest.raises(OptionError, match="does not fit"):
        run("test:", tmp_path / "no.mkv", roi="300,0,64,48", **FAST)
    assert not (tmp_path / "no.mkv").exists()


def test_a_queue_keeps_frames_and_a_latency_leaves_old_ones_out(tmp_path: Path) -> None:
    kept = run("test:", tmp_path / "kept.mkv", policy="queue:60", **FAST)
    assert kept.figures.dropped["overload"] == 0
    assert kept.figures.frames_out >= kept.figures.frames_in - 4


def test_a_silent_camera_is_held_or_shown_as_a_card(tmp_path: Path) -> None:
    for policy in ("hold", "slate", "gap"):
        out = tmp_path / f"{policy}.mkv"
        with Camera("tcp") as camera:
            frozen = threading.Timer(2.5, camera.freeze)
            events: list[CameraEvent] = []
            frozen.start()
            report = upscale_camera(
                camera.url,
                [str(out)],
                CameraOptions(duration="6", on_stall=policy, **FAST),  # type: ignore[arg-type]
                on_event=events.append,
            )
            frozen.join()
        held = report.figures.frames_held
        assert (held > 0) == (policy != "gap"), policy
        times = times_of(out)
        assert times == sorted(set(times))
        assert len(times) == report.figures.frames_out + held
        if policy == "slate":
            with av.open(str(out)) as container:
                last = list(container.decode(video=0))[-1].to_ndarray(format="rgb24")
            columns = last[last.shape[0] // 2, 40::80].astype(int)
            assert len({tuple(colour // 40) for colour in columns}) >= 6, "eight bars of different colours"


def test_a_camera_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    events: list[CameraEvent] = []
    with Camera("udp", "--sound") as camera:

        def restart() -> None:
            camera.kill()
            time.sleep(3)
            camera.start()

        restarted = threading.Timer(3, restart)
        restarted.start()
        report = upscale_camera(
            camera.url, [str(out)], CameraOptions(duration="14", model="bicubic"), on_event=events.append
        )
        restarted.join()
    assert report.figures.reconnects >= 1
    times = times_of(out)
    assert times == sorted(set(times))
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) > 2, "the time without pictures has passed in the recording, too"
    assert times[-1] > 8
    assert any(event.kind == "source" for event in events)


@pytest.mark.parametrize(
    ("source", "choices", "error", "words"),
    [
        ("test:", {"model": "nothing"}, ModelError, "nothing"),
        ("test:", {"ladder": "hat-nano,nothing"}, ModelError, "nothing"),
        ("test:", {"ladder": "bicubic,bicubic"}, UsageError, "twice"),
        ("test:", {"ladder": "bicubic", "model": "hat-nano"}, UsageError, "--ladder"),
        ("test:", {"encoder": "nothing"}, OptionError, "nothing"),
        ("test:", {"encoder_option": ("nothing=1",)}, OptionError, "nothing"),
        ("test:nothing", {}, SourceError, "test:nothing"),
        ("/dev/video77", {}, SourceError, "/dev/video77"),
        ("ftp://a/b", {}, OptionError, "ftp"),
        ("no-such-camera", {}, OptionError, "no-such-camera"),
        ("rtsp://user:secret@127.0.0.1:1/x", {}, SourceError, r"user:\*\*\*@127"),
        ("http://127.0.0.1:1/x.mjpg", {}, SourceError, "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_one_line_within_five_seconds(
    tmp_path: Path, source: str, choices: dict[str, object], error: type[HatVideoError], words: str
) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=words) as caught:
        run(source, tmp_path / "out.mkv", **{"audio": "none", **({} if "ladder" in choices else FAST), **choices})
    assert time.monotonic() - began < 6
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="-o OUTPUT"):
        run("test:")
    with pytest.raises(OutputError, match="no folder"):
        run("test:", tmp_path / "none" / "out.mkv", **FAST)
    with pytest.raises(OptionError, match="gif"):
        run("test:", tmp_path / "out.gif", **FAST)
    (tmp_path / "there.mkv").write_bytes(b"something")
    with pytest.raises(OutputError, match="--overwrite"):
        run("test:", tmp_path / "there.mkv", **FAST)
    assert (tmp_path / "there.mkv").read_bytes() == b"something"
    began = time.monotonic()
    with mute_server() as port, pytest.raises(OutputError, match="rtmp"):
        run("test:", f"rtmp://127.0.0.1:{port}/live/x", tmp_path / "out.mkv", **FAST)
    with pytest.raises(OutputError, match=r"127\.0\.0\.1:1"):
        run("test:", "tcp://127.0.0.1:1", **FAST)
    assert time.monotonic() - began < 16
    with mute_server() as port, pytest.raises(OutputError, match=str(port)):
        run("test:", serve=f"127.0.0.1:{port}", **FAST)


def test_figures_come_every_second_and_a_callers_stop_ends_the_run(tmp_path: Path) -> None:
    seen: list[LiveFigures] = []
    stop = threading.Event()

    def look(figures: LiveFigures) -> None:
        seen.append(figures)
        if len(seen) == 3:
            stop.set()

    report = upscale_camera(
        "test:",
        [str(tmp_path / "out.mkv")],
        CameraOptions(**FAST),
        on_figures=look,
        cancel=stop,  # type: ignore[arg-type]
    )
    assert 3 <= len(seen) <= 4
    assert [one.frames_in for one in seen] == sorted(one.frames_in for one in seen)
    assert report.figures.seconds < 10
    assert times_of(tmp_path / "out.mkv")


def test_the_command_ends_properly_at_ctrl_c(tmp_path: Path) -> None:
    out, report = tmp_path / "out.mp4", tmp_path / "report.json"
    process = start("camera", "test:", "-o", out, "--model", "bicubic", "--report", report, "--progress", "json")
    assert process.stderr is not None
    for line in process.stderr:
        if json.loads(line)["event"] == "figures":
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    whole = json.loads(report.read_text(encoding="utf-8"))
    assert len(times_of(out)) == whole["figures"]["frames_out"]
    assert "Traceback" not in said


def test_a_recording_survives_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    process = start("camera", "test:", "-o", out, "--model", "bicubic", "--progress", "json")
    assert process.stderr is not None
    recorded = 0
    for line in process.stderr:
        said = json.loads(line)
        if said["event"] == "figures":
            recorded = said["outputs"][0]["frames"]
            if said["seconds"] > 5:
                break
    process.kill()
    process.communicate(timeout=20)
    with av.open(str(out)) as container:
        kept = sum(1 for _ in container.decode(video=0))
    # Of what had been recorded, a fragment of half a second and the picture held back may be lost: 8 + 1 at 15 fps.
    assert recorded > 20
    assert kept >= recorded - 9


def piped(clip: Path, *words: object) -> subprocess.CompletedProcess[bytes]:
    """The command with a file on its standard input; it succeeds."""
    done = subprocess.run(
        [sys.executable, "-m", "hat_video", "camera", "-", *map(str, words)],
        input=clip.read_bytes(),
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_pipe_in_and_a_player_out(tmp_path: Path) -> None:
    clip = tmp_path / "clip.ts"
    with av.open(str(clip), "w") as made, av.open(str(ROOT / "samples" / "bbb_320x180.mp4")) as given:
        copy = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                made.mux(packet)
    done = piped(clip, "-o", "-", "--model", "bicubic", "-q", "--policy", "queue:200")
    made_file = tmp_path / "made.nut"
    made_file.write_bytes(done.stdout)
    with av.open(str(made_file)) as container:
        sizes = {(frame.width, frame.height) for frame in container.decode(video=0)}
    assert sizes == {(640, 360)}


def test_the_sound_of_telephones_becomes_aac(tmp_path: Path) -> None:
    """G.711, which most IP cameras send."""
    clip, out = tmp_path / "clip.nut", tmp_path / "out.mp4"
    with av.open(str(clip), "w") as made:
        video, sound = made.add_stream("libx264", rate=10), made.add_stream("pcm_mulaw", rate=8000, layout="mono")
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((144, 160), 5 * number, np.uint8), "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            made.mux(video.encode(frame))
            piece = av.AudioFrame.from_ndarray(np.full((1, 800), 3000, np.int16), "s16", "mono")
            piece.sample_rate, piece.pts, piece.time_base = 8000, 800 * number, Fraction(1, 8000)
            made.mux(sound.encode(piece))
        made.mux(video.encode(None))
    done = piped(clip, "-o", out, "--model", "bicubic", "--policy", "queue:60")
    assert b"pcm_mulaw" in done.stderr
    with av.open(str(out)) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]


def test_a_player_that_goes_ends_the_run() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hat_video", "camera", "test:", "-o", "-", "--model", "bicubic"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    process.stdout.read(4000)
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read().decode()
    assert process.wait(30) == 1
    assert "reader" in said
    assert "Traceback" not in said


def test_the_page_shows_the_run(tmp_path: Path) -> None:
    import urllib.request

    port = free_port()
    answers: dict[str, bytes] = {}

    def ask(figures: LiveFigures) -> None:
        if figures.frames_out > 5 and not answers:
            for path in ("figures", "metrics", "healthz", "snapshot.jpg"):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
                    answers[path] = answer.read()

    options = CameraOptions(serve=f"127.0.0.1:{port}", duration="6", ladder="bicubic,lanczos")
    upscale_camera("test:", (), options, on_figures=ask)
    said = json.loads(answers["figures"])
    assert said["output_size"] == [640, 360]
    assert b"frames_in_total" in answers["metrics"]
    with av.open(__import__("io").BytesIO(answers["snapshot.jpg"])) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert picture.shape == (360, 640, 3)
    assert np.ptp(picture) > 100


@pytest.mark.parametrize(
    "words",
    [
        ["--policy", "oldest"],
        ["--policy", "queue:0"],
        ["--roi", "1,2,3"],
        ["--size", "big"],
        ["--fps", "0"],
        ["--segment", "10"],
        ["--keep", "1d"],
        ["--max-latency", "0"],
        ["--retries", "-1"],
        ["--jobs", "0"],
        ["--ladder", ","],
        ["--token", "abc"],
        ["--duration", "0"],
        ["--audio", "loud"],
        ["--scale", "5"],
    ],
)
def test_wrong_options_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["camera", "test:", "-o", "-", *words]) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert words[0] in said


def test_devices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":77")
    assert main(["devices", "--json"]) == 0
    assert any(device["url"] == "screen::77" for device in json.loads(capsys.readouterr().out))
