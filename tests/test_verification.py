"""`hat-video verify` on its own: what somebody else's tool did to a proven file, and good files of every kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest

from hat_video.cli import main
from hat_video.jobs.verification import verify_files
from tests.command import upscale
from tests.conformance.table import KINDS
from tests.conformance.tools import ffmpeg
from tests.test_sequence import write_pictures

FAST = ("--model", "bicubic", "--scale", "2", "--preset", "ultrafast", "-q")
CHART = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=2,scroll=h=0.08:v=0.05")
NOISE = ("-f", "lavfi", "-i", "anoisesrc=d=2:seed=1:a=0.3")
TEXTS = "1\n00:00:00,200 --> 00:00:00,900\nOne\n\n2\n00:00:01,000 --> 00:00:01,800\nTwo\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A moving source with sound and texts, and its proven double."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "texts.srt").write_text(TEXTS)
    (folder / "font.ttf").write_bytes(bytes(range(256)) * 8)
    source, output = folder / "source.mkv", folder / "output.mkv"
    ffmpeg(
        *CHART, *NOISE, "-i", folder / "texts.srt", "-map", "0:v", "-map", "1:a", "-map", "2:s",
        "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "aac", "-c:s", "srt",
        "-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709",
        "-metadata", "title=The Film", "-metadata:s:a:0", "language=eng", "-metadata:s:a:0", "title=Stereo",
        "-attach", folder / "font.ttf", "-metadata:s:t", "mimetype=application/x-truetype-font", source,
    )  # fmt: skip
    assert upscale(source, "-o", output, *FAST) == 0
    return source, output


def remuxed(*words: str) -> Callable[[Path, Path], None]:
    """The same packets but for what `words` change."""
    return lambda good, bad: ffmpeg("-i", good, "-map", "0", "-c", "copy", *words, bad)


def swapped(good: Path, bad: Path) -> None:
    """Frames 13 and 14 change places; nothing else does."""
    with av.open(str(good)) as inp:
        frames = list(inp.decode(video=0))
    pts = [frame.pts for frame in frames]
    frames[13], frames[14] = frames[14], frames[13]
    pictures = bad.with_name("pictures.mkv")
    with av.open(str(pictures), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        context.time_base = Fraction(1, 1000)
        for frame, tick in zip(frames, pts, strict=True):
            frame.pts, frame.time_base, frame.pict_type = tick, Fraction(1, 1000), 0
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    ffmpeg("-i", pictures, "-i", good, "-map", "0:v", "-map", "1:a", "-map", "1:s", "-map", "1:t", "-c", "copy",
           "-map_metadata", "1", bad)  # fmt: skip


TAMPERED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "two frames change places": (swapped, "frame 13 shows the picture of the source's frame 14"),
    "sound late from the middle on": (
        remuxed("-bsf:a", "setts=pts=PTS+if(gt(PTS*TB\\,1)\\,300\\,0):dts=DTS+if(gt(PTS*TB\\,1)\\,300\\,0)"),
        r"audio stream 1 .* from packet \d+ on, at 1\.\d+ s, is \+300\.0 ms off",
    ),
    "one text late": (remuxed("-bsf:s", "setts=pts=PTS+if(gt(N\\,0)\\,230\\,0)"), r"subtitle .* is \+230\.0 ms off"),
    "red and blue change places": (
        remuxed("-c:v", "libx264", "-qp", "0", "-vf", "swapuv"),
        "dB of the source's colours",
    ),
    "another transfer in the stream": (
        remuxed("-bsf:v", "h264_metadata=transfer_characteristics=16"),
        "colour transfer is 16 in the pictures themselves",
    ),
    "another matrix in the stream": (
        remuxed("-bsf:v", "h264_metadata=matrix_coefficients=5"),
        "colour matrix is bt601 in the pictures themselves",
    ),
    "another language": (remuxed("-metadata:s:a:0", "language=fre"), "has the language fre, not eng"),
    "another name": (remuxed("-metadata:s:a:0", "title=Mono"), "is called 'Mono', not 'Stereo'"),
    "forced": (remuxed("-disposition:s:0", "forced"), "is marked as forced"),
    "another title": (remuxed("-metadata", "title=Foo"), "the file's title is 'Foo', not 'The Film'"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_what_was_changed_is_found(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    source, good = pair
    tamper, said = TAMPERED[kind]
    tamper(good, tmp_path / "bad.mkv")
    found = verify_files(source, tmp_path / "bad.mkv", is_full=True).verdict
    assert not found.is_ok
    assert any(re.search(said, problem) for problem in found.problems), found.problems


def test_another_font_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, good = pair
    (tmp_path / "font.ttf").write_bytes(bytes(2048))
    ffmpeg("-i", good, "-map", "0:v", "-map", "0:a", "-map", "0:s", "-c", "copy", "-attach", tmp_path / "font.ttf",
           "-metadata:s:t", "mimetype=application/x-truetype-font", tmp_path / "bad.mkv")  # fmt: skip
    found = verify_files(source, tmp_path / "bad.mkv").verdict
    assert any("font.ttf is not the source's" in problem for problem in found.problems)


def test_a_proven_file_is_proven_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, good = pair
    assert verify_files(source, good, is_full=True).verdict.is_ok
    for suffix in (".mp4", ".mov", ".webm"):
        output = tmp_path / f"out{suffix}"
        assert upscale(source, "-o", output, "--model", "bicubic", "--scale", "2", "-q") == 0
        verdict = verify_files(source, output, is_full=True).verdict
        assert verdict.is_ok, verdict.problems


@pytest.mark.parametrize(("mode", "words"), [("off", "as it is"), ("frame", "frame a frame"), ("field", "a field")])
def test_interlaced_however_it_was_read(tmp_path: Path, mode: str, words: str) -> None:
    source, output = tmp_path / "clip.mkv", tmp_path / "out.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=50:d=1,scroll=h=0.08,interlace", "-c:v", "libx264", "-flags",
           "+ildct+ilme", "-pix_fmt", "yuv420p", source)  # fmt: skip
    assert upscale(source, "-o", output, *FAST, "--deinterlace", mode) == 0
    found = verify_files(source, output, is_full=True)
    assert found.verdict.is_ok, found.verdict.problems
    assert any(words.split()[-1] in line for line in found.assumed)


def test_a_smaller_picture_is_no_upscaled_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = pair
    small = tmp_path / "small.mp4"
    ffmpeg("-i", output, "-vf", "scale=iw/4:ih/4", "-c:a", "copy", small)
    found = verify_files(source, small, is_full=False)
    assert not found.verdict.is_ok
    assert any("48" in problem or "32" in problem for problem in found.verdict.problems), found.verdict.problems


def test_sound_that_begins_late_in_mp4(tmp_path: Path) -> None:
    """FLAC of 44.1 kHz that begins at 22.99 ms, under pictures whose time base is Matroska's milliseconds."""
    source, output = tmp_path / "clip.mkv", tmp_path / "out.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=1", "-itsoffset", "0.02299", "-f", "lavfi", "-i",
           "sine=f=440:r=44100:d=0.9", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "flac", source)  # fmt: skip
    assert upscale(source, "-o", output, *FAST) == 0


