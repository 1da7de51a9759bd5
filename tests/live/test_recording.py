"""Recordings: exact, whole at any moment, cut by time, kept for so long and no longer; disks that fill, and pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from hat_video.errors import OutputError
from hat_video.live.encode import AudioLine, LiveEncoder
from hat_video.live.names import Made, RowNames
from hat_video.live.outputs import FanOut, OutputEvent, parse_output
from hat_video.live.recording import StdoutOutput
from tests.command import ROOT
from tests.live.feeding import (
    RATE,
    STEP,
    Seen,
    head_of,
    look,
    look_at,
    made_encoder,
    make_sound,
    packets,
    picture,
    sound,
    wait_until,
)
from tests.live.leftovers import nothing_left

SUFFIXES = (".mp4", ".mkv", ".ts")


def fan_out(
    encoder: LiveEncoder, *names: Any, on_event: Callable[[OutputEvent], None] | None = None, **options: Any
) -> FanOut:
    plans = [parse_output(str(name), **options) for name in names]
    return FanOut(encoder, plans, stop=threading.Event(), on_event=on_event)


def record(folder: Path, numbers: range, *names: str, tone: Path | None = None, **options: Any) -> LiveEncoder:
    """A whole run, faster than in real time; sound comes well before its pictures, as in a real run."""
    line = None if tone is None else AudioLine(head_of(tone), "copy", containers=["mp4", "mpegts"])
    encoder = made_encoder(line)
    with nothing_left(), fan_out(encoder, *(f"{folder}/{name}" for name in names), **options) as outputs:
        heard = [] if line is None or tone is None else sound(line, tone)
        for made in packets(encoder, numbers):
            while heard and heard[0].pts <= made[0].pts + 30_000:
                outputs.send([heard.pop(0)])
            outputs.send(made)
        outputs.send(encoder.flush())
        outputs.send(heard)
    encoder.close()
    for figures in outputs.figures:
        assert (figures.frames, figures.dropped, figures.error) == (len(numbers), 0, None)
    return encoder


def boxes(path: Path) -> list[str]:
    """Names of an MP4's outermost boxes."""
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        names.append(data[at + 4 : at + 8].decode("latin-1"))
        at += int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size
    return names


def test_a_closed_recording_is_plain_exact_tagged_and_seekable(tmp_path: Path) -> None:
    encoder = made_encoder()
    ticks = [0, 6001, 11_999, 18_000, 40_007, 46_000, 100_003, 106_000, 112_345, 190_001, 195_000]
    names = [f"a{suffix}" for suffix in SUFFIXES]
    with nothing_left(), fan_out(encoder, *(tmp_path / name for name in names)) as outputs:
        for number, at in enumerate(ticks):
            outputs.send(encoder.encode(picture(number), at, time.monotonic()))
    encoder.close()
    for name in names:
        seen = look(tmp_path / name)
        close = Fraction(1, 1000) if name.endswith("mkv") else 0
        assert len(seen.pts) == len(ticks)
        assert all(abs(a - Fraction(b, 90_000)) <= close for a, b in zip(seen.pts, ticks, strict=True)), name
        assert seen.tags == (1, 1, 1, 1)
        with av.open(str(tmp_path / name)) as container:
            assert abs((container.duration or 0) / 1e6 - 2.17) < 0.15
            container.seek(1_900_000)
            assert next(container.decode(video=0)).pts * container.streams.video[0].time_base > 1
    assert boxes(tmp_path / "a.mp4") == ["ftyp", "free", "mdat", "moov"]


