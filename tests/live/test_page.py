"""The page of a live run, over real connections on loopback, with pictures from a real encoder."""

import io
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from hat_video.errors import OutputError
from hat_video.live.fragments import age_box
from tests.live.scene import WEBSOCKET, Coder, Scene, State, pictures_of, read_jpeg, watch


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene() as running:
        running.wait(lambda: running.page.pictures.number > 0)
        yield running


def newest(viewer: ClientConnection) -> bytes:
    """The last message before a silence."""
    last = b""
    while True:
        try:
            message = viewer.recv(timeout=1)
        except TimeoutError:
            return last
        last = message if isinstance(message, bytes) else last


def drain(viewer: ClientConnection) -> None:
    """Reads until the connection ends."""
    while True:
        viewer.recv(timeout=20)


# ---- The coded video.


def test_a_viewer_gets_the_head_and_then_a_key_frame_at_once(scene: Scene) -> None:
    asked = scene.coder.asked
    with watch(scene) as viewer:
        hello = json.loads(viewer.recv(timeout=20))
        head = viewer.recv(timeout=20)
        fragments = [viewer.recv(timeout=20) for _ in range(10)]
    assert scene.coder.asked > asked
    assert hello["mime"].startswith('video/mp4; codecs="avc1.')
    assert isinstance(head, bytes)
    assert head[4:8] == b"ftyp"
    # Concatenated they are a file that any player takes; each fragment is a picture of its own.
    decoded = pictures_of(head + b"".join(map(bytes, fragments)))
    assert len(decoded) == 10
    assert decoded[0].shape == (180, 320)
    with av.open(io.BytesIO(head + b"".join(map(bytes, fragments)))) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (6, 1)


def test_no_fragment_waits_for_the_next_picture(scene: Scene) -> None:
    with watch(scene) as viewer:
        last = b""
        for _ in range(3):
            last = bytes(viewer.recv(timeout=20, decode=False))
        scene.is_paused.set()
        try:
            last = newest(viewer) or last
            assert scene.last_ticks == int.from_bytes(last[72:80], "big")
        finally:
            scene.is_paused.clear()


def test_age_comes_ahead_of_each_picture(scene: Scene) -> None:
    assert age_box(None)[8:] == b"\xff\xff\xff\xff"
    assert age_box(0.25) == struct.pack(">I4sI", 12, b"free", 250)
    with watch(scene) as viewer:
        messages = [viewer.recv(timeout=20) for _ in range(6)][2:]
    ticks = []
    for message in messages:
        assert isinstance(message, bytes)
        size, kind, age = struct.unpack_from(">I4sI", message)
        assert (size, kind) == (12, b"free")
        assert age < 20000
        assert message[16:20] == b"moof"
        # Where the page's script looks for the time.
        assert message[64:68] == b"tfdt"
        ticks.append(int.from_bytes(message[72:80], "big"))
    assert ticks == sorted(set(ticks))


def test_a_codec_that_no_browser_plays_is_refused_and_the_page_falls_back_to_jpegs() -> None:
    with Scene(coder=Coder(name="ffv1", crf=None)) as scene:
        assert scene.page.fragmenter is None
        with pytest.raises(InvalidStatus) as refused:
            watch(scene)
        assert refused.value.response.status_code == 404
        scene.wait(lambda: scene.page.pictures.number > 0)
        assert scene.get("/snapshot.jpg")[0] == 200


# ---- Viewers who are slow, who never read, or who are too many.


def test_who_reads_slowly_gets_whole_groups_of_pictures() -> None:
    with Scene(noise=True, coder=Coder(crf=5), fps=30) as scene:
        address = f"ws://127.0.0.1:{scene.port}/stream"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", scene.port))
        with connect(address, sock=connection, compression=None, max_size=None, max_queue=1) as viewer:
            viewer.recv(timeout=20)
            viewer.recv(timeout=20)
            numbers = []
            while len(numbers) < 60:
                message = bytes(viewer.recv(timeout=20, decode=False))
                number = int.from_bytes(message[32:36], "big")
                is_key = message[108:112] == b"\x02\0\0\0"
                # Where something is missing, it goes on with a key frame.
                assert is_key or number == numbers[-1] + 1
                numbers.append(number)
                time.sleep(0.1 if len(numbers) < 40 else 0)
            assert numbers[-1] - numbers[0] >= len(numbers), "it was not slow enough for this test"
            assert scene.page.output_figures.dropped > 0


