"""Opening a source: who decodes it, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from hat_video.errors import OptionError, SourceError
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.media.dali_source import DaliSource, dali_reasons
from hat_video.media.gpu_source import with_index
from hat_video.media.nvdec_source import NvdecSource, nvdec_reasons
from hat_video.media.probe import Probe
from hat_video.media.probe import probe as probe_file
from hat_video.media.pyav_source import PyavSource

__all__ = ["FrameSource", "open_source"]

_ON_GPU = {"dali": (DaliSource, dali_reasons), "nvdec": (NvdecSource, nvdec_reasons)}
"""In the order in which `auto` tries them."""


class FrameSource(Protocol):
    """Frames of one video stream in presentation order, with the timestamps of the probe's index.

    One thread at a time may use it.
    """

    name: str
    """Who decodes: dali, nvdec or pyav."""
    info: VideoInfo
    lost: list[int]
    """Timestamps within the ranges read so far that no frame came for."""
    corrupt: list[int]
    """Timestamps of frames that the decoder gave, but marked as damaged."""
    notes: list[str]
    """Why another decoder was not taken, one line each."""

    def __enter__(self) -> FrameSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[FrameBatch]: ...

    def read(self, start_pts: int | None = None, end_pts: int | None = None) -> Iterator[FrameBatch]:
        """Frames with start_pts <= pts < end_pts, in batches that are counted from the first of them.

        Reading on from where the last range ended costs nothing.
        """
        ...

    def close(self) -> None:
        """Lets go of the file."""
        ...


def open_source(
    path: str | os.PathLike[str],
    *,
    decoder: str = "auto",
    probe: Probe | None = None,
    batch: int = 1,
    device: str | torch.device = "cpu",
    goes_on: bool | None = None,
) -> FrameSource:
    """Opens the frames of a file, as planes with integer timestamps.

    Args:
        path: the file.
        decoder: `dali`, `nvdec` or `pyav`; or `auto`: the first of them that can, on a CPU always `pyav`. Give the
            opened source's `name` to get the same one again.
        probe: what `hat_video.probe` said of the file, if it has been asked already.
        batch: frames to a batch.
        device: where the frames are wanted: cpu, cuda or cuda:N. Planes of `dali` and `nvdec` lie there, those of
            `pyav` in this machine's memory.
        goes_on: where a decoder on the GPU fails half-way, PyAV goes on from that frame; None: only if `auto` chose it.

    Returns:
        A context manager; iterate it, or call `read(start_pts, end_pts)`.

    Raises:
        SourceError: the file cannot be read.
        OptionError: the decoder that was asked for cannot take this file; all the reasons are named.
    """
    if decoder not in ("auto", "pyav", *_ON_GPU):
        raise OptionError(f"--decoder {decoder}: is not known; use auto, {', '.join(_ON_GPU)} or pyav")
    found = probe or probe_file(Path(path))
    where = with_index(device)
    notes: list[str] = []
    for name in _candidates(decoder, where):
        source, reasons = _try(name, found, batch, where, decoder == "auto" if goes_on is None else goes_on)
        if source is not None:
            source.notes += notes
            return source
        if decoder != "auto":
            raise OptionError(f"--decoder {decoder}: cannot take {path}: {'; '.join(reasons)}; use auto or pyav")
        notes.append(f"not decoded by {name}: {'; '.join(reasons)}")
    plain = PyavSource(found, batch=batch)
    plain.notes += notes
    return plain


def _candidates(decoder: str, device: torch.device) -> tuple[str, ...]:
    """Who is asked before PyAV."""
    if decoder == "auto":
        return tuple(_ON_GPU) if device.type == "cuda" else ()
    return () if decoder == "pyav" else (decoder,)


def _try(
    name: str, probe: Probe, batch: int, device: torch.device, goes_on: bool
) -> tuple[FrameSource | None, list[str]]:
    """The source, or all the reasons against it."""
    kind, reasons_of = _ON_GPU[name]
    reasons = [] if device.type == "cuda" else [f"it decodes on a CUDA device, and --device is {device}"]
    reasons += reasons_of(probe, device.index or 0)
    if reasons:
        return None, reasons
    try:
        return kind(probe, batch=batch, device=device, goes_on=goes_on), []
    except SourceError as error:
        return None, [str(error)]
