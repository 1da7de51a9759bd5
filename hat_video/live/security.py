"""Who may see the page: where it listens, which requests it answers, and the token.

A page on loopback is not private by that alone: any web site that its user visits can send requests to it, and by DNS
rebinding even read the answers. So every request must name a host that is ours, and a request that another site has
caused is refused. Beyond loopback a token is demanded as well.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from hat_video.errors import OptionError, OutputError

__all__ = ["Address", "Guard", "Rules", "check_token", "listen", "parse_address"]

_LEAST_TOKEN = 12
_MOST_BODY = 4096
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where the page listens."""

    text: str
    """As it was given."""
    host: str
    """A name or an IP address, without brackets."""
    port: int
    """0 for any free one."""
    family: socket.AddressFamily
    is_loopback: bool
    """Whether only this machine can reach it."""


def parse_address(text: str) -> Address:
    """`PORT` (on 127.0.0.1), `HOST:PORT` or `[IPv6]:PORT`.

    Raises:
        OptionError: it is none of these, or there is no such host.
    """
    match = re.fullmatch(r"(?:(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+)):)?(?P<port>\d{1,5})", text)
    if match is None or int(match["port"]) > 65535:
        raise OptionError(
            f"--serve {text}: must be HOST:PORT, [IPv6]:PORT or PORT; for instance 127.0.0.1:8080, or 0.0.0.0:8080"
            " to be reached from other machines"
        )
    host, port = match["v6"] or match["name"] or "127.0.0.1", int(match["port"])
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OptionError(f"--serve {text}: no such host: {error.strerror or error}") from None
    places = [(family, str(place[0]).partition("%")[0]) for family, *_, place in found]
    is_loopback = all(ipaddress.ip_address(place).is_loopback for _, place in places)
    return Address(text, host, port, places[0][0], is_loopback)


def listen(address: Address) -> socket.socket:
    """The listening socket; taken before anything else starts.

    Raises:
        OutputError: the port is taken, or the address cannot be used.
    """
    try:
        listener = socket.create_server((address.host, address.port), family=address.family, backlog=64)
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "the port is taken by another program; choose another one, or 0 for any that is free",
            errno.EACCES: "ports below 1024 are reserved here; choose a higher one",
            errno.EADDRNOTAVAIL: "this machine has no such address; give one of its own, or 0.0.0.0 for all",
        }.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"--serve {address.text}: {reason}") from None
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # Little waits in the kernel for a slow viewer: what waits there gets old and can no longer be dropped.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 128 << 10)
    return listener


