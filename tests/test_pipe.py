"""Pipes: one pass, in order, every frame with its time, and an end that is an end."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from hat_video.errors import CancelledError, OptionError, SourceError, StrictError
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.report import Progress
from hat_video.jobs.stream import StreamReport, upscale_stream
from hat_video.media.probe import probe
from hat_video.media.source import open_source
from tests.clips import make_clip
from tests.conformance.table import KINDS
from tests.conformance.tools import ffmpeg
from tests.test_alpha import alpha_clip

FAST = UpscaleOptions(model="bicubic", scale=2, preset="ultrafast", jobs=2)


class OneWay(io.RawIOBase):
    """A file that cannot be moved in, as a pipe."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, *_: object) -> int:
        raise OSError("Illegal seek")


def run(source: Path, target: Path, options: UpscaleOptions = FAST, form: str = "mkv") -> StreamReport:
    with source.open("rb") as file, target.open("wb") as out:
        return upscale_stream(OneWay(file), out, options, form=form)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["mkv", "nut"])
@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".flv"])
def test_frames_sound_and_time_go_through(tmp_path: Path, suffix: str, form: str) -> None:
    clip = make_clip(tmp_path / f"clip{suffix}", width=64, height=48, frames=40, subtitles=False)
    report = run(clip, tmp_path / f"out.{form}", form=form)
    assert report.frames == 40
    before, after = probe(clip), probe(tmp_path / f"out.{form}")
    assert (after.video.width, after.video.height) == (128, 96)
    times = [[pts * found.video.time_base for pts in found.index.pts] for found in (before, after)]
    offset = times[1][0] - times[0][0]
    assert max(abs(b - a - offset) for a, b in zip(*times, strict=True)) <= Fraction(1, 1000)
    assert [s.kind for s in after.streams] == [s.kind for s in before.streams]
    with av.open(str(clip)) as a, av.open(str(tmp_path / f"out.{form}")) as b:
        starts = [next(p for p in c.demux(audio=0) if p.pts is not None) for c in (a, b)]
        sound = [p.pts * p.time_base for p in starts]
    assert abs((sound[1] - times[1][0]) - (sound[0] - times[0][0])) <= Fraction(1, 1000)


@pytest.mark.parametrize("way", ["file", "stdin", "half-read"])
def test_a_file_may_have_its_index_at_the_end(tmp_path: Path, way: str) -> None:
    # More than FFmpeg's buffer holds, in which it could go back even on a pipe.
    clip = make_clip(tmp_path / "clip.mp4", width=320, height=240, frames=30, subtitles=False)
    assert clip.read_bytes().find(b"moov") > 100_000
    if way == "file":
        made = subprocess.run(command(str(clip), "-o", "-"), capture_output=True, check=True, timeout=100).stdout
    elif way == "stdin":
        with clip.open("rb") as file:
            made = subprocess.run(
                command("-", "-o", "-"), stdin=file, capture_output=True, check=True, timeout=100
            ).stdout
    else:
        with io.BytesIO(b"a line\n" + clip.read_bytes()) as memory, io.BytesIO() as out:
            memory.readline()
            assert upscale_stream(memory, out, replace(FAST, strict=True)).notes == []
            made = out.getvalue()
    (tmp_path / "out.mkv").write_bytes(made)
    before, after = probe(clip), probe(tmp_path / "out.mkv")
    assert len(after.index.pts) == len(before.index.pts) == 30
    assert [s.kind for s in after.streams] == [s.kind for s in before.streams]


def test_a_pipe_with_its_index_at_the_end_is_told_so(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", frames=30)
    with pytest.raises(SourceError, match=r"^-: its index \(moov\) lies at the end.*give the file itself.*faststart"):
        run(clip, tmp_path / "out.mkv")
    # One in fragments, or with its index in front, goes through.
    for flags in ("faststart", "frag_keyframe+empty_moov"):
        ffmpeg("-i", clip, "-c", "copy", "-movflags", flags, tmp_path / "front.mp4")
        assert run(tmp_path / "front.mp4", tmp_path / "out.mkv", replace(FAST, strict=True)).frames == 30
        (tmp_path / "front.mp4").unlink()


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_sound_that_goes_on_is_no_loss(tmp_path: Path, suffix: str) -> None:
    clip = tmp_path / f"clip{suffix}"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=1", "-f", "lavfi", "-i", "sine=d=4", "-c:v", "libx264",
           "-pix_fmt", "yuv420p", "-c:a", "aac", "-movflags", "faststart", clip)  # fmt: skip
    assert run(clip, tmp_path / "out.mkv", replace(FAST, strict=True)).notes == []
    with clip.open("rb") as file, (tmp_path / "file.mkv").open("wb") as out:
        assert upscale_stream(file, out, replace(FAST, strict=True)).notes == []