def test_sound_is_copied_at_its_own_times(tmp_path: Path) -> None:
    tone = make_sound(tmp_path / "tone.mkv", 4)
    with av.open(str(tone)) as container:
        payloads = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    record(tmp_path, range(60), "a.mp4", "a.mkv", "a.ts", tone=tone)
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        seen = look(path)
        assert seen.codec == ["h264", "aac"]
        assert len(seen.sound) >= len(payloads) - 2
        steps = [b - a for a, b in zip(seen.sound, seen.sound[1:], strict=False)]
        assert all(abs(step - Fraction(1024, 48_000)) < Fraction(1, 900) for step in steps)
        if suffix != ".ts":
            with av.open(str(path)) as container:
                assert [bytes(p) for p in container.demux(audio=0) if p.size] == payloads[-len(seen.sound) :]


@pytest.mark.parametrize("has_sound", [False, True])
def test_a_kill_loses_less_than_a_second(tmp_path: Path, has_sound: bool) -> None:
    tone = str(make_sound(tmp_path / "tone.mkv", 12)) if has_sound else "-"
    names = ["a.mp4", "a.mkv", "a.ts", "row-%H%M%S.mp4", "hls/"]
    words = [sys.executable, "-m", "tests.live.recorder", "30", tone, *(f"{tmp_path}/{name}" for name in names)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    sent = [float(process.stdout.readline()) for _ in range(int(4.6 * RATE))]
    process.kill()
    sent += [float(line) for line in process.stdout]
    process.wait()
    process.stdout.close()
    for suffix in SUFFIXES:
        seen = look(tmp_path / f"a{suffix}")
        assert sent[-1] - float(seen.pts[-1]) <= 1, suffix
        assert seen.pts[0] == 0
        assert not has_sound or sent[-1] - float(seen.sound[-1]) <= 1
    *rows, last = names_of(tmp_path)
    assert [look(path).frames for path in rows] == [2 * RATE] * len(rows)
    begun = 2 * len(rows)
    # A file that has just been begun may have nothing yet that can be read.
    assert sent[-1] - begun <= 1 or sent[-1] - (begun + float(look(last).pts[-1])) <= 1
    # What the playlist names is there and whole.
    listed = [line for line in (tmp_path / "hls/live.m3u8").read_text().splitlines() if line.endswith(".ts")]
    assert len(listed) == 2
    assert all(look(tmp_path / "hls" / name).frames == 2 * RATE for name in listed)


def names_of(folder: Path) -> list[Path]:
    """The files of a row, in the order in which they were begun."""
    (journal,) = folder.glob(".hat-video-*.made")
    names = dict.fromkeys(json.loads(line)["name"] for line in journal.read_text(encoding="utf-8").splitlines())
    assert set(names) == {path.name for path in folder.glob("row*")}
    return [folder / name for name in names]


def rows_of(folder: Path) -> list[tuple[Path, Seen]]:
    return [(path, look(path)) for path in names_of(folder)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_cut_at_key_frames_and_lose_nothing(tmp_path: Path, suffix: str) -> None:
    tone = make_sound(tmp_path / "tone.mkv", 6.4)
    record(tmp_path, range(6 * RATE + 5), f"row-%Y%m%d-%H%M%S{suffix}", tone=tone, segment_seconds=2)
    rows = rows_of(tmp_path)
    assert [seen.frames for _, seen in rows] == [2 * RATE, 2 * RATE, 2 * RATE, 5]
    for path, seen in rows:
        assert min(seen.pts) == 0, path
        assert 0 <= min(seen.sound) < 0.03
        assert max(seen.sound) < max(seen.pts) + Fraction(1, RATE) + Fraction(1, 2)
    with av.open(str(tone)) as container:
        count = sum(1 for packet in container.demux(audio=0) if packet.size)
    assert sum(len(seen.sound) for _, seen in rows) >= count - 2


def test_a_cut_is_asked_for_where_key_frames_are_rare(tmp_path: Path) -> None:
    encoder = made_encoder(key_seconds=3600)
    with fan_out(encoder, tmp_path / "row-%H%M%S.mkv", segment_seconds=1) as outputs:
        for made in packets(encoder, range(4 * RATE)):
            outputs.send(made)
            time.sleep(0.01)
    encoder.close()
    assert len(rows_of(tmp_path)) >= 3


def test_names_go_by_time_and_never_overwrite(tmp_path: Path) -> None:
    names = RowNames(tmp_path / "%Y-%m" / "cam-%H%M.mp4")
    wall = time.mktime((2026, 3, 4, 5, 6, 7, 0, 0, -1))
    first = names.free(wall)
    assert first == tmp_path / "2026-03" / "cam-0506.mp4"
    first.write_bytes(b"")
    assert names.free(wall).name == "cam-0506-2.mp4"


def aged(path: Path, seconds: float) -> Path:
    os.utime(path, (time.time() - seconds, time.time() - seconds))
    return path


def test_retention_deletes_what_it_made_and_nothing_else(tmp_path: Path) -> None:
    pattern = "%Y/row-%Y%m%d-%H%M%S.mkv"
    record(tmp_path, range(5 * RATE), pattern, segment_seconds=2)
    (year,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    first, second, third = sorted(year.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    mine = [year / "row-20010203-040506.mkv", year / "holiday.mkv", tmp_path / "row-20010203-040506.mkv"]
    for path in mine:
        path.write_bytes(b"mine")
        aged(path, 9999)
    aged(first, 9999)
    second.unlink()
    second.write_bytes(b"mine now")
    aged(second, 9999)
    journal = next(tmp_path.glob(".hat-video-*.made"))
    with journal.open("a", encoding="utf-8") as file:
        status = mine[1].stat()
        file.write(f'{{"name": "{year.name}/holiday.mkv", "inode": {status.st_ino}}}\n')
        file.write(f'{{"name": "{year.name}/../../x.mkv", "inode": 1}}\nrubbish\n')
    time.sleep(1.1)  # other names
    record(tmp_path, range(5 * RATE), pattern, segment_seconds=2, keep_seconds=3600)
    assert not first.exists()
    assert second.read_bytes() == b"mine now"
    assert third.exists()
    assert all(path.read_bytes() == b"mine" for path in mine)
    assert len(list(year.iterdir())) == 2 + 2 + 3


def test_retention_leaves_no_empty_folder(tmp_path: Path) -> None:
    made = Made(tmp_path, "%Y/%m/cam-%S.ts")
    path = tmp_path / "2020" / "01" / "cam-00.ts"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    made.add(path)
    made.prune(older_than=time.time() + 10, besides=[path])
    assert path.exists()
    made.prune(older_than=time.time() + 10)
    assert not (tmp_path / "2020").exists()
    assert tmp_path.exists()


def test_an_old_file_stays_until_there_is_something_better(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(b"old")
    encoder = made_encoder()
    with fan_out(encoder, path, may_replace=True):
        pass
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.mkv"]  # noqa: PTH208
    with fan_out(encoder, path, may_replace=True) as outputs:
        for made in packets(encoder, range(10)):
            outputs.send(made)
    assert look(path).frames == 10
    encoder.close()


def test_a_run_without_a_picture_leaves_no_file(tmp_path: Path) -> None:
    encoder = made_encoder()
    names = ["a.mp4", "a.mkv", "a.ts", "row-%H%M%S.mp4"]
    with nothing_left(), fan_out(encoder, *(tmp_path / name for name in names)):
        pass
    encoder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As one user may be allowed everything, the answer of the system is the one for a folder that has gone.
    encoder = made_encoder()
    gone = tmp_path / "gone"
    gone.mkdir()
    outputs = fan_out(encoder, tmp_path / "a.mp4", gone / "b.mp4", gone / "c-%S.mkv", segment_seconds=None)
    gone.rmdir()
    before = time.monotonic()
    with nothing_left(), pytest.raises(OutputError, match=r"^[^\n]*gone/[^\n]*: No such file or directory$"):
        outputs.__enter__()
    assert time.monotonic() - before < 5
    assert list(tmp_path.iterdir()) == [], "a folder that has gone is not made again: it may be a disk"
    encoder.close()


@contextmanager
def disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of its own."""
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_fills(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hat_video.live.output._LONGEST_DELAY", 0.5)
    monkeypatch.setattr("hat_video.live.recording._ENOUGH_BYTES", 1 << 20)
    events: list[OutputEvent] = []
    encoder = made_encoder(crf=0, preset="ultrafast")
    with disk(tmp_path / "disk", 3 << 20) as place, nothing_left():
        filler = place / "filler"
        filler.write_bytes(bytes(2 << 20))
        beside = tmp_path / "beside.mkv"
        with fan_out(encoder, place / f"a{suffix}", beside, on_event=events.append) as outputs:
            number = 0

            def until(is_so: Callable[[], bool]) -> None:
                nonlocal number
                give_up = time.monotonic() + 60
                while not is_so():
                    assert time.monotonic() < give_up, (outputs.figures, events)
                    outputs.send(encoder.encode(picture(number, noise=True), number * STEP, time.monotonic()))
                    number += 1
                    time.sleep(0.002)

            until(lambda: outputs.figures[0].error is not None)
            assert "No space left on device" in str(outputs.figures[0].error)
            assert outputs.figures[1].is_up
            filler.unlink()
            until(lambda: outputs.figures[0].is_up)
            wait_until(lambda: outputs.figures[1].frames == number)
            filled = outputs.figures[0].frames
            until(lambda: outputs.figures[0].frames > filled + 20)
        assert [event.kind for event in events][:2] == ["down", "up"]
        first, second = look(place / f"a{suffix}"), look(place / f"a-2{suffix}")
        assert first.frames > 20
        assert second.frames > 20
        assert second.pts[0] == 0
        assert look(beside).frames == number
    encoder.close()


def playlist(path: Path) -> tuple[list[str], list[str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("#")], [line for line in lines if not line.startswith("#")]


def test_hls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hat_video.live.hls._WINDOW_SECONDS", 6.0)
    monkeypatch.setattr("hat_video.live.hls._KEPT_BEHIND", 1)
    tone = make_sound(tmp_path / "tone.mkv", 20)
    record(tmp_path, range(20 * RATE), "hls/", tone=tone)
    folder = tmp_path / "hls"
    tags, names = playlist(folder / "live.m3u8")
    assert tags[0] == "#EXTM3U"
    assert "#EXT-X-TARGETDURATION:2" in tags
    assert "#EXT-X-MEDIA-SEQUENCE:7" in tags
    assert tags[-1] == "#EXT-X-ENDLIST"
    assert tags.count("#EXTINF:2.000000,") == len(names) == 3
    assert len(list(folder.glob("*.ts"))) == 4, "one more than the playlist names"
    seen = look(folder / "live.m3u8")
    assert seen.frames == 6 * RATE
    # The last piece is at its own time, so that players need not guess.
    last = look(folder / names[-1])
    assert abs(float(last.pts[0]) - 18) < 0.01
    assert abs(float(last.sound[0]) - 18) < 0.03

    # Another run begins anew, and leaves nothing of this one; what is not its own stays.
    (folder / "live-mine.ts").write_bytes(b"mine")
    (folder / "index.html").write_bytes(b"mine")
    record(tmp_path, range(3 * RATE), "hls/")
    _, again = playlist(folder / "live.m3u8")
    assert len(again) == 2
    assert not set(names) & {path.name for path in folder.iterdir()}
    assert {path.name for path in folder.glob("*.ts")} == {*again, "live-mine.ts"}
    assert (folder / "index.html").exists()


def test_a_playlist_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "film.m3u8"
    mine.write_text("#EXTM3U\n")
    encoder = made_encoder()
    with pytest.raises(OutputError, match=r"film.m3u8: exists; use --overwrite or another -o"):
        fan_out(encoder, mine).__enter__()
    assert mine.read_text() == "#EXTM3U\n"
    with fan_out(encoder, mine, may_replace=True):
        pass
    encoder.close()
    assert mine.read_text().endswith("#EXT-X-ENDLIST\n"), "also where there was no picture"


def assert_is_whole(path: Path) -> None:
    """A playlist has an end, and each piece that it names is there and as long as it says."""
    tags, names = playlist(path)
    assert tags[-1] == "#EXT-X-ENDLIST"
    assert names
    seconds = [float(tag.removeprefix("#EXTINF:").rstrip(",")) for tag in tags if tag.startswith("#EXTINF:")]
    assert [look(path.with_name(name)).frames for name in names] == [round(each * RATE) for each in seconds]


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_playlist_has_an_end_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    monkeypatch.setattr("hat_video.live.output._FIRST_DELAY", 0.1 if comes_back else 60.0)
    encoder = made_encoder()
    folder, away = tmp_path / "hls", tmp_path / "away"
    with nothing_left():
        with fan_out(encoder, f"{folder}/") as outputs:
            until = feeding(encoder, outputs)
            until(lambda: len(playlist(folder / "live.m3u8")[1]) >= 2)
            folder.rename(away)
            until(lambda: not outputs.figures[0].is_up)
            away.rename(folder)
            if comes_back:
                until(lambda: outputs.figures[0].is_up)
                frames = outputs.figures[0].frames
                until(lambda: outputs.figures[0].frames > frames + 3 * RATE)
        assert outputs.figures[0].reconnects == comes_back
    encoder.close()
    assert_is_whole(folder / "live.m3u8")
    assert ("#EXT-X-DISCONTINUITY" in playlist(folder / "live.m3u8")[0]) == comes_back


def feeding(encoder: LiveEncoder, outputs: FanOut, *, noise: bool = False) -> Callable[[Callable[[], bool]], None]:
    """Gives what sends one picture after the other until something is so."""
    numbers = iter(range(1 << 20))

    def until(is_so: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < give_up, outputs.figures
            number = next(numbers)
            outputs.send(encoder.encode(picture(number, noise=noise), number * STEP, time.monotonic()))
            time.sleep(0.002)

    return until


def test_a_playlist_on_a_disk_that_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hat_video.live.output._LONGEST_DELAY", 0.5)
    encoder = made_encoder(crf=0, preset="ultrafast")
    with disk(tmp_path / "disk", 4 << 20) as place, nothing_left():
        filler = place / "filler"
        filler.write_bytes(bytes(3 << 20))
        folder = place / "hls"
        with fan_out(encoder, f"{folder}/") as outputs:
            until = feeding(encoder, outputs, noise=True)
            until(lambda: not outputs.figures[0].is_up)
            assert "No space left on device" in str(outputs.figures[0].error)
            filler.unlink()
            until(lambda: outputs.figures[0].is_up)
            filled = outputs.figures[0].frames
            until(lambda: outputs.figures[0].frames > filled + 20)
        assert_is_whole(folder / "live.m3u8")
        _, names = playlist(folder / "live.m3u8")
        assert {path.name for path in folder.glob("*.ts")} == set(names), "what has failed is taken away"
    encoder.close()


def test_a_playlist_that_is_given_up_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hat_video.live.outputs._CLOSE_SECONDS", 0.0)
    encoder = made_encoder()
    made = [packet for batch in packets(encoder, range(100 * RATE)) for packet in batch]
    with nothing_left(), fan_out(encoder, f"{tmp_path}/hls/") as outputs:
        outputs.send(made)
        wait_until(lambda: outputs.figures[0].frames > 0)
    encoder.close()
    assert outputs.figures[0].dropped > 0
    assert_is_whole(tmp_path / "hls" / "live.m3u8")


class Piped:
    """An output that writes into a pipe."""

    def __init__(self, container: str) -> None:
        self.events: list[OutputEvent] = []
        self.encoder = made_encoder(crf=0, preset="ultrafast")
        reading, self.writing = os.pipe()
        self.reader = os.fdopen(reading, "rb", buffering=0)
        self.output = StdoutOutput(
            "-",
            container,
            self.encoder,
            ask_for_key=self.encoder.ask_for_key,
            on_event=self.events.append,
            fd=self.writing,
        )
        self.output.start()
        assert self.output.wait_open(5)

    def end(self) -> None:
        self.output.close()
        self.output.abort()
        assert self.output.join(3)
        os.close(self.writing)
        self.reader.close()
        self.encoder.close()


@pytest.mark.parametrize("container", ["nut", "matroska"])
def test_a_pipe_is_read_as_it_comes(container: str) -> None:
    with nothing_left():
        piped = Piped(container)
        seen: list[Seen] = []
        thread = threading.Thread(target=lambda: seen.append(look(piped.reader, format=container)))
        thread.start()
        for made in packets(piped.encoder, range(20)):
            piped.output.send(made[0])
        piped.output.close()
        assert piped.output.join(10)
        os.close(piped.writing)
        thread.join(10)
        piped.reader.close()
        piped.encoder.close()
    assert seen[0].frames == 20
    assert seen[0].tags == (1, 1, 1, 1)


def test_a_reader_that_goes_ends_that_output_only() -> None:
    with nothing_left():
        piped = Piped("nut")
        piped.reader.close()
        for made in packets(piped.encoder, range(20)):
            piped.output.send(made[0])
        wait_until(lambda: piped.output.is_over)
        assert piped.output.figures.error == "closed by its reader"
        assert [(event.kind, event.message) for event in piped.events] == [("over", "closed by its reader")]
        piped.end()


def test_a_reader_that_pauses_makes_nobody_wait_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_left():
        piped = Piped("nut")
        piped.output._queue._seconds = 0.5
        number = 0
        while piped.output.figures.dropped < 20:
            before = time.monotonic()
            for made in packets(piped.encoder, range(number, number + 1), noise=True):
                piped.output.send(made[0])
            assert time.monotonic() - before < 1
            number += 1
            time.sleep(0.005)
        seen: list[Seen] = []

        def watch() -> None:
            with av.open(piped.reader, format="nut") as container:
                seen.append(look_at(container))

        thread = threading.Thread(target=watch)
        thread.start()
        for _ in range(40):
            for made in packets(piped.encoder, range(number, number + 1)):
                piped.output.send(made[0])
            number += 1
            time.sleep(0.01)
        piped.output.close()
        assert piped.output.join(10)
        os.close(piped.writing)
        thread.join(10)
        assert seen[0].frames == piped.output.figures.frames == number - piped.output.figures.dropped
        assert max(seen[0].pts) == Fraction((number - 1) * STEP, 90_000)
        piped.reader.close()
        piped.encoder.close()


def test_a_pipe_that_nobody_reads_is_given_up_at_the_end() -> None:
    with nothing_left():
        piped = Piped("nut")
        for made in packets(piped.encoder, range(40), noise=True):
            piped.output.send(made[0])
        before = time.monotonic()
        piped.end()
        assert time.monotonic() - before < 2


def test_standard_output_that_is_no_terminal() -> None:
    code = (
        "import threading, sys; from hat_video.live.outputs import *; from tests.live.feeding import *\n"
        "encoder = made_encoder()\n"
        "with FanOut(encoder, [parse_output('-')], stop=threading.Event()) as outputs:\n"
        "    number = 0\n"
        "    while outputs.ended is None and number < 4000:\n"
        "        outputs.send(encoder.encode(picture(number, noise=True), number * STEP, 0.0)); number += 1\n"
        "        time.sleep(0.001)\n"
        "sys.exit(outputs.ended)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(25) == b"nut/multimedia container\0"
    process.stdout.close()
    assert process.stderr.read().decode().strip() == "-: closed by its reader"
    assert process.wait(20) == 1
    process.stderr.close()
