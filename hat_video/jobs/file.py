"""One clip, from the plan to a finished file that has been proven.

Nothing gets the output's name before the proof: the film is written beside it as `.part`, compared with the source, and
only then renamed. What it takes to go on after a crash lies in the work folder, what it takes to know that a file is
finished in a receipt beside it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from hat_video.errors import (
    CancelledError,
    HatVideoError,
    OutputError,
    SourceError,
    StrictError,
    VerifyError,
    WorkError,
)
from hat_video.files import remove_unfinished, write_atomically
from hat_video.frames import FrameBatch
from hat_video.inference.processors import cpu_count
from hat_video.inference.timeline import Span, write_trace
from hat_video.inference.upscaler import choose_devices
from hat_video.jobs.choices import output_label
from hat_video.jobs.engines import LocalEngine, ProcessEngine
from hat_video.jobs.estimate import Estimate, Trial, film_bytes_before
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.plan import CONTAINERS, Manifest, Plan, Segment, plan_file
from hat_video.jobs.report import FileReport, Progress, Stage, check_report
from hat_video.jobs.sequence import as_film
from hat_video.jobs.verification import verify_files
from hat_video.jobs.work import SegmentRecord, Worker, drop_segment, read_record
from hat_video.jobs.workspace import (
    WORK_FOLDER,
    Receipt,
    discard,
    locked,
    made_folder,
    read_receipt,
    remove_empty,
    sweep,
    write_receipt,
)
from hat_video.media.mux import SegmentFile, join
from hat_video.media.probe import Probe, probe
from hat_video.media.sequence import is_sequence, plain_name
from hat_video.media.verify import verify
from hat_video.model.zoo import Model

__all__ = ["default_output", "upscale_file"]

_PART = ".part"


def default_output(source: Path, label: str) -> Path:
    """`<stem>_<label><suffix>` beside the source; `.mkv` where the source's own container cannot be written."""
    suffix = source.suffix if source.suffix.lower() in CONTAINERS else ".mkv"
    stem = plain_name(source) if is_sequence(source) else source.stem
    return source.with_name(f"{stem}_{label}{suffix}")


def upscale_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: UpscaleOptions | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    cancel: threading.Event | None = None,
    model: Model | None = None,
    found: Probe | None = None,
) -> FileReport:
    """Upscales one clip, goes on where an earlier run of the same request was cut off, and proves the result.

    Args:
        source: the clip.
        output: the file to make; `default_output` if None.
        options: the choices; the defaults if None.
        on_progress: called from this thread, at most a few times a second.
        on_estimate: called once in the first seconds of a run that will take more than a minute.
        cancel: set it from another thread to stop; what is committed is kept.
        model: the model that `options` choose, where the caller has loaded it already.
        found: the probe of the source, where the caller has it already.

    Returns:
        The report, with status `done`, or `already done` where a matching receipt lies beside the output.

    Raises:
        HatVideoError: see `hat_video.errors`. The output's name never holds an unfinished file.
    """
    options = options or UpscaleOptions()
    check_report(options.trace, "--trace")
    source_path = Path(source)
    if output is None:
        output = default_output(source_path, output_label(options, model))
    target = Path(output)
    # Numbered pictures are bound below the lock, which keeps `clean` away from their film, too.
    with made_folder(target.parent), locked(target), as_film(source_path, target, options) as film:
        run = _Run(film, target, options, on_progress, on_estimate, cancel or threading.Event())
        return replace(run.upscale(model, found), source=source_path)