def test_variable_rate_stays_variable(tmp_path: Path) -> None:
    pts = [0, 3, 4, 9, 10, 11, 20, 29]
    clip = make_clip(tmp_path / "vfr.mkv", pts=pts, time_base=Fraction(1, 100), audio=())
    run(clip, tmp_path / "out.mkv")
    found = probe(tmp_path / "out.mkv")
    assert [(p - found.index.pts[0]) * found.video.time_base for p in found.index.pts] == [
        Fraction(p, 100) for p in pts
    ]


@pytest.mark.parametrize(
    ("pix_fmt", "tolerance"), [("yuv444p", 0), ("yuv444p10le", 0), ("gray", 0), ("yuv420p", 4), ("yuv422p", 4)]
)
def test_y4m_out_and_in(tmp_path: Path, pix_fmt: str, tolerance: int) -> None:
    """Where chroma is not resampled, not a bit is lost; else luma only where a colour leaves the range of RGB."""
    clip = make_clip(tmp_path / "clip.mkv", codec="ffv1", pix_fmt=pix_fmt, width=62, height=46, frames=5, audio=())
    same = UpscaleOptions(model="bicubic", scale=1)
    run(clip, tmp_path / "a.y4m", same, "y4m")
    lossless = UpscaleOptions(model="bicubic", scale=1, encoder="ffv1")
    run(tmp_path / "a.y4m", tmp_path / "b.mkv", lossless)
    with av.open(str(clip)) as a, av.open(str(tmp_path / "a.y4m")) as y, av.open(str(tmp_path / "b.mkv")) as b:
        for one, two, three in zip(a.decode(video=0), y.decode(video=0), b.decode(video=0), strict=True):
            assert two.format.name.replace("yuvj", "yuv") == pix_fmt
            for frame in (two, three):
                planes = list(zip(frame.planes, one.planes, strict=True))
                for mine, theirs in planes if not tolerance else planes[:1]:
                    difference = from_dlpack(mine).int() - from_dlpack(theirs).int()
                    assert difference.abs().max() <= tolerance


def test_y4m_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", codec="ffv1", pix_fmt="bgr0", frames=2, audio=())
    with pytest.raises(OptionError, match=r"y4m: cannot hold gbrp\w*; use --format mkv"):
        run(clip, tmp_path / "a.y4m", UpscaleOptions(model="bicubic", scale=1), "y4m")


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no video at all\n" * 100)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "empty"):
        with pytest.raises(SourceError, match="not a media stream"):
            run(tmp_path / name, tmp_path / "out.mkv")
    clip = make_clip(tmp_path / "clip.mkv", frames=3)
    with pytest.raises(OptionError, match="--format avi: must be mkv, nut, y4m"):
        run(clip, tmp_path / "out.avi", form="avi")
    sound = tmp_path / "sound.mkv"
    with av.open(str(clip)) as source, av.open(str(sound), "w") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    with pytest.raises(SourceError, match="no video stream"):
        run(sound, tmp_path / "out.mkv")


