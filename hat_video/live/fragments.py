"""Coded pictures as fragmented MP4 in memory, one fragment a picture, and the viewers who get them.

FFmpeg writes the head (`ftyp`, `moov`): it knows every codec's boxes and colour tags. The fragments are written here:
FFmpeg's muxer holds each one back until the next picture comes, which at 15 frames a second costs 67 ms of latency and
at a stall leaves the newest picture unseen.

Source: ISO/IEC 14496-12 (boxes), 14496-15 and RFC 6381 (codec strings), AV1 Codec ISO Media File Format Binding.
"""

from __future__ import annotations

import io
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import av
from av.error import FFmpegError

if TYPE_CHECKING:
    from av.video.stream import VideoStream

    from hat_video.live.encode import LivePacket

__all__ = ["Audience", "Fragment", "Fragmenter", "Viewer", "age_box"]

_TIMESCALE = 90000
_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
# How long a picture is said to last. It is never known when the picture leaves. Longer than the truth is right: a
# player never runs dry between two pictures, and a gap of more than twice the duration would make it wait for the next
# key frame (W3C MSE, coded frame processing); after so long a gap the encoder makes one anyway.
_DURATION = _TIMESCALE
_NO_AGE = 0xFFFFFFFF
_SYNC, _NOT_SYNC = 0x02000000, 0x01010000


@dataclass(frozen=True, slots=True)
class Fragment:
    """One picture, ready to be sent."""

    data: bytes
    """`moof` and `mdat`."""
    is_key: bool
    ticks: int
    """Decode time in 1/90000 s."""
    captured: float | None
    """`time.monotonic()` when the camera's frame had arrived."""


class Fragmenter:
    """Makes fragments of packets.

    Args:
        template: the encoder's stream, open: its parameters and extradata are known.

    Raises:
        ValueError: no browser plays that codec in MP4, or FFmpeg cannot put it there.
    """

    def __init__(self, template: VideoStream) -> None:
        self._codec = template.codec_context.name
        # Encoders write Annex B unless their extradata is an avcC or hvcC, which begins with its version, 1.
        extradata = template.codec_context.extradata or b""
        self._is_annex_b = extradata[:1] == b"\0"
        self.head = _head(template)
        """`ftyp` and `moov`: the initialization segment."""
        self.mime = f'video/mp4; codecs="{_codec_string(self.head)}"'
        """What MediaSource is asked for."""
        self._number = 0
        self._shift: int | None = None

    def fragment(self, packet: LivePacket) -> Fragment:
        """A fragment of its own for one packet of video."""
        data = packet.data
        if self._is_annex_b:
            data = _length_prefixed(data)
        elif data.startswith(b"\x12\x00"):
            data = data[2:]  # AV1's temporal delimiter has no place in MP4
        dts, pts = (_in_ticks(value, packet.time_base) for value in (packet.dts, packet.pts))
        if self._shift is None:
            self._shift = max(0, -dts)  # an encoder with B-frames begins before 0, which no `tfdt` can say
        self._number += 1
        moof = _moof(self._number, dts + self._shift, pts - dts, len(data), packet.is_key)
        mdat = struct.pack(">I4s", 8 + len(data), b"mdat")
        return Fragment(b"".join((moof, mdat, data)), packet.is_key, dts, packet.captured)


def age_box(seconds: float | None) -> bytes:
    """A `free` box with a picture's age at this moment, in milliseconds; players skip it, the page reads it.

    None, for a picture that no camera has taken just now, is 2^32-1.
    """
    milliseconds = _NO_AGE if seconds is None else min(max(0, round(seconds * 1000)), _NO_AGE - 1)
    return struct.pack(">I4sI", 12, b"free", milliseconds)


def _in_ticks(value: int, time_base: Fraction) -> int:
    return value if time_base == Fraction(1, _TIMESCALE) else round(value * time_base * _TIMESCALE)


