"""The command `hat-video`: the only place that prints, draws progress and sets exit codes.

Exit codes: 0 done and proven, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from pydantic import TypeAdapter
from tqdm import tqdm

from hat_video.errors import CancelledError, HatVideoError, OutputError, UsageError
from hat_video.jobs.directory import DirectoryReport, plan_clips, upscale_clips
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions, load_config
from hat_video.jobs.plan import cpu_count, load_chosen_model
from hat_video.jobs.report import FileReport, Progress
from hat_video.jobs.workspace import clean
from hat_video.presets import preset_names

__all__ = ["main"]

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Video super-resolution with HAT: exact, unkillable, and honest about its speed.",
)


@dataclass(frozen=True, slots=True)
class _Say:
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
            print(json.dumps({"event": name, **facts}), file=sys.stderr, flush=True)


class _Meter:
    """Progress as a bar, as JSON lines, or not at all."""

    def __init__(self, say: _Say) -> None:
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

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _upscale(
    inputs: list[Path],
    output: str | None,
    report: Path | None,
    say: _Say,
    options: UpscaleOptions,
    cancel: threading.Event,
) -> int:
    is_one = len(inputs) == 1 and not inputs[0].is_dir()
    if report is not None and (report.is_dir() or not report.absolute().parent.is_dir()):
        raise OutputError(f"--report {report}: not a file in an existing folder")
    clips, skipped = plan_clips(inputs, output, options.scale or load_chosen_model(options).scale)
    for path in skipped:
        say.note(f"skipped {path}: not a video by its name")
    meter = _Meter(say)

    def tell(done: FileReport) -> None:
        meter.close()
        _tell_report(done, say)

    def write(whole: DirectoryReport) -> None:
        if report is not None:
            report.write_bytes(TypeAdapter(DirectoryReport).dump_json(whole, indent=1) + b"\n")

    try:
        if is_one:
            source, target = clips[0].source, clips[0].output
            try:
                made = upscale_file(source, target, options, on_progress=meter, cancel=cancel)
            except HatVideoError as error:
                write(DirectoryReport([FileReport("failed", source, target, error=str(error))], skipped))
                raise
            tell(made)
            whole = DirectoryReport([made], skipped)
        else:
            whole = DirectoryReport(
                upscale_clips(clips, options, on_progress=meter, on_report=tell, cancel=cancel), skipped
            )
            _tell_table(whole, say)
    finally:
        meter.close()
    write(whole)
    return _FAILED if whole.failed else 0


def _tell_report(report: FileReport, say: _Say) -> None:
    say.event(
        report.status.replace(" ", "_"),
        {"source": str(report.source), "output": str(report.output), "error": report.error, "frames": report.frames},
    )
    if report.status == "failed":
        print(f"hat-video: {report.error}", file=sys.stderr)
        return
    for note in report.notes:
        say.note(f"note: {note}")
    for stream in report.streams:
        if stream["action"] in ("convert", "drop") or (say.is_verbose and stream["action"] != "video"):
            target = f" to {stream['target']}" if stream["action"] == "convert" else ""
            reason = f" ({stream['reason']})" if stream["reason"] else ""
            say.note(
                f"stream #{stream['index']} {stream['kind']}/{stream['codec']}: {stream['action']}{target}{reason}"
            )
    if say.is_verbose:
        say.note(f"recipe: {json.dumps(report.recipe, default=str)}")
        say.note(f"seconds: {json.dumps(report.seconds)}")
    if report.status == "already done":
        say.result(f"{report.output}: already done; {report.verification}")
        return
    pace = f", {report.fps:.2f} frames/s" if report.fps else ""
    say.result(f"{report.output}: {report.verification}{pace}")


def _tell_table(report: DirectoryReport, say: _Say) -> None:
    say.result("")
    for clip in report.clips:
        frames = f"{clip.frames.get('out', 0):>7} frames" if clip.status != "failed" else " " * 14
        say.result(f"{clip.status:<12} {frames}  {clip.source}")
    say.result(f"{len(report.clips) - len(report.failed)} of {len(report.clips)} clips are done")


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks the run to stop and keep what is committed, the second one leaves at once."""
    cancel = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            os._exit(_INTERRUPTED)
        cancel.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancel
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _declare(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command one option for each field of `UpscaleOptions`, with its type, default and help."""
    hints = get_type_hints(UpscaleOptions, include_extras=True)
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "choices"]
    declared = []
    for option in fields(UpscaleOptions):
        kind, text = get_args(hints[option.name])
        default = option.default
        flag = f"--{option.name.replace('_', '-')}"
        if kind == tuple[str, ...]:
            kind, default = list[str], []
        declared.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if isinstance(default, tuple) else default,
                annotation=Annotated[kind | None if kind == list[str] else kind, typer.Option(flag, help=text)],
            )
        )
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters[2:2] = declared

    def run(**values: Any) -> None:
        mine = {p.name: values.pop(p.name) for p in own}
        command(**mine, choices=values)

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _use_config(context: typer.Context, name: str | None) -> str | None:
    """Lets a config file stand in for the defaults, so that what is typed wins over it."""
    if name is not None:
        context.default_map = {**asdict(load_config(name)), **(context.default_map or {})}
    return name


@app.command(name="upscale")
@_declare
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
    shown = ("bar" if sys.stderr.isatty() and not quiet else "none") if progress == "auto" else progress
    say = _Say(shown, quiet, verbose)
    with _interruptible() as cancel:
        choices["encoder_option"] = tuple(choices["encoder_option"] or ())
        raise typer.Exit(_upscale(inputs, output, report, say, UpscaleOptions(**choices), cancel))


@app.command(name="probe")
def probe_command(
    source: Annotated[Path, typer.Argument(metavar="INPUT")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what is in a file: its video, every stream, and anything odd about it."""
    from hat_video.media.probe import Probe, probe

    found = probe(source)
    if as_json:
        print(TypeAdapter(Probe).dump_json(found, indent=1).decode())
        return
    video, index = found.video, found.index
    rate = f", {float(video.rate):.3f} frames/s on average" if video.rate else ""
    print(
        f"{source}: {found.format_name}, {float(found.duration_seconds):.3f} s from {float(found.start_seconds):.3f} s"
    )
    print(f"  {found.codec} {video.width}x{video.height} {video.pixel_format.name}, {len(index.pts)} frames{rate}")
    colour = video.color
    settled = f" (assumed: {', '.join(colour.assumed)})" if colour.assumed else ""
    print(
        f"  colour: matrix {colour.matrix}, primaries {colour.primaries}, transfer {colour.transfer},"
        f" {'full' if colour.is_full_range else 'limited'} range, chroma {colour.siting}{settled}"
    )
    for stream in found.streams:
        extra = "".join(f" {text}" for text in (stream.language, stream.title) if text)
        print(f"  #{stream.index} {stream.kind}/{stream.codec}{extra}")
    for note in found.notes:
        print(f"  note: {note}")


@app.command(name="models")
def models_command(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List the models: what each is for, its size, licence, and where to get it."""
    from hat_video.model.zoo import list_models

    models = list_models()
    if as_json:
        print(json.dumps([asdict(model) for model in models], indent=1, default=str))
        return
    for model in models:
        scales = "/".join(f"x{scale}" for scale in model.scales)
        print(f"{model.name:<28} {scales:<12} {model.purpose}")
        size = f"{model.parameters:,} parameters, " if model.parameters else ""
        print(f"{'':<41} {size}{model.licence}; {model.where}")


@app.command(name="doctor")
def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say what this machine can do, and what would be chosen on it."""
    from hat_video.jobs.doctor import examine

    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=1, default=str))
        return
    for name, value in facts.items():
        print(f"{name:<18} {', '.join(map(str, value)) if isinstance(value, list) else value}")


