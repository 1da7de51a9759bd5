"""An output: a thread of its own behind a queue, so that nothing it does or fails to do is felt by anybody else."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from av.error import FFmpegError

from hat_video.errors import OutputError
from hat_video.live.figures import OutputFigures
from hat_video.live.muxing import reason_of
from hat_video.live.packet import LivePacket
from hat_video.live.sources import masked

__all__ = ["EndedError", "Output", "OutputEvent", "PacketQueue", "Session"]

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 10.0
# A session that lasted so long was a good one: the next back-off begins anew.
_GOOD_SECONDS = 5.0


class EndedError(OutputError):
    """The output is over for good, as a pipe whose reader has gone."""


@dataclass(frozen=True, slots=True)
class OutputEvent:
    """Something that happened to an output, for the log."""

    output: str
    """Its name, credentials masked."""
    kind: Literal["up", "down", "over", "note"]
    """`down` is tried again, `over` is not."""
    message: str


class Session(Protocol):
    """One file, or one connection, from its opening to its end. All of it runs on the output's thread."""

    @property
    def bytes(self) -> int:
        """That have gone out so far."""

    def write(self, packet: LivePacket) -> bool:
        """Writes a packet; False if it had to be left out, as before the first key frame."""

    def finish(self) -> None:
        """Ends it properly."""

    def abandon(self) -> None:
        """Lets go after an error; must not raise."""


class PacketQueue:
    """Packets for one output. `put` never waits.

    A full queue drops whole groups of pictures: what follows a lost picture cannot be decoded before a key frame.

    Args:
        seconds: full when its oldest packet has waited so long.
        size: or when it holds so many bytes.
        keeps_old: True: what came first is kept, as a recording wants it; False: what came last, as a viewer wants it.
        ask_for_key: called, on the thread that puts, when something was dropped.
    """

    def __init__(self, *, seconds: float, size: int, keeps_old: bool, ask_for_key: Callable[[], None]) -> None:
        self._seconds, self._size, self._keeps_old = seconds, size, keeps_old
        self._ask_for_key = ask_for_key
        self._packets: deque[tuple[float, LivePacket]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._is_dropping = self._has_ended = False
        self.dropped = 0
        """Pictures."""

    def put(self, packet: LivePacket) -> None:
        now = time.monotonic()
        with self._changed:
            if self._has_ended:
                return
            if self._is_full(now):
                if not self._keeps_old:
                    self._clear()
                if not self._is_dropping:
                    self._ask_for_key()
                self._is_dropping = True
            is_start = packet.kind == "video" and packet.is_key
            if self._is_dropping and (not is_start or self._is_full(now)):
                self.dropped += packet.kind == "video"
                return
            self._is_dropping = False
            self._packets.append((now, packet))
            self._bytes += len(packet.data)
            self._changed.notify()

    def get(self, timeout: float) -> LivePacket | None:
        """The next packet; None if there is none within `timeout` seconds, or never again."""
        with self._changed:
            if not self._packets and not self._has_ended:
                self._changed.wait(timeout)
            if not self._packets:
                return None
            _, packet = self._packets.popleft()
            self._bytes -= len(packet.data)
            return packet

    def end(self) -> None:
        """Nothing more will be put."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def lose(self) -> None:
        """Drops what is there, up to the next key frame: nobody takes it."""
        with self._changed:
            self._clear()
            self._is_dropping = True

    def count(self, pictures: int) -> None:
        """Counts pictures that were taken out and not written."""
        with self._changed:
            self.dropped += pictures

    @property
    def is_over(self) -> bool:
        """True when it has ended and is empty."""
        with self._changed:
            return self._has_ended and not self._packets

    @property
    def has_ended(self) -> bool:
        with self._changed:
            return self._has_ended

    def wait_for_end(self, timeout: float) -> bool:
        """Waits; True if it has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._has_ended, timeout)

    def _is_full(self, now: float) -> bool:
        return bool(self._packets) and (self._bytes > self._size or now - self._packets[0][0] > self._seconds)

    def _clear(self) -> None:
        self.dropped += sum(packet.kind == "video" for _, packet in self._packets)
        self._packets.clear()
        self._bytes = 0


