"""An HLS folder, for browsers and players that fetch files: a playlist, and the last minute in pieces of two seconds.

Any web server can serve it. The playlist is replaced whole, never changed; it names only pieces that are finished.
Pieces are MPEG-TS, which every HLS player knows; their time goes on from piece to piece.

Source: RFC 8216 (HTTP Live Streaming).
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hat_video.errors import OutputError
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.muxing import Streams
from hat_video.live.names import Made
from hat_video.live.output import Output, OutputEvent
from hat_video.live.recording import Piece, Pieces

__all__ = ["HlsOutput"]

_PIECE_SECONDS = 2.0
_WINDOW_SECONDS = 60.0
# Players may still ask for what has just left the playlist.
_KEPT_BEHIND = 5


@dataclass(frozen=True, slots=True)
class _Listed:
    name: str
    seconds: float
    wall: float
    begins_anew: bool
    """After an error: what came before has another end."""


class HlsOutput(Output):
    """Writes an HLS folder.

    Args:
        playlist: its path; the pieces lie beside it.
        streams: of the encoder.
        may_replace: a playlist that this did not make may be replaced.
    """

    def __init__(
        self,
        name: str,
        playlist: Path,
        streams: Streams,
        *,
        may_replace: bool,
        ask_for_key: Callable[[], None],
        on_event: Callable[[OutputEvent], None] | None = None,
    ) -> None:
        super().__init__(name, ask_for_key=ask_for_key, on_event=on_event, queue_seconds=10.0)
        self._playlist, self._streams, self._may_replace = playlist, streams, may_replace
        self._made = Made(playlist.parent, f"{playlist.stem}-%H.ts")
        self._run_name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self._listed: deque[_Listed] = deque()
        self._behind: deque[str] = deque()
        self._open: dict[Path, tuple[float, bool]] = {}
        self._count = self._first_number = self._first_anew = 0
        self._longest = _PIECE_SECONDS
        self._start: int | None = None
        self._newest: Piece | None = None
        self._begins_anew = self._has_begun = False

    def connect(self) -> Pieces:
        """Makes the folder, and opens the first piece."""
        folder = self._playlist.parent
        if not self._has_begun:
            folder.mkdir(exist_ok=True)
            if self._playlist.exists() and not (self._made.is_there or self._may_replace):
                raise OutputError("exists; use --overwrite or another -o")
            self._made.prune(older_than=math.inf)  # what a run before has left
        self._remove_failed()
        self._begins_anew = self._has_begun
        pieces = Pieces(
            self, _PIECE_SECONDS, has_audio=self._streams.audio_template is not None, ask_for_key=self._ask_for_key
        )
        if not self._has_begun:
            self._write_playlist(is_over=False)
        self._has_begun = True
        return pieces

    def new_piece(self, wall: float) -> Piece:
        """As `Shelf` has it."""
        path = self._playlist.with_name(f"{self._playlist.stem}-{self._run_name}-{self._count:06d}.ts")
        self._count += 1
        if self._start is None and self._newest is not None:
            self._start = self._newest.first
        piece = self._newest = Piece(path, "mpegts", self._streams, wall, start=self._start)
        try:
            self._made.add(path)
        except OSError:
            piece.abandon()
            raise
        self._open[path] = (wall, self._begins_anew)
        self._begins_anew = False
        return piece

    def done(self, piece: Piece) -> None:
        """As `Shelf` has it."""
        wall, begins_anew = self._open.pop(piece.path)
        if piece.first is None:
            return
        seconds = float((piece.end - piece.first) * LIVE_TIME_BASE)
        self._longest = max(self._longest, seconds)
        self._listed.append(_Listed(piece.path.name, seconds, wall, begins_anew))
        while sum(listed.seconds for listed in self._listed) - self._listed[0].seconds >= _WINDOW_SECONDS:
            gone = self._listed.popleft()
            self._first_number += 1
            self._first_anew += gone.begins_anew
            self._behind.append(gone.name)
        self._write_playlist(is_over=False)
        while len(self._behind) > _KEPT_BEHIND:
            self._playlist.with_name(self._behind.popleft()).unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            super()._run()
        finally:
            if self._has_begun:
                self._end_playlist()

    def _end_playlist(self) -> None:
        """However the run has ended: players ask again and again for a playlist that has no end."""
        self._remove_failed()
        try:
            self._write_playlist(is_over=True)
        except OSError as error:
            self._is_finished = False
            self._end(error)

    def _remove_failed(self) -> None:
        """Takes away pieces that were never finished: no playlist names them."""
        for path in self._open:
            with suppress(OSError):
                path.unlink()
        self._open.clear()

    def _write_playlist(self, *, is_over: bool) -> None:
        lines = [
            "#EXTM3U",
            "#EXT-X-VERSION:3",
            f"#EXT-X-TARGETDURATION:{math.ceil(self._longest)}",
            f"#EXT-X-MEDIA-SEQUENCE:{self._first_number}",
            f"#EXT-X-DISCONTINUITY-SEQUENCE:{self._first_anew}",
            "#EXT-X-INDEPENDENT-SEGMENTS",
        ]
        for listed in self._listed:
            if listed.begins_anew:
                lines.append("#EXT-X-DISCONTINUITY")
            shown = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(listed.wall))
            lines.append(f"#EXT-X-PROGRAM-DATE-TIME:{shown}.{int(listed.wall % 1 * 1000):03d}Z")
            lines += [f"#EXTINF:{listed.seconds:.6f},", listed.name]
        if is_over:
            lines.append("#EXT-X-ENDLIST")
        part = self._playlist.with_name(f".{self._playlist.name}.{os.getpid()}.part")
        try:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
            part.replace(self._playlist)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise
