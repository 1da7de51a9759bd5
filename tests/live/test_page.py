"""The page of a live run, over real connections on loopback, with pictures from a real encoder."""

import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from hat_video.color import from_rgb, to_rgb
from hat_video.errors import OutputError
from hat_video.frames import ColorInfo, PixelFormat, VideoInfo
from hat_video.live.encode import LivePacket
from hat_video.live.fragments import Fragmenter, Viewer, age_box
from hat_video.live.pictures import _JPEG, _STILL, Pictures
from tests.live.scene import BT601, SMALL, TICKS, WEBSOCKET, Coder, Scene, State, picture


@pytest.fixture(autouse=True, scope="module")
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene() as running:
        running.wait(lambda: running.page.pictures.number > 0)
        yield running


def watch(scene: Scene) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{scene.port}/stream", compression=None, max_size=None, open_timeout=20)


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


def pictures_of(data: bytes) -> list[np.ndarray]:
    """Decoded by FFmpeg, as (H, W) luma."""
    with av.open(io.BytesIO(data), format="mp4") as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


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


def test_fragments_hold_the_source_times_exactly() -> None:
    coder = Coder()
    fragmenter = Fragmenter(coder.video_template)
    times = [0, 6000, 6001, 20000, 110000, 123456789]
    data = fragmenter.head
    for k, ticks in enumerate(times):
        for packet in coder.encode(picture(k, coder.info), ticks, time.monotonic()):
            data += fragmenter.fragment(packet).data
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.time_base == TICKS
        assert [packet.pts for packet in container.demux(stream) if packet.size] == times
    coder.close()


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


@pytest.mark.parametrize(("name", "start"), [("libx264", "avc1."), ("libx265", "hvc1.1."), ("libsvtav1", "av01.0.")])
def test_codec_strings_and_heads_of_each_codec(name: str, start: str) -> None:
    coder = Coder(name=name, crf=30)
    fragmenter = Fragmenter(coder.video_template)
    assert f'codecs="{start}' in fragmenter.mime
    data, count = fragmenter.head, 0
    for k in range(6):
        packets = coder.encode(picture(k, coder.info), k * 6000, time.monotonic())
        count += len(packets)
        data += b"".join(fragmenter.fragment(packet).data for packet in packets)
    if count:
        assert len(pictures_of(data)) == count
    coder.close()


def test_the_codec_string_is_the_one_that_the_stream_says() -> None:
    coder = Coder()
    avcc = Fragmenter(coder.video_template).head.partition(b"avcC")[2]
    sps = coder.video_template.codec_context.extradata.split(b"\0\0\1")[1]
    assert avcc[1:4] == sps[1:4]
    assert Fragmenter(coder.video_template).mime == f'video/mp4; codecs="avc1.{sps[1:4].hex()}"'
    coder.close()


def test_a_codec_that_no_browser_plays_is_refused_and_the_page_falls_back_to_jpegs() -> None:
    with Scene(coder=Coder(name="ffv1", crf=None)) as scene:
        assert scene.page.fragmenter is None
        with pytest.raises(InvalidStatus) as refused:
            watch(scene)
        assert refused.value.response.status_code == 404
        scene.wait(lambda: scene.page.pictures.number > 0)
        assert scene.get("/snapshot.jpg")[0] == 200


def test_b_frames_keep_their_order() -> None:
    coder = Coder()
    fragmenter = Fragmenter(coder.video_template)
    packets = [packet for k in range(3) for packet in coder.encode(picture(k, coder.info), k * 3000, 0.0)]
    shown = [(6000, -3000), (0, 0), (12000, 3000)]
    data = fragmenter.head
    for packet, (pts, dts) in zip(packets, shown, strict=True):
        moved = LivePacket("video", packet.data, pts, dts, 0, TICKS, packet.is_key, None)
        data += fragmenter.fragment(moved).data
    with av.open(io.BytesIO(data)) as container:
        read = [(packet.pts, packet.dts) for packet in container.demux(video=0) if packet.size]
    assert [pts - dts for pts, dts in read] == [9000, 0, 9000]
    assert read[0][1] >= 0
    coder.close()


# ---- Viewers who are slow, who never read, or who are too many.


def fragments_of(coder: Coder, count: int, *, key_every: int = 10**9, noise: bool = False) -> Iterator[LivePacket]:
    planes = [picture(k, coder.info, noise=noise) for k in range(4)]
    for k in range(count):
        if k and k % key_every == 0:
            coder.ask_for_key()
        yield from coder.encode(planes[k % 4], k * 6000, 0.0)


def test_a_full_queue_goes_on_at_the_newest_key_frame() -> None:
    coder = Coder(key_seconds=1e6)
    fragmenter = Fragmenter(coder.video_template)
    viewer = Viewer(lambda: None, most_seconds=2.0)
    for packet in fragments_of(coder, 40, key_every=25):
        viewer.put(fragmenter.fragment(packet))
    first = viewer.take()
    assert first is not None
    assert first.is_key
    assert first.ticks == 25 * 6000
    assert viewer.dropped == 25
    coder.close()


def test_a_full_queue_without_a_key_frame_waits_for_one() -> None:
    coder = Coder(key_seconds=1e6)
    fragmenter = Fragmenter(coder.video_template)
    viewer = Viewer(lambda: None, most_seconds=2.0)
    for packet in fragments_of(coder, 60):
        viewer.put(fragmenter.fragment(packet))
    assert viewer.take() is None
    assert viewer.needs_key_from is not None
    assert viewer.dropped == 60
    coder.close()


