"""The page of a live run: the picture in a browser, the figures, and what other programs ask for.

It takes packets as every other output does and never makes the run wait: who looks too slowly gets fewer pictures, and
who stops reading is let go. See `routes` for what it answers, `security` for whom, `fragments` for the video's way.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from hat_video.errors import OptionError, OutputError
from hat_video.frames import VideoInfo
from hat_video.live.figures import LiveFigures, OutputFigures
from hat_video.live.fragments import Audience, Fragmenter
from hat_video.live.pictures import Pictures
from hat_video.live.security import Guard, Rules, check_token, listen, parse_address

if TYPE_CHECKING:
    import uvicorn
    from av.video.stream import VideoStream

    from hat_video.live.encode import LivePacket

__all__ = ["Coder", "LiveState", "Page"]

_SILENCE_SECONDS = 5.0
_CONNECTIONS = 64
_START_SECONDS = 10.0
_CLOSE_SECONDS = 3.0


class LiveState(Protocol):
    """The run, as the page sees it. Both are called from the page's thread and must not block."""

    def figures(self) -> LiveFigures: ...
    def move_roi(self, x: int, y: int) -> tuple[int, int] | None: ...


class Coder(Protocol):
    """The encoder, as the page sees it."""

    def ask_for_key(self) -> None: ...
    @property
    def video_template(self) -> VideoStream: ...


