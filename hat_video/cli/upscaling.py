"""`hat-video upscale` and `hat-video preview`: files, directories, pictures and pipes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer
from pydantic import TypeAdapter
from tqdm import tqdm

from hat_video.cli.declare import Verbose, declare
from hat_video.cli.say import (
    FAILED,
    Meter,
    Say,
    interruptible,
    say_as,
    tell_progress,
    tell_report,
    tell_streams,
    tell_table,
    write_report,
)
from hat_video.errors import CancelledError, HatVideoError, OptionError, OutputError, SourceError, UsageError
from hat_video.jobs.choices import load_chosen_model, make_upscaler, output_label
from hat_video.jobs.directory import DirectoryReport, plan_clips, upscale_clips
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions, load_config
from hat_video.jobs.report import FileReport, Stage, check_report
from hat_video.jobs.sequence import as_film
from hat_video.jobs.workspace import made_folder
from hat_video.media.sequence import is_sequence, plain_name
from hat_video.media.stills import is_still
from hat_video.paths import JsonPath
from hat_video.presets import preset_names

__all__ = ["preview_command", "upscale_command"]

# Seconds between two events of a pipe; a file's come at the same pace.
_TELL_EVERY = 0.2


def _upscale(
    inputs: list[Path],
    output: str | None,
    report: Path | None,
    say: Say,
    options: UpscaleOptions,
    cancel: threading.Event,
) -> int:
    is_one = len(inputs) == 1 and not inputs[0].is_dir()
    clips, skipped = plan_clips(inputs, output, output_label(options))
    for path in skipped:
        what = "a picture; give it by name" if is_still(path) else "not a video by its name"
        say.event("skipped", {"source": str(path), "reason": what})
        say.note(f"skipped {path}: {what}")
    meter = Meter(say)

    def tell(done: FileReport) -> None:
        meter.close()
        tell_report(done, say)

    try:
        if is_one:
            source, target = clips[0].source, clips[0].output
            try:
                made = upscale_file(
                    source, target, options, on_progress=meter, on_estimate=meter.estimate, cancel=cancel
                )
            except HatVideoError as error:
                failed = FileReport("failed", source, target, error=str(error))
                write_report(report, DirectoryReport, DirectoryReport([failed], skipped))
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
    write_report(report, DirectoryReport, whole)
    return FAILED if whole.failed else 0


def _outline(status: str, source: Path, output: str | Path, error: str | None = None) -> dict[str, Any]:
    """How each entry of a report begins."""
    written = TypeAdapter(JsonPath).dump_python
    return {
        "status": status,
        "source": written(source, mode="json"),
        "output": written(Path(output), mode="json"),
        "error": error,
    }


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
        if sys.stdout is None:
            raise OutputError("-o -: standard output is closed")
        try:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        except (HatVideoError, BrokenPipeError):
            raise
        except OSError as error:
            raise OutputError(f"-o -: cannot be written: {error.strerror or error}") from None
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


@contextmanager
def _giver(source: Path, output: str, options: UpscaleOptions) -> Iterator[BinaryIO]:
    """Where a stream comes from: standard input, a FIFO, a file, or numbered pictures as a film beside them."""
    if source.is_dir():
        raise UsageError(
            f"{source}: is a directory, and -o {output} takes one stream; give one video, numbered pictures, or -"
        )
    with ExitStack() as stack:
        if str(source) == "-":
            if sys.stdin is None:
                raise SourceError("-: standard input is closed")
            yield sys.stdin.buffer
            return
        if is_sequence(source):
            source = stack.enter_context(as_film(source, source.with_name(plain_name(source)), options))
        try:
            file = stack.enter_context(source.open("rb"))
        except OSError as error:
            raise SourceError(f"{source}: cannot be opened: {error.strerror or error}") from None
        yield file


class _Counter:
    """Progress of a pipe: as a bar, or a few times a second as JSON. How much will come is not known."""

    def __init__(self, say: Say, source: Path, output: str) -> None:
        self._say, self._source, self._output = say, source, output
        self._bar = tqdm(unit=" frames", disable=say.progress != "bar")
        self._done = 0
        self._began: float | None = None
        self._told = 0.0
        self.tell("plan")

    def __call__(self, frames: int) -> None:
        now = time.perf_counter()
        self._began = now if self._began is None else self._began
        self._done += frames
        self._bar.update(frames)
        if now - self._told >= _TELL_EVERY:
            self._told = now
            self.tell("work")

    def tell(self, stage: Stage) -> None:
        since = 0.0 if self._began is None else time.perf_counter() - self._began
        tell_progress(
            self._say,
            stage,
            self._source,
            self._output,
            frames_done=self._done,
            fps=(self._done - 1) / since if since and self._done > 1 else None,
        )

    def close(self) -> None:
        self._bar.close()


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
    from hat_video.jobs.stream import upscale_stream
    from hat_video.media.sinks import PIPE_FORMATS

    if output is None:
        raise UsageError(f"{source}: give -o, a file or - for a pipe")
    suffix = Path(output).suffix.lower().removeprefix(".")
    chosen = form or (suffix if suffix in PIPE_FORMATS else "mkv")
    names = {"source": str(source), "output": output}
    counter = _Counter(say, source, output)
    try:
        with (
            _giver(source, output, options) as given,
            _taker(output, chosen, may_replace=options.overwrite) as taken,
        ):
            report = upscale_stream(
                given,
                taken,
                # Of numbered pictures the film beside them has it.
                replace(options, rate=None) if is_sequence(source) else options,
                form=chosen,
                source_name=str(source),
                target_name="-o -" if output == "-" else output,
                on_frames=counter,
                cancel=cancel,
            )
    except HatVideoError as error:
        if not isinstance(error, CancelledError):
            write_report(report_file, dict[str, Any], _outline("failed", source, output, str(error)))
        raise
    finally:
        counter.close()
    counter.tell("done")
    for note in report.notes:
        say.note(f"note: {note}")
    tell_streams(report.streams, say)
    pace = report.frames / report.seconds if report.seconds else 0.0
    say.event("done", {**names, "error": None, "frames": report.counts})
    say.note(f"{report.frames} frames went through, {pace:.2f} frames/s; a pipe cannot be proven or resumed")
    write_report(report_file, dict[str, Any], {**_outline("done", source, output), **asdict(report)})
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
    targets = {
        path: path.with_name(f"{path.stem}_x{upscaler.scale}{path.suffix}")
        if output is None
        else Path(output) / path.name
        if is_folder
        else Path(output)
        for path in paths
    }
    taken: dict[Path, Path] = {}
    for path, target in targets.items():
        if taken.setdefault(target, path) != path:
            raise UsageError(f"{taken[target]} and {path} would both become {target}; rename one, or run them apart")
    reports: list[dict[str, object]] = []
    failed = 0
    for number, (path, target) in enumerate(targets.items(), 1):
        if cancel.is_set():
            raise CancelledError("the pictures that are done are kept")
        place = {"clip": number, "clips": len(targets), "frames_total": 1}
        names = {"source": str(path), "output": str(target)}
        tell_progress(say, "work", path, target, frames_done=0, **place)
        try:
            with made_folder(target.parent):
                made = upscale_still(path, target, options, upscaler)
        except Exception as error:  # whatever is wrong with one picture, the others are wanted
            is_ours = isinstance(error, HatVideoError)
            said = str(error) if is_ours else f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
            reports.append(_outline("failed", path, target, said))
            if len(paths) == 1:
                write_report(report_file, list[Any], reports)
                raise
            say.event("failed", {**names, "error": said, "frames": {}})
            print(f"hat-video: {said}", file=sys.stderr)
            failed += 1
            continue
        facts = TypeAdapter(StillReport).dump_python(made, mode="json")
        reports.append({**_outline("done", path, target), **facts})
        tell_progress(say, "done", path, target, frames_done=1, **place)
        for note in made.notes:
            say.note(f"note: {note}")
        carried = f", with {', '.join(name.removesuffix('-data') for name in made.kept)}" if made.kept else ""
        frames = {"in": 1, "out": 1, "lost": 0, "corrupt": 0, "reused": 0}
        say.event("done", {**names, "error": None, "frames": frames})
        say.result(f"{made.output}: {made.size[0]}x{made.size[1]}, {made.bit_depth} bits{carried}")
    write_report(report_file, list[Any], reports)
    return FAILED if failed else 0


def _use_config(context: typer.Context, name: str | None) -> str | None:
    """Lets a config file stand in for the defaults, so that what is typed wins over it."""
    if name is not None:
        context.default_map = {**asdict(load_config(name)), **(context.default_map or {})}
    return name


def _named_path(word: str) -> Path:
    """An empty word, often a variable that is not set, would be the current directory."""
    if not word:
        raise typer.BadParameter("'': is empty; give a file or a directory")
    return Path(word)


@declare(UpscaleOptions)
def upscale_command(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="files, and directories to search through", metavar="INPUT...", parser=_named_path),
    ],
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
    check_report(report)
    check_report(choices["trace"], "--trace")
    if report is not None and choices["trace"] is not None and report.absolute() == choices["trace"].absolute():
        raise OptionError(f"--report {report}: is --trace's file too; give it another name")
    if output == "":
        raise UsageError("-o '': is empty; give a file or a directory")
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
        typer.Option(
            "-o", "--output", help="the clip to make; default: <stem>_preview_TIMEs.mp4 beside it", metavar="PATH"
        ),
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
    verbose: Verbose = False,
    *,
    choices: dict[str, Any],
) -> None:
    """Upscale a few seconds, show them beside the source, and say what the whole clip would take."""
    from hat_video.jobs.preview import PreviewReport, preview_file

    say = say_as("auto", is_quiet=quiet, is_verbose=False)
    check_report(choices["trace"], "--trace")
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
