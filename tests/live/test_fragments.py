"""Coded pictures as fragmented MP4, and the queues of those who watch them."""

import io
import time
from collections.abc import Iterator

import av
import pytest

from hat_video.live.encode import LivePacket
from hat_video.live.fragments import Fragmenter, Viewer
from tests.live.scene import TICKS, Coder, picture, pictures_of


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


@pytest.mark.parametrize(("name", "start"), [("libx264", "avc1."), ("libx265", "hvc1.1."), ("libsvtav1", "av01.0.")])
def test_codec_strings_and_heads_of_each_codec(name: str, start: str) -> None:
    coder = Coder(name=name, crf=30)
    fragmenter = Fragmenter(coder.video_template)
    assert f'codecs="{start}' in fragmenter.mime
    packets = [packet for k in range(6) for packet in coder.encode(picture(k, coder.info), k * 6000, 0.0)]
    packets += coder.flush()
    data = fragmenter.head + b"".join(fragmenter.fragment(packet).data for packet in packets)
    assert len(pictures_of(data)) == 6
    coder.close()


def test_the_codec_string_is_the_one_that_the_stream_says() -> None:
    coder = Coder()
    avcc = Fragmenter(coder.video_template).head.partition(b"avcC")[2]
    sps = coder.video_template.codec_context.extradata.split(b"\0\0\1")[1]
    assert avcc[1:4] == sps[1:4]
    assert Fragmenter(coder.video_template).mime == f'video/mp4; codecs="avc1.{sps[1:4].hex()}"'
    coder.close()


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
