"""The kinds of source: each a real file as some program in the world writes it, small and made in a moment.

A maker writes one file into a folder and returns it. Pictures are FFmpeg's moving test chart, sound is noise, which is
like itself at one place only, so that the referee can measure by how much it was moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from tests.conformance.tools import ffmpeg

__all__ = ["KINDS", "Kind", "kind"]

Maker = Callable[[Path], Path]


@dataclass(frozen=True)
class Kind:
    """One kind of source and what is known of it beforehand."""

    name: str
    title: str
    """What it is, for people."""
    chapter: str
    make: Maker
    rate: Fraction | None = None
    """Frames a second where the file has no timestamps that could be trusted: frame k is then expected at k / rate."""
    start: Fraction | None = None
    """When the first frame is shown, in seconds, where FFmpeg's own programs differ in what they guess."""
    refused: str | None = None
    """A pattern of the one line with which the command must refuse it."""
    reported: str | None = None
    """A pattern that one of the report's notes must have."""
    options: tuple[str, ...] = ()
    """Words that the command is given besides."""


KINDS: dict[str, Kind] = {}


def kind(
    chapter: str,
    title: str,
    *,
    rate: Fraction | int | None = None,
    start: Fraction | None = None,
    refused: str | None = None,
    reported: str | None = None,
    options: tuple[str, ...] = (),
) -> Callable[[Maker], Maker]:
    """Declares the decorated maker as a kind; its name is the function's, with dashes."""

    def declare(make: Maker) -> Maker:
        name = make.__name__.replace("_", "-")
        KINDS[name] = Kind(name, title, chapter, make, rate and Fraction(rate), start, refused, reported, options)
        return make

    return declare


def chart(seconds: float = 1, rate: int | str = 24, size: str = "64x48") -> tuple[str, ...]:
    """Arguments that make the test chart an input, rolling, so that every frame is its own."""
    return ("-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d={seconds},scroll=h=0.08:v=0.05")


def noise(seconds: float = 1, seed: int = 1, rate: int = 48000) -> tuple[str, ...]:
    """Arguments that make noise an input."""
    return ("-f", "lavfi", "-i", f"anoisesrc=d={seconds}:seed={seed}:a=0.3:r={rate}")


def x264(gop: int = 8, bframes: int = 2, params: str = "") -> tuple[str, ...]:
    """Arguments for H.264 with B-frames."""
    words = f"threads=1:bframes={bframes}:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0"
    return (
        "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p",
        "-x264-params", f"{words}:{params}" if params else words,
    )  # fmt: skip


AAC = ("-c:a", "aac", "-b:a", "96k")


def plain(path: Path, *more: str, seconds: float = 1, rate: int | str = 24) -> Path:
    """The chart in H.264 with noise in AAC; `more` comes before the file's name."""
    ffmpeg(*chart(seconds, rate), *noise(seconds), *x264(), *AAC, *more, path)
    return path