class _Run:
    """One request, while it runs."""

    def __init__(
        self,
        source: Path,
        output: Path,
        options: UpscaleOptions,
        on_progress: Callable[[Progress], None] | None,
        on_estimate: Callable[[Estimate], None] | None,
        stop: threading.Event,
    ) -> None:
        self.source, self.output, self.options, self.stop = source, output, options, stop
        self._on_progress, self._on_estimate = on_progress, on_estimate
        self._trial: Trial | None = None
        self._frames_done = self._frames_total = self._frames_reused = 0
        self._began = time.perf_counter()
        self._work_began = self._began
        self._told = 0.0
        self._seconds: dict[str, float] = {}
        self._notes: list[str] = []

    def upscale(self, model: Model | None, found: Probe | None) -> FileReport:
        self._check_names()
        self._tell("plan", force=True)
        self._planned_stamp = self._stamp()
        with self._clock("plan"):
            plan = plan_file(self.source, self.output, self.options, model, found)
        manifest = plan.manifest
        self._notes.extend(manifest.notes)
        self._frames_total = len(manifest.index.pts)
        base = (self.options.work_dir or self.output.parent / WORK_FOLDER) / self.output.name
        folder = base / manifest.key
        receipt = read_receipt(self.output)
        if self.output.exists():
            if receipt is not None and receipt.key == manifest.key and receipt.is_of(self.output):
                discard(folder)
                sweep(base)
                remove_empty(base)
                line = self._prove_again(receipt)
                return self._report("already done", plan, [], frames=receipt.frames, reused=0, verification=line)
            if not self.options.overwrite:
                raise OutputError(
                    f"{self.output}: exists, and these settings did not make it; use --overwrite or another -o"
                )
        self._note_other_recipes(base, manifest)
        with self._work_folder(folder, base):
            return self._make(plan, folder)

    def _prove_again(self, receipt: Receipt) -> str:
        """What is asked of a file that is done already may be more than what was asked when it was made."""
        lost = receipt.frames.get("lost", 0)
        if self.options.strict and lost:
            raise StrictError(
                f"{self.output}: is done already, without {lost} frames that cannot be decoded;"
                " --strict refuses to leave them out"
            )
        if self.options.verify != "full" or "decoded" in receipt.verification:
            return receipt.verification
        with self._clock("verify"):
            found = verify_files(
                self.source,
                self.output,
                is_full=True,
                start=self.options.start,
                duration=self.options.duration,
                limits=self.options.limits(),
            ).verdict
        if not found.is_ok:
            raise VerifyError(f"{self.output}: is done already, but {found.line}")
        write_receipt(self.output, replace(receipt, verification=found.line))
        return found.line

    def _check_names(self) -> None:
        output = self.output
        try:
            output.with_name(output.name + _PART).exists()
            if output.is_dir():
                raise OutputError(f"{output}: is a directory; give a file, or end the name in / for a directory")
            if output.exists() and self.source.exists() and output.samefile(self.source):
                raise OutputError(f"{output}: is the input itself; give another -o")
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{output}: cannot be written: {error.strerror or error}; give another -o") from None
        for place in {output.parent, self.options.work_dir or output.parent}:
            try:
                place.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=place):
                    pass
            except OSError as error:
                raise OutputError(f"{place}: cannot be written to: {error.strerror or error}") from None

    def _check_space(self, plan: Plan, folder: Path, records: Iterable[SegmentRecord]) -> None:
        """Refuses what cannot fit; what may become tight goes on, since nothing is lost where the disk becomes full.

        Segments and the joined film exist side by side until the proof; the other streams are only in the film.
        """
        manifest, kept, target = plan.manifest, list(records), self.output.parent
        encoded = sum(record.bytes for record in kept)
        left = len(manifest.index.pts) - sum(len(record.pts) + len(record.lost) for record in kept)
        rest = film_bytes_before(manifest, left, sum(len(record.pts) for record in kept), encoded)
        others = len(manifest.index.pts) * plan.probe.other_bytes // len(plan.probe.index.pts)
        is_copied = all(stream.action in ("video", "copy") for stream in manifest.streams)
        # The container of the segments costs more than the film's.
        film = (3 * encoded // 4 + rest[0] + (others if is_copied else 0), encoded + rest[1] + others)
        part = self.output.with_name(self.output.name + _PART)
        try:
            is_one_disk = folder.stat().st_dev == target.stat().st_dev
            free = {place: shutil.disk_usage(place).free for place in (folder, target)}
            if part.exists():
                free[target] += part.stat().st_size  # what a killed run has joined is written over
        except OSError as error:
            raise OutputError(f"{target}: cannot be looked at: {error.strerror or error}") from None
        needs = {target: (rest[0] + film[0], rest[1] + film[1])} if is_one_disk else {folder: rest, target: film}
        for place, (least, usual) in needs.items():
            room = f"{place}: {free[place] / 1e6:.1f} MB"
            if free[place] < least:
                elsewhere = "write elsewhere with -o" if place == target else "give another --work-dir"
                raise OutputError(
                    f"{room} are free, at least {least / 1e6:.1f} MB are needed; free some space or {elsewhere}"
                )
            if free[place] < usual:
                self._notes.append(
                    f"{room} were free at the start, where {usual / 1e6:.1f} MB are usual for such a run"
                )

    def _note_other_recipes(self, base: Path, manifest: Manifest) -> None:
        """Says what is different from the runs whose work lies beside ours, since that is why none of it is used."""
        for path in sorted(base.glob("*/manifest.json")):
            try:
                other = Manifest.from_json(path.read_bytes())
            except (OSError, ValueError):
                continue
            if other.key == manifest.key:
                continue
            changed = [] if other.digest == manifest.digest else ["the source"]
            theirs, ours = asdict(other.recipe), asdict(manifest.recipe)
            changed += [f"{name} ({theirs[name]} -> {ours[name]})" for name in ours if theirs[name] != ours[name]]
            self._notes.append(f"not reused, because changed: {', '.join(changed)}; work in {path.parent}")

    @contextmanager
    def _work_folder(self, folder: Path, base: Path) -> Iterator[None]:
        """The work folder; removed again by a run that leaves nothing to go on with."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)
            sweep(base)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made: {error.strerror or error}") from None
        try:
            yield
        finally:
            if not any(folder.glob("seg-*.json")):
                discard(folder)
            remove_empty(base)

    def _make(self, plan: Plan, folder: Path) -> FileReport:
        manifest = plan.manifest
        try:
            with self._clock("work"):
                records, reused = self._work(plan, folder)
            return self._finish(plan, folder, records, reused)
        except HatVideoError as error:
            kept = sum(1 for _ in folder.glob("seg-*.json"))
            if not kept or isinstance(error, StrictError | VerifyError):
                raise
            raise type(error)(
                f"{error}; {kept} of {len(manifest.segments)} segments are kept: the same command goes on from there"
            ) from error.__cause__

    def _work(self, plan: Plan, folder: Path) -> tuple[list[SegmentRecord], int]:
        manifest = plan.manifest
        records = self._committed(folder, manifest)
        self._check_space(plan, folder, records.values())
        write_atomically(folder / "manifest.json", manifest.to_json())
        to_do = [segment for segment in manifest.segments if segment.id not in records]
        reused = len(records)
        self._frames_reused = self._frames_done = sum(len(record.pts) for record in records.values())
        self._work_began = time.perf_counter()
        self._tell("work", force=True)
        if to_do:
            jobs = self.options.jobs or cpu_count()
            devices = choose_devices(self.options.device)
            if len(devices) > 1:
                self._work_in_processes(plan, folder, devices, jobs, to_do, records)
            else:
                self._work_here(plan, folder, jobs, to_do, records)
        return [records[segment.id] for segment in manifest.segments], reused

    def _committed(self, folder: Path, manifest: Manifest) -> dict[int, SegmentRecord]:
        """The segments of earlier runs. One that does not hold is taken back: making it again gives the same bytes."""
        records = {}
        for segment in manifest.segments:
            try:
                record = read_record(folder, manifest, segment)
            except WorkError as error:
                drop_segment(folder, segment)
                self._notes.append(f"segment {segment.id} is made again: {error}")
                continue
            if record is not None:
                records[segment.id] = record
        return records

    def _work_here(
        self, plan: Plan, folder: Path, jobs: int, to_do: list[Segment], records: dict[int, SegmentRecord]
    ) -> None:
        worker = Worker(
            plan.manifest,
            folder,
            upscaler=plan.upscaler,
            jobs=jobs,
            stop=self.stop,
            on_batch=self._count,
            found=plan.probe,
            reuse=self.options.reuse,
            keeps_spans=self.options.trace is not None,
        )
        trial = Trial(plan.manifest, plan.probe, folder, in_flight=jobs, to_do=to_do, began=self._began)
        with worker, trial as self._trial:
            for record in LocalEngine(worker).map(to_do):
                records[record.id] = record
        self._notes += worker.notes
        self._write_trace(worker.spans)

    def _work_in_processes(
        self,
        plan: Plan,
        folder: Path,
        devices: list[torch.device],
        jobs: int,
        to_do: list[Segment],
        records: dict[int, SegmentRecord],
    ) -> None:
        engine = ProcessEngine(
            plan.manifest,
            folder,
            plan.upscaler.model,
            devices,
            jobs=max(1, jobs // len(devices)),
            stop=self.stop,
            on_frames=self._count_frames,
            reuse=self.options.reuse,
            keeps_spans=self.options.trace is not None,
        )
        for record in engine.map(to_do):
            records[record.id] = record
        self._notes += engine.notes
        self._write_trace(engine.spans)

    def _write_trace(self, spans: list[Span]) -> None:
        if self.options.trace is not None:
            write_trace(self.options.trace, spans)

    def _finish(self, plan: Plan, folder: Path, records: list[SegmentRecord], reused: int) -> FileReport:
        manifest = plan.manifest
        lost = [pts for record in records for pts in record.lost]
        corrupt = [pts for record in records for pts in record.corrupt]
        made = sorted(pts for record in records for pts in record.pts)
        self._note_damage(manifest, lost, corrupt, made)
        durations = {pts: manifest.index.duration_of(i) for i, pts in enumerate(manifest.index.pts)}
        part = self.output.with_name(self.output.name + _PART)
        try:
            self._tell("join", force=True)
            with self._clock("join"):
                facts = join(
                    part,
                    manifest.recipe.container,
                    [SegmentFile(folder / record.file, record.pts) for record in records if record.file],
                    source=self.source,
                    streams=manifest.streams,
                    video=manifest.video,
                    durations=durations,
                    span=manifest.recipe.span,
                    should_stop=self.stop.is_set,
                )
            self._notes.extend(facts.notes)
            self._tell("verify", force=True)
            with self._clock("verify"):
                verdict = verify(
                    plan.probe,
                    part,
                    video=manifest.video,
                    pts=made,
                    durations=durations,
                    streams=manifest.streams,
                    segment_starts=[segment.start_pts for segment in manifest.segments],
                    lost=lost,
                    corrupt=corrupt,
                    span=manifest.recipe.span,
                    is_full=self.options.verify == "full",
                    hashes={
                        pts: mark
                        for record in records
                        for pts, mark in zip(sorted(record.pts), record.hashes, strict=False)
                    },
                )
                if not verdict.is_ok:
                    raise VerifyError(f"{self.output}: {verdict.line}; not finished, the work is kept in {folder}")
            self._check_source(plan)
            if self.stop.is_set():
                raise CancelledError("stopped")
            frames = self._frames(manifest, records)
            self._publish(part, Receipt.of(part, manifest.key, frames, verdict.line))
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        if not self.options.keep_work:
            discard(folder)
        self._tell("done", force=True)
        return self._report(
            "done",
            plan,
            records,
            frames=frames,
            reused=reused,
            verification=verdict.line,
            checked=dict(verdict.checked),
        )

    def _check_source(self, plan: Plan) -> None:
        """The pictures were read first, the sound last: both must be of the file that was planned."""
        if self._stamp() == self._planned_stamp:
            return
        if not self.source.exists() or probe(self.source, self.options.limits()).digest != plan.manifest.digest:
            raise VerifyError(f"{self.source}: was changed while it was read; run again for what it is now")

    def _stamp(self) -> tuple[int, ...] | None:
        """What tells one state of the source's file from another; None where there is none."""
        try:
            stat = self.source.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _note_damage(self, manifest: Manifest, lost: list[int], corrupt: list[int], made: list[int]) -> None:
        if not made:
            raise SourceError(f"{self.source}: not one of its {len(manifest.index.pts)} frames can be decoded")
        if lost:
            first = float(lost[0] * manifest.video.time_base)
            self._notes.append(f"{len(lost)} frames cannot be decoded and are lost, the first at {first:.3f} s")
            if self.options.strict:
                raise StrictError(f"{self.source}: {self._notes[-1]}; --strict refuses to leave them out")
        if corrupt:
            first = float(corrupt[0] * manifest.video.time_base)
            self._notes.append(f"{len(corrupt)} frames are damaged in the source, the first at {first:.3f} s")

    def _publish(self, part: Path, receipt: Receipt) -> None:
        """Receipt first, name second: killed in between, the next run finds no output and simply goes on."""
        try:
            write_receipt(self.output, receipt)
            part.replace(self.output)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.output}: cannot be given its name: {error.strerror or error}") from None

    def _frames(self, manifest: Manifest, records: list[SegmentRecord]) -> dict[str, int]:
        return {
            "in": len(manifest.index.pts),
            "out": sum(len(record.pts) for record in records),
            "lost": sum(len(record.lost) for record in records),
            "corrupt": sum(len(record.corrupt) for record in records),
            "reused": self._frames_reused,
            "same": sum(record.same for record in records),
        }

    def _report(
        self,
        status: Literal["done", "already done"],
        plan: Plan,
        records: list[SegmentRecord],
        *,
        frames: dict[str, int],
        reused: int,
        verification: str,
        checked: dict[str, object] | None = None,
    ) -> FileReport:
        manifest, model = plan.manifest, plan.upscaler.model
        made = frames["out"] - frames["reused"] if records else 0
        work = self._seconds.get("work", 0.0)
        stages = {name: sum(record.seconds[name] for record in records) for name in ("decode", "model", "encode")}
        same = sum(record.same for record in records)
        if same:
            self._notes.append(f"{same} frames equal the one before and took its result")
        if self.options.reuse == "changed" and plan.upscaler.reach is None:
            self._notes.append(
                f"--reuse changed: {model.name} pools over the whole picture, so any change reaches everything;"
                " --attention-pool box:16 bounds that, and changes the pictures slightly"
            )
        elif records:
            computed = sum(record.computed * len(record.pts) for record in records) / max(1, frames["out"])
            # Frames that equal the one before have their own line.
            if self.options.reuse == "changed" or computed < 0.995 - same / max(1, frames["out"]):
                self._notes.append(f"{100 * computed:.0f} % of the pixels went through the network")
        redone = sum(record.redone for record in records)
        if redone:
            self._notes.append(f"{redone} batches gave non-finite values and were computed again one precision safer")
        return FileReport(
            status=status,
            source=self.source,
            output=self.output,
            frames=frames,
            segments={"total": len(manifest.segments), "reused": reused},
            seconds={
                name: round(value, 3)
                for name, value in {**self._seconds, **stages, "total": time.perf_counter() - self._began}.items()
            },
            fps=round(made / work, 3) if made and work else None,
            model={"name": model.name, "sha256": model.sha256, "scale": model.scale, "purpose": model.purpose},
            recipe={"key": manifest.key, **asdict(manifest.recipe)},
            streams=[asdict(stream) for stream in manifest.streams],
            verification=verification,
            checked=checked or {},
            notes=list(self._notes),
        )

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = time.perf_counter() - began

    def _count_frames(self, count: int) -> None:
        self._frames_done += count
        self._tell("work")

    def _count(self, batch: FrameBatch) -> None:
        self._count_frames(len(batch))
        if self._on_estimate is not None and self._trial is not None:
            estimate = self._trial.feed(batch)
            if estimate is not None:
                self._on_estimate(estimate)

    def _tell(self, stage: Stage, *, force: bool = False) -> None:
        now = time.perf_counter()
        if self._on_progress is None or (not force and now - self._told < 0.2):
            return
        self._told = now
        made = self._frames_done - self._frames_reused
        fps = made / (now - self._work_began) if made else None
        left = self._frames_total - self._frames_done
        self._on_progress(
            Progress(
                stage=stage,
                source=self.source,
                output=self.output,
                frames_done=self._frames_done,
                frames_total=self._frames_total,
                frames_reused=self._frames_reused,
                fps=fps,
                eta_seconds=left / fps if fps else None,
            )
        )
