"""Who runs the work. Every engine gives the same bytes, since all of them run the same segments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hat_video.jobs.plan import Segment
from hat_video.jobs.work import SegmentRecord, Worker

__all__ = ["LocalEngine"]


class LocalEngine:
    """One process: segments in order of time, so that the decoder never has to seek; parallel inside, over frames."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def map(self, segments: Iterable[Segment]) -> Iterator[SegmentRecord]:
        """Makes each segment; yields its record once it is committed. Errors of `Worker.work` come through."""
        for segment in segments:
            yield self._worker.work(segment)
