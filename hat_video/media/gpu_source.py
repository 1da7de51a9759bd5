"""What decoders on a GPU have in common: they are believed only as far as the CPU's decoder agrees with them.

A GPU decoder is a second opinion on what a file's pictures are. Its first frames are compared with PyAV's when it is
opened, and every frame must be the one that the index names. Where it fails half-way, PyAV can go on at the exact
frame.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hat_video.errors import SourceError
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.media.probe import Probe
from hat_video.media.pyav_source import PyavSource

__all__ = ["GpuSource", "picture_reasons", "with_index"]

_FIRST_FRAMES = 8


def with_index(device: str | torch.device) -> torch.device:
    """The device, by number where it is a CUDA device: `cuda` alone is the current one."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def picture_reasons(probe: Probe, device_index: int) -> list[str]:
    """Why no decoder on the GPU may have a file, one reason an entry; empty if one may.

    Args:
        probe: of the file, prepared: what it says is what is to be read.
        device_index: of the CUDA device.
    """
    video, index = probe.video, probe.index
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reasons = []
    if gpus <= device_index:
        reasons.append(f"there is no CUDA device {device_index}: torch {torch.__version__} sees {gpus or 'none'}")
    # A stream from standard input, an address and a pipe have no index that could be trusted, either.
    if not probe.path.is_file():
        reasons.append("it is not a regular file on this machine")
    if probe.deinterlace != "off":
        reasons.append("its fields are to become frames, which bwdif does on the CPU")
    elif video.is_interlaced:
        reasons.append("its frames are interlaced")
    if video.pixel_format.has_alpha:
        reasons.append("its alpha is wanted")
    if video.width % 2 or video.height % 2:
        reasons.append(f"its size of {video.width}x{video.height} is odd")
    if index.is_counted:
        reasons.append("its timestamps are missing, repeat, or are those of decoding")
    if probe.is_truncated:
        reasons.append("it is truncated")
    return reasons


class GpuSource(ABC):
    """Frames of one video stream in presentation order, decoded on a GPU; the interface is that of `PyavSource`.

    Batches are complete when they are handed over: whoever gets them may use any CUDA stream. One thread at a time may
    use it. Use it as a context manager, or call `close`.

    Args:
        probe: what is known of the file.
        batch: frames to a batch.
        device: where the planes shall lie.
        goes_on: True: where the decoder fails half-way, PyAV goes on at that frame, on the CPU, and `notes` says so.
            False: it is an error.
        is_checked: compare the first frames with those of PyAV.

    Raises:
        SourceError: the decoder cannot open the file, or its first frames are not those of PyAV.
    """

    name = "gpu"
    luma_tolerance = 0
    """Code values that a luma sample may differ from PyAV's."""
    chroma_tolerance = 0
    """The same, for a chroma sample."""

    def __init__(
        self,
        probe: Probe,
        *,
        batch: int = 1,
        device: str | torch.device = "cuda",
        goes_on: bool = False,
        is_checked: bool = True,
    ) -> None:
        self.info: VideoInfo = probe.video
        self.lost: list[int] = []
        """Timestamps that no frame came for; only ever of what PyAV read, since here that is an error."""
        self.corrupt: list[int] = []
        """Timestamps of frames that PyAV gave, but marked as damaged."""
        self.notes: list[str] = []
        """Why another decoder was not taken, and what became of this one, one line each."""
        self._probe = probe
        self._batch = batch
        self._device = with_index(device)
        self._goes_on = goes_on
        self._instead: PyavSource | None = None
        try:
            self._open()
            if is_checked:
                self._compare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[FrameBatch]:
        return self.read()

    def close(self) -> None:
        """Lets go of the file and of the decoder's memory."""
        self._shut()
        if self._instead is not None:
            self._instead.close()

    def read(self, start_pts: int | None = None, end_pts: int | None = None) -> Iterator[FrameBatch]:
        """Frames with start_pts <= pts < end_pts, in batches that are counted from the first of them.

        Args:
            start_pts: first tick; the first frame's if None.
            end_pts: the tick after the last; all that is left if None.

        Raises:
            SourceError: the decoder failed or gave other frames than the file has, and PyAV may not go on.
        """
        pts = self._probe.index.pts
        at = 0 if start_pts is None else bisect_left(pts, start_pts)
        last = len(pts) if end_pts is None else bisect_left(pts, end_pts)
        if self._instead is None:
            batches = self._batches(at, last)
            while at < last:
                try:
                    planes = next(batches)
                except SourceError as error:
                    if not self._goes_on:
                        raise
                    self._go_on_with_pyav(error)
                    break
                yield FrameBatch(planes, pts[at : at + len(planes[0])])
                at += len(planes[0])
        if self._instead is not None and at < last:
            yield from self._instead.read(pts[at], end_pts)

    @abstractmethod
    def _open(self) -> None:
        """Makes the decoder; it stands before the first frame."""

    @abstractmethod
    def _shut(self) -> None:
        """Lets go of the decoder; may be called twice, and of one that was never made."""

    @abstractmethod
    def _batches(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        """The planes of the frames numbered `first` to `last` - 1, (N, h, w) each, N <= the batch, none missing.

        Raises:
            SourceError: the decoder failed, or gave something else.
        """

    def _failed(self, frame: int, why: object) -> SourceError:
        """The error of a decoder that gave everything up to the frame numbered `frame`."""
        pts = self._probe.index.pts
        place = f"frame {frame} (pts {pts[frame]})" if frame < len(pts) else "the end"
        reason = why if isinstance(why, str) else _first_words(why)
        return SourceError(
            f"{self._probe.path}: {self.name} failed at {place}: {reason}; --decoder pyav decodes it on the CPU"
        )

    def _go_on_with_pyav(self, error: SourceError) -> None:
        self._shut()
        self.notes.append(f"from there on decoded by pyav: {error}")
        self._instead = PyavSource(self._probe, batch=self._batch)
        # Whoever holds these lists sees what PyAV finds.
        self._instead.lost, self._instead.corrupt = self.lost, self.corrupt

    @property
    def _checked_frames(self) -> int:
        return min(_FIRST_FRAMES, len(self._probe.index.pts))

    def _compare(self) -> None:
        pts, count = self._probe.index.pts, self._checked_frames
        ours = list(self._batches(0, count))
        with PyavSource(self._probe, batch=count) as pyav:
            theirs = next(pyav.read(pts[0], pts[count] if count < len(pts) else None), None)
        if theirs is None or theirs.pts != pts[:count]:
            raise self._failed(0, f"pyav gives other frames than the first {count} of the file's index")
        apart = [
            int((torch.cat(plane).cpu().int() - their.int()).abs().max())
            for plane, their in zip(zip(*ours, strict=True), theirs.planes, strict=True)
        ]
        allowed = [self.luma_tolerance] + [self.chroma_tolerance] * (len(apart) - 1)
        if any(a > b for a, b in zip(apart, allowed, strict=True)):
            raise self._failed(
                0,
                f"the first {count} frames differ from pyav's by up to {', '.join(map(str, apart))} code values"
                f" in Y, U, V ({', '.join(map(str, allowed))} allowed)",
            )


def _first_words(error: object) -> str:
    """One line that says what happened: DALI's errors come with a stack trace before it, and another one behind."""
    text = str(error).partition("encountered:")[2] or str(error)
    lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("[/")]
    first = lines[0] if lines else type(error).__name__
    return re.sub(r'^Assert on ".*?" failed: ', "", first).partition(". ")[0].rstrip(":.")
