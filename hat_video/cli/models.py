"""The commands about networks: `train-data`, `train`, `evaluate`, `export`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from hat_video.cli.declare import Verbose
from hat_video.cli.say import Say, interruptible
from hat_video.inference.processors import cpu_count
from hat_video.jobs.report import check_report
from hat_video.presets import preset_names

__all__ = ["evaluate_command", "export_command", "train_command", "train_data_command"]


def export_command(
    model: Annotated[str, typer.Argument(help="a model's name, or a HAT checkpoint", metavar="MODEL")],
    onnx: Annotated[Path, typer.Option("--onnx", help="the file to write", metavar="FILE.onnx")],
    scale: Annotated[int | None, typer.Option(help="of a model that comes in several scales")] = None,
    attention_pool: Annotated[str | None, typer.Option(help="global, or box:N; default: the model's own")] = None,
    verbose: Verbose = False,
) -> None:
    """Write a model as ONNX, for other runtimes: any batch, any size."""
    from hat_video.jobs.choices import load_chosen_model
    from hat_video.jobs.options import UpscaleOptions
    from hat_video.model.onnx_export import export_onnx

    options = UpscaleOptions(model=model, scale=scale, attention_pool=attention_pool)  # type: ignore[arg-type]
    facts = export_onnx(load_chosen_model(options), onnx)
    print(f"{onnx}: {facts['name']} x{facts['scale']}, opset {facts['opset']}, {onnx.stat().st_size:,} bytes;", end=" ")
    print(f"pad height and width to multiples of {facts['multiple']} (metadata `hat_video` says how)")


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
    verbose: Verbose = False,
) -> None:
    """Build a training set from packages that anyone can install, and from your own photographs."""
    from hat_video.training.build import build_tiles, choose_packages
    from hat_video.training.tiles import HELD_OUT

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
    if report.reasons:
        told = "; ".join(f"{count}: {reason}" for reason, count in report.reasons.most_common(5))
        print(f"why the others gave no tile: {told}")
    for path in report.kept_out:
        print(f"kept out, it resembles an evaluation picture: {path}")
    groups = ", ".join(f"{count} {name}" for name, count in report.tiles.items())
    print(f"{output}: {report.tiles.total()} tiles ({groups}), {report.megapixels:.0f} megapixels;", end=" ")
    print(f"{report.duplicates} duplicates left out")
    if not report.tiles[HELD_OUT]:
        print("nothing is held out, which takes 26 photographs of one source: evaluate the training on --stills")


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
    compile: Annotated[  # noqa: A002 - the option's name
        bool, typer.Option("--compile", help="for long runs on a GPU: torch's compiler, which takes a minute at first")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")] = False,
    verbose: Verbose = False,
) -> None:
    """Train a network; the same command goes on where it stopped. Several processes: torchrun -m hat_video train."""
    from hat_video.training.loop import Training, TrainProgress
    from hat_video.training.recipe import load_recipe, read_changes

    recipe = load_recipe(config, read_changes(change or []))
    # torchrun sends its own signal after the terminal's.
    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with (
        interruptible(leaves_at_second=not is_launched) as cancel,
        tqdm(total=recipe.iterations, disable=quiet or not sys.stderr.isatty()) as bar,
    ):

        def show(progress: TrainProgress) -> None:
            bar.update(progress.iteration - bar.n)
            bar.set_postfix_str(f"{progress.stage}, loss {progress.loss:.4f}")
            if progress.is_evaluated and not quiet:
                scores = "".join(f"; {name} {value:.3f} dB" for name, value in progress.scores.items())
                where = f"{progress.iteration}/{progress.iterations} {progress.stage}"
                tqdm.write(f"{where}: loss {progress.loss:.5f}{scores}")

        training = Training(
            recipe,
            tiles,
            output,
            device=device,
            stills=tuple(stills or ()),
            threads=threads,
            workers=workers,
            compile=compile,
        )
        training.run(on_progress=show, cancel=cancel)
    if not quiet and training.rank == 0:
        print(f"{output / 'model.safetensors'}: {recipe.iterations} iterations")


def evaluate_command(
    model: Annotated[
        list[str] | None,
        typer.Option(help="a model's name or a checkpoint, can be repeated; default: the included one"),
    ] = None,
    scale: Annotated[
        Literal[1, 2, 3, 4] | None,
        typer.Option(help="times wider and higher; at 1 clips are only compressed; default: a checkpoint's own, or 2"),
    ] = None,
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
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="the network's arithmetic; auto: on stills fp32, on clips the command's own"),
    ] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print the tables only")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure models beside bicubic and Lanczos: on sets of pictures, and on clips made small and compressed.

    At --scale 1 beside the compressed clip as it is.
    """
    from hat_video.analysis.evaluation import evaluate
    from hat_video.analysis.sheet import parse_crop

    check_report(json_file, "--json")
    say = Say("none", quiet, is_verbose=False)
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
