"""What `preview` and a long run promise of time, size and memory, against what then comes.

    python benchmarks/estimate.py            # writes benchmarks/results/estimate.json

The sample clip with the default model: a preview of its middle, the run itself, and four copies in a row, since only a
run of more than a minute makes an estimate at its start. Each in a process of its own, as people run them. A ratio of
1.1 means that a tenth more was promised than came.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import torch

sys.path.insert(0, str(Path(__file__).parent))
from road import CLIP, ROOT, repeated

RESULT = ROOT / "benchmarks" / "results" / "estimate.json"
LIMIT = 0.2


def command(*words: str) -> tuple[str, str, float, int]:
    """stdout, stderr, wall seconds and peak resident bytes of one `hat-video`."""
    # A child starts out with its parent's peak, so a small process starts it.
    launcher = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
        " print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr); sys.exit(code)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-S", "-c", launcher, sys.executable, "-m", "hat_video", *words],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    lines, _, peak = done.stderr.rpartition("PEAK ")
    return done.stdout, lines, seconds, int(peak)


def compared(promised: dict[str, float], path: Path, seconds: float, memory: int) -> dict[str, dict[str, float]]:
    """Each promise beside what came, and their ratio."""
    came = {"seconds": seconds, "bytes": float(path.stat().st_size), "memory_bytes": float(memory)}
    return {
        name: {"promised": promised[name], "came": value, "ratio": promised[name] / value}
        for name, value in came.items()
    }


def by_preview(folder: Path, seconds: str) -> dict[str, dict[str, float]]:
    """The preview's promise and the run."""
    shown, _, _, _ = command("preview", str(CLIP), "-o", str(folder / "p.mp4"), "--seconds", seconds, "--json", "-q")
    output = folder / "film.mp4"
    report = folder / "report.json"
    _, _, _, memory = command("upscale", str(CLIP), "-o", str(output), "-q", "--report", str(report))
    took = json.loads(report.read_text())["clips"][0]["seconds"]["total"]
    return compared(json.loads(shown)["whole"], output, took, memory)


def at_the_start(folder: Path, copies: int) -> dict[str, dict[str, float]]:
    """What a long run says of itself, and how it ends."""
    source, output, report = folder / "long.mp4", folder / "long_film.mp4", folder / "long.json"
    repeated(copies, source)
    words = ["upscale", str(source), "-o", str(output), "--progress", "json", "--report", str(report)]
    _, lines, _, memory = command(*words)
    events = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    promised = next(event for event in events if event["event"] == "estimate")
    took = json.loads(report.read_text())["clips"][0]["seconds"]["total"]
    return compared(promised, output, took, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", default="2", help="of the preview")
    parser.add_argument("--copies", type=int, default=4, help="of the sample clip in the long run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        found = {
            "preview": by_preview(Path(first), arguments.seconds),
            "start_of_a_long_run": at_the_start(Path(second), arguments.copies),
        }
    worst = max(abs(entry["ratio"] - 1) for kind in found.values() for entry in kind.values())
    result = {
        "command": "python benchmarks/estimate.py",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "system": platform.system(),
            "load": os.getloadavg(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
        "clip": CLIP.name,
        "preview_seconds": arguments.seconds,
        "copies": arguments.copies,
        **found,
        "worst": worst,
        "limit": LIMIT,
        "is_within_limit": worst <= LIMIT,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for kind, entries in found.items():
        print(kind, {name: round(entry["ratio"], 3) for name, entry in entries.items()})
    print(f"worst {worst:.3f}; written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
