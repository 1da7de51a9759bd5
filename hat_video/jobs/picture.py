"""Frames become larger frames: colour, network, size, alpha; and nothing is computed twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hat_video.color import alpha_from_unit, alpha_to_unit, from_rgb, to_rgb
from hat_video.frames import FrameBatch, PixelFormat, VideoInfo
from hat_video.inference.regions import Reach, Rectangle
from hat_video.inference.tiling import pad_to_multiple
from hat_video.inference.unchanged import OUTPUT_MARGIN, changed_cells, most_pixels, parts_to_compute
from hat_video.inference.upscaler import Upscaler
from hat_video.model.resample import resize

__all__ = ["FrameUpscaler", "Reuse", "Task", "Upscaled", "upscale_planes"]

Reuse = Literal["auto", "same", "changed"]

Planes = tuple[Tensor, ...]

# More than any chroma filter looks at, on the way in, and a multiple of every subsampling.
_INPUT_MARGIN = 16


@dataclass(frozen=True, slots=True)
class Task:
    """A batch, and what of it must be computed."""

    batch: FrameBatch
    takes: tuple[int, ...]
    """For each frame, the one in the batch whose result it takes: itself, or an equal one before it; -1 is the last
    frame of the batch before."""
    parts: tuple[Rectangle, ...] | None
    """In a batch of one frame: all that is not as in the frame before, in source pixels. None: everything."""
    before: Future[tuple[Planes, Tensor]] | None
    """The last frame of the batch before, and whether it is finite; kept until this batch has taken what it needs."""
    last: Future[tuple[Planes, Tensor]] = field(default_factory=Future)

    @property
    def pts(self) -> tuple[int, ...]:
        return self.batch.pts


@dataclass(frozen=True, slots=True)
class Upscaled:
    """A batch whose own work is done. What it takes from the batch before may be under way yet."""

    source: FrameBatch
    made: Future[tuple[Planes, Tensor]]

    @classmethod
    def of(cls, source: FrameBatch, planes: Planes, is_finite: Tensor) -> Upscaled:
        """One that is there."""
        made = Future[tuple[Planes, Tensor]]()
        made.set_result((planes, is_finite))
        return cls(source, made)

    @property
    def planes(self) -> Planes:
        """(N, h, w), where they were computed; waits for the batches before, and raises their error."""
        return self.made.result()[0]

    @property
    def is_finite(self) -> Tensor:
        """A bool () there: False where `FrameUpscaler.settled` must make them again. Waits likewise."""
        return self.made.result()[1]

    @property
    def pts(self) -> tuple[int, ...]:
        return self.source.pts


class FrameUpscaler:
    """Makes batches of large frames out of batches of small ones, each to the bit as if it were alone.

    A frame that equals the one before takes its result. With `reuse="changed"`, on models with a bounded reach, only
    the parts that a change concerns are computed, and the rest is taken from the frame before.

    `look` sees the batches in their order, from one thread; calls may come from several at once, in any order that
    starts the batches in theirs.

    Args:
        upscaler: the network.
        small: the facts of the source.
        large: the facts of the output.
        reuse: what is taken from the frame before; `auto` is `changed` on a CPU. A GPU is best fed with whole frames.
    """

    def __init__(self, upscaler: Upscaler, small: VideoInfo, large: VideoInfo, *, reuse: Reuse = "same") -> None:
        self._upscaler, self._small, self._large = upscaler, small, large
        # A resample or an alpha would have to be followed on its way, too; and tiles are there to save memory.
        is_plain = (large.width, large.height) == (small.width * upscaler.scale, small.height * upscaler.scale)
        is_plain &= reuse == "changed" or upscaler.device.type == "cpu"
        is_plain &= not large.pixel_format.has_alpha and upscaler.tile is None
        self._reach: Reach | None = upscaler.reach if reuse != "same" and is_plain else None
        self._lock = threading.Lock()
        self._before: Task | None = None
        self.same = 0
        """Frames that took the result of the one before."""
        self.pixels = 0
        """Of the source, in all frames."""
        self.pixels_computed = 0
        """Of these, those that went through the network; around parts it computes some for nothing, which count."""

    def forget(self) -> None:
        """The next batch is not the one after the last: a segment begins."""
        self._before = None

    def look(self, batch: FrameBatch) -> Task:
        """Compares a batch with what was before."""
        before = self._before
        takes: list[int] = []
        last = None if before is None else tuple(plane[-1] for plane in before.batch.planes)
        for number in range(len(batch)):
            planes = tuple(plane[number] for plane in batch.planes)
            is_same = last is not None and all(map(torch.equal, last, planes))
            takes.append((takes[-1] if takes else -1) if is_same else number)
            last = planes
        parts = None
        if before is not None and len(batch) == 1 and takes == [0] and self._reach is not None:
            parts = self._parts(before.batch, batch, self._reach)
        needs_before = before is not None and (-1 in takes or parts is not None)
        task = Task(batch, tuple(takes), parts, before.last if before is not None and needs_before else None)
        self._before = task
        return task

    def _parts(self, before: FrameBatch, batch: FrameBatch, reach: Reach) -> tuple[Rectangle, ...] | None:
        old, new = (tuple(plane[-1] for plane in frames.planes) for frames in (before, batch))
        height, width = new[0].shape
        # Where a camera moves, that is seen at the first plane.
        cells = changed_cells(old, new, reach.grid, most_pixels(height, width) / reach.grid**2)
        parts = parts_to_compute(cells, height, width, reach)
        return None if parts is None else tuple(parts)

    def __call__(self, task: Task) -> Upscaled:
        """Makes what is new in the frames; waits for no device and for no other frame.

        Raises:
            OutOfMemoryError, WorkError: see `Upscaler`.
        """
        made = Future[tuple[Planes, Tensor]]()
        # The task itself holds the frame before, which will hold what is called there: a circle of large frames.
        takes, parts, last = task.takes, task.parts, task.last
        try:
            fresh = self._fresh(task)
        except BaseException as error:
            last.set_exception(error)
            raise

        def put_together(before: Future[tuple[Planes, Tensor]] | None) -> None:
            try:
                planes, is_finite = self._put_together(takes, parts, fresh, None if before is None else before.result())
            except BaseException as error:  # noqa: BLE001 - whoever takes the frames is told
                last.set_exception(error)
                made.set_exception(error)
            else:
                last.set_result((tuple(plane[-1:] for plane in planes), is_finite))
                made.set_result((planes, is_finite))

        if task.before is None:
            put_together(None)
        else:
            # A thread that waited here would be one that computes no other frame.
            task.before.add_done_callback(put_together)
        return Upscaled(task.batch, made)

    def settled(self, made: Upscaled) -> FrameBatch:
        """The frames; computed again, and then safely, where the network gave something that is no picture."""
        planes = made.planes
        if not bool(made.is_finite):
            planes = upscale_planes(made.source.planes, self._small, self._large, self._upscaler)
        return FrameBatch(planes, made.pts)

    def _fresh(self, task: Task) -> list[tuple[Planes, Tensor]]:
        """What the network makes for a batch: its new frames, or each of its parts; and whether that is finite."""
        with self._lock:
            self.same += sum(taken != number for number, taken in enumerate(task.takes))
            self.pixels += len(task.batch) * self._small.width * self._small.height
        if task.parts is not None:
            return [self._part(task.batch.planes, part) for part in task.parts]
        fresh = sorted({number for number in task.takes if number >= 0})
        return [self._computed(tuple(_frames(plane, fresh) for plane in task.batch.planes))] if fresh else []

    def _put_together(
        self,
        takes: tuple[int, ...],
        parts: tuple[Rectangle, ...] | None,
        fresh: list[tuple[Planes, Tensor]],
        before: tuple[Planes, Tensor] | None,
    ) -> tuple[Planes, Tensor]:
        if parts is not None and before is not None:
            return self._patched(parts, fresh, before)
        sources = fresh if before is None else [*fresh, before]
        planes, finite = sources[0]
        numbers = sorted({number for number in takes if number >= 0})
        if takes != tuple(numbers):
            where = [numbers.index(taken) if taken >= 0 else len(numbers) for taken in takes]
            planes = tuple(
                _frames(torch.cat(same), where) for same in zip(*(planes for planes, _ in sources), strict=True)
            )
            finite = torch.stack([finite for _, finite in sources]).all()
        return planes, finite

    def _computed(self, planes: Planes) -> tuple[Planes, Tensor]:
        finite: list[Tensor] = []

        def network(rgb: Tensor) -> Tensor:
            out, is_finite = self._upscaler.unchecked(rgb)
            finite.append(is_finite)
            return out

        made = upscale_planes(planes, self._small, self._large, network)
        with self._lock:
            self.pixels_computed += len(planes[0]) * self._small.width * self._small.height
        return made, torch.stack(finite).all()

    def _patched(
        self, parts: Sequence[Rectangle], made: list[tuple[Planes, Tensor]], before: tuple[Planes, Tensor]
    ) -> tuple[Planes, Tensor]:
        """The frame before, with its changed parts made anew."""
        base, is_finite = before
        planes = tuple(plane.clone() for plane in base)
        for part, (values, _) in zip(parts, made, strict=True):
            larger = part.times(self._upscaler.scale)
            for plane, value, place in zip(planes, values, _places(larger, self._large.pixel_format), strict=True):
                plane[place] = value
        return planes, torch.stack([is_finite, *(finite for _, finite in made)]).all()

    def _part(self, planes: Planes, part: Rectangle) -> tuple[Planes, Tensor]:
        """The output planes of a part, and whether it is finite."""
        reach, small, large, scale = self._reach, self._small, self._large, self._upscaler.scale
        if reach is None:
            raise ValueError("parts go with a bounded reach")
        height, width = planes[0].shape[1:]
        grown = part.grown(OUTPUT_MARGIN, height, width)
        tall, wide = (-(-length // reach.multiple) * reach.multiple for length in (height, width))
        region = reach.region(grown, tall, wide)
        inside = Rectangle(region.top, min(height, region.bottom), region.left, min(width, region.right))
        near = inside.grown(_INPUT_MARGIN, height, width)
        cut = [plane[place] for plane, place in zip(planes, _places(near, small.pixel_format), strict=True)]
        rgb = inside.within(near).cut(to_rgb(cut, small.pixel_format, small.color))
        made, finite = self._upscaler.unchecked_part(pad_to_multiple(rgb, reach.multiple), grown.within(region))
        values = from_rgb(made, large.pixel_format, large.color)
        own = part.within(grown).times(scale)
        with self._lock:
            self.pixels_computed += inside.area
        return tuple(
            value[place] for value, place in zip(values, _places(own, large.pixel_format), strict=True)
        ), finite


def _frames(plane: Tensor, numbers: list[int]) -> Tensor:
    """Some frames of (N, h, w), in that order. An index would be copied to a GPU, and wait for all that is queued."""
    if numbers == list(range(len(plane))):
        return plane
    return torch.stack([plane[number] for number in numbers])


def _places(part: Rectangle, pixel_format: PixelFormat) -> tuple[tuple[slice, slice, slice], ...]:
    """Where a part of the picture lies in each of its planes, (N, h, w); it begins at whole chroma samples."""
    luma = (0, 0)
    chroma = (pixel_format.log2_chroma_h, pixel_format.log2_chroma_w)
    shifts = {"gray": (luma,), "rgb": (luma,) * 3, "yuv": (luma, chroma, chroma)}[pixel_format.kind]
    return tuple(
        (
            slice(None),
            slice(part.top >> down, -(-part.bottom >> down)),
            slice(part.left >> across, -(-part.right >> across)),
        )
        for down, across in (*shifts, *((luma,) if pixel_format.has_alpha else ()))
    )


def upscale_planes(
    planes: Sequence[Tensor], small: VideoInfo, large: VideoInfo, network: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Enlarges pictures.

    Alpha goes the same way as a gray picture; it is taken to be straight, so colours are enlarged as they are, those
    under transparent pixels too. Where the network's size is not the output's, a Lanczos resample follows.

    Args:
        planes: (N, h, w), as `small` says.
        small: the facts of the source.
        large: the facts of the output.
        network: (N, 3, H, W) R'G'B' in [0, 1] to the same, enlarged.

    Returns:
        (N, h, w) planes, as `large` says.
    """

    def enlarged(rgb: Tensor) -> Tensor:
        made = network(rgb)
        size = (large.height, large.width)
        return made if made.shape[2:] == size else resize(made, size, kernel="lanczos").clamp_(0, 1)

    colours = from_rgb(enlarged(to_rgb(planes, small.pixel_format, small.color)), large.pixel_format, large.color)
    if not large.pixel_format.has_alpha:
        return colours
    alpha = alpha_to_unit(planes, small.pixel_format)
    opaque = colours[0].new_ones((), dtype=torch.float32).expand(colours[0].shape[0], 1, large.height, large.width)
    if alpha is None:
        return (*colours, alpha_from_unit(opaque, large.pixel_format))
    # An even alpha (most often: opaque) stays exactly that, and costs nothing.
    first = alpha[:, :, :1, :1]
    made = first * opaque if bool((alpha == first).all()) else enlarged(alpha.repeat(1, 3, 1, 1)).mean(1, keepdim=True)
    return (*colours, alpha_from_unit(made.to(colours[0].device), large.pixel_format))
