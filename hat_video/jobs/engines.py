"""Who runs the work. Every engine gives the same bytes, since all of them run the same segments."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from hat_video.errors import CancelledError, DeviceLostError, HatVideoError, WorkError
from hat_video.files import UNFINISHED
from hat_video.frames import FrameBatch
from hat_video.inference.timeline import Span
from hat_video.inference.upscaler import Upscaler
from hat_video.jobs.picture import Reuse
from hat_video.jobs.plan import Manifest, Segment
from hat_video.jobs.work import SegmentRecord, Worker
from hat_video.model.zoo import Model

__all__ = ["LocalEngine", "ProcessEngine"]

# A segment that took this many processes with it would take the next one, too.
_MOST_DEATHS = 2
_POLL_SECONDS = 0.1


class LocalEngine:
    """One process: segments in order of time, so that the decoder never has to seek; parallel inside, over frames."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def map(self, segments: Iterable[Segment]) -> Iterator[SegmentRecord]:
        """Makes each segment; yields its record once it is committed. Errors of `Worker.work` come through."""
        for segment in segments:
            yield self._worker.work(segment)


@dataclass(frozen=True, slots=True)
class _Order:
    """What a process needs to know."""

    manifest: bytes
    folder: Path
    model: Model
    device: str
    jobs: int
    reuse: Reuse
    keeps_spans: bool


@dataclass(slots=True)
class _Hand:
    """A process, and what it is doing."""

    device: str
    process: BaseProcess
    talk: Connection
    life: Connection
    """Closed, by us or by our end, it ends the process; a word on it asks the process to stop."""
    segment: Segment | None = None


