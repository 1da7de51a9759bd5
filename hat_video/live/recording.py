"""Recordings: one file, files by time, and standard output.

What is on the disk can be played at any moment, also after this process was killed: MP4 is written in
fragments of half a second, and becomes an ordinary MP4 when it is closed; Matroska and MPEG-TS can be read up to any
byte. Each file of a row begins with a key frame at time 0 and can be played alone; a piece of sound is in the file in
whose time it begins.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from av.error import FFmpegError

from hat_video.errors import OutputError
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.muxing import Muxer, Streams
from hat_video.live.names import RowNames, is_pattern
from hat_video.live.output import Output, OutputEvent
from hat_video.live.packet import LivePacket
from hat_video.live.pipes import PipeWriter

__all__ = ["FileWriter", "Piece", "Pieces", "RecordingOutput", "StdoutOutput"]

# Sound of before a cut may come so much later than the picture.
_LATE_TICKS = round(1 / LIVE_TIME_BASE)
# After a full disk: less than this is not worth another file.
_ENOUGH_BYTES = 32 << 20


class FileWriter:
    """A new file, for a muxer.

    Args:
        path: of the file.
        may_replace: an existing one is replaced, with the first byte that is written.

    Raises:
        OSError: it cannot be made, or it exists.
    """

    def __init__(self, path: Path, *, may_replace: bool = False) -> None:
        self.path, self._part = path, path
        if may_replace:
            # Until there is something better, the old one stays.
            self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.closed = False
        self.written = self._good = 0
        """Bytes so far."""

    def write(self, data: bytes) -> int:
        if self._part != self.path:
            self._part.replace(self.path)
            self._part = self.path
        view = memoryview(data)
        while view:
            count = os.write(self._fd, view)
            view = view[count:]
            self.written += count
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return os.lseek(self._fd, offset, whence)

    def tell(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def mark(self) -> None:
        """Up to here all is well."""
        self._good = self.tell()

    def close(self, *, remove: bool = False, has_failed: bool = False) -> None:
        """Lets the file go, or takes it away.

        Args:
            remove: take it away.
            has_failed: what was written after the last mark is half of something, and is cut off.
        """
        self.closed = True
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if has_failed:
                with suppress(OSError):
                    os.ftruncate(fd, self._good)
            if remove:
                with suppress(OSError):
                    self._part.unlink()
            os.close(fd)


class Piece:
    """One file being written."""

    def __init__(
        self, path: Path, container: str, streams: Streams, wall: float, *, may_replace: bool = False,
        start: int | None = None,
    ) -> None:  # fmt: skip
        self.path = path
        self.writer = FileWriter(path, may_replace=may_replace)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(wall))
        try:
            self.muxer = Muxer(self.writer, container, streams, start=start, tags={"creation_time": stamp})
        except BaseException:
            self.writer.close(remove=True)
            raise
        self.first: int | None = None
        """Time of its first picture."""
        self.end = 0
        """Time at which its last picture ends, as far as that is known."""

    def write(self, packet: LivePacket) -> bool:
        is_written = self.muxer.write(packet)
        self.writer.mark()
        if is_written and packet.kind == "video":
            self.first = packet.pts if self.first is None else self.first
            self.end = packet.pts + packet.duration
        return is_written

    def close(self) -> None:
        """Finishes it; a file without a picture is taken away."""
        try:
            if self.muxer.frames:
                self.muxer.close()
        except BaseException:
            self.abandon()
            raise
        self.muxer.abandon()
        self.writer.close(remove=not self.muxer.frames)

    def abandon(self) -> None:
        """Lets go after an error; what is there stays."""
        self.muxer.abandon()
        self.writer.close(remove=not self.muxer.frames, has_failed=True)


class Shelf(Protocol):
    """Where pieces come from, and where they go."""

    def new_piece(self, wall: float) -> Piece:
        """Opens a piece that begins at `wall`, in seconds since 1970."""

    def done(self, piece: Piece) -> None:
        """A piece has been finished."""


class Pieces:
    """A session that writes into one file after another, cut at key frames.

    The first file is opened at once, which proves that it can be.

    Args:
        shelf: gives and takes the files.
        seconds: cut after so long, at the next key frame; never if None.
        has_audio: whether there is sound to wait for at a cut.
        ask_for_key: asks for the key frame of the cut.
    """

    def __init__(
        self, shelf: Shelf, seconds: float | None, *, has_audio: bool, ask_for_key: Callable[[], None]
    ) -> None:
        self._shelf, self._has_audio, self._ask_for_key = shelf, has_audio, ask_for_key
        self._ticks = None if seconds is None else round(seconds / LIVE_TIME_BASE)
        self._current = shelf.new_piece(time.time())
        self._old: Piece | None = None
        self._cut = 0
        self._has_asked = False
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """As `Session` has it."""
        return self._bytes + self._current.writer.written + (self._old.writer.written if self._old else 0)

    def write(self, packet: LivePacket) -> bool:
        """As `Session` has it."""
        if packet.kind == "audio":
            if self._old is not None:
                if packet.pts < self._cut:
                    return self._old.write(packet)
                self._close_old()
            return self._current.write(packet)
        if self._old is not None and packet.pts - self._cut > _LATE_TICKS:
            self._close_old()
        first = self._current.first
        if self._ticks is not None and first is not None and packet.pts - first >= self._ticks:
            if packet.is_key:
                self._turn(packet)
            elif not self._has_asked:
                self._has_asked = True
                self._ask_for_key()
        return self._current.write(packet)

    def finish(self) -> None:
        """As `Session` has it."""
        self._close_old()
        self._current.close()
        if self._current.first is not None:
            self._shelf.done(self._current)

    def abandon(self) -> None:
        """As `Session` has it."""
        for piece in (self._old, self._current):
            if piece is not None:
                with suppress(OSError, FFmpegError, ValueError):
                    piece.abandon()

    def _turn(self, packet: LivePacket) -> None:
        self._close_old()
        delay = 0.0 if packet.captured is None else time.monotonic() - packet.captured
        piece = self._shelf.new_piece(time.time() - delay)
        self._old, self._current, self._cut, self._has_asked = self._current, piece, packet.pts, False
        self._old.end = packet.pts
        if not self._has_audio:
            self._close_old()

    def _close_old(self) -> None:
        if self._old is not None:
            piece, self._old = self._old, None
            try:
                piece.close()
            finally:
                self._bytes += piece.writer.written
            self._shelf.done(piece)


class RecordingOutput(Output):
    """A file, or a row of files by time.

    After an error, as of a full disk, it goes on in another file as soon as that is possible: `out-2.mp4` after
    `out.mp4`. No file that exists is ever written to, but for the one that `may_replace` allows.

    Args:
        path: of the file; of a row, a pattern of `strftime`.
        container: FFmpeg's name of the muxer.
        streams: of the encoder.
        segment_seconds: length of a file; None: one file.
        keep_seconds: older files of this row are deleted; None: none is.
        may_replace: the file may exist, and is lost then; no matter for a row.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        container: str,
        streams: Streams,
        *,
        segment_seconds: float | None,
        keep_seconds: float | None,
        may_replace: bool,
        ask_for_key: Callable[[], None],
        on_event: Callable[[OutputEvent], None] | None = None,
    ) -> None:
        super().__init__(
            name, ask_for_key=ask_for_key, on_event=on_event, queue_seconds=60.0, queue_bytes=64 << 20, keeps_old=True
        )
        self._path, self._container, self._streams = path, container, streams
        self._seconds, self._keep, self._may_replace = segment_seconds, keep_seconds, may_replace
        self._names: RowNames | None = None
        self._open: set[Path] = set()
        self._has_begun = False

    def connect(self) -> Pieces:
        """Opens the first, or the next file."""
        if self._names is None and is_pattern(self._path):
            self._names = RowNames(self._path)
        self._open.clear()
        self._clean()
        if self._has_begun:
            folder = self._path.parent if self._names is None else self._names.base
            free = shutil.disk_usage(folder).free
            if free < _ENOUGH_BYTES:
                raise OutputError(f"no space left on device ({free >> 20} MiB are free)")
        pieces = Pieces(
            self,
            self._seconds,
            has_audio=self._streams.audio_template is not None,
            ask_for_key=self._ask_for_key,
        )
        self._has_begun = True
        return pieces

    def new_piece(self, wall: float) -> Piece:
        """As `Shelf` has it."""
        if self._names is None:
            return self._single(wall)
        while True:
            path = self._names.free(wall)
            try:
                piece = Piece(path, self._container, self._streams, wall)
                break
            except FileExistsError:
                continue  # made by somebody else in the meantime
        if self._seconds is not None:
            try:
                self._names.made.add(path)
            except OSError:
                piece.abandon()
                raise
        self._open.add(path)
        self._clean()
        return piece

    def done(self, piece: Piece) -> None:
        """As `Shelf` has it."""
        self._open.discard(piece.path)
        if self._names is not None and self._seconds is not None and piece.path.exists():
            self._names.made.add(piece.path, is_closed=True)
        self._clean()

    def _single(self, wall: float) -> Piece:
        if not self._has_begun:
            return Piece(self._path, self._container, self._streams, wall, may_replace=self._may_replace)
        number = 2
        while True:
            path = self._path.with_stem(f"{self._path.stem}-{number}")
            try:
                return Piece(path, self._container, self._streams, wall)
            except FileExistsError:
                number += 1

    def _clean(self) -> None:
        if self._names is not None and self._keep is not None:
            self._names.made.prune(older_than=time.time() - self._keep, besides=self._open)