def _head(template: VideoStream) -> bytes:
    file = io.BytesIO()
    options = {
        "movflags": "frag_custom+empty_moov+default_base_moof",
        "video_track_timescale": str(_TIMESCALE),
        "use_editlist": "0",
        "fflags": "+bitexact",
    }
    out = av.open(file, "w", format="mp4", options=options)
    try:
        stream = out.add_stream_from_template(template, opaque=True)
        if stream.codec_context.name in ("hevc", "libx265"):
            stream.codec_context.codec_tag = "hvc1"  # the only spelling that Apple's players take
        out.start_encoding()
        # What follows on closing (an index of no fragments) belongs to files.
        return file.getvalue()
    except (FFmpegError, ValueError) as error:
        raise ValueError(f"{template.codec_context.name} cannot be put into MP4: {error}") from None
    finally:
        out.close()


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, where its content begins, where it ends) of each box, those inside containers too."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        if size < 8:
            return
        yield kind, start + 8, start + size
        if kind in _CONTAINERS:
            yield from _boxes(data, start + 8, start + size)
        elif kind == b"stsd":
            yield from _boxes(data, start + 16, start + size)
        elif kind in (b"avc1", b"hvc1", b"av01"):
            yield from _boxes(data, start + 8 + 78, start + size)
        start += size


def _codec_string(head: bytes) -> str:
    """As RFC 6381 has it, from the decoder configuration in the head."""
    for kind, start, end in _boxes(head, 0, len(head)):
        config = head[start:end]
        if kind == b"avcC":
            return f"avc1.{config[1:4].hex()}"
        if kind == b"hvcC":
            return _hevc_string(config)
        if kind == b"av1C":
            profile, level = config[1] >> 5, config[1] & 31
            depth = {0: 8, 2: 10, 3: 12}[(config[2] >> 5) & 3]
            return f"av01.{profile}.{level:02d}{'MH'[config[2] >> 7]}.{depth:02d}"
    raise ValueError("browsers play H.264, H.265 and AV1 here, and no other codec")


def _hevc_string(config: bytes) -> str:
    space = ("", "A", "B", "C")[config[1] >> 6]
    compatible = int(f"{int.from_bytes(config[2:6], 'big'):032b}"[::-1], 2)
    constraints = [f"{byte:x}" for byte in config[6:12].rstrip(b"\0")]
    level = f"{'LH'[(config[1] >> 5) & 1]}{config[12]}"
    return ".".join([f"hvc1.{space}{config[1] & 31}", f"{compatible:x}", level, *constraints])


def _length_prefixed(data: bytes) -> bytes:
    """Annex B to NAL units with four bytes of length ahead. A unit never ends in a zero byte, so zeros are padding."""
    units = (unit.rstrip(b"\0") for unit in data.split(b"\0\0\1"))
    return b"".join(part for unit in units if unit for part in (len(unit).to_bytes(4, "big"), unit))


def _moof(number: int, dts: int, offset: int, size: int, is_key: bool) -> bytes:
    """Movie fragment of one sample; `offset` is its presentation time minus its decode time."""
    mfhd = struct.pack(">I4sII", 16, b"mfhd", 0, number)
    tfhd = struct.pack(">I4sII", 16, b"tfhd", 0x020000, 1)  # offsets count from this box's `moof`
    tfdt = struct.pack(">I4sIQ", 20, b"tfdt", 0x01000000, dts)
    length = 8 + len(mfhd) + 8 + len(tfhd) + len(tfdt) + 36
    fields = 0x01000F01  # version 1 (signed offsets): where the data is; duration, size, flags, offset of the sample
    flags = _SYNC if is_key else _NOT_SYNC
    trun = struct.pack(">I4sIIIIIIi", 36, b"trun", fields, 1, length + 8, _DURATION, size, flags, offset)
    traf = struct.pack(">I4s", 8 + len(tfhd) + len(tfdt) + len(trun), b"traf")
    return b"".join((struct.pack(">I4s", length, b"moof"), mfhd, traf, tfhd, tfdt, trun))


