"""Numbered pictures as a source: bound into one film beside the work, for as long as they are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hat_video.errors import HatVideoError, OutputError, UsageError
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.workspace import WORK_FOLDER, remove_empty
from hat_video.media.sequence import bind_sequence, is_sequence, parse_rate

__all__ = ["as_film"]


@contextmanager
def as_film(source: Path, output: Path, options: UpscaleOptions) -> Iterator[Path]:
    """The file to read for `source`: itself, or the film that its pictures were bound into.

    The film lies among the unfinished work of `output`, where `hat-video clean` finds it should the process be killed.

    Raises:
        UsageError: pictures without `--rate`, or the other way round.
        SourceError: as for `bind_sequence`.
        OutputError: the film cannot be written.
    """
    if not is_sequence(source):
        if options.rate is not None:
            raise UsageError(f"--rate {options.rate}: is for numbered pictures (frame_%04d.png); {source} has times")
        yield source
        return
    if options.rate is None:
        raise UsageError(f"{source}: pictures have no times; give --rate, for instance --rate 24")
    base = (options.work_dir or output.parent) / WORK_FOLDER / output.name
    with ExitStack() as stack:
        stack.callback(remove_empty, base)
        try:
            base.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sequence-", dir=base))
            film = Path(folder) / f"{source.name}.mov"
            bind_sequence(source, parse_rate(options.rate), film)
        except HatVideoError:
            raise
        except OSError as error:
            raise OutputError(f"{base}: cannot be written: {error.strerror or error}") from None
        yield film
