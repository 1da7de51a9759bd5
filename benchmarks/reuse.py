"""What it saves to compute nothing twice: screens, animation on twos, a moving camera.

    python benchmarks/reuse.py --clips FOLDER/*     # results/reuse.json, the tables of docs/reuse.md
    python benchmarks/reuse.py --tables             # docs/reuse.md from the JSON

Frames are decoded beforehand, and made in memory by as many threads as there are CPUs. Each way of making them is timed
in turns with whole frames of the same material, of which a sample is enough: they all cost the same. What it has made
is compared with the whole frames, to the bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.screen import record_all  # noqa: E402
from benchmarks.timing import machine, versions  # noqa: E402
from hat_video import Upscaler, load_model, open_source  # noqa: E402
from hat_video.frames import FrameBatch, PixelFormat, VideoInfo  # noqa: E402
from hat_video.inference.double_buffer import map_in_flight  # noqa: E402
from hat_video.inference.processors import cpu_count  # noqa: E402
from hat_video.jobs.picture import FrameUpscaler, Reuse  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "reuse.json"
PAGE = ROOT / "docs" / "reuse.md"
BEGIN, END = "<!-- made by benchmarks/reuse.py -->", "<!-- /reuse -->"
SAMPLE = ROOT / "samples" / "bbb_320x180.mp4"
JOBS = cpu_count()
COMPARED = 6


@dataclass(frozen=True)
class Material:
    """Frames of one kind."""

    name: str
    info: VideoInfo
    frames: list[FrameBatch]


def read(path: Path, name: str, most: int) -> Material:
    """The first frames of a clip, one a batch."""
    with open_source(path) as source:
        frames: list[FrameBatch] = []
        for batch in source.read():
            frames += [
                FrameBatch(tuple(plane[number : number + 1] for plane in batch.planes), (batch.pts[number],))
                for number in range(len(batch))
            ]
            if len(frames) >= most:
                break
        return Material(name, source.info, frames[:most])


def on_twos(path: Path, drawings: int, options: dict[str, str]) -> Path:
    """Writes an animation of the sample's frames, each of them shown for two: the camera rests, the drawing changes."""
    with av.open(str(SAMPLE)) as source, av.open(str(path), "w") as out:
        first = source.streams.video[0]
        stream = out.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = first.width, first.height, "yuv420p", 1
        for number, frame in enumerate(source.decode(video=0)):
            if number == drawings:
                break
            for shown in range(2):
                frame.pts, frame.time_base, frame.pict_type = 2 * number + shown, Fraction(1, 24), 0
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def large_info(info: VideoInfo, scale: int) -> VideoInfo:
    """Of the enlarged frames: 4:2:0, as they are encoded."""
    form = info.pixel_format if info.pixel_format.kind == "yuv" else PixelFormat.parse("yuv420p")
    color = info.color if info.color.matrix else replace(info.color, matrix=1, is_full_range=False)
    return replace(info, width=info.width * scale, height=info.height * scale, pixel_format=form, color=color)


def make(upscaler: Upscaler, material: Material, reuse: Reuse) -> tuple[float, list[FrameBatch], FrameUpscaler]:
    """Seconds for all frames, the frames, and what was reused."""
    work = FrameUpscaler(upscaler, material.info, large_info(material.info, upscaler.scale), reuse=reuse)
    began = time.perf_counter()
    made = map_in_flight(work, map(work.look, material.frames), workers=JOBS, stop=threading.Event())
    frames = [work.settled(one) for one in made]
    return time.perf_counter() - began, frames, work


def make_whole(upscaler: Upscaler, material: Material, numbers: Sequence[int]) -> tuple[float, list[FrameBatch]]:
    """Seconds a frame when nothing is reused nor compared, and these frames."""
    work = FrameUpscaler(upscaler, material.info, large_info(material.info, upscaler.scale))

    def alone(number: int) -> FrameBatch:
        # Each is the first of a segment.
        with lock:
            work.forget()
            task = work.look(material.frames[number])
            work.forget()
        return work.settled(work(task))

    lock = threading.Lock()
    began = time.perf_counter()
    frames = list(map_in_flight(alone, numbers, workers=JOBS, stop=threading.Event()))
    return (time.perf_counter() - began) / len(numbers), frames


