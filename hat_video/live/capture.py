"""A camera's pictures as they come: the thread that owns the connection, and makes another when it breaks.

Callbacks run on that thread, which waits for nobody: they must take what they get and return. Sound comes as packets
with bytes of their own whose pts, dts and duration are live ticks (`LIVE_TIME_BASE`, also their `time_base`); their
`stream` is not set. What they are of is in `Capture.audio`, as the first connection had it; sound of a later connection
that differs is left out, with a note.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from av.error import FFmpegError
from av.packet import Packet

from hat_video.errors import CancelledError, HatVideoError, OptionError, SourceError
from hat_video.frames import VideoInfo
from hat_video.live.brake import Brake
from hat_video.live.captured import AudioHead, Captured, CaptureEvent, CaptureFigures, Roi
from hat_video.live.connection import Connection
from hat_video.live.reading import ChangedError, Reading, Run
from hat_video.live.source_recorder import SourceRecorder
from hat_video.live.sources import CameraSource

__all__ = ["AudioHead", "Capture", "CaptureEvent", "CaptureFigures", "Captured", "Roi"]

# Seconds between tries to connect: from, to. Each is multiplied by a random factor, so that many do not try at once.
_FIRST_PAUSE, _LAST_PAUSE, _JITTER = 0.25, 10.0, (0.5, 1.5)
# For the first picture after a reconnection: key frames may be so far apart.
_FIRST_PICTURE_SECONDS = 15.0
# `__exit__` takes no longer; `__enter__` leaves the thread so much of its time to end.
_CLOSE_SECONDS, _MARGIN_SECONDS = 1.8, 0.5
# Should the brake not work, FFmpeg's own time-outs must still be longer than any silence that is allowed.
_SAFETY_SECONDS = 25.0


class Capture:
    """Pictures and sound of a camera, for as long as it is entered.

    When `__enter__` returns, the first picture has been decoded, and `info` and `audio` are known. From then on a
    connection that breaks or falls silent is made again, for ever unless `retries` says otherwise.

    Args:
        source: as `parse_source` gives it.
        on_frame: gets each picture.
        on_audio: gets each packet of sound; None: sound is not read.
        on_event: gets what people should hear of.
        retries: failures to connect in a row, after the first success, before the run fails; None: no end.
        stall_seconds: a connection without a picture for so long is dead.
        roi: the part of the picture that is wanted.
        record: the camera's own packets are copied into this file.
        open_timeout: seconds within which `__enter__` returns or raises.
        stop: ends the capture when it is set; `__exit__` ends it too.

    Raises:
        OptionError, OutputError: `record` is no file that can be written.
    """

    def __init__(
        self,
        source: CameraSource,
        *,
        on_frame: Callable[[Captured], None],
        on_audio: Callable[[Packet[Any]], None] | None = None,
        on_event: Callable[[CaptureEvent], None],
        retries: int | None = None,
        stall_seconds: float = 2.0,
        roi: Roi | None = None,
        record: Path | None = None,
        open_timeout: float = 5.0,
        stop: threading.Event | None = None,
    ) -> None:
        self.source = source
        self.error: Exception | None = None
        """Why the capture has ended; None while it goes on, and after a proper end."""
        self._retries, self._open_timeout = retries, open_timeout
        self._stop, self._closing, self._ended = stop or threading.Event(), threading.Event(), threading.Event()
        recorder = None if record is None else SourceRecorder(record, self._note)
        self._run = Run(
            on_frame, on_audio, on_event, source.name, stall_seconds, recorder, roi, closing=self._is_closing
        )
        self._thread = threading.Thread(target=self._main, name="capture", daemon=True)

    def __enter__(self) -> Self:
        """Waits for the first picture.

        Raises:
            SourceError: none came in time; the reason in one line.
            OptionError: the part does not fit into it, or its packets cannot be recorded.
            CancelledError: `stop` was set.
        """
        ready, deadline = self._run.ready, time.monotonic() + self._open_timeout
        self._thread.start()
        try:
            while not ready.wait(0.05) and time.monotonic() < deadline:
                if self._stop.is_set():
                    break
            if not self._run.has_frame:
                if self._stop.is_set():
                    raise CancelledError("stopped before the first picture")
                if self.error is not None:
                    raise self.error
                # A driver or a resolver that cannot be interrupted; its thread ends when that returns.
                raise SourceError(f"{self.source.name}: no picture within {self._open_timeout:g} s")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the capture, within two seconds whatever the source does."""
        self._close()

    @property
    def info(self) -> VideoInfo:
        """Of what `on_frame` gets: the part, where only a part is. Its time base is LIVE_TIME_BASE."""
        return _entered(self._run.info)

    @property
    def source_info(self) -> VideoInfo:
        """Of the camera's whole picture."""
        return _entered(self._run.source_info)

    @property
    def audio(self) -> AudioHead | None:
        """What the packets of `on_audio` are of; None where there is no sound."""
        return self._run.audio

    @property
    def roi(self) -> Roi | None:
        """The part that is wanted now."""
        return self._run.roi

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come; `error` says if that is an error."""
        return self._ended.is_set()

    @property
    def figures(self) -> CaptureFigures:
        """What has been counted so far."""
        run = self._run
        is_fresh = time.monotonic() - run.last_frame < run.stall_seconds
        return CaptureFigures(
            frames=run.frames,
            decode_errors=run.decode_errors,
            dropped=dict(run.dropped),
            corrupt=run.corrupt,
            reconnects=max(0, run.connections - 1),
            reanchored=run.clock.reanchored,
            is_up=run.connections > 0 and is_fresh and not self.is_ended,
            last_frame=run.last_frame,
            decode_seconds=run.decode_seconds,
            recorded_packets=0 if run.recorder is None else run.recorder.packets,
            record_dropped=0 if run.recorder is None else run.recorder.dropped,
        )

    def move_roi(self, x: int, y: int) -> tuple[int, int]:
        """Moves the part, from the next picture on, as near to (x, y) as the picture and its chroma allow.

        Returns:
            Where it is now.

        Raises:
            OptionError: there is no part: the whole picture is upscaled.
        """
        roi, info = self._run.roi, self.source_info
        if roi is None:
            raise OptionError("the whole picture is upscaled; only a part (--roi) can be moved")
        x, y = min(max(0, x), info.width - roi.width), min(max(0, y), info.height - roi.height)
        moved = replace(roi, x=x, y=y).within(info)
        self._run.roi = moved
        return moved.x, moved.y

    def _close(self) -> None:
        """Ends the thread, and waits for it as long as there is hope that it ends."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        self._closing.set()
        self._thread.join(0.7 * _CLOSE_SECONDS)
        if self._run.recorder is not None:
            self._run.recorder.close(max(0.2, deadline - time.monotonic()))

    def _is_closing(self) -> bool:
        return self._closing.is_set() or self._stop.is_set()

    def _note(self, message: str) -> None:
        self._run.note(message)

    # From here on: the capture's thread.

    def _main(self) -> None:
        run = self._run
        # For this thread alone: copying planes is no work for several, which would wait for each other.
        torch.set_num_threads(1)
        try:
            with Brake(lambda: run.is_due):
                self._connect_for_ever()
        except Exception as error:  # noqa: BLE001 - whoever owns the capture is told
            self.error = error
            if run.has_frame:
                run.on_event(CaptureEvent("failed", self._without_name(error)))
        finally:
            self._ended.set()
            run.ready.set()

    def _connect_for_ever(self) -> None:
        failures, pause = 0, _FIRST_PAUSE
        while not self._is_closing():
            before = self._run.connections
            problem = self._connect()
            if self._is_closing():
                return
            if not self._run.has_frame:
                raise SourceError(f"{self.source.name}: {problem or 'there is no picture in it'}")
            if problem is None:
                self._run.on_event(CaptureEvent("ended", "the source has ended"))
                return
            if self._run.connections > before:
                failures, pause = 0, _FIRST_PAUSE
            if self._retries is not None and failures >= self._retries:
                raise SourceError(f"{self.source.name}: {problem}; given up after {failures} more tries")
            failures += 1
            seconds = pause * random.uniform(*_JITTER)
            self._run.on_event(CaptureEvent("down", f"{problem}; again in {seconds:.1f} s"))
            self._rest(seconds)
            # Where it is the camera that comes to us, a pause would only make it wait.
            pause = _FIRST_PAUSE if self._is_passive() else min(2 * pause, _LAST_PAUSE)

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._is_closing() and (left := end - time.monotonic()) > 0:
            self._closing.wait(min(0.1, left))

    def _is_passive(self) -> bool:
        source = self.source
        return "listen" in source.options or re.match(r"udp:|.*[?&](listen|mode=listener)\b", source.url) is not None

    def _connect(self) -> str | None:
        """One connection, from open to end; why it ended, or None if that was the end of the source."""
        run = self._run
        is_first, before, began = not run.has_frame, run.connections, time.monotonic()
        patience = self._open_timeout - _MARGIN_SECONDS if is_first else self._open_timeout
        run.deadline = began + patience
        try:
            with Connection(self.source, lambda: run.is_due, self._open_timeout + _SAFETY_SECONDS) as connection:
                if not is_first:
                    patience = _FIRST_PICTURE_SECONDS
                    run.deadline = began + patience
                try:
                    Reading(run, connection).read()
                except (FFmpegError, OSError) as error:
                    if isinstance(error, HatVideoError):
                        raise
                    raise SourceError(connection.why(error)) from None
        except ChangedError:
            raise
        except SourceError as error:
            if run.connections > before and time.monotonic() > run.deadline:
                return f"silent for {run.stall_seconds:g} s"
            if time.monotonic() > run.deadline:
                return f"no picture within {self._open_timeout if is_first else patience:g} s"
            return self._without_name(error)
        return None if self.source.kind in ("pipe", "test") else "the camera has closed the connection"

    def _without_name(self, error: Exception) -> str:
        return str(error).removeprefix(f"{self.source.name}: ")


def _entered(info: VideoInfo | None) -> VideoInfo:
    if info is None:
        raise RuntimeError("a capture knows its pictures once it is entered: with Capture(...) as capture:")
    return info
