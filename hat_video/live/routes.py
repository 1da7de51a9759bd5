"""What the page answers, route by route. Imported only when a page is served: it needs FastAPI."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from importlib.resources import files
from typing import Protocol

from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict

from hat_video.live.figures import LiveFigures
from hat_video.live.fragments import Audience, Fragmenter, Viewer, age_box
from hat_video.live.metrics import make_registry, render
from hat_video.live.pictures import Jpeg, Pictures, Which

__all__ = ["Served", "make_app"]

_MJPEG_SECONDS = 0.1
"""Between two pictures of a moving JPEG, at least."""
_STILL_SECONDS = 0.25
"""Between two stills, at least, whoever asks."""
_REPEAT_SECONDS = 5.0
"""A moving JPEG that stands still is sent again so often, to see whether anybody is there."""
_BOUNDARY = "picture"


class Served(Protocol):
    """What the routes need of the page."""

    fragmenter: Fragmenter | None
    audience: Audience
    pictures: Pictures
    worker: ThreadPoolExecutor
    viewers_limit: int
    mjpeg_viewers: set[object]
    helpers: set[object]

    def figures(self) -> LiveFigures: ...
    def move_roi(self, x: int, y: int) -> tuple[int, int] | None: ...
    def why_silent(self) -> str | None: ...
    def drop_connection(self, client: tuple[str, int]) -> None: ...
    @property
    def is_ending(self) -> bool: ...
    @property
    def viewers(self) -> int: ...


class Place(BaseModel):
    """The upper left corner of the part, in the camera's pixels."""

    model_config = ConfigDict(extra="forbid")

    x: int
    y: int


def make_app(page: Served) -> FastAPI:
    """The application, without its guard."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    html = files("hat_video.live").joinpath("page.html").read_text(encoding="utf-8")
    registry = make_registry(page.figures)
    stills = _Pace(_STILL_SECONDS)

    @app.get("/")
    async def index(request: Request) -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        # Not every browser counts ws: of the same host as 'self'. The guard has seen that it is a host's name.
        host = request.headers["host"]
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data: blob:;"
            f" media-src 'self' blob:; connect-src 'self' ws://{host} wss://{host};"
            " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        )
        return HTMLResponse(html.replace("__NONCE__", nonce), headers={"content-security-policy": policy})

    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        await _stream(page, socket)

    @app.get("/mjpeg")
    async def mjpeg(of: Which = "result") -> Response:
        return _mjpeg(page, of)

    @app.get("/snapshot.jpg")
    async def snapshot(of: Which = "result", frame: int | None = None) -> Response:
        await stills.wait()
        jpeg = await _in_worker(page, page.pictures.best, of, frame)
        if jpeg is None:
            if page.pictures.number and frame is not None:
                return PlainTextResponse(f"frame {frame} is gone; leave `frame` out for the newest\n", 404)
            return _no_picture(page, of)
        return Response(jpeg.data, media_type="image/jpeg", headers={"x-frame": str(jpeg.number)})

    @app.get("/figures")
    async def figures() -> JSONResponse:
        told = asdict(page.figures())
        told["latency_buckets"] = {str(bound): count for bound, count in told["latency_buckets"].items()}
        told["page"] = {
            "viewers_limit": page.viewers_limit,
            "has_camera": page.pictures.has_camera,
            "silent": page.why_silent(),
        }
        return JSONResponse(told)

    @app.post("/roi")
    async def roi(place: Place) -> Response:
        moved = page.move_roi(place.x, place.y)
        if moved is None:
            return PlainTextResponse("the whole picture is upscaled: there is no part to move (--roi)\n", 409)
        return JSONResponse({"x": moved[0], "y": moved[1]})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = render(registry, request.headers.get("accept"))
        return Response(body, headers={"content-type": content_type})

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        reason = page.why_silent()
        return PlainTextResponse("ok\n" if reason is None else f"{reason}\n", 200 if reason is None else 503)

    return app


async def _in_worker(page: Served, make: Callable[..., Jpeg | None], *args: object) -> Jpeg | None:
    """JPEGs are made beside the event loop: one of a large picture would make the video stutter."""
    return await asyncio.get_running_loop().run_in_executor(page.worker, make, *args)


class _Pace:
    """Lets one through every so often; the others wait in line."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        mine = max(now, self._next)
        self._next = mine + self._seconds
        await asyncio.sleep(mine - now)


