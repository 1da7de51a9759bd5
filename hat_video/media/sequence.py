"""Numbered pictures, `frame_%04d.png`, bound into one film: packets are copied, nothing is decoded.

What has timestamps, an order and one size is then like any other source: it can be sought in, resumed and proven.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.error import FFmpegError
from av.video.stream import VideoStream

from hat_video.errors import OptionError, SourceError
from hat_video.media.opening import open_file

if TYPE_CHECKING:
    from av.container import InputContainer

__all__ = ["bind_sequence", "is_sequence", "parse_rate", "pictures_of", "plain_name"]

_NUMBER = re.compile(r"%(?:0(\d+))?d")
# What QuickTime holds, each frame by itself and at any rate exactly: by their first bytes, since FFmpeg may take a
# small one for the first of a sequence, which it would then open by itself.
_FORMS = {
    b"\x89PNG": "png_pipe",
    b"\xff\xd8\xff": "jpeg_pipe",
    b"II*\0": "tiff_pipe",
    b"MM\0*": "tiff_pipe",
    b"SDPX": "dpx_pipe",
    b"XPDS": "dpx_pipe",
}
_NO_PICTURE = "not a picture that can be read"
_Facts = tuple[str, int, int, str | None]  # codec, width, height, pixel format
# Whoever writes 23.976 means this.
_NTSC = {"23.976": 24, "23.98": 24, "29.97": 30, "47.952": 48, "59.94": 60, "119.88": 120}


def is_sequence(path: Path) -> bool:
    """Whether a path is a pattern of numbered pictures: `frame_%04d.png`; no file has that name itself."""
    return len(_NUMBER.findall(path.name)) == 1 and not path.exists()


def plain_name(pattern: Path) -> str:
    """What a pattern is called without its number: `frame` for `frame_%04d.png`."""
    return re.sub(r"[-_. ]*%\d*d[-_. ]*", "", pattern.stem) or pattern.parent.resolve().name or "pictures"


def parse_rate(text: str) -> Fraction:
    """Frames a second as people write them: `24`, `23.976` (which is 24000/1001), `30000/1001`, `12.5`.

    Raises:
        OptionError: it is no such rate.
    """
    if text in _NTSC:
        return Fraction(1000 * _NTSC[text], 1001)
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000 or rate.denominator > 100_000:
        raise OptionError(f"--rate {text}: must be frames a second, for instance 24, 23.976, 30000/1001")
    return rate


def pictures_of(pattern: Path) -> list[Path]:
    """The pictures of a sequence in the order of their numbers, from whichever is the lowest.

    Raises:
        SourceError: there is none, or a number is missing between the first and the last.
    """
    match = _NUMBER.search(pattern.name)
    if match is None:
        raise SourceError(f"{pattern}: has no number like %04d in its name")
    width = int(match[1] or 0)
    fitting = re.compile(
        re.escape(pattern.name[: match.start()]) + rf"(\d{{{max(1, width)},}})" + re.escape(pattern.name[match.end() :])
    )
    try:
        names = {int(found[1]): path for path in pattern.parent.iterdir() if (found := fitting.fullmatch(path.name))}
    except OSError as error:
        raise SourceError(f"{pattern.parent}: cannot be read: {error.strerror or error}") from None
    if not names:
        raise SourceError(f"{pattern}: no picture has such a name")
    missing = next((n for n in range(min(names), max(names)) if n not in names), None)
    if missing is not None:
        raise SourceError(
            f"{pattern}: picture {missing} is missing, between {min(names)} and {max(names)};"
            " put it there, or upscale the parts"
        )
    return [names[n] for n in sorted(names)]


def bind_sequence(pattern: Path, rate: Fraction, target: Path) -> None:
    """Writes the pictures of a sequence into a QuickTime film, as they are.

    Args:
        pattern: as for `pictures_of`.
        rate: frames a second, kept exactly.
        target: the film.

    Raises:
        SourceError: as for `pictures_of`; a picture cannot be read, or is of another size or kind than the first.
    """
    stream: VideoStream | None = None
    first: _Facts | None = None
    with av.open(str(target.absolute()), "w", format="mov", options={"fflags": "+bitexact"}) as film:
        for number, path in enumerate(pictures_of(pattern)):
            with _opened(path) as picture:
                source = picture.streams.video[0]
                context = source.codec_context
                facts = (context.name, context.width, context.height, context.pix_fmt)
                first = first or facts
                if facts != first:
                    raise SourceError(
                        f"{path}: is {_words(facts)}, the first one is {_words(first)}; a film has one kind of frames"
                    )
                if stream is None:
                    stream = film.add_stream_from_template(source)
                    stream.time_base = 1 / rate
                packet = next((packet for packet in picture.demux(source) if packet.size), None)
                if packet is None:
                    raise SourceError(f"{path}: {_NO_PICTURE}")
                packet.stream = stream
                packet.time_base, packet.pts, packet.dts, packet.duration = 1 / rate, number, number, 1
                packet.is_keyframe = True
                film.mux(packet)


def _opened(path: Path) -> InputContainer:
    try:
        with path.open("rb") as file:
            head = file.read(4)
        form = next((form for mark, form in _FORMS.items() if head.startswith(mark)), None)
        if form is None:
            raise SourceError(f"{path}: is none of the pictures that can be bound into a film: PNG, TIFF, DPX, JPEG")
        picture = open_file(path, form=form)
    except SourceError:
        raise
    except (FFmpegError, OSError):
        raise SourceError(f"{path}: {_NO_PICTURE}") from None
    if not picture.streams.video or not picture.streams.video[0].codec_context.width:
        picture.close()
        raise SourceError(f"{path}: {_NO_PICTURE}")
    return picture


def _words(facts: _Facts) -> str:
    return f"{facts[0]} {facts[1]}x{facts[2]} {facts[3]}"
