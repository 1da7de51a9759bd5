"""The command `hat-video`: the only place that prints, draws progress and sets exit codes.

Exit codes: 0 done and proven, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from hat_video.cli.camera import camera_command, devices_command
from hat_video.cli.inspection import clean_command, doctor_command, models_command, probe_command, verify_command
from hat_video.cli.models import evaluate_command, export_command, train_command, train_data_command
from hat_video.cli.say import FAILED, INTERRUPTED, USAGE, terminable
from hat_video.cli.upscaling import preview_command, upscale_command
from hat_video.errors import CancelledError, HatVideoError, OptionError, UsageError

__all__ = ["main"]

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _command in (
    *(upscale_command, preview_command, camera_command, devices_command),
    *(verify_command, probe_command, models_command, doctor_command, clean_command),
    *(train_data_command, train_command, evaluate_command, export_command),
):
    app.command(name=_command.__name__.removesuffix("_command").replace("_", "-"))(_command)


def _tell_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"hat-video {version('hat-video')} (torch {version('torch')}, av {version('av')})")
        raise typer.Exit


@app.callback()
def _whole(
    is_version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version, and those of torch and av", is_eager=True, callback=_tell_version
        ),
    ] = False,
) -> None:
    """Video super-resolution with HAT: exact, unkillable, and honest about its speed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # A name that is no UTF-8 must not end a run when it is printed.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code = _run(words, is_verbose="-v" in words or "--verbose" in words)
    unwritten = _unwritten()
    if unwritten is None:
        return code
    return code or _tell_unwritten(unwritten)


def _run(words: list[str], *, is_verbose: bool) -> int:
    """A command, and how it ended in one line."""
    try:
        with terminable():
            code = app(args=words, prog_name="hat-video", standalone_mode=False)
    except typer.TyperException as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        text = text.replace("Value error, ", "")  # pydantic's, of a choice that there is not
        context = getattr(error, "ctx", None)
        command = "hat-video" if context is None else context.command_path
        print(f"hat-video: {text} Try `{command} --help`.", file=sys.stderr)
        return USAGE
    except typer.Exit as error:
        code = error.exit_code
    except (KeyboardInterrupt, CancelledError, typer.Abort) as error:
        kept = f": {error}" if isinstance(error, CancelledError) else ""
        print(f"hat-video: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    except (UsageError, OptionError) as error:
        print(f"hat-video: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError as error:
        return _tell_unwritten(error)
    except HatVideoError as error:
        if is_verbose:
            traceback.print_exc()
        print(f"hat-video: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:  # noqa: BLE001 - the last resort: one line, and the details for whoever asks
        if is_verbose:
            traceback.print_exc()
        if isinstance(error, OSError) and _is_printing(error):
            return _tell_unwritten(error)
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or "no more is known"
        more = "" if is_verbose else "; -v shows where"
        print(f"hat-video: unexpected {type(error).__name__}: {where}{said}{more}", file=sys.stderr)
        return FAILED
    # Typer keeps Ctrl-C to itself, but for the code.
    if code == INTERRUPTED:
        print("hat-video: interrupted", file=sys.stderr)
    return int(code or 0)


def _is_printing(error: OSError) -> bool:
    """Whether it is `print` that failed: whoever opens and writes files does not do so from here, or names them."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return error.filename is None and module.startswith(("hat_video.cli", "typer"))


def _unwritten() -> OSError | None:
    """Why stdout cannot take what was printed; None if it has it all."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # Python would try once more at its end, and complain.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - lives until the process ends
        return error
    return None


def _tell_unwritten(error: OSError) -> int:
    # Where whoever read our output has gone, there is nobody to tell.
    if not isinstance(error, BrokenPipeError):
        print(f"hat-video: standard output: cannot be written: {error.strerror or error}", file=sys.stderr)
    return FAILED
