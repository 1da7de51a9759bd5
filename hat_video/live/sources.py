"""What a camera may be called, and how FFmpeg is asked for its pictures with the least delay."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import av
import av.device

from hat_video.errors import OptionError

__all__ = ["CameraSource", "Device", "check_asked", "list_devices", "masked", "parse_source"]

Kind = Literal["device", "network", "screen", "test", "pipe"]

_NETWORK = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "tcp", "srt")
_GRAMMAR = (
    "0, /dev/video0, a device's name, rtsp:// rtmp:// http:// udp:// tcp:// srt://..., screen:, test:, or - for "
    "standard input"
)
# What a stream from the network may make FFmpeg open: more of the network, and no file of this machine.
_PROTOCOLS = "crypto,data,http,https,httpproxy,rtmp,rtmps,rtmpt,rtmpts,rtp,rtsp,srtp,tcp,tls,udp"
# Little is looked at to find the streams, and what was looked at is kept (no `nobuffer`): the first key frame is mostly
# among it, and a capture that never waits has caught up at once. Over TCP, with a key frame every 4 s, the first
# picture came after 0.8 s instead of 4.1, with no more delay afterwards. Nor is any rate worth waiting for
# (`fpsprobesize`).
_PROMPT = {"flags": "low_delay", "fpsprobesize": "0", "probesize": "32768", "analyzeduration": "100000"}
# A transport stream says only in its key frames how large its picture is; no longer is looked than until that is known.
_PATIENT = _PROMPT | {"probesize": "5000000", "analyzeduration": "3000000"}
_DEFAULT_SIZE, _DEFAULT_FPS = "320x180", "15"

_URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://(?P<rest>[^\s'\"<>]*)")
_SECRET = re.compile(
    r"(?P<name>[?&;](?:p|pw|[^=&;\s]*(?:pas|pwd|token|key|secret|auth|sig|cred|session|jwt|streamid)[^=&;\s]*))"
    r"=(?P<value>[^&;#\s'\"<>]+)",
    re.IGNORECASE,
)
# The last part of an RTMP address may be a stream's key: who knows it may publish. Names that people give are shorter.
_STREAM_KEY = re.compile(r"(?<=/)[A-Za-z0-9_-]{16,}(?=$|[?#])")


@dataclass(frozen=True, slots=True)
class CameraSource:
    """Where live pictures come from, and how to ask for them."""

    kind: Kind
    url: str = field(repr=False)
    """What `av.open` gets, with credentials: never for people."""
    name: str
    """For people: credentials masked."""
    format: str | None = None
    """FFmpeg's demuxer; None: told by what comes."""
    options: dict[str, str] = field(default_factory=dict)
    """Of the demuxer and the protocol."""
    stamps: Literal["source", "arrival"] = "source"
    """Whose clock counts. What carries no times (MJPEG over HTTP, bare H.264) goes by arrival in any case."""
    via_ffmpeg: bool = False
    """Needs the `ffmpeg` program: the protocol is not in PyAV."""


@dataclass(frozen=True, slots=True)
class Device:
    """Something on this machine that gives pictures."""

    kind: Literal["device", "screen"]
    name: str
    """For people; works as a source too."""
    url: str
    """What to give as the source."""


def masked(text: str) -> str:
    """The text with every password, token and key in the URLs within it replaced by `***`."""
    return _URL.sub(lambda found: f"{found['scheme']}://{_masked_rest(found['scheme'].lower(), found['rest'])}", text)


def _masked_rest(scheme: str, rest: str) -> str:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    at = authority.rfind("@")
    secret = authority.partition(":")[2]
    if secret and not secret.isdigit():
        # A password with a slash or a question mark, which no URL may have as it is; it is one all the same.
        at = max(at, rest.partition("?")[0].rfind("@"))
        at = rest.rfind("@") if at < 0 else at
    if at >= 0:
        user, colon, _ = rest[:at].partition(":")
        rest = (f"{user}:***@" if colon else "***@" if user else "@") + rest[at + 1 :]
    rest = _SECRET.sub(lambda found: f"{found['name']}=***", rest)
    return _STREAM_KEY.sub("***", rest) if scheme.startswith("rtmp") else rest


def list_devices() -> list[Device]:
    """Cameras and screens of this machine; none where there are none, or where FFmpeg cannot tell."""
    found = []
    try:
        cameras = av.device.enumerate_input_devices("v4l2")
    except (ValueError, OSError):  # No such format on this system; no devices.
        cameras = []
    for camera in cameras:
        found.append(Device("device", camera.description or camera.name, camera.name))
    display = os.environ.get("DISPLAY")
    if display:
        found.append(Device("screen", f"screen {display}", f"screen:{display}"))
    return found


def parse_source(
    text: str, *, size: str | None = None, fps: str | None = None, input_format: str | None = None
) -> CameraSource:
    """What a source given by a person means. Nothing is opened.

    Args:
        text: `0`, `/dev/video0`, a device's name, a URL, `screen:`, `test:`, `test:GRAPH` or `-`.
        size: `1280x720`, asked of a device, a part of the screen, or of the test picture.
        fps: frames a second, asked likewise.
        input_format: of a device: the form in which it sends (`mjpeg`, `yuyv422`, `h264`); elsewhere: FFmpeg's demuxer.

    Raises:
        OptionError: it is none of these, or an option does not go with it.
    """
    check_asked(size, fps)
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    if colon and scheme == "test":
        return _test(text, rest, size, fps, input_format)
    if colon and scheme == "screen":
        return _screen(rest, size, fps, input_format)
    if rest.startswith("//") or text == "-":
        for name, value in (("--size", size), ("--fps", fps)):
            if value is not None:
                what = masked(text)
                raise OptionError(
                    f"{name} {value}: {what} comes as it comes; only a device, screen: and test: are asked"
                )
        if text == "-":
            options = _PROMPT | {"probesize": "500000", "analyzeduration": "500000"}
            return CameraSource("pipe", "-", "standard input", input_format, options)
        return _network(text, scheme, input_format)
    return _device(text, size, fps, input_format)


