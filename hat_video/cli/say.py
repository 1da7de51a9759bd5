"""What the commands print: results on stdout, all else on stderr; the bar; and how they are interrupted."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pydantic import TypeAdapter
from tqdm import tqdm

from hat_video.errors import OutputError
from hat_video.jobs.directory import DirectoryReport
from hat_video.jobs.estimate import Estimate
from hat_video.jobs.report import FileReport, Progress, Stage

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "USAGE",
    "Meter",
    "Say",
    "interruptible",
    "say_as",
    "tell_progress",
    "tell_report",
    "tell_streams",
    "tell_table",
    "terminable",
    "write_report",
]

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@dataclass(frozen=True, slots=True)
class Say:
    """What to print: results on stdout, everything else on stderr."""

    progress: Literal["bar", "json", "none"]
    is_quiet: bool
    is_verbose: bool

    def result(self, line: str) -> None:
        if not self.is_quiet:
            print(line, flush=True)

    def note(self, line: str) -> None:
        if not self.is_quiet and self.progress != "json":
            tqdm.write(line, file=sys.stderr)

    def event(self, name: str, facts: dict[str, object]) -> None:
        if self.progress == "json":
            # In one piece: other threads have lines of their own.
            sys.stderr.write(json.dumps({"event": name, **facts}) + "\n")
            sys.stderr.flush()


def say_as(progress: Literal["auto", "bar", "json", "none"], *, is_quiet: bool, is_verbose: bool) -> Say:
    """What `--progress`, `-q` and `-v` come to: `auto` is a bar on a terminal."""
    automatic: Literal["bar", "none"] = "bar" if sys.stderr.isatty() and not is_quiet else "none"
    return Say(automatic if progress == "auto" else progress, is_quiet, is_verbose)


def write_report(path: Path | None, kind: Any, report: object) -> None:
    """Writes a report as JSON, if one is wanted.

    Args:
        path: `--report`.
        kind: the report's type.
        report: what was done.

    Raises:
        OutputError: it cannot be written.
    """
    if path is None:
        return
    from hat_video.files import write_atomically

    try:
        write_atomically(path, TypeAdapter(kind).dump_json(report, indent=1) + b"\n")
    except OutputError as error:
        raise OutputError(f"--report {error}") from None


class Meter:
    """Progress as a bar, as JSON lines, or not at all."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._bar: tqdm[Any] | None = None

    def __call__(self, progress: Progress) -> None:
        if self._say.progress == "json":
            facts = asdict(progress)
            self._say.event(
                "progress",
                {name: str(value) if isinstance(value, Path) else value for name, value in facts.items()},
            )
        elif self._say.progress == "bar":
            self._draw(progress)

    def _draw(self, progress: Progress) -> None:
        if progress.stage in ("plan", "done"):
            self.close()
        elif progress.stage == "work":
            if self._bar is None:
                name = (
                    progress.source.name
                    if progress.clips == 1
                    else f"{progress.clip}/{progress.clips} {progress.source.name}"
                )
                self._bar = tqdm(
                    total=progress.frames_total,
                    initial=progress.frames_reused,
                    desc=name,
                    unit=" frames",
                    dynamic_ncols=True,
                )
            self._bar.update(progress.frames_done - self._bar.n)
        elif self._bar is not None:
            self._bar.update(progress.frames_done - self._bar.n)
            self._bar.set_postfix_str({"join": "joining", "verify": "proving"}[progress.stage])

    def estimate(self, estimate: Estimate) -> None:
        """Said once, above the bar."""
        self._say.event("estimate", asdict(estimate))
        self._say.note(estimate.line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def tell_progress(
    say: Say,
    stage: Stage,
    source: Path,
    output: str | Path,
    *,
    frames_done: int,
    frames_total: int | None = None,
    fps: float | None = None,
    clip: int = 1,
    clips: int = 1,
) -> None:
    """Progress of what is no clip, in the same fields; null is what a pipe or a picture cannot know."""
    facts = {
        "stage": stage,
        "source": str(source),
        "output": str(output),
        "frames_done": frames_done,
        "frames_total": frames_total,
        "frames_reused": 0,
        "fps": fps,
        "eta_seconds": None,
        "clip": clip,
        "clips": clips,
    }
    say.event("progress", facts)


def tell_report(report: FileReport, say: Say) -> None:
    say.event(
        report.status.replace(" ", "_"),
        {"source": str(report.source), "output": str(report.output), "error": report.error, "frames": report.frames},
    )
    if report.status == "failed":
        print(f"hat-video: {report.error}", file=sys.stderr)
        return
    for note in report.notes:
        say.note(f"note: {note}")
    tell_streams(report.streams, say)
    if say.is_verbose:
        say.note(f"recipe: {json.dumps(report.recipe, default=str)}")
        say.note(f"seconds: {json.dumps(report.seconds)}")
    if report.status == "already done":
        say.result(f"{report.output}: already done; {report.verification}")
        return
    pace = f", {report.fps:.2f} frames/s" if report.fps else ""
    say.result(f"{report.output}: {report.verification}{pace}")


def tell_streams(streams: Sequence[Mapping[str, object]], say: Say) -> None:
    """Which streams of a source did not come along as they are, and why."""
    for stream in streams:
        if stream["action"] in ("convert", "drop") or (say.is_verbose and stream["action"] != "video"):
            target = f" to {stream['target']}" if stream["action"] == "convert" else ""
            reason = f" ({stream['reason']})" if stream["reason"] else ""
            say.note(
                f"stream #{stream['index']} {stream['kind']}/{stream['codec']}: {stream['action']}{target}{reason}"
            )


def tell_table(report: DirectoryReport, say: Say) -> None:
    say.result("")
    for clip in report.clips:
        frames = f"{clip.frames.get('out', 0):>7} frames" if clip.status != "failed" else " " * 14
        say.result(f"{clip.status:<12} {frames}  {clip.source}")
    say.result(f"{len(report.clips) - len(report.failed)} of {len(report.clips)} clips are done")


@contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM end what runs as Ctrl-C does, so that it can put away what it has made."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interruptible(*, leaves_at_second: bool = True) -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks the run to stop and keep what is committed, the second one leaves at once.

    Args:
        leaves_at_second: False under a launcher that passes on what the terminal has sent already, and ends what does
            not end by itself.
    """
    cancel = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if cancel.is_set() and leaves_at_second:
            os._exit(INTERRUPTED)
        cancel.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancel
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
