"""The command `hat-video`: the only place that prints, draws progress and sets exit codes.

Exit codes: 0 done and proven, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

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
    help="Video super-resolution with HAT: exact, unkillable, and honest about its speed.",
)
for _command in (
    *(upscale_command, preview_command, camera_command, devices_command),
    *(verify_command, probe_command, models_command, doctor_command, clean_command),
    *(train_data_command, train_command, evaluate_command, export_command),
):
    app.command(name=_command.__name__.removesuffix("_command").replace("_", "-"))(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # A name that is no UTF-8 must not end a run when it is printed.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    is_verbose = "-v" in words or "--verbose" in words
    try:
        with terminable():
            code = app(args=words, prog_name="hat-video", standalone_mode=False)
    except typer.TyperException as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        print(f"hat-video: {text} Try `hat-video --help`.", file=sys.stderr)
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
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody to tell.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - lives until the process ends
        return FAILED
    except HatVideoError as error:
        if is_verbose:
            traceback.print_exc()
        print(f"hat-video: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:  # noqa: BLE001 - the last resort: one line, and the details for whoever asks
        if is_verbose:
            traceback.print_exc()
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or "no more is known"
        more = "" if is_verbose else "; -v shows where"
        print(f"hat-video: unexpected {type(error).__name__}: {where}{said}{more}", file=sys.stderr)
        return FAILED
    # Typer keeps Ctrl-C to itself, but for the code.
    if code == INTERRUPTED:
        print("hat-video: interrupted", file=sys.stderr)
    return int(code or 0)
