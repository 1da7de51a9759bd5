"""Numbered pictures as a film, by real pictures and the real command."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from hat_video.errors import OptionError, SourceError
from hat_video.media.sequence import parse_rate, pictures_of
from tests.clips import moving_picture
from tests.command import upscale
from tests.conformance.tools import ffmpeg

FAST = ("--model", "bicubic", "--scale", "2", "--preset", "ultrafast")


def write_pictures(folder: Path, suffix: str, pix_fmt: str, numbers: range, size: tuple[int, int] = (64, 48)) -> Path:
    """Pictures with known content; the pattern that names them."""
    folder.mkdir(exist_ok=True)
    codec = {".png": "png", ".tif": "tiff", ".dpx": "dpx", ".jpg": "mjpeg"}[suffix]
    for number in numbers:
        frame = av.VideoFrame.from_ndarray(moving_picture(number, *size), format="rgb24").reformat(
            format=pix_fmt, threads=1
        )
        encoder = av.CodecContext.create(codec, "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = *size, pix_fmt, Fraction(1, 25)
        data = b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None)))
        (folder / f"frame_{number:04d}{suffix}").write_bytes(data)
    return folder / f"frame_%04d{suffix}"


@pytest.mark.parametrize(
    ("suffix", "pix_fmt"),
    [(".png", "rgb24"), (".png", "rgb48be"), (".tif", "rgb24"), (".dpx", "gbrp10le"), (".jpg", "yuvj420p")],
)
def test_every_picture_is_a_frame_at_its_exact_time(tmp_path: Path, suffix: str, pix_fmt: str) -> None:
    pattern = write_pictures(tmp_path / "in", suffix, pix_fmt, range(86400, 86412))
    output = tmp_path / "film.mp4"
    assert upscale(pattern, "-o", output, "--rate", "23.976", *FAST) == 0
    with av.open(str(output)) as film:
        stream = film.streams.video[0]
        frames = list(film.decode(stream))
        assert {(frame.width, frame.height) for frame in frames} == {(128, 96)}
        assert [frame.pts * stream.time_base for frame in frames] == [Fraction(1001 * n, 24000) for n in range(12)]
    for n, frame in enumerate(frames):
        small = frame.reformat(width=64, height=48, format="rgb24", interpolation="AREA", threads=1).to_ndarray()
        error = [np.abs(small.astype(int) - moving_picture(86400 + k, 64, 48)).mean() for k in range(12)]
        assert int(np.argmin(error)) == n, "the pictures are in order"
    assert not list(tmp_path.rglob("sequence-*"))


def test_same_command_again_is_already_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = write_pictures(tmp_path / "in", ".png", "rgb24", range(5))
    for _ in range(2):
        assert upscale(pattern, "--rate", "12.5", *FAST) == 0
    said = capsys.readouterr()
    assert "already done" in said.out
    assert (tmp_path / "in" / "frame_x2.mkv").is_file()


def test_what_is_wrong_with_pictures_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = write_pictures(tmp_path / "in", ".png", "rgb24", range(1, 9))
    assert upscale(pattern, *FAST) == 2
    assert "give --rate" in capsys.readouterr().err
    assert upscale(pattern, "--rate", "fast", *FAST) == 2
    assert "must be frames a second" in capsys.readouterr().err
    (tmp_path / "in" / "frame_0004.png").rename(tmp_path / "in" / "away.png")
    assert upscale(pattern, "--rate", "24", *FAST) == 1
    assert "picture 4 is missing" in capsys.readouterr().err
    write_pictures(tmp_path / "in", ".png", "rgb24", range(4, 5), size=(32, 48))
    assert upscale(pattern, "--rate", "24", *FAST) == 1
    assert "frame_0004.png: is png 32x48" in capsys.readouterr().err
    (tmp_path / "in" / "frame_0004.png").write_bytes(b"no picture")
    assert upscale(pattern, "--rate", "24", *FAST) == 1
    assert "frame_0004.png: is none of the pictures" in capsys.readouterr().err
    (tmp_path / "in" / "frame_0004.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    assert upscale(pattern, "--rate", "24", *FAST) == 1
    assert "frame_0004.png: not a picture" in capsys.readouterr().err
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.2:r=25", tmp_path / "clip_%d.bmp")
    assert upscale(tmp_path / "clip_%d.bmp", "--rate", "24", *FAST) == 1
    assert "PNG, TIFF, DPX, JPEG" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.mkv"))
    assert not list(tmp_path.rglob("sequence-*"))


def test_a_film_has_times_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.2:r=25", "-pix_fmt", "yuv420p", tmp_path / "clip.mp4")
    assert upscale(tmp_path / "clip.mp4", "--rate", "24", *FAST) == 2
    assert "is for numbered pictures" in capsys.readouterr().err


def test_rates() -> None:
    assert parse_rate("23.976") == Fraction(24000, 1001)
    assert parse_rate("30000/1001") == Fraction(30000, 1001)
    assert parse_rate("12.5") == Fraction(25, 2)
    for wrong in ("0", "-1", "nan", "", "1/0", "10000"):
        with pytest.raises(OptionError, match="--rate"):
            parse_rate(wrong)


def test_numbers_decide_the_order(tmp_path: Path) -> None:
    for number in (8, 9, 10, 11):
        (tmp_path / f"a{number}.png").touch()
    (tmp_path / "a12.jpg").touch()
    assert [path.name for path in pictures_of(tmp_path / "a%d.png")] == ["a8.png", "a9.png", "a10.png", "a11.png"]
    with pytest.raises(SourceError, match="no picture"):
        pictures_of(tmp_path / "b%d.png")
