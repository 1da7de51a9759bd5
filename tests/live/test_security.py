"""Who gets in: real requests with the headers that browsers, other sites and attackers send."""

import json
import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from hat_video.errors import OptionError
from hat_video.live.page import Page
from hat_video.live.security import check_token, parse_address
from tests.live.scene import TOKEN, Coder, Scene, State

ROI = b'{"x":0,"y":0}'


@pytest.fixture(scope="module")
def open_page() -> Iterator[Scene]:
    """On loopback, without a token."""
    with Scene(state=State(roi=(0, 0, 80, 44))) as running:
        running.wait(lambda: running.page.pictures.number > 0)
        yield running


@pytest.fixture(scope="module")
def closed_page() -> Iterator[Scene]:
    """Reachable by others, with a token."""
    with Scene(address="0.0.0.0:0", token=TOKEN, state=State(roi=(0, 0, 80, 44))) as running:
        running.wait(lambda: running.page.pictures.number > 0)
        yield running


def watch(scene: Scene, query: str = "", **headers: str) -> ClientConnection:
    pairs = {name.replace("_", "-"): value for name, value in headers.items()}
    origin = pairs.pop("Origin", None)
    return connect(
        f"ws://127.0.0.1:{scene.port}/stream{query}",
        origin=origin, additional_headers=pairs, compression=None, max_size=None, open_timeout=20,
    )  # type: ignore[arg-type]  # fmt: skip


def refused(scene: Scene, query: str = "", **headers: str) -> int:
    with pytest.raises(InvalidStatus) as error:
        watch(scene, query, **headers)
    return error.value.response.status_code


# ---- Where it listens.


@pytest.mark.parametrize(
    ("text", "host", "port", "is_loopback"),
    [
        ("8080", "127.0.0.1", 8080, True),
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("127.9.9.9:1", "127.9.9.9", 1, True),
        ("localhost:0", "localhost", 0, True),
        ("[::1]:8080", "::1", 8080, True),
        ("0.0.0.0:8080", "0.0.0.0", 8080, False),
        ("[::]:8080", "::", 8080, False),
        ("192.0.2.7:8080", "192.0.2.7", 8080, False),
    ],
)
def test_addresses(text: str, host: str, port: int, is_loopback: bool) -> None:
    address = parse_address(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, is_loopback)


@pytest.mark.parametrize(
    "text", ["", ":8080", "host", "127.0.0.1:", "127.0.0.1:99999", "::1:80", "http://x:80", "a b:80", "x:8o"]
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError, match=r"must be HOST:PORT.*127\.0\.0\.1:8080"):
        parse_address(text)


def test_no_such_host() -> None:
    with pytest.raises(OptionError, match="no such host"):
        parse_address("no-such-host.invalid:8080")


def test_beyond_loopback_a_token_is_demanded() -> None:
    coder = Coder()
    with pytest.raises(OptionError, match=r"others can reach that; give --token") as error:
        Page("0.0.0.0:8080", token=None, state=State(), encoder=coder, stop=threading.Event())
    assert "\n" not in str(error.value)
    check_token(None, parse_address("127.0.0.1:8080"))
    coder.close()


@pytest.mark.parametrize("token", ["", "short", "has a space in it", "semicolon;semicolon", "ünïcödeünïcöde", "x" * 11])
def test_what_is_no_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(OptionError, match="12 or more") as error:
        check_token(token, parse_address("127.0.0.1:8080"))
    assert not token or token not in str(error.value)


# ---- DNS rebinding: a name of the attacker's that leads to this machine.


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:{port}",
        "localhost:{port}",
        "[::1]:{port}",
        "LOCALHOST",
        "localhost.",
        "cam.localhost",
        "192.0.2.1:80",
    ],
)
def test_own_names_are_answered(open_page: Scene, host: str) -> None:
    assert open_page.get("/figures", Host=host.format(port=open_page.port))[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "1.2.3.4.5"]
)
@pytest.mark.parametrize("path", ["/", "/figures", "/mjpeg", "/snapshot.jpg", "/metrics", "/healthz", "/nothing"])
def test_strange_names_are_not(open_page: Scene, host: str, path: str) -> None:
    assert open_page.get(path, Host=host.format(port=open_page.port))[0] == 421