def check_asked(size: str | None, fps: str | None) -> None:
    """Raises `OptionError` where a size or a rate that a camera is asked for is none."""
    if size is not None and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
        raise OptionError(f"--size {size}: must be WIDTHxHEIGHT, as 1280x720")
    if fps is not None and not _is_rate(fps):
        raise OptionError(f"--fps {fps}: must be a number above 0, as 30 or 30000/1001")


def _is_rate(text: str) -> bool:
    try:
        return 0 < Fraction(text) <= 1000
    except (ValueError, ZeroDivisionError):
        return False


def _test(text: str, graph: str, size: str | None, fps: str | None, input_format: str | None) -> CameraSource:
    if input_format is not None:
        raise OptionError(f"--input-format {input_format}: test: has none; leave it out")
    if not graph:
        size, fps = size or _DEFAULT_SIZE, fps or _DEFAULT_FPS
        graph = (
            f"testsrc2=size={size}:rate={fps},format=yuv420p,realtime[out0];sine=frequency=440:sample_rate=48000:"
            "beep_factor=2,arealtime[out1]"
        )
    elif size is not None or fps is not None:
        raise OptionError(f"{text}: --size and --fps are for test: alone; a graph says its own")
    return CameraSource("test", graph, text, "lavfi")


def _screen(display: str, size: str | None, fps: str | None, input_format: str | None) -> CameraSource:
    if input_format is not None:
        raise OptionError(f"--input-format {input_format}: a screen has none; leave it out")
    display = display or os.environ.get("DISPLAY", "")
    if not display:
        raise OptionError("screen: there is no X display here ($DISPLAY is not set); name one, as screen::0")
    if ":" not in display:
        display = f":{display}"
    return CameraSource("screen", display, f"screen:{display}", "x11grab", _asked(size, fps))


def _asked(size: str | None, fps: str | None) -> dict[str, str]:
    options = {}
    if size is not None:
        options["video_size"] = size
    if fps is not None:
        options["framerate"] = fps
    return options


def _network(text: str, scheme: str, form: str | None) -> CameraSource:
    if scheme not in _NETWORK:
        raise OptionError(f"{masked(text)}: {scheme}:// is not known; give {_GRAMMAR}")
    if form is not None and form not in av.formats_available:
        raise OptionError(f"--input-format {form}: FFmpeg has no such demuxer; leave it out to have it found")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise OptionError(
            f"{masked(text)}: is no URL; a host and a port below 65536 are wanted, as rtsp://cam:554/1"
        ) from None
    if not host and scheme != "udp":
        raise OptionError(f"{masked(text)}: names no host, as in {scheme}://camera/...")
    if scheme == "srt":
        return CameraSource("network", text, masked(text), form or "mpegts", dict(_PATIENT), via_ffmpeg=True)
    options = {"protocol_whitelist": _PROTOCOLS}
    if scheme in ("rtsp", "rtsps"):
        # Over TCP nothing is lost on the way; a camera that only knows UDP is asked again.
        options |= _PROMPT | {"rtsp_flags": "prefer_tcp"}
    elif scheme in ("rtmp", "rtmps"):
        options |= _PROMPT
    elif parts.path.endswith(".m3u8"):
        options |= {"live_start_index": "-1"}
    else:
        options |= _PATIENT
        if scheme == "udp":
            # What does not fit is lost, as UDP is; FFmpeg would end the stream.
            options |= {"overrun_nonfatal": "1"}
    if scheme in ("rtmp", "rtmps", "http"):
        # Both have it as an option; in the URL, where udp and tcp have theirs, they would send it on.
        query = parse_qsl(parts.query, keep_blank_values=True)
        if ("listen", "1") in query or ("listen", "") in query:
            options["listen"] = "1"
            text = urlunsplit(parts._replace(query=urlencode([pair for pair in query if pair[0] != "listen"])))
    return CameraSource("network", text, masked(text), form, options, "arrival" if form == "mpjpeg" else "source")


def _device(text: str, size: str | None, fps: str | None, input_format: str | None) -> CameraSource:
    options = _asked(size, fps)
    if input_format is not None:
        options["input_format"] = input_format
    if text.isdecimal():
        text = f"/dev/video{int(text)}"
    if not text.startswith("/dev/"):
        cameras = [device for device in list_devices() if device.kind == "device"]
        named = [camera for camera in cameras if camera.name.casefold() == text.casefold()]
        if not named:
            if Path(text).is_file():
                raise OptionError(f"{text}: is a file; use `hat-video upscale {text}`")
            have = ", ".join(f"{camera.name} ({camera.url})" for camera in cameras) or "none"
            raise OptionError(f"{masked(text)!r}: no such source; give {_GRAMMAR}; cameras here: {have}")
        text = named[0].url
    if sys.platform != "linux":
        raise OptionError(
            f"{text}: cameras of this system are not supported, only those of Linux (v4l2); send a stream"
        )
    return CameraSource("device", text, text, "v4l2", options)
