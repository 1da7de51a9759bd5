"""Opening files: FFmpeg reads the file that was named and nothing else, and a hostile one finds limits."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import av

from hat_video.errors import OptionError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream

__all__ = ["Limits", "demux", "open_file", "safe_options"]

# Playlists, scripts and manifests: what they name may lie on the network or anywhere on this machine. The last of them
# read devices, or take the file's name for a pattern.
_LEADING_ELSEWHERE = {
    *("hls", "concat", "dash", "sdp", "rtsp", "rtp", "imf", "webm_dash_manifest", "vobsub", "dvdvideo", "libcdio"),
    *("alsa", "fbdev", "kmsgrab", "lavfi", "oss", "v4l2", "video4linux2", "x11grab", "xcbgrab", "image2", "image2pipe"),
}


@dataclass(frozen=True)
class Limits:
    """How much of this machine a file may ask for.

    Raises:
        OptionError: a limit is below 1.
    """

    pixels: int = 1 << 27
    """In a frame; 134 million is 16384x8192."""
    streams: int = 128
    frames: int = 4_000_000
    """In a clip: their times are kept in memory, about 250 bytes each; 37 hours at 30 frames a second."""

    def __post_init__(self) -> None:
        for name in ("pixels", "streams", "frames"):
            if getattr(self, name) < 1:
                raise OptionError(f"--max-{name} {getattr(self, name)}: must be 1 or more")

    def check(self, path: Path, container: InputContainer) -> None:
        """Raises `SourceError` where a container declares more streams or larger pictures than that."""
        if len(container.streams) > self.streams:
            raise SourceError(
                f"{path}: has {len(container.streams)} streams, --max-streams allows {self.streams}; "
                "raise it if the file is to be trusted"
            )
        for stream in container.streams.video:
            context = stream.codec_context
            if context is not None:
                self.check_size(path, context.width, context.height)

    def check_size(self, path: Path, width: int, height: int) -> None:
        """Raises `SourceError` where a picture is larger than that."""
        if width * height > self.pixels:
            raise SourceError(
                f"{path}: has frames of {width}x{height}, {width * height} pixels; --max-pixels allows {self.pixels}; "
                "raise it if the file is to be trusted"
            )


def open_file(path: Path, *, form: str | None = None, tag_errors: str = "replace") -> InputContainer:
    """Opens a file for reading, alone: no playlist, no other file, no network.

    Args:
        path: the file.
        form: FFmpeg's name of its format; found out by its bytes if None.
        tag_errors: what becomes of tags that are not UTF-8, as `bytes.decode` has it.

    Raises:
        SourceError: it is empty, no regular file, or one that only leads to others.
        FFmpegError, OSError: as `av.open` says.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise SourceError(f"{path}: is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path}: is a pipe or a device, not a file; `-` reads a stream from standard input")
    if status.st_size == 0:
        raise SourceError(f"{path}: is empty (0 bytes)")
    options = safe_options()
    # Absolute: in `a:b.mp4` FFmpeg sees a protocol called `a`.
    name = str(path.absolute())
    try:
        # PyAV 19 dropped the argument and always decodes tags leniently.
        if int(av.__version__.split(".")[0]) < 19:
            return av.open(name, "r", format=form, options=options, metadata_errors=tag_errors)
        return av.open(name, "r", format=form, options=options)
    except (av.error.ArgumentError, av.error.PermissionError, av.error.InvalidDataError):
        if (kind := _leads_elsewhere(path)) is None:
            raise
        raise SourceError(
            f"{path}: is {kind} that only names other files; nothing but the file itself is ever opened: "
            "give the files, or pipe a stream in with `-`"
        ) from None


def demux(container: InputContainer, *streams: Stream) -> Iterator[Packet[Stream]]:
    """Packets of streams, of all of them if none is named, in the file's order; then an empty one for each stream.

    A stream that shows up only on the way, as transport streams allow, is left out.

    Raises:
        FFmpegError: the file is damaged there; nothing more can be read from this iterator.
    """
    try:
        yield from container.demux(*streams)
    except IndexError:
        # PyAV, which does not know such a stream, stumbles over its empty packet: the last of all.
        return


def safe_options() -> dict[str, str]:
    """Options of `av.open` that keep FFmpeg from opening anything but what it was given."""
    return {"protocol_whitelist": "file", "format_whitelist": _formats(), "max_streams": "1000"}


@cache
def _formats() -> str:
    return ",".join(sorted(av.formats_available - _LEADING_ELSEWHERE))


def _leads_elsewhere(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf")
    for mark, kind in ((b"#EXTM3U", "an HLS playlist"), (b"ffconcat", "a concat script"), (b"v=0", "an SDP session")):
        if head.startswith(mark):
            return kind
    return "a manifest" if b"<MPD" in head or b"<SmoothStreaming" in head else None
