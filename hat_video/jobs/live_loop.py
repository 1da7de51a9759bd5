"""The loop of a live run: the newest frame to the network, several at a time, and in order to the one encoder."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hat_video.color import from_rgb
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.inference.double_buffer import Given, Prefetch, ThreadLane, Ticket
from hat_video.jobs.picture import Task, Upscaled
from hat_video.jobs.rungs import Rung
from hat_video.live.captured import Captured
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.ladder import Ladder, RungChange
from hat_video.live.mailbox import Mailbox
from hat_video.live.meter import LiveMeter

__all__ = ["LiveLoop", "OnStall"]

OnStall = Literal["gap", "hold", "slate"]

_TICKS = int(1 / LIVE_TIME_BASE)
_POLL_SECONDS = 0.1
# Frames that come late because of the network or the source are no stall; after so long without one it is.
_STALL_SECONDS = 1.0
# Between two repeated pictures: enough for players and servers to stay, and next to nothing to encode.
_HELD_SECONDS = 0.5
# Repeated pictures stay behind the camera's own clock, which may be a little behind ours.
_BEHIND_SECONDS = 0.4


class Encoding(Protocol):
    """Where finished pictures go: they are encoded and handed to all outputs."""

    def __call__(self, planes: Sequence[Tensor], ticks: int, arrived: float) -> None: ...


@dataclass(frozen=True, slots=True)
class _Work:
    """A frame on its way."""

    captured: Captured
    number: int
    """Of the rung."""
    task: Task


@dataclass(frozen=True, slots=True)
class _Done:
    made: Upscaled
    seconds: float


class LiveLoop:
    """Takes frames from a mailbox until that is over, upscales them by the rung that the ladder says, and encodes them.

    Args:
        rungs: from the best to the fastest.
        ladder: of as many rungs.
        mailbox: of captured frames.
        encode: where finished pictures go; called from the thread that calls `run`.
        meter: is told of everything.
        in_flight: frames that are computed at once.
        large: the facts of the output.
        on_stall: what is shown while no frames come.
        on_change: is told of every step on the ladder.
        on_pair: is given each frame, and the planes that were made of it.
        most_latency_seconds: frames that waited longer than that are not begun with.
        stop: ends the run.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        ladder: Ladder,
        mailbox: Mailbox[Captured],
        encode: Encoding,
        meter: LiveMeter,
        *,
        in_flight: int,
        large: VideoInfo,
        on_stall: OnStall,
        on_change: Callable[[RungChange], None],
        on_pair: Callable[[Captured, Sequence[Tensor]], None] | None,
        most_latency_seconds: float | None,
        stop: threading.Event,
    ) -> None:
        self._rungs, self.ladder, self._mailbox = rungs, ladder, mailbox
        self._encode, self._meter, self._in_flight, self._large = encode, meter, in_flight, large
        self._on_stall, self._on_change, self._on_pair, self._stop = on_stall, on_change, on_pair, stop
        self._most_latency = most_latency_seconds
        self._lane = ThreadLane("model", in_flight)
        self._free = threading.Semaphore(in_flight)
        # No key may come later: others read it while it is counted.
        self.dropped: Counter[str] = Counter(late=0, nonmonotonic=0, stopped=0)
        """Frames that were not upscaled, by reason; `stopped`: those that waited when the run was stopped."""
        self._last: tuple[tuple[Tensor, ...], int] | None = None
        """The newest picture, and its time."""
        self._last_ticks = -1
        self._last_shown = 0.0
        self._newest = 0.0
        self._slate: tuple[Tensor, ...] | None = None

    def run(self) -> None:
        """Returns once the mailbox is closed and empty; or once `stop` is set, and what was begun with is encoded.

        Raises:
            WorkError, OutOfMemoryError: see `Upscaler`; and what `encode` raises.
        """
        try:
            # `stop` ends the frames; those that are on their way are still waited for, by the lane's own end, too.
            with Prefetch(
                self._submitted(), depth=2 * self._in_flight, stop=threading.Event(), name="hat-video-dispatch"
            ) as items:
                for item in items:
                    if item is None:
                        self._idle(time.monotonic())
                    else:
                        self._finish(*item)
        finally:
            self._mailbox.close()
            self.dropped["stopped"] += len(self._mailbox)
            self._lane.close()

    def _submitted(self) -> Iterator[tuple[_Work, Ticket[_Done]] | None]:
        """Frames as they go to the network; None now and then while there is nothing to do."""
        before = -1
        while not self._mailbox.is_over and not self._stop.is_set():
            # Whoever takes a frame before there is room for it computes an old one.
            if not self._free.acquire(timeout=_POLL_SECONDS):
                yield None
                continue
            captured = self._mailbox.take(_POLL_SECONDS)
            if captured is None or self._is_late(captured):
                self._free.release()
                yield None
                continue
            number = self.ladder.rung
            rung = self._rungs[number]
            if number != before:
                rung.frames.forget()
                before = number
            batch = FrameBatch(tuple(plane[None] for plane in captured.planes), (captured.ticks,))
            work = _Work(captured, number, rung.frames.look(batch))
            yield work, self._lane.submit(self._compute, Given(work))

    def _is_late(self, captured: Captured) -> bool:
        if self._most_latency is None or time.monotonic() - captured.arrived <= self._most_latency:
            return False
        self.dropped["late"] += 1
        return True

    def _compute(self, work: _Work) -> _Done:
        began = time.perf_counter()
        try:
            made = self._rungs[work.number].frames(work.task)
        finally:
            self._free.release()
        return _Done(made, time.perf_counter() - began)

    def _finish(self, work: _Work, ticket: Ticket[_Done]) -> None:
        done, rung, captured = ticket.wait(), self._rungs[work.number], work.captured
        planes = tuple(plane[0].cpu() for plane in rung.frames.settled(done.made).planes)
        self._meter.spent("model", done.seconds)
        if captured.ticks <= self._last_ticks:
            self.dropped["nonmonotonic"] += 1
            return
        began = time.perf_counter()
        self._encode(planes, captured.ticks, captured.arrived)
        now = time.monotonic()
        self._meter.spent("encode", time.perf_counter() - began)
        self._meter.left(now, now - captured.arrived)
        rung.made += 1
        rung.cost_seconds = done.seconds
        self._last, self._last_ticks, self._last_shown = (planes, captured.ticks), captured.ticks, now
        self._newest = captured.arrived
        if self._on_pair is not None:
            self._on_pair(captured, planes)
        change = self.ladder.finished(now, work.number, done.seconds, now - captured.arrived)
        if change is not None:
            self._on_change(change)

    def _idle(self, now: float) -> None:
        """Nothing comes: shows the last picture again, or the slate."""
        if self._on_stall == "gap" or self._last is None or now - self._newest < _STALL_SECONDS:
            return
        if now - self._last_shown < _HELD_SECONDS:
            return
        planes, ticks = self._last
        if self._on_stall == "slate":
            self._slate = self._slate or slate(self._large)
            planes = self._slate
        ticks += round((now - self._newest - _BEHIND_SECONDS) * _TICKS)
        if ticks <= self._last_ticks:
            return
        self._last_ticks, self._last_shown = ticks, now
        self._encode(planes, ticks, now)
        self._meter.held()


def slate(info: VideoInfo) -> tuple[Tensor, ...]:
    """A test card of eight dim colour bars: nobody takes it for the camera.

    Returns:
        Planes (h, w), as `info` says.
    """
    bars = torch.tensor([[(7 - n) >> 1 & 1, (7 - n) >> 2 & 1, (7 - n) & 1] for n in range(8)], dtype=torch.float32)
    columns = torch.arange(info.width) * len(bars) // info.width
    picture = (0.1 + 0.4 * bars[columns]).T[None, :, None, :].expand(1, 3, info.height, info.width)
    return tuple(plane[0] for plane in from_rgb(picture.contiguous(), info.pixel_format, info.color))