class Viewer:
    """One who watches: a bounded queue from the run's thread to the page's.

    Args:
        wake: called, from the run's thread, when there is something to take again.
        most_seconds: of video in the queue, and
        most_bytes: of data; beyond either, everything up to the next key frame is dropped.
    """

    def __init__(self, wake: Callable[[], None], *, most_seconds: float = 2.0, most_bytes: int = 8 << 20) -> None:
        self._wake = wake
        self._most_ticks, self._most_bytes = round(most_seconds * _TIMESCALE), most_bytes
        self._lock = threading.Lock()
        self._queue: deque[Fragment] = deque()
        self._bytes = 0
        self.dropped = 0
        """Pictures that it did not get since its first one."""
        self._has_begun = False
        self.needs_key_from: float | None = time.monotonic()
        """From when on it may ask for a key frame; None while it has what it needs. At once for who has just come."""

    @property
    def held(self) -> int:
        """Bytes in the queue."""
        return self._bytes

    def put(self, fragment: Fragment) -> None:
        """Never blocks."""
        with self._lock:
            if self.needs_key_from is not None:
                if not fragment.is_key:
                    self.dropped += self._has_begun
                    return
                self.needs_key_from = None
                self._has_begun = True
            self._queue.append(fragment)
            self._bytes += len(fragment.data)
            if self._is_over():
                self._skip()
            has_any = bool(self._queue)
        if has_any:
            self._wake()

    def take(self) -> Fragment | None:
        """The next one; None if there is none yet."""
        with self._lock:
            if not self._queue:
                return None
            fragment = self._queue.popleft()
            self._bytes -= len(fragment.data)
            return fragment

    def _is_over(self) -> bool:
        span = self._queue[-1].ticks - self._queue[0].ticks
        return self._bytes > self._most_bytes or span > self._most_ticks

    def _skip(self) -> None:
        """Goes on at the newest key frame in the queue, or else at the next one to come."""
        newest_key = max((k for k, fragment in enumerate(self._queue) if fragment.is_key), default=0)
        for _ in range(newest_key):
            self._drop_first()
        if self._is_over() or not newest_key:
            while self._queue:
                self._drop_first()
            # One who cannot keep up must not make the picture worse for all by asking for many key frames.
            self.needs_key_from = time.monotonic() + 1.0

    def _drop_first(self) -> None:
        self._bytes -= len(self._queue.popleft().data)
        self.dropped += 1


class Audience:
    """Everyone who watches the coded video.

    Args:
        ask_for_key: of the encoder; may be called from any thread.
        limit: of viewers at a time.
    """

    def __init__(self, ask_for_key: Callable[[], None], *, limit: int) -> None:
        self._ask_for_key = ask_for_key
        self._limit = limit
        self._lock = threading.Lock()
        self._viewers: set[Viewer] = set()
        self._asked = -1.0
        self._gone = 0

    def __len__(self) -> int:
        return len(self._viewers)

    @property
    def dropped(self) -> int:
        """Pictures that viewers did not get, of those who left too."""
        with self._lock:
            return self._gone + sum(viewer.dropped for viewer in self._viewers)

    def enter(self, wake: Callable[[], None]) -> Viewer | None:
        """A new viewer, for whom a key frame is asked at once; None if there are too many already."""
        with self._lock:
            if len(self._viewers) >= self._limit:
                return None
            viewer = Viewer(wake)
            self._viewers.add(viewer)
        self._ask(time.monotonic())
        return viewer

    def leave(self, viewer: Viewer) -> None:
        with self._lock:
            self._viewers.discard(viewer)
            self._gone += viewer.dropped

    def spread(self, fragment: Fragment) -> None:
        """To everyone; never blocks."""
        with self._lock:
            viewers = list(self._viewers)
        for viewer in viewers:
            viewer.put(fragment)
        now = time.monotonic()
        if any(viewer.needs_key_from is not None and viewer.needs_key_from <= now for viewer in viewers):
            self._ask(now)

    def _ask(self, now: float) -> None:
        if now - self._asked >= 0.5:  # one key frame serves all who wait for it
            self._asked = now
            self._ask_for_key()
