"""The work: one segment from decoded frames to a committed file.

A segment file gets a name made of its own content, and counts only once its sidecar, written last and renamed into
place, says so. Killing the process at any moment therefore leaves complete segments and rubbish, never a segment that
only looks done.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hat_video.errors import CancelledError, OutOfMemoryError, OutputError, WorkError
from hat_video.files import UNFINISHED, write_atomically
from hat_video.frames import FrameBatch
from hat_video.inference.double_buffer import Lane, Prefetch, StreamLane, ThreadLane, run_through
from hat_video.inference.timeline import Span, Timeline
from hat_video.inference.upscaler import Upscaler
from hat_video.jobs.picture import FrameUpscaler, Reuse, Task, Upscaled
from hat_video.jobs.plan import Manifest, Segment
from hat_video.media.deinterlace import prepare
from hat_video.media.encoder import SegmentFacts, SegmentWriter
from hat_video.media.full_check import hash_planes, is_lossless
from hat_video.media.probe import Probe, probe
from hat_video.media.source import open_source

__all__ = ["SegmentRecord", "Worker", "drop_segment", "read_record"]


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """The sidecar: the proof that a segment is done, and what is in it."""

    key: str
    id: int
    file: str | None
    """Name of the segment file in the work folder; None where every frame was lost."""
    sha256: str
    bytes: int
    extradata_sha256: str
    pts: tuple[int, ...]
    """Timestamps of the packets, in decode order."""
    lost: tuple[int, ...]
    """Timestamps of the source's frames that no decoder could give."""
    corrupt: tuple[int, ...]
    """Timestamps of frames that the decoder gave but marked as damaged."""
    redone: int
    """Batches that were computed again one precision safer."""
    same: int
    """Frames that took the result of the one before, which they equal."""
    computed: float
    """Share of the source's pixels that went through the network; above 1 where parts needed their surroundings."""
    hashes: tuple[str, ...]
    """`hash_planes` of the frames that a lossless encoder was given, in presentation order; else none."""
    seconds: dict[str, float]
    """decode, model (summed over the frames in flight), encode, wall."""


