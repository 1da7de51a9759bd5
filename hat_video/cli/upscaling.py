"""`hat-video upscale` and `hat-video preview`: files, directories, pictures and pipes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer
from pydantic import TypeAdapter
from tqdm import tqdm

from hat_video.cli.declare import declare
from hat_video.cli.say import FAILED, Meter, Say, check_report, interruptible, say_as, tell_report, tell_table
from hat_video.errors import CancelledError, HatVideoError, OptionError, OutputError, SourceError, UsageError
from hat_video.jobs.choices import load_chosen_model, make_upscaler, output_label
from hat_video.jobs.directory import DirectoryReport, plan_clips, upscale_clips
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions, load_config
from hat_video.jobs.report import FileReport
from hat_video.jobs.workspace import made_folder
from hat_video.media.stills import is_still
from hat_video.presets import preset_names

__all__ = ["preview_command", "upscale_command"]


def _upscale(
    inputs: list[Path],
    output: str | None,
    report: Path | None,
    say: Say,
    options: UpscaleOptions,
    cancel: threading.Event,
) -> int:
    is_one = len(inputs) == 1 and not inputs[0].is_dir()
    check_report(report)
    clips, skipped = plan_clips(inputs, output, output_label(options))
    for path in skipped:
        what = "a picture; give it by name" if is_still(path) else "not a video by its name"
        say.note(f"skipped {path}: {what}")
    meter = Meter(say)

    def tell(done: FileReport) -> None:
        meter.close()
        tell_report(done, say)

    def write(whole: DirectoryReport) -> None:
        if report is not None:
            report.write_bytes(TypeAdapter(DirectoryReport).dump_json(whole, indent=1) + b"\n")

    try:
        if is_one:
            source, target = clips[0].source, clips[0].output
            try:
                made = upscale_file(
                    source, target, options, on_progress=meter, on_estimate=meter.estimate, cancel=cancel
                )
            except HatVideoError as error:
                write(DirectoryReport([FileReport("failed", source, target, error=str(error))], skipped))
                raise
            tell(made)
            whole = DirectoryReport([made], skipped)
        else:
            whole = DirectoryReport(
                upscale_clips(
                    clips, options, on_progress=meter, on_estimate=meter.estimate, on_report=tell, cancel=cancel
                ),
                skipped,
            )
            tell_table(whole, say)
    finally:
        meter.close()
    write(whole)
    return FAILED if whole.failed else 0


def _is_pipe(path: str | Path | None) -> bool:
    try:
        return path is not None and (str(path) == "-" or Path(path).is_fifo())
    except OSError:
        return False  # a name that no file can have; whoever opens it says so


@contextmanager
def _taker(output: str, form: str, *, may_replace: bool) -> Iterator[BinaryIO]:
    """Where a stream goes. A file gets its name once all of it is there."""
    path = Path(output)
    if output == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    is_file = path.is_file() or not path.exists()
    if is_file and path.suffix.lower() != f".{form}":
        raise OptionError(f"-o {output}: the stream is {form}, call it so: {path.with_suffix(f'.{form}').name}")
    if path.is_file() and not may_replace:
        raise OutputError(f"{output}: exists; use --overwrite or another -o")
    part = path.with_name(f"{path.name}.part") if is_file else path
    try:
        with part.open("wb") as file:
            yield file
        if is_file:
            part.replace(path)
    except BaseException as error:
        if is_file:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, HatVideoError):
            raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from None
        raise


def _stream(
    source: Path,
    output: str | None,
    form: str | None,
    report_file: Path | None,
    say: Say,
    options: UpscaleOptions,
    cancel: threading.Event,
) -> int:
    """Pipes: one pass; stdout belongs to the video, so all that is said goes to stderr."""
    from hat_video.jobs.stream import StreamReport, upscale_stream
    from hat_video.media.sinks import PIPE_FORMATS

    if output is None:
        raise UsageError(f"{source}: give -o, a file or - for a pipe")
    suffix = Path(output).suffix.lower().removeprefix(".")
    chosen = form or (suffix if suffix in PIPE_FORMATS else "mkv")
    done = 0
    with ExitStack() as stack, tqdm(unit=" frames", disable=say.progress != "bar") as bar:
        try:
            given = sys.stdin.buffer if str(source) == "-" else stack.enter_context(source.open("rb"))
        except OSError as error:
            raise SourceError(f"{source}: cannot be opened: {error.strerror}") from None
        taken = stack.enter_context(_taker(output, chosen, may_replace=options.overwrite))

        def count(frames: int) -> None:
            nonlocal done
            done += frames
            bar.update(frames)
            say.event("progress", {"stage": "work", "source": str(source), "output": output, "frames_done": done})

        report = upscale_stream(
            given, taken, options, form=chosen, source_name=str(source), on_frames=count, cancel=cancel
        )
    if report_file is not None:
        report_file.write_bytes(TypeAdapter(StreamReport).dump_json(report, indent=1) + b"\n")
    for note in report.notes:
        say.note(f"note: {note}")
    pace = report.frames / report.seconds if report.seconds else 0.0
    say.event("done", {"source": str(source), "output": output, "error": None, "frames": {"out": report.frames}})
    say.note(f"{report.frames} frames went through, {pace:.2f} frames/s; a pipe cannot be proven or resumed")
    return 0


def _stills(
    paths: list[Path],
    output: str | None,
    report_file: Path | None,
    say: Say,
    options: UpscaleOptions,
    cancel: threading.Event,
) -> int:
    """Pictures, one after the other; a bad one does not stop the rest."""
    from hat_video.jobs.still import StillReport, upscale_still

    model = load_chosen_model(options)
    upscaler = make_upscaler(model, options)
    is_folder = output is not None and (len(paths) > 1 or output.endswith(os.sep) or Path(output).is_dir())
    targets: dict[Path, Path | None] = {
        path: None if output is None else Path(output) / path.name if is_folder else Path(output) for path in paths
    }
    taken: dict[Path, Path] = {}
    for path, target in targets.items():
        if target is not None and taken.setdefault(target, path) != path:
            raise UsageError(f"{taken[target]} and {path} would both become {target}; rename one, or run them apart")
    reports: list[StillReport] = []
    failed = 0
    for path, target in targets.items():
        if cancel.is_set():
            raise CancelledError("the pictures that are done are kept")
        try:
            with made_folder((target or path).parent):
                made = upscale_still(path, target, options, upscaler)
        except HatVideoError as error:
            if len(paths) == 1:
                raise
            print(f"hat-video: {error}", file=sys.stderr)
            failed += 1
            continue
        reports.append(made)
        for note in made.notes:
            say.note(f"note: {note}")
        carried = f", with {', '.join(name.removesuffix('-data') for name in made.kept)}" if made.kept else ""
        say.event("done", {"source": str(path), "output": str(made.output), "error": None, "frames": {"out": 1}})
        say.result(f"{made.output}: {made.size[0]}x{made.size[1]}, {made.bit_depth} bits{carried}")
    if report_file is not None:
        report_file.write_bytes(TypeAdapter(list[StillReport]).dump_json(reports, indent=1) + b"\n")
    return FAILED if failed else 0


def _use_config(context: typer.Context, name: str | None) -> str | None:
    """Lets a config file stand in for the defaults, so that what is typed wins over it."""
    if name is not None:
        context.default_map = {**asdict(load_config(name)), **(context.default_map or {})}
    return name


@declare(UpscaleOptions)
def upscale_command(
    inputs: Annotated[list[Path], typer.Argument(help="files, and directories to search through", metavar="INPUT...")],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", help="file or directory; default: <stem>_x<scale> beside the input", metavar="PATH"
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="a TOML file of options, or a preset: " + ", ".join(preset_names("upscale")),
            metavar="NAME|FILE",
            is_eager=True,
            callback=_use_config,
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="write what was done as JSON", metavar="FILE.json")] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="of a pipe (-o -): mkv, nut or y4m; default: mkv", metavar="NAME")
    ] = None,
    progress: Annotated[
        Literal["auto", "bar", "json", "none"], typer.Option(help="auto: a bar on a terminal")
    ] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="print every choice; a traceback with an error")
    ] = False,
    *,
    choices: dict[str, Any],
) -> None:
    """Upscale clips, with their sound and all else that they carry, and prove the result."""
    say = say_as(progress, is_quiet=quiet, is_verbose=verbose)
    with interruptible() as cancel:
        if _is_pipe(output) or any(_is_pipe(path) for path in inputs):
            if len(inputs) > 1:
                raise UsageError("-: a pipe goes alone; give one input")
            raise typer.Exit(_stream(inputs[0], output, form, report, say, UpscaleOptions(**choices), cancel))
        pictures = [path for path in inputs if is_still(path)]
        if pictures and len(pictures) == len(inputs):
            raise typer.Exit(_stills(inputs, output, report, say, UpscaleOptions(**choices), cancel))
        if pictures:
            raise UsageError(f"{pictures[0]}: is a picture, and other inputs are not; give pictures and clips apart")
        if form is not None:
            raise UsageError(f"--format {form}: is for pipes (-o -); a file's suffix says what it is")
        raise typer.Exit(_upscale(inputs, output, report, say, UpscaleOptions(**choices), cancel))


@declare(UpscaleOptions, without=("start", "duration"))
def preview_command(
    clip: Annotated[Path, typer.Argument(help="a video", metavar="CLIP")],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="the clip to make; default: <stem>_preview.mp4 beside it", metavar="PATH"),
    ] = None,
    at: Annotated[str | None, typer.Option(help="seconds or HH:MM:SS.mmm; default: the middle", metavar="T")] = None,
    seconds: Annotated[str, typer.Option(help="how long", metavar="T")] = "5",
    config: Annotated[
        str | None,
        typer.Option(
            help="as for upscale", metavar="NAME|FILE", is_eager=True, callback=_use_config, show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="no bar, no notes")] = False,
    *,
    choices: dict[str, Any],
) -> None:
    """Upscale a few seconds, show them beside the source, and say what the whole clip would take."""
    from hat_video.jobs.preview import PreviewReport, preview_file

    say = say_as("auto", is_quiet=quiet, is_verbose=False)
    meter = Meter(say)
    with interruptible() as cancel:
        try:
            made = preview_file(
                clip, output, UpscaleOptions(**choices), at=at, seconds=seconds, on_progress=meter, cancel=cancel
            )
        finally:
            meter.close()
    for note in made.notes:
        say.note(f"note: {note}")
    if as_json:
        print(TypeAdapter(PreviewReport).dump_json(made, indent=1).decode())
        return
    print(f"{made.source}, {made.frames} frames from {made.start_seconds:.3f} s: {made.fps:.2f} frames/s")
    print(f"the whole clip: {made.whole.line}")
    print(f"{made.clip} and {made.picture}: left the source, enlarged by bicubic; right the result")
