"""What a source may be called, what it is opened with, and that nobody reads its password."""

from __future__ import annotations

from pathlib import Path

import pytest

from hat_video.errors import OptionError
from hat_video.live.sources import list_devices, masked, parse_source


@pytest.mark.parametrize(
    ("text", "kind", "url", "form"),
    [
        ("0", "device", "/dev/video0", "v4l2"),
        ("12", "device", "/dev/video12", "v4l2"),
        ("/dev/video1", "device", "/dev/video1", "v4l2"),
        ("/dev/v4l/by-id/usb-cam", "device", "/dev/v4l/by-id/usb-cam", "v4l2"),
        ("rtsp://user:secret@cam:554/1", "network", "rtsp://user:secret@cam:554/1", None),
        ("udp://:5000", "network", "udp://:5000", None),
        ("udp://@239.1.1.1:5000", "network", "udp://@239.1.1.1:5000", None),
        ("HTTP://cam/video.mjpg", "network", "HTTP://cam/video.mjpg", None),
        ("srt://cam:9000?mode=caller", "network", "srt://cam:9000?mode=caller", "mpegts"),
        ("screen::97", "screen", ":97", "x11grab"),
        ("screen:97", "screen", ":97", "x11grab"),
        ("-", "pipe", "-", None),
        ("test:testsrc=d=1", "test", "testsrc=d=1", "lavfi"),
    ],
)
def test_what_a_source_is(text: str, kind: str, url: str, form: str | None) -> None:
    source = parse_source(text)
    assert (source.kind, source.url, source.format) == (kind, url, form)
    assert source.via_ffmpeg == text.startswith("srt")


def test_what_is_asked_of_a_device() -> None:
    camera = parse_source("0", size="1280x720", fps="30000/1001", input_format="mjpeg")
    assert camera.options == {"video_size": "1280x720", "framerate": "30000/1001", "input_format": "mjpeg"}
    assert parse_source("screen::0", size="640x480", fps="10").options == {"video_size": "640x480", "framerate": "10"}
    assert "size=64x48:rate=5," in parse_source("test:", size="64x48", fps="5").url
    assert "size=320x180:rate=15," in parse_source("test:").url


def test_little_delay() -> None:
    assert parse_source("rtsp://cam/1").options["rtsp_flags"] == "prefer_tcp"
    for url in ("rtsp://cam/1", "rtmp://cam/1", "udp://cam:1", "http://cam/1"):
        options = parse_source(url).options
        assert options["flags"] == "low_delay"
        assert "file" not in options["protocol_whitelist"]
    assert parse_source("https://cam/live.m3u8?x=1").options["live_start_index"] == "-1"


def test_listening_is_an_option_of_rtmp_and_a_word_of_tcp() -> None:
    rtmp = parse_source("rtmp://0.0.0.0:1935/live/cam?listen=1&x=2")
    assert (rtmp.url, rtmp.options["listen"]) == ("rtmp://0.0.0.0:1935/live/cam?x=2", "1")
    assert parse_source("tcp://0.0.0.0:9000?listen=1").url == "tcp://0.0.0.0:9000?listen=1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"text": "ftp://cam/1"}, "ftp:// is not known; give 0, /dev/video0"),
        ({"text": "no such camera"}, "no such source; give"),
        ({"text": "rtsp://"}, "names no host"),
        ({"text": "rtsp://user:secret@cam:99999/1"}, "is no URL"),
        ({"text": "rtsp://cam/1", "size": "640x480"}, "--size 640x480: rtsp://cam/1 comes as it comes"),
        ({"text": "-", "fps": "30"}, "--fps 30"),
        ({"text": "0", "size": "big"}, "must be WIDTHxHEIGHT"),
        ({"text": "0", "fps": "0"}, "must be a number above 0"),
        ({"text": "0", "fps": "1/0"}, "must be a number above 0"),
        ({"text": "test:testsrc", "fps": "5"}, "a graph says its own"),
        ({"text": "test:", "input_format": "mjpeg"}, "--input-format mjpeg"),
        ({"text": "rtsp://cam/1", "input_format": "nonsense"}, "no such demuxer"),
    ],
)
def test_what_is_refused(words: dict[str, str], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_source(**words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_is_no_camera(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.touch()
    with pytest.raises(OptionError, match="hat-video upscale"):
        parse_source(str(film))


def test_a_screen_needs_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(OptionError, match=r"\$DISPLAY is not set"):
        parse_source("screen:")
    monkeypatch.setenv("DISPLAY", ":42")
    assert parse_source("screen:").url == ":42"
    assert ("screen", "screen::42") in [(device.kind, device.url) for device in list_devices()]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("rtsp://user:secret@cam:554/1", "rtsp://user:***@cam:554/1"),
        ("rtsp://user:sec@ret@cam/1", "rtsp://user:***@cam/1"),
        ("rtsp://user:sec/ret@cam/1", "rtsp://user:***@cam/1"),
        ("rtsp://user:sec?ret@cam/1", "rtsp://user:***@cam/1"),
        ("rtsp://user:se@c/ret@cam/1", "rtsp://user:***@cam/1"),
        ("rtsp://user:sec:ret@[::1]:554/1", "rtsp://user:***@[::1]:554/1"),
        ("http://secret@cam/1", "http://***@cam/1"),
        ("http://cam:8080/stream@main", "http://cam:8080/stream@main"),
        ("http://cam/1?token=secret&x=1", "http://cam/1?token=***&x=1"),
        ("http://cam/1?loginuse=me&loginpas=secret#top", "http://cam/1?loginuse=me&loginpas=***#top"),
        ("http://cam/1?x=1&API_KEY=secret", "http://cam/1?x=1&API_KEY=***"),
        ("http://cam/1?u=me&p=secret", "http://cam/1?u=me&p=***"),
        ("srt://cam:9000?passphrase=secret&streamid=read:cam:me:secret", "srt://cam:9000?passphrase=***&streamid=***"),
        ("rtmp://live.example/app/secret-secret-secret", "rtmp://live.example/app/***"),
        ("rtmp://live.example/app/garden", "rtmp://live.example/app/garden"),
        ("I/O error: 'rtsp://user:secret@cam/1'", "I/O error: 'rtsp://user:***@cam/1'"),
        ("a rtsp://a:secret@b/ c rtmp://d:secret@e/f g", "a rtsp://a:***@b/ c rtmp://d:***@e/f g"),
        ("udp://@239.1.1.1:5000", "udp://@239.1.1.1:5000"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_passwords_are_masked(text: str, seen: str) -> None:
    assert masked(text) == seen
    assert masked(seen) == seen


def test_no_message_shows_a_password() -> None:
    source = parse_source("rtsp://user:secret@cam/1?token=secret")
    assert "secret" not in source.name
    assert "secret" not in repr(source)