def check_token(token: str | None, address: Address) -> None:
    """Refuses a page that others can reach without a token, and a token that is none.

    Raises:
        OptionError: as said; the message does not show the token.
    """
    if token is None:
        if not address.is_loopback:
            raise OptionError(
                f"--serve {address.text}: others can reach that; give --token SECRET, or serve on 127.0.0.1:"
                f"{address.port}"
            )
        return
    if len(token) < _LEAST_TOKEN or not re.fullmatch(r"[A-Za-z0-9._~-]+", token):
        raise OptionError(
            f"--token: must be {_LEAST_TOKEN} or more of letters, digits and .-_~; for instance the output of"
            " python -c 'import secrets; print(secrets.token_urlsafe())'"
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    reason: str


class Rules:
    """What a request must have. The same for HTTP and WebSocket.

    Args:
        address: where the page listens.
        token: that must be shown; None for none.
        port: that it got.
        hosts: further names by which people reach it, of a proxy for instance.
    """

    def __init__(self, address: Address, token: str | None, port: int, hosts: Iterable[str] = ()) -> None:
        own = socket.gethostname().lower()
        self._names = {"localhost", address.host.lower(), own, f"{own}.local", *(name.lower() for name in hosts)}
        self._token = token
        # The cookie holds a secret of this run and not the token. Cookies do not know ports: two runs on one machine
        # would overwrite each other's without the number in the name.
        self._cookie_name = f"hat_video_{port}"
        self._cookie = secrets.token_urlsafe(32)

    def set_cookie(self) -> str:
        """The header that lets a browser in from now on."""
        return f"{self._cookie_name}={self._cookie}; Path=/; HttpOnly; SameSite=Strict"

    def refusal(self, scope: Scope) -> Refusal | None:
        """Why the request must not be answered; None if it may."""
        headers = _headers(scope)
        return (
            self._strange_host(headers)
            or _foreign(scope, headers)
            or _too_large(headers)
            or (None if scope["path"] == "/healthz" or self._is_known(scope, headers) else _UNKNOWN)
        )

    def shows_token(self, scope: Scope) -> bool:
        """Whether the query holds the right token."""
        given = _query(scope).get("token")
        return self._token is not None and given is not None and _same(given, self._token)

    def _strange_host(self, headers: dict[str, str]) -> Refusal | None:
        match = _HOST.fullmatch(headers.get("host", ""))
        if match is None:
            return Refusal(400, "the Host header is missing or no host name")
        name = match["name"].lower().strip("[]").rstrip(".")
        # Rebinding needs a name that its owner can turn elsewhere; nobody can turn a number.
        if name in self._names or name.endswith(".localhost") or _is_number(name):
            return None
        return Refusal(421, "this page does not go by that name; use the address that hat-video printed")

    def _is_known(self, scope: Scope, headers: dict[str, str]) -> bool:
        if self._token is None or self.shows_token(scope):
            return True
        kind, _, shown = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(shown.strip(), self._token):
            return True
        cookies = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        return any(name == self._cookie_name and _same(value, self._cookie) for name, _, value in cookies)


_UNKNOWN = Refusal(401, "the token is missing or wrong; give it as ?token=... or as Authorization: Bearer ...")


def _same(one: str, other: str) -> bool:
    """In a time that does not say where they differ."""
    return hmac.compare_digest(one.encode(), other.encode())


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _headers(scope: Scope) -> dict[str, str]:
    """By lower-case name; of a repeated one the last, but two hosts are none."""
    pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
    headers = dict(pairs)
    if sum(name == "host" for name, _ in pairs) != 1:
        headers.pop("host", None)
    return headers


def _query(scope: Scope) -> dict[str, str]:
    try:
        return dict(parse_qsl(scope["query_string"].decode("latin-1"), max_num_fields=16))
    except ValueError:
        return {}


def _foreign(scope: Scope, headers: dict[str, str]) -> Refusal | None:
    """Requests that another site has caused."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != headers["host"].lower():
        return Refusal(403, "another site has sent this request")
    # `same-site` is no better than `cross-site`: every port of this machine is the same site. A link that someone
    # follows is all right: it shows the page and nothing reads it.
    site = headers.get("sec-fetch-site", "none")
    is_visit = headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/" and scope.get("method") == "GET"
    if site not in ("none", "same-origin") and not is_visit:
        return Refusal(403, "another site has caused this request")
    return None


def _too_large(headers: dict[str, str]) -> Refusal | None:
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not length.isdecimal() or int(length) > _MOST_BODY:
        return Refusal(413, f"a body may have {_MOST_BODY} bytes, and must say how many it has")
    return None


_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)

_ASK_FOR_TOKEN = """<!doctype html><html lang="en"><meta charset="utf-8"><title>hat-video</title>
<meta name="viewport" content="width=device-width"><style>
body{font:16px/1.5 system-ui,sans-serif;background:#0e1116;color:#e8ecf1;display:grid;place-items:center;height:90vh}
form{display:grid;gap:.75rem;width:min(20rem,80vw)}input,button{font:inherit;padding:.6rem .8rem;border-radius:.5rem;
border:1px solid #4a5568;background:#171c24;color:inherit}button{background:#2f6feb;border-color:#2f6feb}</style>
<form action="/" method="get"><label for="token">__WHY__</label>
<input id="token" name="token" type="password" autocomplete="off" autofocus required>
<button>Open</button></form></html>"""


class Guard:
    """Applies the rules to everything that comes, and puts safe headers on everything that goes (ASGI middleware).

    Args:
        app: what is guarded.
        rules: to be applied.
        on_error: told of what the application did not catch, before the server turns it into a bare 500.
    """

    def __init__(self, app: App, rules: Rules, on_error: Callable[[Exception], None]) -> None:
        self._app, self._rules, self._on_error = app, rules, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._rules.refusal(scope)
        if refusal is not None:
            await _refuse(refusal, scope, send)
            return
        extra = [(b"set-cookie", self._rules.set_cookie().encode())] if self._rules.shows_token(scope) else []

        async def send_safely(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                own = {name.lower() for name, _ in message.get("headers", ())}
                safe = [(name, value) for name, value in _HEADERS if name not in own]
                message = {**message, "headers": [*message.get("headers", ()), *safe, *extra]}
            await send(message)

        try:
            await self._app(scope, receive, send_safely)
        except OSError:
            raise  # the other side has gone
        except Exception as error:
            self._on_error(error)
            raise


async def _refuse(refusal: Refusal, scope: Scope, send: Send) -> None:
    is_visit = refusal.status == 401 and scope["type"] == "http" and scope["path"] == "/"
    why = "That is not the token." if "token" in _query(scope) else "This camera asks for its token."
    body = (_ASK_FOR_TOKEN.replace("__WHY__", why) if is_visit else f"{refusal.reason}\n").encode()
    kind = "text/html; charset=utf-8" if is_visit else "text/plain; charset=utf-8"
    headers = [
        (b"content-type", kind.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *((name, value) for name, value in _HEADERS if not (is_visit and name == b"content-security-policy")),
    ]
    if is_visit:
        policy = b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
        headers.append((b"content-security-policy", policy))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="hat-video"'))
    prefix = "websocket." if scope["type"] == "websocket" else ""
    await send({"type": f"{prefix}http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": f"{prefix}http.response.body", "body": body})