def test_who_never_reads_costs_nothing_and_is_let_go() -> None:
    with Scene(noise=True, coder=Coder(crf=5), fps=30, patience_seconds=2.0) as scene:
        with watch(scene) as good:
            scene.wait(lambda: scene.page.pictures.number > 0)
            silent = [scene.open(WEBSOCKET.format(path="/stream"), receive_buffer=4096) for _ in range(4)]
            silent += [scene.open("GET /mjpeg HTTP/1.1\nHost: localhost\n\n", receive_buffer=4096) for _ in range(2)]
            scene.wait(lambda: scene.page.viewers >= 6)
            most_held = 0
            got = 0
            deadline = time.monotonic() + 30
            while scene.page.viewers > 1:
                good.recv(timeout=20)
                got += 1
                most_held = max(most_held, *(viewer.held for viewer in scene.page.audience._viewers), 0)
                assert time.monotonic() < deadline, "those who never read are still there"
            # The one who reads has got its pictures all the while.
            assert got > 10
            assert most_held < 9 << 20
        for connection in silent:
            connection.close()
        # It never waited for any of them. (Much slower than it ever is: this machine may be busy.)
        assert scene.slowest < 1.0


def test_closing_takes_less_than_two_seconds_with_viewers_who_never_read() -> None:
    scene = Scene(noise=True, coder=Coder(crf=5), fps=30)
    with scene:
        scene.wait(lambda: scene.page.pictures.number > 0)
        silent = [scene.open(WEBSOCKET.format(path="/stream"), receive_buffer=4096) for _ in range(4)]
        silent += [scene.open("GET /mjpeg HTTP/1.1\nHost: localhost\n\n", receive_buffer=4096) for _ in range(2)]
        silent.append(scene.open("GET / HTT"))
        scene.wait(lambda: scene.page.viewers >= 6)
        time.sleep(1.0)
        scene.finish_feeding()
        began = time.monotonic()
        scene.page.close()
        assert time.monotonic() - began < 2
    for connection in silent:
        connection.close()


def test_who_asks_for_nothing_is_let_go() -> None:
    with Scene(patience_seconds=1.0) as scene:
        connection = scene.open("GET / HT")
        assert connection.recv(100) == b""
        connection.close()


def test_too_many_viewers_are_told_so() -> None:
    with Scene(viewers=2) as scene, watch(scene), watch(scene):
        scene.wait(lambda: scene.page.viewers == 2)
        with pytest.raises(InvalidStatus) as refused:
            watch(scene)
        assert refused.value.response.status_code == 503
        scene.wait(lambda: scene.page.pictures.number > 0)
        assert scene.get("/mjpeg")[0] == 503
        assert json.loads(scene.get("/figures")[2])["viewers"] == 2
        # The figures and stills are for everyone.
        assert scene.get("/snapshot.jpg")[0] == 200


def test_viewers_who_leave_make_room(scene: Scene) -> None:
    for _ in range(12):
        with watch(scene) as viewer:
            viewer.recv(timeout=20)
    scene.wait(lambda: scene.page.viewers == 0)
    for _ in range(3):
        connection = scene.open("GET /mjpeg HTTP/1.1\nHost: localhost\n\n")
        assert b"200 OK" in connection.recv(4096)
        connection.close()
    scene.wait(lambda: scene.page.viewers == 0)


def test_viewers_only_listen(scene: Scene) -> None:
    with watch(scene) as viewer:
        viewer.send("hello")
        with pytest.raises(Exception, match="1008"):
            drain(viewer)
    with watch(scene) as viewer:
        viewer.send(b"x" * 5000)
        with pytest.raises(Exception, match="1009"):
            drain(viewer)


def test_many_who_come_at_once_share_a_key_frame(scene: Scene) -> None:
    scene.wait(lambda: scene.page.viewers == 0)
    asked, began = scene.coder.asked, time.monotonic()
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(watch(scene))
    assert scene.coder.asked - asked <= 1 + (time.monotonic() - began) / 0.5


# ---- Pictures.


def test_snapshots_have_full_size_and_the_right_picture(scene: Scene) -> None:
    status, headers, data = scene.get("/snapshot.jpg")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert read_jpeg(data).shape == (180, 320, 3)
    status, headers, data = scene.get("/snapshot.jpg?of=source")
    assert read_jpeg(data).shape == (90, 160, 3)
    assert scene.get("/snapshot.jpg?of=camera")[0] == 404
    assert scene.get("/snapshot.jpg?of=nothing")[0] == 422


def test_two_snapshots_of_one_frame(scene: Scene) -> None:
    number = scene.get("/snapshot.jpg?of=result")[1]["x-frame"]
    scene.wait(lambda: scene.page.pictures.number > int(number) + 2)
    status, headers, _ = scene.get(f"/snapshot.jpg?of=source&frame={number}")
    assert (status, headers["x-frame"]) == (200, number)
    status, _, text = scene.get("/snapshot.jpg?of=source&frame=1")
    assert status == 404
    assert b"gone" in text