def _no_picture(page: Served, of: Which) -> Response:
    if page.pictures.number:
        return PlainTextResponse(f"there is no picture of the {of}\n", 404)
    return PlainTextResponse("no picture has been made yet\n", 503, headers={"retry-after": "1"})


# ---- The coded video. There is no sound on the page: with a second track, MediaSource plays only where both tracks are
# buffered, so that every gap in the sound would stop the picture.


async def _stream(page: Served, socket: WebSocket) -> None:
    woken = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop has ended in this moment
            loop.call_soon_threadsafe(woken.set)

    if page.fragmenter is None:
        await socket.send_denial_response(PlainTextResponse("browsers cannot play this codec; see /mjpeg\n", 404))
        return
    if page.viewers >= page.viewers_limit or (viewer := page.audience.enter(wake)) is None:
        await socket.send_denial_response(_too_many(page))
        return
    try:
        await socket.accept()
        feeding = asyncio.create_task(_feed(socket, viewer, page.fragmenter, woken))
        listening = asyncio.create_task(_listen(socket))
        done, left = await asyncio.wait({feeding, listening}, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if listening in done and listening.result():
            # It has sent something, which viewers do not.
            with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
                await asyncio.wait_for(socket.close(1008, "viewers only listen"), 0.5)
            await asyncio.sleep(0.2)
        for task in done:
            with suppress(WebSocketDisconnect, RuntimeError):
                task.result()
    finally:
        page.audience.leave(viewer)
        if socket.client is not None:
            # Closing would wait until the viewer has read all that was sent, which it may never do.
            page.drop_connection((socket.client.host, socket.client.port))


async def _feed(socket: WebSocket, viewer: Viewer, fragmenter: Fragmenter, woken: asyncio.Event) -> None:
    await socket.send_text(json.dumps({"mime": fragmenter.mime}))
    await socket.send_bytes(fragmenter.head)
    while True:
        woken.clear()
        while (fragment := viewer.take()) is not None:
            age = None if fragment.captured is None else time.monotonic() - fragment.captured
            await socket.send_bytes(age_box(age) + fragment.data)
        await woken.wait()


async def _listen(socket: WebSocket) -> bool:
    """Ends when the viewer is gone (False) or says something (True)."""
    message = await socket.receive()
    return bool(message["type"] == "websocket.receive")


def _too_many(page: Served) -> PlainTextResponse:
    return PlainTextResponse(f"{page.viewers_limit} viewers are here already, and no more are let in\n", 503)


# ---- Moving JPEG: for browsers without MediaSource, for the source beside the result, and for whatever reads MJPEG.


def _mjpeg(page: Served, of: Which) -> Response:
    is_viewer = of == "result"
    if page.viewers >= page.viewers_limit if is_viewer else len(page.helpers) >= 2 * page.viewers_limit:
        return _too_many(page)
    if not page.pictures.number or (of == "camera" and not page.pictures.has_camera):
        return _no_picture(page, of)
    kind = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
    return StreamingResponse(
        _among(page.mjpeg_viewers if is_viewer else page.helpers, _moving(page, of)), media_type=kind
    )


async def _among(crowd: set[object], parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Counts one in the crowd while it is served."""
    one = object()
    crowd.add(one)
    try:
        async for part in parts:
            yield part
    finally:
        crowd.discard(one)


async def _moving(page: Served, of: Which) -> AsyncIterator[bytes]:
    # The next boundary goes out with each picture: browsers show one when they have seen its end.
    yield f"--{_BOUNDARY}\r\n".encode()
    number, sent = 0, 0.0
    while not page.is_ending:
        now = time.monotonic()
        if page.pictures.number != number or now - sent > _REPEAT_SECONDS:
            jpeg = await _in_worker(page, page.pictures.quick, of)
            if jpeg is None:
                return
            # Large ones come less often, so that this never takes much of what the network needs.
            pause = max(_MJPEG_SECONDS, 3 * (time.monotonic() - now))
            number, sent = jpeg.number, now
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg.data)}\r\n\r\n".encode()
            yield head + jpeg.data + f"\r\n--{_BOUNDARY}\r\n".encode()
            await asyncio.sleep(max(0.01, sent + pause - time.monotonic()))
        else:
            await asyncio.sleep(0.02)
