"""When each stage of the road was busy: sums for the report, and on request every span, as a picture of the overlap."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hat_video.errors import OutputError

__all__ = ["Timeline", "busy_share", "write_trace"]

Span = tuple[str, float, float, int | None]
"""Lane, begin and end in seconds of `time.perf_counter`, and the first pts of the frames, if it is about frames."""


class Timeline:
    """Spans of work, reported from any thread.

    Args:
        keeps_spans: remember every span and not only the sums.
    """

    def __init__(self, *, keeps_spans: bool = False) -> None:
        self.spans: list[Span] = []
        self._keeps_spans = keeps_spans
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def span(self, lane: str, pts: int | None = None) -> Iterator[None]:
        """Times the block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, began, time.perf_counter(), pts)

    def add(self, lane: str, begin: float, end: float, pts: int | None = None) -> None:
        """Takes note of work that was timed elsewhere."""
        with self._lock:
            self._seconds[lane] = self._seconds.get(lane, 0.0) + end - begin
            if self._keeps_spans:
                self.spans.append((lane, begin, end, pts))

    def seconds(self, lane: str) -> float:
        """All spans of a lane together; where several were at work at once, more than has passed."""
        with self._lock:
            return self._seconds.get(lane, 0.0)


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """Writes spans as a Chrome trace, which chrome://tracing and ui.perfetto.dev open.

    Work that overlaps within a lane, such as the frames in flight, gets a row each.

    Source: Trace Event Format, complete events (`ph: X`), microseconds.

    Raises:
        OutputError: the file cannot be written.
    """
    origin = min((begin for _, begin, _, _ in spans), default=0.0)
    rows: dict[str, list[float]] = {}
    numbers: dict[tuple[str, int], int] = {}
    events: list[dict[str, object]] = []
    for lane, begin, end, pts in sorted(spans, key=lambda span: span[1]):
        ends = rows.setdefault(lane, [])
        row = next((n for n, last in enumerate(ends) if last <= begin), len(ends))
        ends[row : row + 1] = [end]
        number = numbers.setdefault((lane, row), len(numbers))
        events.append(
            {
                "name": lane if pts is None else f"{lane} {pts}",
                "cat": lane,
                "ph": "X",
                "ts": round((begin - origin) * 1e6, 1),
                "dur": round((end - begin) * 1e6, 1),
                "pid": 1,
                "tid": number,
            }
        )
    for (lane, row), number in numbers.items():
        name = lane if row == 0 else f"{lane} {row + 1}"
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": name}})
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--trace {path}: cannot be written: {error.strerror or error}") from None


def busy_share(spans: Sequence[Span], lane: str, during: str) -> float:
    """How much of the time that `during` was busy, `lane` was busy as well: 0 to 1; 0 where `during` never was."""
    theirs = _merged(spans, during)
    total = sum(end - begin for begin, end in theirs)
    both = 0.0
    for begin, end in _merged(spans, lane):
        both += sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in theirs)
    return both / total if total else 0.0


def _merged(spans: Sequence[Span], lane: str) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted((begin, end) for name, begin, end, _ in spans if name == lane):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