def test_moving_jpegs_move_and_are_paced(scene: Scene) -> None:
    connection = scene.open("GET /mjpeg?of=source HTTP/1.1\nHost: localhost\n\n")
    data = b""
    began = time.monotonic()
    while data.count(b"--picture") < 6:
        data += connection.recv(65536)
        assert time.monotonic() - began < 30
    seconds = time.monotonic() - began
    connection.close()
    assert b"multipart/x-mixed-replace; boundary=picture" in data
    parts = [part[part.index(b"\xff\xd8") :] for part in data.split(b"--picture")[1:] if b"\xff\xd8" in part]
    shown = [read_jpeg(part[: part.rindex(b"\xff\xd9") + 2]) for part in parts[:5]]
    assert all(picture.shape == (90, 160, 3) for picture in shown)
    assert any(not np.array_equal(shown[0], other) for other in shown[1:])
    assert seconds > 0.35  # ten a second at most


def test_before_the_first_picture() -> None:
    coder = Coder()
    scene = Scene(coder=coder)
    scene.is_paused.set()
    with scene:
        assert scene.get("/snapshot.jpg")[0] == 503
        assert scene.get("/mjpeg")[0] == 503
        status, _, text = scene.get("/healthz")
        assert (status, text) == (503, b"no picture has been made yet\n")
        assert scene.get("/")[0] == 200


# ---- Figures, health, the part that is upscaled.


def test_figures_are_told_as_they_are(scene: Scene) -> None:
    told = json.loads(scene.get("/figures")[2])
    assert told["source"] == "rtsp://user:***@camera/1"
    assert told["rungs"][2] == {"model": "bicubic", "frames": 100, "cost_seconds": 0.002}
    assert told["page"] == {"viewers_limit": 8, "has_camera": False, "silent": None}
    assert told["latency_buckets"]["0.05"] == 300


def test_health_follows_the_frames() -> None:
    with Scene() as scene:
        scene.wait(lambda: scene.get("/healthz")[0] == 200)
        scene.state.told = State(is_source_up=False).told
        status, _, text = scene.get("/healthz")
        assert (status, text) == (503, b"no frames come from the camera\n")


def test_the_part_can_be_moved() -> None:
    with Scene(state=State(roi=(0, 0, 80, 46)), camera=True) as scene:
        body = json.dumps({"x": 33, "y": 1000}).encode()
        status, _, answer = scene.get("/roi", method="POST", body=body, Content_Type="application/json")
        assert (status, json.loads(answer)) == (200, {"x": 32, "y": 44})
        assert json.loads(scene.get("/figures")[2])["roi"] == [32, 44, 80, 46]
        for wrong in (b"", b"{}", b'{"x":1,"y":"a"}', b'{"x":1,"y":2,"z":3}', b"[" * 1000):
            assert scene.get("/roi", method="POST", body=wrong, Content_Type="application/json")[0] in (400, 422)
        scene.wait(lambda: scene.page.pictures.has_camera)
        assert scene.get("/snapshot.jpg?of=camera")[0] == 200


def test_where_all_is_upscaled_there_is_no_part_to_move(scene: Scene) -> None:
    answer = scene.get("/roi", method="POST", body=b'{"x":1,"y":2}', Content_Type="application/json")
    assert answer[0] == 409
    assert b"--roi" in answer[2]


def test_the_page_needs_nothing_from_elsewhere(scene: Scene) -> None:
    status, headers, html = scene.get("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"__NONCE__" not in html
    assert b"https://" not in html
    assert html.count(b"http://") == html.count(b"http://www.w3.org/")  # a name in the icon, not an address
    assert b'src="http' not in html
    for path in ("/docs", "/openapi.json", "/redoc", "/page.html", "/../page.py"):
        assert scene.get(path)[0] == 404


def test_the_page_is_an_output_with_figures(scene: Scene) -> None:
    told = scene.page.output_figures
    assert told.is_up
    assert told.frames > 0
    assert told.error is None


# ---- Starting.


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(OutputError, match=f"--serve 127.0.0.1:{port}: the port is taken") as error,
            Scene(address=f"127.0.0.1:{port}"),
        ):
            pass
        assert "\n" not in str(error.value)


def test_importing_the_library_needs_no_server() -> None:
    code = (
        "import sys, hat_video, hat_video.cli, hat_video.live.page, hat_video.live.metrics;"
        "unwanted = ('fastapi', 'uvicorn', 'starlette', 'prometheus_client', 'websockets');"
        "bad = [name for name in unwanted if name in sys.modules];"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
