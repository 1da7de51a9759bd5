"""A live run as people start it: delivered frames, latency, memory, a slow-down, and the clock on the page.

    python benchmarks/live.py                      # everything: 25 minutes; results/live.json
    python benchmarks/live.py --only slowdown      # one of: steady, slowdown, glass; the others keep their figures

Each part starts `hat-video camera` in a process of its own and reads what it reports, records and shows.

- steady: `test:` at 320x180 and 15 frames a second, every frame different, with cnn-pico-video pinned for ten
  minutes and hat-nano-video for five.
- slowdown: the default ladder, while other processes take the CPUs for eight seconds. Pictures show their number, and
  there is a beep every second: whether sound and picture are together is read from the recording.
- glass: a camera that draws the clock into its picture; a browser (Chromium) reads it from the page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import machine, versions  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "live.json"
SIZE, FPS = "320x180", 15
BITS = 16
BURNERS_PER_CPU = 2
SLOW_FROM, SLOW_FOR, SLOW_RUN = 20.0, 8.0, 60.0
# The rungs of the default ladder: the network that is wanted, and the one that keeps up.
BEST, FAST = "hat-nano-video", "cnn-pico-video"
# A rate at which the fast one has room on two slow cores, and has none when they are 2.5 times slower.
SLOW_FPS = 15


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "hat_video", "camera", *map(str, words)]


@contextlib.contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[str]]:
    """The command, which is asked to stop at the end, as by Ctrl-C."""
    process = subprocess.Popen(
        command(*words), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def memory_mib(pid: int) -> float:
    """Resident, now."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def watched(process: subprocess.Popen[str], seconds: float) -> list[dict[str, Any]]:
    """The figures that the command says once a second on stderr, with its memory."""
    found = []
    assert process.stderr is not None
    until = time.monotonic() + seconds + 60
    for line in process.stderr:
        with contextlib.suppress(json.JSONDecodeError, FileNotFoundError, ProcessLookupError):
            said = json.loads(line)
            if said.get("event") == "figures":
                found.append({**said, "memory_mib": memory_mib(process.pid)})
        if time.monotonic() > until:
            break
    return found