def compare(upscaler: Upscaler, material: Material, rounds: int) -> dict[str, Any]:
    """`same` and `changed` against whole frames, in turns."""
    count = len(material.frames)
    sample = [round(number * (count - 1) / (4 * JOBS - 1)) for number in range(4 * JOBS)]
    make_whole(upscaler, material, sample[:JOBS])
    make(upscaler, replace(material, frames=material.frames), "changed")
    ratios: dict[str, list[float]] = {"same": [], "changed": []}
    works: dict[str, FrameUpscaler] = {}
    is_equal = True
    for _ in range(rounds):
        per_frame, whole = make_whole(upscaler, material, sample)
        for reuse in ("same", "changed"):
            seconds, frames, works[reuse] = make(upscaler, material, reuse)
            ratios[reuse].append(per_frame * count / seconds)
            for number, expected in list(zip(sample, whole, strict=True))[:: max(1, len(sample) // COMPARED)]:
                is_equal &= all(map(torch.equal, frames[number].planes, expected.planes))
    changed = works["changed"]
    result = {
        "size": [material.info.width, material.info.height],
        "frames": count,
        "same_frames": changed.same / count,
        "computed": changed.pixels_computed / changed.pixels,
        "faster": {reuse: statistics.median(values) for reuse, values in ratios.items()},
        "rounds": ratios,
        "changed_over_same": statistics.median(b / a for a, b in zip(ratios["same"], ratios["changed"], strict=True)),
        "same_bits": is_equal,
    }
    print(f"{material.name}: {result}", flush=True)
    return result


def materials(folder: Path, clips: Sequence[Path], frames: int) -> list[Material]:
    """All of them; screens are recorded now."""
    print("recording screens", flush=True)
    record_all(folder, frames)
    lossless, usual = {"qp": "0"}, {"crf": "18"}
    found = [
        read(folder / "terminal.mkv", "a terminal, lossless", frames),
        read(folder / "terminal_h264.mp4", "a terminal, H.264 crf 23", frames),
        read(folder / "page.mkv", "a page that is scrolled, lossless", frames),
        read(folder / "page_h264.mp4", "a page that is scrolled, H.264 crf 23", frames),
        read(on_twos(folder / "twos.mp4", 24, lossless), "animation on twos, lossless", 48),
        read(on_twos(folder / "twos18.mp4", 24, usual), "animation on twos, H.264 crf 18", 48),
        read(SAMPLE, "a film: the sample clip", 48),
    ]
    return found + [read(path, path.name, 24) for path in clips]


def tables(result: dict[str, Any]) -> str:
    """For docs/reuse.md."""
    rows = [
        "| material | frames | equal to the one before | pixels computed | `same` | `changed` | `changed` over `same` |"
    ]
    rows.append("|---|---|---|---|---|---|---|")
    for name, entry in result["materials"].items():
        width, height = entry["size"]
        same, changed = (f"{entry['faster'][reuse]:.2f}x" for reuse in ("same", "changed"))
        rows.append(
            f"| {name}, {width}x{height} | {entry['frames']} | {entry['same_frames']:.0%} | {entry['computed']:.1%}"
            f" | {same} | {changed} | {entry['changed_over_same']:.3f} |"
        )
    return "\n".join(rows)


def page_with(text: str, result: dict[str, Any]) -> str:
    """The page with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(result)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, nargs="*", default=[])
    parser.add_argument("--model", default="hat-pico")
    parser.add_argument("--frames", type=int, default=150, help="of each screen")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="only write the page from the JSON")
    arguments = parser.parse_args()
    if not arguments.tables:
        torch.set_num_threads(1)
        model = load_model(arguments.model)
        upscaler = Upscaler(model, in_flight=JOBS)
        with tempfile.TemporaryDirectory() as folder:
            found = {
                one.name: compare(upscaler, one, arguments.rounds)
                for one in materials(Path(folder), arguments.clips, arguments.frames)
            }
        result = {
            "command": "python benchmarks/reuse.py --clips ...",
            "machine": machine(),
            "versions": versions("torch", "openvino", "av"),
            "model": f"{model.name} x{model.scale}",
            "backend": upscaler.backend,
            "precision": upscaler.precision,
            "frames_in_flight": JOBS,
            "materials": found,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
