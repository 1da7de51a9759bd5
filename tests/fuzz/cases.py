"""One case: a small clip with some bytes changed, given to the real command in a process of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import av
from av.stream import Disposition

from hat_video.cli import main
from hat_video.media.opening import demux, open_file
from tests.conformance.table import ALL_KINDS

__all__ = ["SEEDS", "Case", "make_seeds", "mutate", "run_case"]

SEEDS = (
    *("constant-rate", "edit-list-mov", "open-gop", "webm-vp9", "ts-at-30000", "mpeg4-avi"),
    *("timed-text", "text-subtitles", "chapters", "cover", "fragmented", "flv-h264", "ogv", "mpeg-ps", "wmv", "gif"),
)
"""Kinds of the conformance suite; the first six are the containers that matter most."""

_KINDS = {kind.name: kind for kind in ALL_KINDS}
_TIMEOUT = 30.0
_MOST_MEMORY = 3 << 30
_NUMBERS = (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x01\x00\x00")


@dataclass(frozen=True)
class Case:
    """What one mutated file did."""

    seed: str
    number: int
    seconds: float
    fault: str | None
    """Why it is a finding; None if the command behaved."""
    said: str
    """The last line that it said."""


def make_seeds(folder: Path, names: tuple[str, ...] = SEEDS) -> dict[str, Path]:
    """The unharmed clips."""
    made = {}
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        made[name] = _KINDS[name].make(place)
    return made


def mutate(data: bytes, chance: random.Random) -> bytes:
    """`data` with one to a few changes, half of them near its beginning or its end, where indexes are."""
    body = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        if len(body) < 64:
            break
        last = len(body) - 8
        near_start, near_end = chance.randrange(min(2048, last)), last - chance.randrange(min(4096, last))
        at = chance.choice((near_start, near_end, chance.randrange(last), chance.randrange(last)))
        _change(body, at, min(chance.choice((1, 4, 16, 188, 1000)), len(body) - at), chance)
    return bytes(body)


def _change(body: bytearray, at: int, length: int, chance: random.Random) -> None:
    match chance.randrange(8):
        case 0:
            body[at] ^= 1 << chance.randrange(8)
        case 1:
            body[at] = chance.randrange(256)
        case 2:
            body[at : at + 4] = chance.choice(_NUMBERS)
        case 3:
            body[at : at + length] = chance.randbytes(length)
        case 4:
            body[at : at + length] = bytes(length)
        case 5:
            del body[at : at + length]
        case 6:
            body[at:at] = body[at : at + length]
        case _:
            del body[max(64, at) :]


def run_case(seed: str, number: int, original: Path, folder: Path) -> Case:
    """Mutates a clip, upscales it, and judges what happened. The mutated file stays in `folder`.

    The command runs in a fork of this process: nothing of it can be broken here, and nothing has to be imported again.
    """
    source = folder / f"{seed}-{number}{original.suffix}"
    source.write_bytes(mutate(original.read_bytes(), random.Random(f"{seed}:{number}")))
    output, report, said = folder / f"{source.stem}.out.mkv", folder / "report.json", folder / "said.txt"
    for path in (output, report, said):
        path.unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_command(source, output, report, said)
    status, peak = _wait(child, began + _TIMEOUT)
    seconds = time.monotonic() - began
    text = said.read_text(errors="replace") if said.exists() else ""
    fault = _fault(status, peak, text, source, output, report)
    lines = text.strip().splitlines()
    output.unlink(missing_ok=True)
    return Case(seed, number, seconds, fault, lines[-1] if lines else "")


def _be_the_command(source: Path, output: Path, report: Path, said: Path) -> None:
    code = 99
    try:
        handle = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1, errors="replace")
        words = ("--model", "bicubic", "--scale", "2", "--preset", "ultrafast", "--segment", "0.4", "--jobs", "1")
        # Damage may give a picture any size; what is too large for a test is refused, as it would be for a user.
        limits = ("--max-pixels", "300000", "--max-frames", "20000")
        code = main(["upscale", str(source), "-o", str(output), "--report", str(report), *words, *limits])
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - whatever it is, it is a finding, and this fork must not go on as a test
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(child: int, deadline: float) -> tuple[int | None, int]:
    """The exit status as `waitpid` has it, None for a hang; and the peak of memory, in bytes."""
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage.ru_maxrss * 1024
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return None, 0
        time.sleep(0.01)


def _fault(status: int | None, peak: int, text: str, source: Path, output: Path, report: Path) -> str | None:
    if status is None:
        return f"hang: more than {_TIMEOUT:g} s"
    if os.WIFSIGNALED(status):
        return f"crash: signal {os.WTERMSIG(status)}"
    if "Traceback (most recent" in text:
        return "traceback: " + text.strip().splitlines()[-1]
    if "hat-video: unexpected" in text:
        return "unexpected: " + text.strip().splitlines()[-1]
    if peak > _MOST_MEMORY:
        return f"memory: {peak >> 20} MiB"
    code = os.WEXITSTATUS(status)
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if code:
        return "an output was left by a failed run" if output.exists() else None
    return _silent_loss(source, output, report)


def _silent_loss(source: Path, output: Path, report: Path) -> str | None:
    """Frames that can be decoded from the source must be in the output, or in the report."""
    told = json.loads(report.read_text())["clips"][0]
    frames = told["frames"]
    if frames["in"] != frames["out"] + frames["lost"]:
        return f"the report does not add up: {frames}"
    there = _count(output)
    if there != frames["out"]:
        return f"{there} frames in the output, {frames['out']} reported"
    if any("lost" in note or "truncated" in note or "edit" in note for note in told["notes"]):
        return None
    decodable = _count(source)
    if decodable > frames["out"] + 1:
        return f"silent loss: {decodable} frames can be decoded, {frames['out']} are in the output: {told['notes']}"
    return None


def _count(path: Path) -> int:
    """Frames of the first video that is no cover, decoded by PyAV and nothing else."""
    count = 0
    try:
        with open_file(path) as container:
            stream = next(s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
            for packet in demux(container, stream):
                try:
                    count += len(packet.decode())
                except av.FFmpegError:
                    continue
    except (av.FFmpegError, StopIteration):
        return count
    return count