def by_minute(said: list[dict[str, Any]], name: str) -> list[float]:
    """The median of a figure in each minute."""
    minutes: dict[int, list[float]] = {}
    for one in said:
        minutes.setdefault(int(one["seconds"] // 60), []).append(one[name])
    return [round(statistics.median(values), 4) for _, values in sorted(minutes.items()) if len(values) > 20]


def steady(model: str, seconds: int, folder: Path) -> dict[str, Any]:
    report = folder / f"{model}.json"
    words = ("test:", "--size", SIZE, "--fps", FPS, "--model", model, "--duration", seconds, "--report", report)
    with running(*words, "-o", folder / f"{model}.mkv", "--progress", "json") as process:
        said = watched(process, seconds)
    whole = json.loads(report.read_text(encoding="utf-8"))
    figures, latencies = whole["figures"], whole["latencies"]
    memory = [one["memory_mib"] for one in said if one["seconds"] > 30]
    found = {
        "seconds": figures["seconds"],
        "frames_in": figures["frames_in"],
        "frames_out": figures["frames_out"],
        "delivered_of_15": 15 * figures["frames_out"] / max(1, figures["frames_in"]),
        "fps_out": figures["frames_out"] / figures["seconds"],
        "dropped": figures["dropped"],
        **latencies,
        "latency_p50_by_minute": by_minute(said, "latency_p50_seconds"),
        "latency_p99_by_minute": by_minute(said, "latency_p99_seconds"),
        "memory_mib_by_minute": by_minute(said, "memory_mib"),
        "memory_growth_mib": round(statistics.median(memory[-20:]) - statistics.median(memory[:20]), 1),
        "stage_seconds": figures["stage_seconds"],
    }
    print(model, found, flush=True)
    return found


def marked_source(size: str = SIZE, fps: int = FPS) -> str:
    """A picture in which every frame shows its number, and sound that beeps at every whole second."""
    bits = "".join(
        f",drawbox=x={8 + 20 * (k % 8)}:y={8 + 20 * (k // 8)}:w=16:h=16:color=white:t=fill"
        f":enable='mod(floor(n/{2**k}),2)'"
        for k in range(BITS)
    )
    picture = f"testsrc2=s={size}:r={fps},drawbox=x=0:y=0:w=168:h=48:color=black:t=fill{bits},format=yuv420p"
    sound = "aevalsrc='if(lt(mod(t,1),0.1),0.7*sin(2*PI*1000*t),0)':s=48000"
    return f"test:{picture},realtime[out0];{sound},arealtime[out1]"


def number_in(frame: av.VideoFrame) -> int:
    """What a picture, twice as large as the camera's, shows."""
    # As it lies there: FFmpeg's converter, in several threads, now and then leaves samples out.
    plane = frame.planes[0]
    luma = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    places = ((2 * (16 + 20 * (k // 8)), 2 * (16 + 20 * (k % 8))) for k in range(BITS))
    return sum(int(luma[y, x] > 128) << k for k, (y, x) in enumerate(places))


def offsets_in(recording: Path, fps: int = FPS) -> list[float]:
    """Sound against picture at each beep, in seconds: how much too late the pictures around it are shown."""
    late: list[tuple[float, float]] = []
    sound: list[tuple[float, np.ndarray]] = []
    with av.open(str(recording)) as container:
        rate = container.streams.audio[0].rate
        for frame in container.decode():
            if isinstance(frame, av.VideoFrame):
                late.append((frame.time, frame.time - number_in(frame) / fps))
            else:
                sound.append((frame.time, frame.to_ndarray()[0]))
    beeps, was_loud = [], True
    for start, samples in sound:
        loud = np.abs(samples) > 0.1
        if loud.any() and not was_loud:
            beeps.append(start + int(np.argmax(loud)) / rate)
        was_loud = bool(loud[-1] or loud.any())
    # A beep begins at a whole second of the camera's own clock, which the pictures show.
    found = []
    for beep in beeps:
        near = min(late, key=lambda one: abs(one[0] - beep))
        of_sound = (beep - near[1] + 0.5) % 1 - 0.5
        found.append(of_sound)
    return found


def burn(until: float) -> None:
    while time.monotonic() < until:
        sum(range(10_000))


def slowdown(folder: Path) -> dict[str, Any]:
    report, recording = folder / "slow.json", folder / "slow.mkv"
    words = ("--duration", SLOW_RUN, "--report", report, "-o", recording, "--progress", "json")
    cpus = len(os.sched_getaffinity(0))
    burners: list[multiprocessing.Process] = []
    began_at = 0.0
    with running(marked_source(fps=SLOW_FPS), *words) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            with contextlib.suppress(json.JSONDecodeError):
                one = json.loads(line)
                if one.get("event") == "figures":
                    said.append(one)
                    if one["seconds"] >= SLOW_FROM and not burners:
                        began_at = one["seconds"]
                        until = time.monotonic() + SLOW_FOR
                        burners = [
                            multiprocessing.Process(target=burn, args=(until,)) for _ in range(BURNERS_PER_CPU * cpus)
                        ]
                        for burner in burners:
                            burner.start()
    for burner in burners:
        burner.join()
    whole = json.loads(report.read_text(encoding="utf-8"))
    steps = [event for event in whole["events"] if event["kind"] == "rung"]
    offsets = offsets_in(recording, SLOW_FPS)
    found = {
        "fps": SLOW_FPS,
        "slow_from_seconds": began_at,
        "slow_for_seconds": SLOW_FOR,
        "other_processes": len(burners),
        "steps": steps,
        "share_of_rungs": {rung["model"]: rung["frames"] for rung in whole["figures"]["rungs"]},
        "frames_in": whole["figures"]["frames_in"],
        "frames_out": whole["figures"]["frames_out"],
        "beeps": len(offsets),
        "av_offset_ms_median": 1000 * statistics.median(offsets),
        "av_offset_ms_most": 1000 * max(map(abs, offsets)),
        "fps_out_by_second": [round(one["fps_out"], 1) for one in said],
    }
    print("slowdown", found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("steady", "slowdown", "glass"))
    parser.add_argument("--seconds", type=int, default=600, help="of the fast network; the best has half of it")
    given = parser.parse_args()
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    result |= {
        "command": f"python benchmarks/live.py --seconds {given.seconds}",
        "machine": machine(),
        "versions": versions("torch", "openvino", "av"),
        "source": f"{SIZE} at {FPS} frames a second",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.only in (None, "steady"):
            result["steady"] = {
                FAST: steady(FAST, given.seconds, folder),
                BEST: steady(BEST, given.seconds // 2, folder),
            }
        if given.only in (None, "slowdown"):
            result["slowdown"] = slowdown(folder)
        if given.only in (None, "glass"):
            from benchmarks.glass import glass_to_glass

            result["glass_to_glass"] = {model: glass_to_glass(model) for model in (FAST, "bicubic")}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