def test_strict_refuses_what_a_pipe_would_lose(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", frames=3, subtitles=True)
    with pytest.raises(StrictError, match="subtitle"):
        run(clip, tmp_path / "out.nut", UpscaleOptions(model="bicubic", scale=2, strict=True), "nut")


def test_cancelled_says_how_far_it_came(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", frames=60)
    stop = threading.Event()
    count = 0

    def tell(frames: int) -> None:
        nonlocal count
        count += frames
        if count == 10:
            stop.set()

    before = threading.active_count()
    with (
        clip.open("rb") as file,
        (tmp_path / "out.mkv").open("wb") as out,
        pytest.raises(CancelledError, match="after"),
    ):
        upscale_stream(OneWay(file), out, FAST, on_frames=tell, cancel=stop)  # type: ignore[arg-type]
    assert threading.active_count() == before


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "hat_video", "upscale", "--model", "bicubic", "--scale", "2", *words]


def test_the_command_in_the_middle_of_a_pipe(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.ts", frames=30)
    with clip.open("rb") as file:
        made = subprocess.run(
            command("-", "-o", "-", "--format", "mkv"), stdin=file, capture_output=True, check=True, timeout=100
        )
    (tmp_path / "out.mkv").write_bytes(made.stdout)
    assert len(probe(tmp_path / "out.mkv").index.pts) == 30
    assert b"30 frames" in made.stderr


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", width=160, height=120, frames=200, audio=())
    with clip.open("rb") as file:
        child = subprocess.Popen(
            command("-", "-o", "-", "--format", "y4m"), stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.read(1000)
        child.stdout.close()
        assert child.stderr is not None
        errors = child.stderr.read().decode()
        assert child.wait(timeout=60) != 0
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 1


def test_a_fifo_is_a_pipe_too(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", frames=12, audio=())
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with clip.open("rb") as file:
        feeder = subprocess.Popen(["tee", str(fifo)], stdin=file, stdout=subprocess.DEVNULL)
        made = subprocess.run(command(str(fifo), "-o", "-"), capture_output=True, check=True, timeout=100)
        feeder.wait(timeout=10)
    (tmp_path / "out.mkv").write_bytes(made.stdout)
    assert len(probe(tmp_path / "out.mkv").index.pts) == 12


def test_a_size_is_reached_and_a_range_is_refused(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", width=96, height=64, frames=6, sample_aspect_ratio=Fraction(4, 3))
    options = UpscaleOptions(model="bicubic", size="150p", preset="ultrafast")
    assert run(clip, tmp_path / "out.mkv", options).scale == 4
    made = probe(tmp_path / "out.mkv").video
    assert (made.width, made.height, made.sample_aspect_ratio) == (300, 150, 1)
    for choices in ({"start": "1"}, {"duration": "1"}):
        with pytest.raises(OptionError, match="give a file"):
            run(clip, tmp_path / "no.mkv", UpscaleOptions(model="bicubic", scale=2, **choices))  # type: ignore[arg-type]


def piped(source: Path, target: Path, *words: object) -> tuple[int, str]:
    """`cat source | hat-video upscale - -o target ...`: the exit code, and what was said."""
    with source.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "hat_video", "upscale", "-", "-o", str(target), "--model", "bicubic", "--scale", "2",
             *map(str, words)],
            stdin=file, capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[1],
        )  # fmt: skip
    return done.returncode, done.stderr


def test_a_turned_picture_stays_turned(tmp_path: Path) -> None:
    matrix = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    clip = make_clip(tmp_path / "clip.mkv", frames=6, audio=(), display_matrix=matrix)
    assert probe(clip).video.display_matrix == matrix
    run(clip, tmp_path / "out.mkv")
    assert probe(tmp_path / "out.mkv").video.display_matrix == matrix
    with pytest.raises(StrictError, match="turned"):
        run(clip, tmp_path / "out.nut", replace(FAST, strict=True), "nut")


def test_alpha_goes_through_or_is_refused(tmp_path: Path) -> None:
    clip = alpha_clip(tmp_path / "clip.webm", "libvpx-vp9", "yuva420p")
    run(clip, tmp_path / "out.mkv", UpscaleOptions(model="bicubic", scale=2, encoder="libvpx-vp9", jobs=1))
    assert probe(tmp_path / "out.mkv").video.pixel_format.has_alpha
    with pytest.raises(OptionError, match="libx264 in matroska cannot keep that"):
        run(clip, tmp_path / "x264.mkv")
    run(clip, tmp_path / "drop.mkv", replace(FAST, alpha="drop"))
    with av.open(str(tmp_path / "drop.mkv")) as film:
        assert "alpha_mode" not in {key.lower() for key in film.streams.video[0].metadata}


def test_an_opaque_gif_is_opaque(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=0.5", tmp_path / "clip.gif")
    assert run(tmp_path / "clip.gif", tmp_path / "out.mkv").frames == 5


@pytest.mark.parametrize(("mode", "frames"), [("auto", 25), ("frame", 25), ("field", 50), ("off", 25)])
def test_fields_become_frames(tmp_path: Path, mode: str, frames: int) -> None:
    clip = tmp_path / "clip.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=50:d=1,scroll=h=0.08,interlace", "-c:v", "libx264", "-flags",
           "+ildct+ilme", "-pix_fmt", "yuv420p", clip)  # fmt: skip
    options = replace(FAST, deinterlace=mode)  # type: ignore[arg-type]
    report = run(clip, tmp_path / "out.mkv", options)
    assert report.frames == frames
    made = probe(tmp_path / "out.mkv")
    assert len(made.index.pts) == frames
    assert not made.video.is_interlaced
    assert any("as they are" in note for note in report.notes) == (mode == "off")
    # The same frames as a file gives.
    exact = replace(options, encoder="ffv1", preset=None)
    upscale_file(clip, tmp_path / "file.mkv", exact)
    run(clip, tmp_path / "pipe.mkv", exact)
    with open_source(tmp_path / "file.mkv") as theirs, open_source(tmp_path / "pipe.mkv") as ours:
        for a, b in zip(theirs, ours, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.planes, b.planes, strict=True))


def test_what_does_not_go_through_is_said(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", frames=6, subtitles=True)
    code, said = piped(clip, tmp_path / "out.y4m")
    assert code == 0
    assert "stream #1 audio/aac: drop (y4m has pictures only)" in said
    assert "stream #2 subtitle/subrip: drop (y4m has pictures only)" in said
    (tmp_path / "chapters.txt").write_text(";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=100\ntitle=One\n")
    (tmp_path / "type.ttf").write_bytes(b"\0\1\0\0")
    rich = tmp_path / "rich.mkv"
    ffmpeg("-i", clip, "-i", tmp_path / "chapters.txt", "-map_metadata", "1", "-c", "copy", "-attach",
           tmp_path / "type.ttf", "-metadata:s:t", "mimetype=application/x-truetype-font", rich)  # fmt: skip
    code, said = piped(rich, tmp_path / "out.mkv")
    assert code == 0
    assert re.search(r"attachment/\w+: drop \(does not go through a pipe\)", said)
    assert "1 chapters are dropped" in said
    assert "truncated" not in said, "text may stay longer than pictures and sound"
    with pytest.raises(StrictError, match="chapters"):
        run(rich, tmp_path / "strict.mkv", replace(FAST, strict=True))


def test_a_pipe_tells_what_a_file_tells(tmp_path: Path) -> None:
    clip, report = make_clip(tmp_path / "clip.mkv", frames=20), tmp_path / "report.json"
    code, said = piped(clip, tmp_path / "out.mkv", "--progress", "json", "--report", report)
    assert code == 0
    events = [json.loads(line) for line in said.splitlines()]
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["stage"] for event in progress] == sorted(
        (event["stage"] for event in progress), key=["plan", "work", "done"].index
    )
    assert all(
        set(event) == {"event", *(field.name for field in fields(Progress))}
        and (event["frames_total"], event["eta_seconds"], event["clip"], event["clips"]) == (None, None, 1, 1)
        for event in progress
    )
    assert progress[-1]["frames_done"] == 20
    assert progress[-1]["fps"] > 0
    assert events[-1]["event"] == "done"
    assert events[-1]["frames"] == {"in": 20, "out": 20, "lost": 0, "corrupt": 0, "reused": 0}
    made = json.loads(report.read_text())
    assert (made["status"], made["source"], made["error"], made["frames"]) == ("done", "-", None, 20)
    clip.write_bytes(b"no video")
    assert piped(clip, tmp_path / "out.mkv", "--overwrite", "--report", report)[0] == 1
    made = json.loads(report.read_text())
    assert made["status"] == "failed"
    assert "not a media stream" in made["error"]


@pytest.mark.parametrize("form", ["mkv", "y4m"])
def test_stdout_that_is_full_is_one_line(tmp_path: Path, form: str) -> None:
    clip = make_clip(tmp_path / "clip.mkv", frames=20)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command(str(clip), "-o", "-", "--format", form), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "hat-video: -o -: cannot be written: No space left on device\n"


def test_one_stream_goes_to_stdout(tmp_path: Path) -> None:
    folder = tmp_path / "numbered"
    folder.mkdir()
    done = subprocess.run(command(str(folder), "-o", "-"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is a directory, and -o - takes one stream" in done.stderr
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=0.5", folder / "%02d.png")
    words = command(str(folder / "%02d.png"), "-o", "-")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give --rate" in done.stderr
    (tmp_path / "out.mkv").write_bytes(
        subprocess.run([*words, "--rate", "12.5"], capture_output=True, check=True).stdout
    )
    made = probe(tmp_path / "out.mkv")
    assert (len(made.index.pts), made.video.rate) == (5, Fraction(25, 2))
    assert sorted(path.name for path in folder.iterdir()) == [f"{n:02d}.png" for n in range(1, 6)]


def test_a_whole_stream_is_not_complained_of(tmp_path: Path) -> None:
    report = run(make_clip(tmp_path / "clip.mkv", frames=20), tmp_path / "out.mkv", replace(FAST, strict=True))
    assert report.notes == []


def test_strict_fails_where_something_was_lost(tmp_path: Path) -> None:
    damaged = KINDS["corrupt-packets"].make(tmp_path)
    assert any("damaged" in note or "decoded" in note for note in run(damaged, tmp_path / "out.mkv").notes)
    with pytest.raises(StrictError, match="strict refuses what has gone out"):
        run(damaged, tmp_path / "out.mkv", replace(FAST, strict=True))
    whole = make_clip(tmp_path / "whole.mkv", frames=60)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(StrictError, match="truncated"):
        run(cut, tmp_path / "out.mkv", replace(FAST, strict=True))
    y4m = UpscaleOptions(model="bicubic", scale=2, strict=True)
    with pytest.raises(StrictError, match="refuses to drop #1 audio"):
        run(whole, tmp_path / "out.y4m", y4m, "y4m")
    uneven = make_clip(tmp_path / "uneven.mkv", frames=5, audio=(), pts=[0, 1, 2, 20, 21], time_base=Fraction(1, 25))
    with pytest.raises(StrictError, match="constant rate"):
        run(uneven, tmp_path / "out.y4m", y4m, "y4m")


def test_a_file_gets_its_name_at_the_end(tmp_path: Path) -> None:
    clip, output = make_clip(tmp_path / "clip.mkv", frames=6), tmp_path / "out.mkv"
    empty = tmp_path / "empty"
    empty.touch()
    output.write_text("precious")
    code, said = piped(clip, output)
    assert (code, output.read_text()) == (1, "precious"), said
    assert "--overwrite" in said
    assert piped(empty, output, "--overwrite")[0] == 1
    assert output.read_text() == "precious"
    assert piped(clip, output, "--overwrite", "--report", tmp_path / "report.json")[0] == 0
    assert len(probe(output).index.pts) == 6
    assert json.loads((tmp_path / "report.json").read_text())["frames"] == 6
    code, said = piped(clip, tmp_path / "out.mp4")
    assert code == 2
    assert "call it so: out.mkv" in said
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--max-pixels", "100"), 1, "--max-pixels allows 100"),
        (("--max-streams", "1"), 1, "--max-streams allows 1"),
        (("--max-frames", "3"), 1, "has more than 3 frames"),
        (("--verify", "full"), 2, "--verify: a pipe is neither"),
        (("--rate", "25"), 2, "--rate: what comes from a pipe"),
        (("--format", "y4m", "--preset", "fast"), 2, "--preset: y4m is not encoded"),
    ],
)
def test_what_a_pipe_cannot_do_is_refused(tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    clip = make_clip(tmp_path / "clip.mkv", frames=6)
    status, text = piped(clip, tmp_path / ("out.y4m" if "y4m" in words else "out.mkv"), *words)
    assert status == code, text
    assert said in text
    assert not list(tmp_path.glob("out.*"))
