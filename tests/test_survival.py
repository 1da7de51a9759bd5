"""Killed, interrupted, changed, tampered with: what is committed is used again, and nothing half is ever shown."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from hat_video.cli import main
from hat_video.jobs.workspace import clean
from tests.clips import make_clip
from tests.command import sidecars, start, tree, upscale, wait_for_segments

# The network makes a run last long enough to be killed in the middle of it.
SLOW = ("--model", "hat-nano", "--scale", "2", "--segment", "0.4", "--jobs", "1")
FAST = ("--model", "bicubic", "--scale", "2", "--segment", "0.4", "--jobs", "1")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds with sound and a single key frame."""
    path = tmp_path_factory.mktemp("clip") / "one_key.mp4"
    make_clip(path, width=96, height=64, frames=60, gop=1000)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_killed_run_goes_on_and_gives_the_same_bytes(clip: Path, tmp_path: Path, suffix: str) -> None:
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"killed{suffix}"
    assert upscale(clip, "-o", whole, *SLOW, "-q") == 0

    process = start("upscale", clip, "-o", output, *SLOW)
    wait_for_segments(process, output, 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    committed = len(sidecars(output))
    assert not output.exists()

    report = tmp_path / "report.json"
    assert upscale(clip, "-o", output, *SLOW, "--report", report, "-q") == 0
    (made,) = json.loads(report.read_text())["clips"]
    assert made["segments"]["reused"] >= committed
    assert 2 <= made["segments"]["reused"] <= made["segments"]["total"]
    assert output.read_bytes() == whole.read_bytes()
    left = {f".hat-video/{name}{rest}" for name in (output.name, whole.name) for rest in ("", "/receipt.json")}
    assert tree(tmp_path) == {".hat-video", "report.json", output.name, whole.name} | left


def test_interrupt_exits_130_says_how_to_go_on_and_resumes(clip: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.mp4", tmp_path / "stopped.mp4"
    assert upscale(clip, "-o", whole, *SLOW, "-q") == 0
    process = start("upscale", clip, "-o", output, *SLOW)
    wait_for_segments(process, output, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    line = errors.strip().splitlines()[-1]
    assert line.startswith("hat-video: interrupted")
    assert "segments are kept" in line
    assert not output.exists()
    assert not list(tmp_path.rglob("*.tmp-*"))
    assert upscale(clip, "-o", output, *SLOW, "-q") == 0
    assert output.read_bytes() == whole.read_bytes()


def test_second_interrupt_leaves_at_once(clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *SLOW)
    wait_for_segments(process, output, 1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert not output.exists()


def test_another_recipe_is_noticed_and_never_mixed(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *SLOW)
    wait_for_segments(process, output, 2)
    process.kill()
    process.wait()
    report = tmp_path / "report.json"
    assert upscale(clip, "-o", output, *SLOW, "--crf", "30", "--report", report) == 0
    assert json.loads(report.read_text())["clips"][0]["segments"]["reused"] == 0
    assert "not reused, because changed: encoder" in capsys.readouterr().err


def test_same_command_again_is_already_done(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST) == 0
    before = output.stat()
    capsys.readouterr()
    assert upscale(clip, "-o", output, *FAST) == 0
    assert "already done" in capsys.readouterr().out
    assert output.stat() == before
    output.touch()
    assert upscale(clip, "-o", output, *FAST) == 0, "another time stamp alone changes nothing"


def test_foreign_output_is_refused_without_overwrite(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.mp4"
    output.write_bytes(b"somebody's only copy")
    assert upscale(clip, "-o", output, *FAST) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"somebody's only copy"
    assert upscale(clip, "-o", output, *FAST, "--overwrite") == 0
    assert upscale(clip, "-o", output, *FAST, "--crf", "40") == 1, "a receipt of other settings does not count"


@pytest.mark.parametrize("harm", ["a bit", "cut off", "empty"])
def test_tampered_segment_is_made_again(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    output, report = tmp_path / "out.mp4", tmp_path / "report.json"
    assert upscale(clip, "-o", output, *FAST, "--keep-work") == 0
    whole = output.read_bytes()
    output.unlink()
    victim = sorted((tmp_path / ".hat-video").rglob("seg-00001.*.mkv"))[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes({"a bit": data, "cut off": data[: len(data) // 2], "empty": b""}[harm])
    capsys.readouterr()
    assert upscale(clip, "-o", output, *FAST, "--report", report) == 0
    said = capsys.readouterr().err
    assert "segment 1 is made again" in said
    assert victim.name in said
    segments = json.loads(report.read_text())["clips"][0]["segments"]
    assert segments["reused"] == segments["total"] - 1, "and only that one"
    assert output.read_bytes() == whole


def test_pictures_slid_by_one_frame_are_caught(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demuxer alone cannot see this fault: every timestamp is there, on the neighbour's picture."""
    output = tmp_path / "out.mp4"
    assert upscale(clip, "-o", output, *FAST, "--keep-work", "--segment", "10", "--encoder-option", "bf=0") == 0
    output.unlink()
    (sidecar,) = (tmp_path / ".hat-video").rglob("seg-*.json")
    (segment,) = (tmp_path / ".hat-video").rglob("seg-*.mkv")
    from hashlib import sha256

    import av

    slid = segment.with_name("slid.mkv")
    with av.open(str(segment)) as source, av.open(str(slid), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        packets = [packet for packet in source.demux(video=0) if packet.size]
        times = [(packet.pts, packet.dts) for packet in packets]
        # The second picture takes the first one's place, and so on; the last one is shown twice.
        for packet, (pts, dts) in zip([packets[0], *packets[:-1]], times, strict=True):
            copy = av.Packet(bytes(packet))
            copy.pts, copy.dts, copy.time_base, copy.stream = pts, dts, source.streams.video[0].time_base, stream
            copy.is_keyframe = packet.is_keyframe
            out.mux(copy)
    slid.replace(segment)
    record = json.loads(sidecar.read_text())
    record["sha256"] = sha256(segment.read_bytes()).hexdigest()
    sidecar.write_text(json.dumps(record))
    capsys.readouterr()
    assert upscale(clip, "-o", output, *FAST, "--segment", "10", "--encoder-option", "bf=0") == 1
    assert "DIFFERS" in capsys.readouterr().err
    assert not output.exists()
    assert sidecar.exists(), "the work is kept for whoever wants to know"


def test_two_runs_on_one_output(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.mp4"
    process = start("upscale", clip, "-o", output, *SLOW)
    wait_for_segments(process, output, 1)
    assert upscale(clip, "-o", output, *SLOW) == 1
    assert "another run" in capsys.readouterr().err
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.exists()


def test_clean_leaves_what_a_run_is_at_work_on(clip: Path, tmp_path: Path) -> None:
    left, output = tmp_path / "left.mp4", tmp_path / "out.mp4"
    assert upscale(clip, "-o", left, *FAST, "--keep-work", "-q") == 0
    process = start("upscale", clip, "-o", output, *SLOW)
    wait_for_segments(process, output, 1)
    told: list[str] = []
    (removed,) = clean(tmp_path, told.append)
    assert removed.parent == tmp_path / ".hat-video" / left.name
    assert told == [f"{output}: is being worked on; left"]
    assert main(["clean", str(output)]) == 0
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.exists()
    assert clean(tmp_path) == []