def test_a_range(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = pair[0], tmp_path / "out.mkv"
    words = ("--start", "0.5", "--duration", "0.8")
    assert upscale(source, "-o", output, *FAST, *words) == 0
    assert main(["verify", str(source), str(output), "--full", *words]) == 0
    assert main(["verify", str(source), str(output)]) == 1
    assert "say which (--start, --duration)" in capsys.readouterr().out


def test_pictures(tmp_path: Path) -> None:
    pattern = write_pictures(tmp_path / "in", ".png", "rgb24", range(8))
    assert upscale(pattern, "-o", tmp_path / "out.mkv", *FAST, "--rate", "24") == 0
    assert main(["verify", str(pattern), str(tmp_path / "out.mkv"), "--full", "--rate", "24"]) == 0


@pytest.mark.parametrize("words", [("--size", "50p"), ("--crf", "35"), ("--size", "200x200", "--crf", "30")])
def test_pure_noise_is_not_taken_for_another_picture(tmp_path: Path, words: tuple[str, ...]) -> None:
    source = tmp_path / "noise.mkv"
    ffmpeg("-f", "lavfi", "-i", "nullsrc=s=64x48:r=25:d=0.4,geq=lum='random(1)*255':cb=128:cr=128", "-c:v", "ffv1",
           "-pix_fmt", "yuv420p", source)  # fmt: skip
    scale = () if "--size" in words else ("--scale", "2")
    assert upscale(source, "-o", tmp_path / "out.mkv", "--model", "bicubic", *scale, *words, "--verify", "full") == 0


def test_more_may_be_asked_of_a_file_that_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.mkv", KINDS["corrupt-packets"].make(tmp_path)
    ffmpeg(*CHART, "-c:v", "libx264", "-bf", "0", "-g", "10", "-pix_fmt", "yuv420p", "-threads", "1", good)
    assert upscale(good, "-o", tmp_path / "good_2.mkv", *FAST) == 0
    assert upscale(bad, "-o", tmp_path / "bad_2.mkv", *FAST) == 0
    assert upscale(bad, "-o", tmp_path / "bad_2.mkv", *FAST, "--strict") == 1
    assert "is done already, without 10 frames" in capsys.readouterr().err
    assert upscale(good, "-o", tmp_path / "good_2.mkv", *FAST[:-1], "--verify", "full") == 0
    assert re.search(r"already done; proven: .* 50 frames decoded", capsys.readouterr().out)
    assert upscale(good, "-o", tmp_path / "good_2.mkv", *FAST[:-1], "--strict") == 0