def test_a_queue_is_bounded_in_bytes_too() -> None:
    coder = Coder(key_seconds=1e6, crf=5)
    fragmenter = Fragmenter(coder.video_template)
    viewer = Viewer(lambda: None, most_seconds=1e6, most_bytes=300_000)
    for packet in fragments_of(coder, 60, key_every=2, noise=True):
        viewer.put(fragmenter.fragment(packet))
        assert viewer.held <= 300_000
    coder.close()


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


def jpeg(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), format="jpeg_pipe") as container:
        frame = next(container.decode(video=0))
        return frame.to_ndarray(format="rgb24")


def test_snapshots_have_full_size_and_the_right_picture(scene: Scene) -> None:
    status, headers, data = scene.get("/snapshot.jpg")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert jpeg(data).shape == (180, 320, 3)
    status, headers, data = scene.get("/snapshot.jpg?of=source")
    assert jpeg(data).shape == (90, 160, 3)
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


@pytest.mark.parametrize("quick", [False, True], ids=["still", "moving"])
@pytest.mark.parametrize(
    ("name", "color"),
    [
        ("yuv420p", BT601),
        ("yuv420p", ColorInfo(1, 1, 1, False)),
        ("yuv420p", ColorInfo(6, 1, 1, True, "center")),
        ("yuv420p10le", ColorInfo(9, 9, 14, False)),
        ("yuv444p", ColorInfo(1, 1, 1, False)),
        ("gbrp", ColorInfo(0, 1, 13, True)),
        ("gray", ColorInfo(1, 1, 1, False)),
        ("yuva420p", ColorInfo(1, 1, 1, False)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.matrix}{'f' if value.is_full_range else ''}",
)
def test_jpegs_have_the_colours_of_the_video(name: str, color: ColorInfo, quick: bool) -> None:
    pixel_format = PixelFormat.parse(name)
    info = VideoInfo(96, 64, TICKS, None, pixel_format, color)
    patches = torch.tensor(
        [[0.8, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.2, 0.9], [0.9, 0.9, 0.9], [0.05, 0.05, 0.05], [0.7, 0.6, 0.1]]
    )
    rgb = patches.T.reshape(1, 3, 1, 6).repeat_interleave(64, 2).repeat_interleave(16, 3)
    planes = [plane[0] for plane in from_rgb(rgb, pixel_format, color)]
    if pixel_format.has_alpha:
        planes.append(torch.full((64, 96), 255, dtype=torch.uint8))
    pictures = Pictures()
    pictures.show((planes, info), (planes, info))
    made = pictures.quick("result") if quick else pictures.best("result")
    assert made is not None
    seen = jpeg(made.data)[32, 8::16].astype(int)
    wanted = (patches * 255).numpy()
    if name == "gray":
        weights = np.array([0.2126, 0.7152, 0.0722])
        wanted = np.repeat((wanted @ weights)[:, None], 3, axis=1)
    assert np.abs(seen - wanted).max() <= 6


def test_pictures_of_odd_size_and_of_changing_size() -> None:
    pictures = Pictures()
    for width, height in ((33, 17), (64, 48), (33, 17)):
        info = VideoInfo(width, height, TICKS, Fraction(15), PixelFormat.parse("yuv420p"), BT601)
        planes = picture(1, info)
        pictures.show((planes, info), (planes, info))
        for made in (pictures.quick("source"), pictures.best("source"), pictures.best("result")):
            assert made is not None
            assert jpeg(made.data).shape == (height, width, 3)


def test_moving_pictures_are_not_huge() -> None:
    info = VideoInfo(3840, 2160, TICKS, Fraction(15), PixelFormat.parse("yuv420p"), BT601)
    planes = [torch.full(size, 90, dtype=torch.uint8) for size in info.pixel_format.plane_sizes(3840, 2160)]
    pictures = Pictures()
    pictures.show((planes, info), (planes, info))
    made = pictures.quick("result")
    assert made is not None
    assert jpeg(made.data).shape == (1080, 1920, 3)
    pictures.close()
    assert pictures.quick("source") is pictures.best("source") is None


def test_a_large_still_is_made_in_bands_that_do_not_show() -> None:
    info = VideoInfo(50, 601, TICKS, None, PixelFormat.parse("yuv420p"), BT601)
    planes = [torch.randint(16, 236, size, dtype=torch.uint8) for size in info.pixel_format.plane_sizes(50, 601)]
    whole = from_rgb(to_rgb([p[None] for p in planes], info.pixel_format, BT601).clamp_(0, 1), _STILL, _JPEG)
    frame = Pictures()._exact(planes, info)
    assert frame is not None
    for made, wanted in zip(frame.planes, whole, strict=True):
        rows = np.frombuffer(memoryview(made), np.uint8).reshape(601, made.line_size)[:, :50]
        assert np.array_equal(rows, wanted[0].numpy())


def test_a_picture_is_made_once_however_many_ask() -> None:
    pictures = Pictures()
    planes = picture(0, SMALL)
    pictures.show((planes, SMALL), (planes, SMALL))
    assert pictures.quick("result") is pictures.quick("result")
    assert pictures.best("source") is pictures.best("source")


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
    shown = [jpeg(part[: part.rindex(b"\xff\xd9") + 2]) for part in parts[:5]]
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