def read_record(folder: Path, manifest: Manifest, segment: Segment) -> SegmentRecord | None:
    """The record of a segment that is done, checked against its file; None if the segment is still to be made.

    Raises:
        WorkError: there is a record, but it cannot be read or is of something else, or its file is missing or was
            changed; the segment has to be made again.
    """
    sidecar = folder / f"seg-{segment.id:05d}.json"
    try:
        record = TypeAdapter(SegmentRecord).validate_json(sidecar.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise WorkError(f"{sidecar}: not a segment's record ({type(error).__name__})") from None
    if record.key != manifest.key or record.id != segment.id:
        raise WorkError(f"{sidecar}: belongs to another run ({record.key}, segment {record.id})")
    if record.file is None:
        return record
    path = folder / record.file
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WorkError(f"{path}: {error.strerror or error}, though its record is there") from None
    if sha256 != record.sha256:
        raise WorkError(f"{path}: was changed after it was finished (sha256 differs)")
    return record


def drop_segment(folder: Path, segment: Segment) -> None:
    """Takes a segment back that does not hold, so that it is made again and its space is free for that.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        # The record first: without it the file is rubbish, and never the other way round.
        (folder / f"seg-{segment.id:05d}.json").unlink(missing_ok=True)
        for path in folder.glob(f"seg-{segment.id:05d}.*.mkv"):
            path.unlink()
    except OSError as error:
        raise OutputError(f"{error.filename}: cannot be removed: {error.strerror or error}") from None


# Double buffering: one batch is computed while another comes or goes.
_BATCHES_ON_GPU = 2


class Worker:
    """Makes segments, one after the other, with the decoder and the network kept open between them.

    Args:
        manifest: the plan.
        folder: the work folder; must exist.
        upscaler: the network, on the device and in the precision that the manifest names.
        jobs: frames in flight on a CPU, each on one thread.
        stop: shared by all that belongs to the run; once set, `work` raises `CancelledError` soon.
        on_batch: called with each batch that was handed to the encoder, from the caller's thread.
        found: the probe of the source, where there is one already.
        reuse: see `FrameUpscaler`; changes no bit.
        keeps_spans: remember when each stage was busy with what, in `spans`.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        upscaler: Upscaler,
        jobs: int,
        stop: threading.Event,
        on_batch: Callable[[FrameBatch], None],
        found: Probe | None = None,
        reuse: Reuse = "same",
        keeps_spans: bool = False,
    ) -> None:
        self._manifest = manifest
        self._folder = folder
        self._upscaler = upscaler
        self._jobs = jobs
        self._frames = FrameUpscaler(upscaler, manifest.source_video, manifest.video, reuse=reuse)
        self._stop = stop
        self._on_batch = on_batch
        recipe = manifest.recipe
        has_alpha = manifest.source_video.pixel_format.has_alpha
        found = found or prepare(probe(manifest.source), deinterlace=recipe.deinterlace, has_alpha=has_alpha)
        self._source = open_source(
            manifest.source,
            decoder=recipe.decoder,
            probe=found,
            batch=recipe.batch,
            device=upscaler.device,
            goes_on=recipe.is_decoder_free,
        )
        self._keeps_spans = keeps_spans
        self.spans: list[Span] = []
        """Of all segments so far; empty unless they are kept."""
        self._hashes: list[str] = []

    @property
    def notes(self) -> list[str]:
        """What became of the decoder, one line each."""
        return self._source.notes

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()

    def work(self, segment: Segment) -> SegmentRecord:
        """Makes and commits one segment.

        Raises:
            CancelledError: `stop` was set; nothing of the segment is left.
            SourceError, OutputError, ModelError, WorkError: it could not be made; nothing of it is left.
        """
        began = time.perf_counter()
        part = self._folder / f"{UNFINISHED}{segment.id:05d}-{uuid.uuid4().hex}.mkv"
        self._source.lost.clear()
        self._source.corrupt.clear()
        self._hashes = []
        redone = self._upscaler.redone
        frames = self._frames
        frames.forget()
        same, pixels, computed = frames.same, frames.pixels, frames.pixels_computed
        timeline = Timeline(keeps_spans=self._keeps_spans)
        try:
            facts = self._make(segment, part, timeline)
            if self._stop.is_set():
                raise CancelledError("stopped")
            self._check(segment, facts)
            name = self._commit(segment, part, facts)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self.spans += timeline.spans
        seconds = {name: timeline.seconds(name) for name in ("decode", "model", "encode")}
        seconds["wall"] = time.perf_counter() - began
        record = SegmentRecord(
            key=self._manifest.key,
            id=segment.id,
            file=name,
            sha256=facts.sha256 if facts else "",
            bytes=facts.bytes if facts else 0,
            extradata_sha256=facts.extradata_sha256 if facts else "",
            pts=facts.pts if facts else (),
            lost=tuple(sorted(set(segment.pts) - set(facts.pts if facts else ()))),
            corrupt=tuple(sorted(set(self._source.corrupt))),
            redone=self._upscaler.redone - redone,
            same=frames.same - same,
            computed=(frames.pixels_computed - computed) / max(1, frames.pixels - pixels),
            hashes=tuple(self._hashes),
            seconds={name: round(value, 4) for name, value in seconds.items()},
        )
        write_atomically(self._folder / f"seg-{segment.id:05d}.json", TypeAdapter(SegmentRecord).dump_json(record))
        return record

    def _make(self, segment: Segment, part: Path, timeline: Timeline) -> SegmentFacts | None:
        decoded = _timed(self._source.read(segment.start_pts, segment.end_pts), timeline, "decode")
        tasks = map(self._frames.look, decoded)
        stages, depth = self._stages(timeline)
        with (
            Prefetch(tasks, depth=depth, stop=self._stop, name="hat-video-decode") as frames,
            closing(run_through(frames, stages, depth=depth, stop=self._stop)) as made,
        ):
            first = next(made, None)
            if first is None:
                return None
            with SegmentWriter(part, self._manifest.recipe.encoder, self._manifest.video) as writer:
                upscaled: Upscaled | None = first
                while upscaled is not None:
                    batch = self._settled(upscaled)
                    with timeline.span("encode", batch.pts[0]):
                        if is_lossless(self._manifest.recipe.encoder):
                            self._hashes += (hash_planes([p[i] for p in batch.planes]) for i in range(len(batch)))
                        writer.write(batch)
                    self._on_batch(batch)
                    upscaled = next(made, None)
                with timeline.span("encode"):
                    facts = writer.close()
        return facts

    def _stages(self, timeline: Timeline) -> tuple[list[tuple[Lane, Callable[[Any], Any]]], int]:
        """Where a batch goes, and how many are on their way at once."""
        device = self._upscaler.device
        if device.type != "cuda":
            return [(ThreadLane("model", self._jobs, timeline), self._upscale)], 2 * self._jobs
        stages: list[tuple[Lane, Callable[[Any], Any]]] = [
            (StreamLane("copy in", device, timeline), lambda task: _on_device(task, device)),
            (StreamLane("model", device, timeline), self._upscale),
        ]
        if self._manifest.recipe.encoder.memory == "host":
            stages.append((StreamLane("copy out", device, timeline), _off_device))
        return stages, _BATCHES_ON_GPU

    def _upscale(self, task: Task) -> Upscaled:
        """Waits for no device."""
        try:
            return self._frames(task)
        except (OutOfMemoryError, WorkError) as error:
            raise type(error)(f"{error} (at the frame with pts {task.pts[0]})") from error.__cause__

    def _settled(self, upscaled: Upscaled) -> FrameBatch:
        """The frames, where the encoder takes them."""
        batch = self._frames.settled(upscaled)
        if self._manifest.recipe.encoder.memory == "host":
            return FrameBatch(tuple(plane.cpu() for plane in batch.planes), batch.pts)
        return batch

    def _check(self, segment: Segment, facts: SegmentFacts | None) -> None:
        """No frame may appear that the plan does not know, and what is missing must be known to be lost."""
        made = sorted(facts.pts) if facts else []
        if len(set(made)) != len(made) or not set(made) <= set(segment.pts):
            raise WorkError(
                f"{self._manifest.source}: segment {segment.id} came out with timestamps that the source does not have;"
                " did the file change while it was read?"
            )

    def _commit(self, segment: Segment, part: Path, facts: SegmentFacts | None) -> str | None:
        if facts is None:
            return None
        name = f"seg-{segment.id:05d}.{facts.sha256[:12]}.mkv"
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(self._folder / name)
        return name


def _on_device(task: Task, device: torch.device) -> Task:
    """The copy goes by itself, since it comes from pinned memory; torch keeps that until the copy is through."""
    batch = task.batch
    planes = (plane if plane.is_cuda else plane.pin_memory().to(device, non_blocking=True) for plane in batch.planes)
    return replace(task, batch=FrameBatch(tuple(planes), batch.pts))


def _off_device(upscaled: Upscaled) -> Upscaled:
    """To pinned memory, by itself."""

    def moved(tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    return Upscaled.of(upscaled.source, tuple(map(moved, upscaled.planes)), moved(upscaled.is_finite))


def _timed(items: Iterable[FrameBatch], timeline: Timeline, name: str) -> Iterator[FrameBatch]:
    iterator = iter(items)
    while True:
        began = time.perf_counter()
        item = next(iterator, None)
        timeline.add(name, began, time.perf_counter(), None if item is None else item.pts[0])
        if item is None:
            return
        yield item