class ProcessEngine:
    """One process for each device, all taking segments from the same queue.

    A process that dies, because its GPU was lost or somebody killed it, loses its segment to another one. If this
    process dies, all of them end at once.

    Args:
        manifest: the plan.
        folder: the work folder.
        model: the network.
        devices: one for each process; the same one several times is allowed.
        jobs: frames in flight in each of them, on a CPU.
        stop: once set, `map` raises `CancelledError` soon.
        on_frames: called with a number of frames that were made.
        reuse: as for `Worker`.
        keeps_spans: likewise.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        model: Model,
        devices: Sequence[torch.device],
        *,
        jobs: int,
        stop: threading.Event,
        on_frames: Callable[[int], None],
        reuse: Reuse = "same",
        keeps_spans: bool = False,
    ) -> None:
        self._devices = [str(device) for device in devices]
        self._orders = [
            _Order(manifest.to_json(), folder, model, device, jobs, reuse, keeps_spans) for device in self._devices
        ]
        self._segments = manifest.segments
        self._stop, self._on_frames = stop, on_frames
        self._deaths: Counter[int] = Counter()
        self.spans: list[Span] = []
        self.notes: list[str] = []
        """Processes that died and decoders that failed, one line each."""

    def map(self, segments: Iterable[Segment]) -> Iterator[SegmentRecord]:
        """Makes each segment; yields its record once it is committed, in whatever order they come.

        Raises:
            CancelledError: `stop` was set.
            WorkError: every process died, or one segment killed several.
            HatVideoError: as `Worker.work` says.
        """
        waiting = deque(segments)
        hands = [self._hire(order) for order in self._orders[: len(waiting)]]
        try:
            while waiting or any(hand.segment is not None for hand in hands):
                if not hands:
                    raise WorkError(f"every process that did the work has died: {'; '.join(self.notes)}")
                for hand in hands:
                    if hand.segment is None and waiting:
                        hand.segment = waiting.popleft()
                        _send(hand.talk, hand.segment.id)
                ready = wait([hand.talk for hand in hands], timeout=_POLL_SECONDS)
                if self._stop.is_set():
                    raise CancelledError("stopped")
                for hand in [hand for hand in hands if hand.talk in ready]:
                    try:
                        kind, what = hand.talk.recv()
                    except (EOFError, OSError):
                        hands.remove(hand)
                        self._bury(hand, waiting)
                        continue
                    if kind == "lost":
                        hands.remove(hand)
                        self._bury(hand, waiting, what)
                    elif kind == "frames":
                        self._on_frames(what)
                    elif kind == "error":
                        raise what
                    else:
                        record, spans, notes = what
                        self.spans += spans
                        self.notes += [note for note in notes if note not in self.notes]
                        hand.segment = None
                        yield record
        finally:
            for hand in hands:
                _send(hand.life, "stop")
            for hand in hands:
                hand.talk.close()
                hand.process.join()
                hand.life.close()

    def _hire(self, order: _Order) -> _Hand:
        context = get_context("spawn")
        talk, other_talk = context.Pipe()
        other_life, life = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(order, other_talk, other_life), name="hat-video-worker")
        # Until the process can see to Ctrl-C itself, it must not hear it. The tracker that multiprocessing starts first
        # would unblock the signal.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other_talk.close()
        other_life.close()
        return _Hand(order.device, process, talk, life)

    def _bury(self, hand: _Hand, waiting: deque[Segment], how: str | None = None) -> None:
        hand.talk.close()
        hand.process.join()
        hand.life.close()
        code = hand.process.exitcode or 0
        how = how or (f"signal {-code}" if code < 0 else f"exit code {code}")
        self.notes.append(f"the process on {hand.device} died ({how})")
        if hand.segment is None:
            return
        for left_over in self._orders[0].folder.glob(f"{UNFINISHED}{hand.segment.id:05d}-*"):
            left_over.unlink(missing_ok=True)
        self._deaths[hand.segment.id] += 1
        if self._deaths[hand.segment.id] >= _MOST_DEATHS:
            raise WorkError(
                f"segment {hand.segment.id} of {len(self._segments)} killed {_MOST_DEATHS} processes"
                f" ({'; '.join(self.notes)}); try --device cpu, or a smaller --tile"
            )
        self.notes[-1] += f"; its segment {hand.segment.id} was made again by another"
        waiting.appendleft(hand.segment)


def _send(to: Connection, what: object) -> None:
    # Who has just died is noticed where it is heard.
    with suppress(OSError):
        to.send(what)


def _work(order: _Order, talk: Connection, life: Connection) -> None:
    """A process's whole life: segments come in by number, records go out."""
    # Ctrl-C goes to every process of the terminal; what it means is the first one's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    stop = threading.Event()
    threading.Thread(target=_watch, args=(life, stop), daemon=True).start()
    try:
        manifest = Manifest.from_json(order.manifest)
        recipe = manifest.recipe
        upscaler = Upscaler(
            order.model,
            device=order.device,
            precision=recipe.precision,
            tile=recipe.tile,
            backend=recipe.backend,
            in_flight=order.jobs,
            trunk_exponent=recipe.trunk_exponent,
        )

        def count(batch: FrameBatch) -> None:
            talk.send(("frames", len(batch)))

        with Worker(
            manifest,
            order.folder,
            upscaler=upscaler,
            jobs=order.jobs,
            stop=stop,
            on_batch=count,
            reuse=order.reuse,
            keeps_spans=order.keeps_spans,
        ) as worker:
            while True:
                record = worker.work(manifest.segments[talk.recv()])
                talk.send(("record", (record, worker.spans, worker.notes)))
                worker.spans = []
    except CancelledError:
        pass
    except DeviceLostError as error:
        _send(talk, ("lost", str(error)))
    except HatVideoError as error:
        _send(talk, ("error", error))
    except (EOFError, OSError):
        pass  # there is no more to do


def _watch(life: Connection, stop: threading.Event) -> None:
    """Asked to stop, the process leaves with everything tidied up; with nobody left to ask it, at once."""
    try:
        life.recv()
        stop.set()
        life.recv()
    except (EOFError, OSError):
        if not stop.is_set():
            os._exit(1)