class StdoutOutput(Output):
    """Standard output, for a player that reads it. Its end is final: the reader closes it when it has seen enough.

    Args:
        container: `nut` or `matroska`.
        streams: of the encoder.
        fd: 1, but in tests.
    """

    def __init__(
        self,
        name: str,
        container: str,
        streams: Streams,
        *,
        ask_for_key: Callable[[], None],
        on_event: Callable[[OutputEvent], None] | None = None,
        fd: int = 1,
    ) -> None:
        super().__init__(name, ask_for_key=ask_for_key, on_event=on_event)
        self._container, self._streams, self._fd = container, streams, fd

    def connect(self) -> PipeSession:
        """Writes the head, so that the reader can set itself up."""
        if os.isatty(self._fd):
            raise OutputError("is a terminal; pipe it into a player, as in `| mpv -`")
        writer = PipeWriter(self._fd, aborted=self.aborted)
        return PipeSession(Muxer(writer, self._container, self._streams), writer)


class PipeSession:
    """A session that writes one container into a pipe."""

    def __init__(self, muxer: Muxer, writer: PipeWriter) -> None:
        self._muxer, self._writer = muxer, writer

    @property
    def bytes(self) -> int:
        """As `Session` has it."""
        return self._writer.written

    def write(self, packet: LivePacket) -> bool:
        """As `Session` has it."""
        return self._muxer.write(packet)

    def finish(self) -> None:
        """As `Session` has it."""
        self._muxer.close()

    def abandon(self) -> None:
        """As `Session` has it."""
        self._muxer.abandon()