@pytest.mark.parametrize("host", ["", "a b", "x'; script-src *", "localhost/x", "user@localhost", "localhost:port"])
def test_what_is_no_name_at_all(open_page: Scene, host: str) -> None:
    connection = open_page.open(f"GET / HTTP/1.1\nHost: {host}\nConnection: close\n\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    connection.close()


def test_strange_names_get_no_video(open_page: Scene) -> None:
    with socket.create_connection(("127.0.0.1", open_page.port)) as connection:
        connection.settimeout(20)
        lines = ["GET /stream HTTP/1.1", "Host: evil.example", "Upgrade: websocket", "Connection: Upgrade",
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", ""]  # fmt: skip
        connection.sendall("\r\n".join(lines).encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 421")


def test_further_names_can_be_given() -> None:
    with Scene(hosts=["cam.example"]) as scene:
        assert scene.get("/figures", Host="CAM.example:8443")[0] == 200
        assert scene.get("/figures", Host="cam.example.org")[0] == 421


# ---- Other sites: what their pages make a browser send.


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:1", "http://localhost:{port}", "null", "file://"]
)
def test_other_sites_get_no_video_and_move_nothing(open_page: Scene, origin: str) -> None:
    origin = origin.format(port=open_page.port)  # the host that is asked is 127.0.0.1
    assert refused(open_page, Origin=origin) == 403
    answer = open_page.get("/roi", method="POST", body=ROI, Content_Type="application/json", Origin=origin)
    assert answer[0] == 403
    assert open_page.get("/figures", Origin=origin)[0] == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", ["/mjpeg", "/snapshot.jpg", "/figures", "/metrics"])
def test_other_sites_embed_nothing(open_page: Scene, site: str, path: str) -> None:
    # Another port of this machine is the same site, and yet another program.
    assert open_page.get(path, Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors")[0] == 403
    assert open_page.get(path, Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate")[0] == 403


def test_a_link_from_another_site_may_be_followed(open_page: Scene) -> None:
    assert open_page.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    assert open_page.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403


def test_its_own_page_is_let_in(open_page: Scene) -> None:
    own = f"http://127.0.0.1:{open_page.port}"
    with watch(open_page, Origin=own) as viewer:
        assert "mime" in json.loads(viewer.recv(timeout=20))
    answer = open_page.get(
        "/roi", method="POST", body=ROI, Content_Type="application/json", Origin=own, Sec_Fetch_Site="same-origin"
    )
    assert answer[0] == 200


def test_a_form_of_another_site_moves_nothing(open_page: Scene) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = open_page.get("/roi", method="POST", body=ROI, Content_Type=kind)
        assert answer[0] in (400, 415, 422)


def test_methods_that_are_not_there(open_page: Scene) -> None:
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"):
        assert open_page.get("/", method=method)[0] == 405
    assert open_page.get("/roi")[0] == 405


# ---- The token.

PATHS = ["/", "/figures", "/mjpeg", "/snapshot.jpg", "/metrics", "/nothing"]


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_shown(closed_page: Scene, path: str) -> None:
    for query, headers in [
        ("", {}),
        ("?token=", {}),
        ("?token=wrong-wrong-wrong", {}),
        (f"?token={TOKEN}x", {}),
        (f"?token={TOKEN[:-1]}", {}),
        ("?token=%FF%FE", {}),
        (f"?Token={TOKEN}", {}),
        ("", {"Authorization": "Bearer wrong-wrong-wrong"}),
        ("", {"Authorization": f"Basic {TOKEN}"}),
        ("", {"Authorization": TOKEN}),
        ("", {"Cookie": f"hat_video_{closed_page.port}={TOKEN}"}),
        ("", {"Cookie": f"token={TOKEN}"}),
    ]:
        status, answered, body = closed_page.get(path + query, **headers)
        assert status == 401, (query, headers)
        assert answered["www-authenticate"].startswith("Bearer")
        assert "set-cookie" not in answered
        assert TOKEN.encode() not in body


def test_without_the_token_there_is_no_video_and_no_moving(closed_page: Scene) -> None:
    assert refused(closed_page) == 401
    assert refused(closed_page, "?token=wrong-wrong-wrong") == 401
    assert closed_page.get("/roi", method="POST", body=ROI, Content_Type="application/json")[0] == 401


def test_the_token_in_the_query_sets_a_cookie_that_lets_in(closed_page: Scene) -> None:
    status, headers, _ = closed_page.get(f"/?token={TOKEN}")
    assert status == 200
    cookie, *attributes = [part.strip() for part in headers["set-cookie"].split(";")]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert TOKEN not in headers["set-cookie"]
    assert cookie.startswith(f"hat_video_{closed_page.port}=")
    assert closed_page.get("/figures", Cookie=cookie)[0] == 200
    assert closed_page.get("/figures", Cookie=f"a=b; {cookie}; c=d")[0] == 200
    assert closed_page.get("/figures", Cookie=cookie + "x")[0] == 401
    with watch(closed_page, Cookie=cookie) as viewer:
        viewer.recv(timeout=20)


def test_programs_show_the_token_as_bearer(closed_page: Scene) -> None:
    status, headers, _ = closed_page.get("/metrics", Authorization=f"Bearer {TOKEN}")
    assert status == 200
    assert "set-cookie" not in headers
    with watch(closed_page, f"?token={TOKEN}") as viewer:
        viewer.recv(timeout=20)


def test_a_cookie_does_not_help_another_site(closed_page: Scene) -> None:
    cookie = closed_page.get(f"/?token={TOKEN}")[1]["set-cookie"].partition(";")[0]
    assert refused(closed_page, Cookie=cookie, Origin="https://evil.example") == 403
    assert closed_page.get("/snapshot.jpg", Cookie=cookie, Sec_Fetch_Site="same-site")[0] == 403


def test_a_cookie_of_one_run_is_nothing_to_another(closed_page: Scene) -> None:
    cookie = closed_page.get(f"/?token={TOKEN}")[1]["set-cookie"].partition(";")[0].partition("=")[2]
    with Scene(token=TOKEN) as other:
        assert other.get("/figures", Cookie=f"hat_video_{other.port}={cookie}")[0] == 401


def test_health_needs_no_token_and_tells_nothing_else(closed_page: Scene) -> None:
    status, headers, body = closed_page.get("/healthz")
    assert (status, body) == (200, b"ok\n")
    assert "set-cookie" not in headers


def test_a_person_is_asked_for_the_token(closed_page: Scene) -> None:
    _, headers, body = closed_page.get("/")
    assert headers["content-type"].startswith("text/html")
    assert b'name="token" type="password"' in body


def test_on_loopback_a_token_counts_too() -> None:
    with Scene(token=TOKEN) as scene:
        assert scene.get("/figures")[0] == 401
        assert scene.get("/figures", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_the_token_is_in_no_log(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    with Scene(token=TOKEN) as scene:
        scene.get(f"/?token={TOKEN}")
        scene.get(f"/nothing?token={TOKEN}")
        scene.get("/figures", Authorization=f"Bearer {TOKEN}")
        connection = scene.open(f"GET /stream?token={TOKEN} HTTP/1.1\nHost: localhost\nUpgrade: websocket\n"
                                "Connection: Upgrade\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n"
                                "Sec-WebSocket-Version: 13\n\n")  # fmt: skip
        assert b" 101 " in connection.recv(4096)
        connection.close()
        broken = scene.open(f"GET /?token={TOKEN} HTTP/9\nnonsense\n\n")
        assert b" 400 " in broken.recv(4096)
        broken.close()
        assert scene.page.url.endswith(f":{scene.port}/")
        assert TOKEN not in scene.page.url + str(scene.page.output_figures)
    said = capfd.readouterr()
    assert all(TOKEN not in record.getMessage() for record in caplog.records)
    assert said.out == said.err == ""


# ---- Headers, sizes.


@pytest.mark.parametrize("path", ["/", "/figures", "/snapshot.jpg", "/metrics", "/healthz", "/nothing"])
def test_safe_headers_are_on_everything(open_page: Scene, path: str) -> None:
    _, headers, _ = open_page.get(path)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "server" not in headers
    assert "access-control-allow-origin" not in headers


def test_scripts_run_by_their_nonce_alone(open_page: Scene) -> None:
    policies = [open_page.get("/")[1]["content-security-policy"] for _ in range(2)]
    assert policies[0] != policies[1]
    scripts = next(part for part in policies[0].split(";") if "script-src" in part)
    assert "unsafe" not in scripts
    assert "nonce-" in scripts
    _, headers, html = open_page.get("/")
    nonce = headers["content-security-policy"].partition("script-src 'nonce-")[2].partition("'")[0]
    assert html.count(f'nonce="{nonce}"'.encode()) == 2
    assert b" onclick=" not in html
    assert b"innerHTML" not in html


def test_bodies_are_limited(open_page: Scene) -> None:
    large = b"[" + b"0," * 5000 + b"0]"
    assert open_page.get("/roi", method="POST", body=large, Content_Type="application/json")[0] == 413
    connection = open_page.open("POST /roi HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\n\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    connection.close()
    connection = open_page.open(f"GET /{'x' * 30000}")
    assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    connection.close()
