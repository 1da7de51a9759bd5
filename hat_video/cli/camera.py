"""`hat-video camera` and `hat-video devices`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import TypeAdapter

from hat_video.cli.declare import Verbose, declare
from hat_video.cli.say import FAILED, Say, interruptible, say_as, write_report
from hat_video.jobs.camera import CameraEvent, CameraReport, upscale_camera
from hat_video.jobs.camera_options import CameraOptions
from hat_video.jobs.report import check_report
from hat_video.live.figures import LiveFigures
from hat_video.live.sources import Device, list_devices

__all__ = ["camera_command", "devices_command"]

_TOKEN = "HAT_VIDEO_TOKEN"


class _Line:
    """The figures in one line that stays in its place, or as JSON lines."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._width = 0

    def figures(self, now: LiveFigures) -> None:
        """Once a second."""
        if self._say.progress == "json":
            self._say.event("figures", json.loads(TypeAdapter(LiveFigures).dump_json(now)))
        elif self._say.progress == "bar":
            line = status_line(now)
            sys.stderr.write(f"\r{line.ljust(self._width)}")
            sys.stderr.flush()
            self._width = len(line)

    def event(self, event: CameraEvent) -> None:
        """Between two lines of figures."""
        self._say.event(event.kind, {"seconds": event.seconds, "text": event.text})
        self.clear()
        self._say.note(event.text)

    def clear(self) -> None:
        if self._width:
            sys.stderr.write(f"\r{' ' * self._width}\r")
            self._width = 0


def status_line(now: LiveFigures) -> str:
    """For people: `in 15.0 out 14.9 fps  drop 1%  lat 96 ms  cnn-pico-video  reconnects 1`."""
    lost = sum(now.dropped.values())
    share = 100 * lost / now.frames_in if now.frames_in else 0.0
    words = [
        f"in {now.fps_in:.1f} out {now.fps_out:.1f} fps",
        f"drop {share:.0f}%",
        f"lat {1000 * now.latency_p50_seconds:.0f} ms",
        now.rung,
    ]
    if not now.is_source_up:
        words.append("NO PICTURE")
    if now.reconnects:
        words.append(f"reconnects {now.reconnects}")
    if now.viewers:
        words.append(f"viewers {now.viewers}")
    words += [f"{output.name}: DOWN" for output in now.outputs if not output.is_up]
    return "  ".join(words)


@declare(CameraOptions)
def camera_command(
    source: Annotated[
        str,
        typer.Argument(
            help="0, /dev/video0, a camera's name, rtsp:// rtmp:// http(s):// udp:// tcp:// srt://, screen:, test:, -",
            metavar="SOURCE",
        ),
    ],
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--output",
            help="FILE.mp4, .mkv or .ts (%Y%m%d-%H%M%S with --segment), a folder live/ for HLS, rtmp:// rtsp:// srt://"
            " udp:// tcp://, vcam:, or - for a player; can be repeated",
            metavar="OUT",
        ),
    ] = None,
    form: Annotated[
        Literal["nut", "mkv"], typer.Option("--format", help="of the stream to -o -", metavar="NAME")
    ] = "nut",
    report: Annotated[Path | None, typer.Option(help="write what was done as JSON", metavar="FILE.json")] = None,
    progress: Annotated[
        Literal["auto", "bar", "json", "none"], typer.Option(help="auto: a line of figures on a terminal")
    ] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="print every choice; a traceback with an error")
    ] = False,
    *,
    choices: dict[str, Any],
) -> None:
    """Upscale a camera while it runs: record, push, show on a page."""
    say = say_as(progress, is_quiet=quiet, is_verbose=verbose)
    check_report(report)
    options = CameraOptions(**choices)
    if options.token is None and options.serve is not None and os.environ.get(_TOKEN):
        options = replace(options, token=os.environ[_TOKEN])
    line = _Line(say)
    with interruptible() as cancel:
        try:
            made = upscale_camera(
                source,
                outputs or (),
                options,
                stdout_format=form,
                on_figures=line.figures,
                on_event=line.event,
                cancel=cancel,
            )
        finally:
            line.clear()
    write_report(report, CameraReport, made)
    _tell(made, say)
    raise typer.Exit(FAILED if made.failed_outputs else 0)


def _tell(made: CameraReport, say: Say) -> None:
    figures, latencies = made.figures, made.latencies
    say.event("done", {"frames": {"in": figures.frames_in, "out": figures.frames_out}, "error": None})
    dropped = ", ".join(f"{count} {reason}" for reason, count in figures.dropped.items() if count) or "none"
    say.note(
        f"{figures.frames_out} of {figures.frames_in} frames in {figures.seconds:.1f} s; dropped: {dropped};"
        f" latency {1000 * latencies.p50_seconds:.0f} ms, at most {1000 * latencies.most_seconds:.0f} ms"
    )
    total = max(1, figures.frames_out)
    say.note("; ".join(f"{rung.model} {100 * rung.frames / total:.0f} %" for rung in figures.rungs))
    for output in figures.outputs:
        lost = f", {output.dropped} dropped" if output.dropped else ""
        say.note(f"{output.name}: {output.frames} frames{lost}")
    if say.is_verbose:
        say.note(f"settings: {json.dumps(made.settings, default=str)}")
    for line in made.failed_outputs:
        print(f"hat-video: {line}", file=sys.stderr)


def devices_command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    verbose: Verbose = False,
) -> None:
    """List the cameras and screens that `hat-video camera` can take."""
    found = list_devices()
    if as_json:
        print(TypeAdapter(list[Device]).dump_json(found, indent=1).decode())
        return
    for device in found:
        print(f"{device.url}\t{device.kind}\t{device.name}")
    if not found:
        print("no cameras and no screen here; streams (rtsp://...) and test: need none", file=sys.stderr)