class Page:
    """Serves the page from a thread of its own. A context manager.

    Args:
        address: `PORT`, `HOST:PORT` or `[IPv6]:PORT`; port 0 for any free one.
        token: what viewers must show; needed where others than this machine can reach the page.
        state: where the figures come from.
        encoder: is asked for key frames; its stream must be open.
        stop: of the run. It is set if the page's thread dies, which should never be.
        viewers: at a time.
        hosts: further names by which people reach the page, of a proxy for instance.
        patience_seconds: after which who does not read is disconnected.

    Raises:
        OptionError: no such address, a token that is missing or too short, or a package that is missing.
        OutputError: on entering: the port is taken or the address cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None,
        state: LiveState,
        encoder: Coder,
        stop: threading.Event,
        viewers: int = 8,
        hosts: Iterable[str] = (),
        patience_seconds: float = 10.0,
    ) -> None:
        _need_packages()
        self._address = parse_address(address)
        check_token(token, self._address)
        self._token, self._hosts = token, tuple(hosts)
        self._state, self._encoder, self._stop = state, encoder, stop
        self._patience = patience_seconds
        self.viewers_limit = viewers
        self.pictures = Pictures()
        self.audience = Audience(encoder.ask_for_key, limit=viewers)
        self.fragmenter: Fragmenter | None = None
        self.mjpeg_viewers: set[object] = set()
        self.helpers: set[object] = set()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="hat-video page pictures")
        self._port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._started = threading.Event()
        self._is_closed = False
        self._error: BaseException | None = None
        self._fault: str | None = None
        self._packet_at: float | None = None
        self._frames = self._bytes = 0

    def __enter__(self) -> Page:
        listener = listen(self._address)
        try:
            self._port = int(listener.getsockname()[1])
            try:
                self.fragmenter = Fragmenter(self._encoder.video_template)
            except ValueError:
                self.fragmenter = None  # the page shows JPEGs then
            self._server = self._make_server()
        except BaseException:
            listener.close()
            raise
        self._thread = threading.Thread(target=self._run, args=(listener,), name="hat-video page", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_SECONDS) or self._error is not None:
            error = self._error
            self.close()
            raise OutputError(f"--serve {self._address.text}: the page did not start: {error or 'it took too long'}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every connection, then the thread. Takes less than two seconds, whatever the viewers do."""
        self._ending.set()
        self.pictures.close()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
            self._thread = None
        # A large picture may be in the making, and that cannot be broken off at any moment.
        last = self.worker.submit(int) if not self._is_closed else None
        self._is_closed = True
        self.worker.shutdown(wait=False)
        if last is not None:
            wait([last], timeout=1.0)

    @property
    def url(self) -> str:
        """Where people find it, without the token."""
        host = self._address.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}/"

    @property
    def viewers(self) -> int:
        """How many look at this moment."""
        return len(self.audience) + len(self.mjpeg_viewers)

    @property
    def is_ending(self) -> bool:
        return self._ending.is_set()

    @property
    def output_figures(self) -> OutputFigures:
        """The page as one of the outputs."""
        return OutputFigures(
            name=f"page {self.url}",
            is_up=self._thread is not None and self._error is None and not self.is_ending,
            frames=self._frames,
            bytes=self._bytes,
            dropped=self.audience.dropped,
            error=self._fault,
        )

    def send(self, packet: LivePacket) -> None:
        """Takes a packet for those who watch; never blocks. From one thread at a time. Sound is passed over."""
        if packet.kind != "video":
            return
        self._packet_at = time.monotonic()
        self._frames += 1
        if self.fragmenter is not None and len(self.audience):
            fragment = self.fragmenter.fragment(packet)
            self._bytes += len(fragment.data)
            self.audience.spread(fragment)

    def show(
        self,
        before: Sequence[Tensor],
        before_info: VideoInfo,
        after: Sequence[Tensor],
        after_info: VideoInfo,
        camera: tuple[Sequence[Tensor], VideoInfo] | None = None,
    ) -> None:
        """Takes the newest frame for stills and moving JPEGs. Keeps references and does nothing else.

        Args:
            before: planes of what was upscaled, (h, w) each, that nobody writes to any more.
            before_info: what they are.
            after: planes of what was made.
            after_info: what they are.
            camera: all that the camera sees, where only a part is upscaled; without it the page shows where the part
                lies and not what is around it.
        """
        self.pictures.show((before, before_info), (after, after_info), camera)

    # ---- For the routes; from the page's thread.

    def figures(self) -> LiveFigures:
        """Of the run, with the viewers, which only the page knows."""
        return replace(self._state.figures(), viewers=self.viewers)

    def move_roi(self, x: int, y: int) -> tuple[int, int] | None:
        return self._state.move_roi(x, y)

    def why_silent(self) -> str | None:
        """Why no pictures flow; None while they do."""
        if self._stop.is_set():
            return "the run is ending"
        if not self._state.figures().is_source_up:
            return "no frames come from the camera"
        if self._packet_at is None:
            return "no picture has been made yet"
        seconds = time.monotonic() - self._packet_at
        return f"no picture was made for {seconds:.0f} seconds" if seconds > _SILENCE_SECONDS else None

    def drop_connection(self, client: tuple[str, int]) -> None:
        """Ends a connection at once, sent or not."""
        for connection in self._connections():
            if tuple(connection.client or ()) == client:
                connection.transport.abort()

    def _note_error(self, error: Exception) -> None:
        self._fault = f"{type(error).__name__}: {error}"

    # ---- The thread.

    def _make_server(self) -> uvicorn.Server:
        import uvicorn

        from hat_video.live.routes import make_app

        rules = Rules(self._address, self._token, self._port, self._hosts)
        config = uvicorn.Config(
            Guard(make_app(self), rules, self._note_error),
            loop="asyncio",
            http="h11",
            ws="websockets-sansio",
            ws_max_size=1024,
            ws_ping_interval=10,
            ws_ping_timeout=20,
            ws_per_message_deflate=False,
            lifespan="off",
            # Its log names the paths of WebSockets with their queries, tokens too.
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            h11_max_incomplete_event_size=16 << 10,
            timeout_graceful_shutdown=1,
        )
        return uvicorn.Server(config)

    def _run(self, listener: socket.socket) -> None:
        # A thread that dies in silence would leave a run that looks well.
        try:
            asyncio.run(self._serve(listener))
            if not self.is_ending:
                raise RuntimeError("the page's server has ended by itself")
        except BaseException as error:  # noqa: BLE001
            self._error = error
            self._fault = f"{type(error).__name__}: {error}"
            self._stop.set()
        finally:
            listener.close()
            self._started.set()

    async def _serve(self, listener: socket.socket) -> None:
        assert self._server is not None
        serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        keeping = asyncio.create_task(self._keep_house(self._server))
        done, _ = await asyncio.wait({serving, keeping}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await serving

    async def _keep_house(self, server: uvicorn.Server) -> None:
        """Lets go of those who do not read or never ask; at the end, of everyone."""
        idle = _Idle(self._patience)
        while not self.is_ending:
            if server.started:
                self._started.set()
            for connection in idle.of(self._connections()):
                connection.transport.abort()
            await asyncio.sleep(0.1 if server.started else 0.01)
        server.should_exit = True
        # Long enough for uvicorn to tell WebSockets that the service ends, and for them to hear it.
        await asyncio.sleep(0.4)
        for connection in self._connections():
            connection.transport.abort()
        server.force_exit = True

    def _connections(self) -> list[Any]:
        return [] if self._server is None else list(self._server.server_state.connections)


class _Idle:
    """Finds connections that make no progress: what was written stays unread, or no request ever comes."""

    def __init__(self, patience_seconds: float) -> None:
        self._patience = patience_seconds
        self._seen: dict[Any, tuple[int, float]] = {}

    def of(self, connections: Iterable[Any]) -> list[Any]:
        now = time.monotonic()
        seen = {}
        for connection in connections:
            waiting = connection.transport.get_write_buffer_size()
            before, since = self._seen.get(connection, (waiting, now))
            has_asked = getattr(connection, "scope", None) is not None
            # A buffer that never shrinks is one that nobody reads; pings make it grow all the same.
            is_well = has_asked and (waiting == 0 or waiting < before)
            seen[connection] = (waiting, now if is_well else since)
        self._seen = seen
        return [connection for connection, (_, since) in seen.items() if now - since > self._patience]


def _need_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise OptionError(f"--serve needs {error.name}: pip install 'hat-video[live]'") from None