@app.command(name="train-data")
def train_data_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="the tile file to write", metavar="FILE.npy")],
    images: Annotated[list[Path] | None, typer.Option(help="a folder of your own photographs", metavar="DIR")] = None,
    only: Annotated[str, typer.Option(help="packages: all, none, or names with commas", metavar="NAMES")] = "all",
    keep_out: Annotated[
        list[Path] | None,
        typer.Option(help="pictures that must not be learnt from; Set5, Set14 and BSD100 never are", metavar="DIR"),
    ] = None,
    downloads: Annotated[
        Path | None, typer.Option(help="where packages are kept; default: beside the output", metavar="DIR")
    ] = None,
    vectors: Annotated[int, typer.Option(help="how many drawings to render", min=0)] = 2500,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = cpu_count(),
) -> None:
    """Build a training set from packages that anyone can install, and from your own photographs."""
    from hat_video.training.build import build_tiles, choose_packages

    with tqdm(unit=" files", disable=not sys.stderr.isatty()) as bar:

        def show(source: str, done: int, total: int) -> None:
            bar.set_description(source, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        report = build_tiles(
            output,
            packages=choose_packages(only),
            images=images or [],
            keep_out=keep_out or [],
            downloads=downloads or output.parent / "packages",
            vector_files=vectors,
            jobs=jobs,
            on_progress=show,
        )
    for source, seen in report.files_seen.items():
        print(f"{source:<32} {report.files_used[source]:>6} of {seen:>6} files used")
    for path in report.kept_out:
        print(f"kept out, it resembles an evaluation picture: {path}")
    groups = ", ".join(f"{count} {name}" for name, count in report.tiles.items())
    print(f"{output}: {report.tiles.total()} tiles ({groups}), {report.megapixels:.0f} megapixels;", end=" ")
    print(f"{report.duplicates} duplicates left out")


@app.command(name="train")
def train_command(
    config: Annotated[
        str, typer.Option(help="a TOML recipe, or one of: " + ", ".join(preset_names("train")), metavar="NAME|FILE")
    ],
    tiles: Annotated[Path, typer.Option(help="the tile file of `hat-video train-data`", metavar="FILE.npy")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the training", metavar="DIR")],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="another value: network.embed_dim=48", metavar="KEY=VALUE"),
    ] = None,
    stills: Annotated[list[Path] | None, typer.Option(help="a set of pictures to evaluate on", metavar="DIR")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option(help="threads on a CPU; 0 for torch's own choice", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="processes that prepare batches", min=0)] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")] = False,
) -> None:
    """Train a network; the same command goes on where it stopped. Several processes: torchrun -m hat_video train."""
    from hat_video.training.loop import Training, TrainProgress
    from hat_video.training.recipe import load_recipe, read_changes

    recipe = load_recipe(config, read_changes(change or []))
    with _interruptible() as cancel, tqdm(total=recipe.iterations, disable=quiet or not sys.stderr.isatty()) as bar:

        def show(progress: TrainProgress) -> None:
            bar.update(progress.iteration - bar.n)
            bar.set_postfix_str(f"{progress.stage}, loss {progress.loss:.4f}")
            if progress.scores and not quiet:
                scores = ", ".join(f"{name} {value:.3f} dB" for name, value in progress.scores.items())
                where = f"{progress.iteration}/{progress.iterations} {progress.stage}"
                tqdm.write(f"{where}: loss {progress.loss:.5f}; {scores}")

        training = Training(
            recipe, tiles, output, device=device, stills=tuple(stills or ()), threads=threads, workers=workers
        )
        training.run(on_progress=show, cancel=cancel)
    if not quiet:
        print(f"{output / 'model.safetensors'}: {recipe.iterations} iterations")


@app.command(name="clean")
def clean_command(paths: Annotated[list[Path], typer.Argument(metavar="PATH...")]) -> None:
    """Remove left-over work folders, of an output or of all outputs below a directory."""
    removed = [folder for path in paths for folder in clean(path)]
    for folder in removed:
        print(f"removed {folder}")
    if not removed:
        print("nothing to remove")


@app.command(name="evaluate")
def evaluate_command(
    model: Annotated[
        list[str] | None,
        typer.Option(help="a model's name or a checkpoint, can be repeated; default: the included one"),
    ] = None,
    scale: Annotated[Literal[2, 3, 4], typer.Option(help="times wider and higher")] = 2,
    stills: Annotated[
        list[Path] | None,
        typer.Option(
            help="a set of pictures: DIR/HR, and DIR/LR_x<scale> if it has one; can be repeated", metavar="DIR"
        ),
    ] = None,
    clips: Annotated[list[Path] | None, typer.Option(help="a video, can be repeated", metavar="FILE")] = None,
    crf: Annotated[
        list[int] | None,
        typer.Option(help="libx264's for the small clips, 0 is lossless; can be repeated; default: 23", min=0, max=51),
    ] = None,
    frames: Annotated[int, typer.Option(help="of each clip, at most", min=1)] = 60,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures", metavar="FILE.json")] = None,
    sheet: Annotated[Path | None, typer.Option(help="write crops side by side", metavar="FILE.png")] = None,
    crop: Annotated[
        str | None, typer.Option(help="of the sheet; default: the most detailed places", metavar="X,Y,W,H")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="the network's arithmetic")
    ] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print the tables only")] = False,
) -> None:
    """Measure models beside bicubic and Lanczos: on sets of pictures, and on clips made small and compressed."""
    from hat_video.analysis.evaluation import evaluate
    from hat_video.analysis.sheet import parse_crop

    say = _Say("none", quiet, is_verbose=False)
    found = evaluate(
        model or [],
        scale,
        stills=stills or [],
        clips=clips or [],
        crf=crf or [23],
        frames=frames,
        device=device,
        precision=precision,
        sheet=sheet,
        crop=None if crop is None else parse_crop(crop),
        on_step=say.note,
    )
    print(found.tables())
    if json_file is not None:
        found.write_json(json_file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_verbose = "-v" in words or "--verbose" in words
    try:
        code = app(args=words, prog_name="hat-video", standalone_mode=False)
    except typer.TyperException as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        print(f"hat-video: {text} Try `hat-video --help`.", file=sys.stderr)
        return _USAGE
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, CancelledError, typer.Abort) as error:
        kept = f": {error}" if isinstance(error, CancelledError) else ""
        print(f"hat-video: interrupted{kept}", file=sys.stderr)
        return _INTERRUPTED
    except UsageError as error:
        print(f"hat-video: {error}", file=sys.stderr)
        return _USAGE
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody to tell.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - lives until the process ends
        return _FAILED
    except HatVideoError as error:
        if is_verbose:
            traceback.print_exc()
        print(f"hat-video: {error}", file=sys.stderr)
        return _FAILED
    return int(code or 0)
