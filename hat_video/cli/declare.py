"""Options of a command, made from the dataclass that declares them: see `hat_video.jobs.options`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

__all__ = ["Verbose", "declare"]

Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="print a traceback with an error")]
"""Every command has it; it is read by `main`, which is where errors end."""


def declare(options: type, *, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option for each field of a dataclass, with its type, default and help.

    The command gets them as the dictionary `choices`; its own parameters stay, the first two of them in front.

    Args:
        options: the dataclass; every field is `Annotated[type, help]`.
        without: fields that the command has words of its own for.
    """

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "choices"]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters[2:2] = _declared(options, without)
        listed = [field.name for field in fields(options) if isinstance(field.default, tuple)]

        def run(**values: Any) -> None:
            mine = {p.name: values.pop(p.name) for p in own}
            for name in listed:
                values[name] = tuple(values[name] or ())
            command(**mine, choices=values)

        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return with_options


def _declared(options: type, without: Sequence[str]) -> list[inspect.Parameter]:
    hints = get_type_hints(options, include_extras=True)
    declared = []
    for option in fields(options):
        if option.name in without:
            continue
        kind, text = get_args(hints[option.name])
        is_list = isinstance(option.default, tuple)
        declared.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if is_list else option.default,
                annotation=Annotated[
                    list[str] | None if is_list else kind,
                    typer.Option(f"--{option.name.replace('_', '-')}", help=text),
                ],
            )
        )
    return declared
