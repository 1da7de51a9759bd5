"""The commands that look and tidy up: `verify`, `probe`, `models`, `doctor`, `clean`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter

from hat_video.cli.declare import Verbose
from hat_video.cli.say import FAILED
from hat_video.jobs.workspace import clean

__all__ = ["clean_command", "doctor_command", "models_command", "probe_command", "verify_command"]


def verify_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT")],
    full: Annotated[bool, typer.Option("--full", help="also decode every frame")] = False,
    start: Annotated[str | None, typer.Option(help="of the range that OUTPUT is of", metavar="T")] = None,
    duration: Annotated[str | None, typer.Option(help="of that range", metavar="T")] = None,
    rate: Annotated[str | None, typer.Option(help="of numbered pictures", metavar="FPS")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    verbose: Verbose = False,
) -> None:
    """Prove that OUTPUT is SOURCE upscaled: every frame, timestamp and stream; say what differs and what is assumed."""
    from hat_video.jobs.verification import Verification, verify_files

    found = verify_files(source, output, is_full=full, start=start, duration=duration, rate=rate)
    verdict = found.verdict
    if as_json:
        print(TypeAdapter(Verification).dump_json(found, indent=1).decode())
    else:
        print(f"{output}: {verdict.line}")
        for problem in verdict.problems[1:]:
            print(f"  and: {problem}")
        for line in found.assumed:
            print(f"  assumed: {line}")
    if not verdict.is_ok:
        raise typer.Exit(FAILED)


def probe_command(
    source: Annotated[Path, typer.Argument(metavar="INPUT")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    verbose: Verbose = False,
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


def models_command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    verbose: Verbose = False,
) -> None:
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


def doctor_command(
    gpu: Annotated[bool, typer.Option("--gpu", help="try what an NVIDIA GPU can do, each thing for real")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    verbose: Verbose = False,
) -> None:
    """Say what this machine can do, and what would be chosen on it."""
    from hat_video.jobs.doctor import examine
    from hat_video.jobs.gpu_check import check_gpu

    if gpu:
        checks = []
        for check in check_gpu():
            checks.append(check)
            if not as_json:
                print(f"{check.name:<16} {'works' if check.works else 'does not work'}: {check.text}", flush=True)
        if as_json:
            print(json.dumps([asdict(check) for check in checks], indent=1))
        if not checks[0].works:
            raise typer.Exit(FAILED)
        return
    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=1, default=str))
        return
    for name, value in facts.items():
        print(f"{name:<18} {', '.join(map(str, value)) if isinstance(value, list) else value}")


def clean_command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...")],
    verbose: Verbose = False,
) -> None:
    """Remove left-over work folders, of an output or of all outputs below a directory."""
    left: list[str] = []
    removed = [folder for path in paths for folder in clean(path, on_note=left.append)]
    for line in (*(f"removed {folder}" for folder in removed), *left):
        print(line)
    if not removed and not left:
        print("nothing to remove")