class Output:
    """A sink with a thread. Subclasses say how it is opened; everything else is here.

    Args:
        name: for people; credentials masked.
        ask_for_key: makes the encoder give a key frame; any thread may call it.
        on_event: called on the output's thread.
        queue_seconds: how far it may lag behind.
        queue_bytes: likewise.
        keeps_old: as `PacketQueue` has it.
    """

    def __init__(
        self,
        name: str,
        *,
        ask_for_key: Callable[[], None],
        on_event: Callable[[OutputEvent], None] | None = None,
        queue_seconds: float = 4.0,
        queue_bytes: int = 32 << 20,
        keeps_old: bool = False,
    ) -> None:
        self.name = name
        self.aborted = threading.Event()
        """Set: whatever waits in this output must give up."""
        self.failure: OutputError | None = None
        """Why it could not be opened at the start."""
        self._ask_for_key, self._on_event, self._keeps_old = ask_for_key, on_event, keeps_old
        self._queue = PacketQueue(seconds=queue_seconds, size=queue_bytes, keeps_old=keeps_old, ask_for_key=ask_for_key)
        self._opened, self._is_up, self._has_ended, self._is_finished = threading.Event(), False, False, False
        self._frames = self._bytes = self._reconnects = 0
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"hat-video-output {name}", daemon=True)

    # On any thread.

    @property
    def figures(self) -> OutputFigures:
        """As it stands."""
        return OutputFigures(
            name=self.name,
            is_up=self._is_up,
            frames=self._frames,
            bytes=self._bytes,
            dropped=self._queue.dropped,
            reconnects=self._reconnects,
            error=self._error,
        )

    @property
    def is_over(self) -> bool:
        """Whether it has ended for good."""
        return self._has_ended

    @property
    def is_finished(self) -> bool:
        """Whether it took all that it was sent, and ended properly."""
        return self._is_finished

    def start(self) -> None:
        """Begins to open it."""
        self._thread.start()

    def wait_open(self, timeout: float) -> bool:
        """Whether opening is done, well or not."""
        return self._opened.wait(timeout)

    def send(self, packet: LivePacket) -> None:
        """Never waits."""
        if not self._has_ended:
            self._queue.put(packet)

    def close(self) -> None:
        """Nothing more will be sent; what was sent is still written. Does not wait."""
        self._queue.end()

    def abort(self) -> None:
        """Whatever it waits for, it gives up. Does not wait."""
        self.aborted.set()
        self._queue.end()

    def join(self, timeout: float) -> bool:
        """Whether its thread has ended by then."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # On its own thread.

    def connect(self) -> Session:
        """Opens it.

        Raises:
            OutputError, FFmpegError, OSError: it cannot be opened now.
        """
        raise NotImplementedError

    def tell(self, kind: Literal["up", "down", "over", "note"], message: str) -> None:
        """Hands an event on."""
        if self._on_event is not None:
            self._on_event(OutputEvent(self.name, kind, masked(message)))

    def _run(self) -> None:
        try:
            session = self._first()
            if session is not None:
                self._serve(session)
        except Exception as error:  # noqa: BLE001 - an output without a thread must not look as if it were up
            self._error = masked(reason_of(error))
            if not self._opened.is_set():
                self.failure = OutputError(f"{self.name}: {self._error}")
        finally:
            self._is_up, self._has_ended = False, True
            self._queue.end()
            self._queue.lose()
            self._opened.set()

    def _first(self) -> Session | None:
        try:
            session = self.connect()
        except (OutputError, FFmpegError, OSError, ValueError) as error:
            self._error = masked(reason_of(error))
            self.failure = OutputError(f"{self.name}: {self._error}")
            return None
        self._is_up = True
        self._opened.set()
        return session

    def _serve(self, session: Session) -> None:
        delay = _FIRST_DELAY
        while True:
            since = time.monotonic()
            try:
                before = self._bytes
                self._take(session)
                session.finish()
                self._bytes = before + session.bytes
                if self._queue.is_over:
                    self._is_finished = True
                else:
                    self._error = "was too slow at the end, and the last pictures are not in it"
                return
            except EndedError as error:
                session.abandon()
                self._end(error)
                return
            except (OutputError, FFmpegError, OSError, ValueError) as error:
                session.abandon()
                self._down(error)
            if time.monotonic() - since > _GOOD_SECONDS:
                delay = _FIRST_DELAY
            again = self._again(delay)
            if again is None:
                return
            session, delay = again

    def _take(self, session: Session) -> None:
        before = self._bytes
        while not self.aborted.is_set():
            packet = self._queue.get(0.5)
            if packet is None:
                if self._queue.is_over:
                    return
                continue
            is_written = False
            try:
                is_written = session.write(packet)
            finally:
                self._bytes = before + session.bytes
                if packet.kind == "video":
                    self._frames += is_written
                    self._queue.count(not is_written)

    def _again(self, delay: float) -> tuple[Session, float] | None:
        """Another session, and the next delay; None: the run is over."""
        while not self._queue.wait_for_end(delay * random.uniform(0.5, 1.5)) and not self.aborted.is_set():
            delay = min(2 * delay, _LONGEST_DELAY)
            try:
                session = self.connect()
            except EndedError as error:
                self._end(error)
                return None
            except (OutputError, FFmpegError, OSError, ValueError) as error:
                self._error = masked(reason_of(error))
                continue
            self._is_up = True
            self._reconnects += 1
            if not self._keeps_old:
                self._queue.lose()  # a new connection begins with what is new
            self._ask_for_key()
            self.tell("up", "is up again")
            return session, delay
        return None

    def _down(self, error: BaseException) -> None:
        self._is_up = False
        self._error = masked(reason_of(error))
        if not self.aborted.is_set():
            self.tell("down", self._error)

    def _end(self, error: BaseException) -> None:
        self._is_up, self._has_ended = False, True
        self._error = masked(reason_of(error))
        self.tell("over", self._error)
