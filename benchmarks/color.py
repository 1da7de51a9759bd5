"""What a trip through the whole road does to colours: decode, R'G'B', network, planes, encode.

    python benchmarks/color.py           # writes benchmarks/results/color.json and docs/color.md

A frame of the sample clip is put into each kind of picture and written without loss; `hat-video upscale` brings it
through the road at its own size (`--model bicubic --scale 1`, which changes nothing) and writes it without loss again.
What differs then is what the road's own arithmetic costs. Beside it, what most scripts do: 8-bit RGB and back by
FFmpeg's scaler with its defaults.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from hat_video import UpscaleOptions, upscale_file

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "samples" / "bbb_320x180.mp4"
RESULT = ROOT / "benchmarks" / "results" / "color.json"
PAGE = ROOT / "docs" / "color.md"

MATRICES = {"BT.601": (6, 6, 6), "BT.709": (1, 1, 1), "BT.2020, PQ": (9, 9, 16), "BT.2020, HLG": (9, 9, 18)}
FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p12le", "gray", "gbrp")
FRAME = 60

_ERRORS = """\
Errors are in code values of the format's own depth: 1 of 256 in 8 bits, 1 of 1024 in 10. Luma is interpolated by
nothing and comes back; chroma of 4:2:0 and 4:2:2 is brought to every pixel and back again, each sample where the
stream says that it lies, which costs what a low-pass at colour edges costs. Colours beyond R'G'B' of 0 to 1, of which
the sample has some in its limited range, are brought to the edge: that is all of the error in luma, and most of that
in 4:4:4. Most: of all samples of the frame."""
_SETTLED = """\
Which matrix, range and siting are taken, and what is assumed of a file that does not say: `hat-video probe`. The
matrix of an untagged file goes by its height: BT.709 from 720 lines on, BT.601 below. Nothing is linearised: PQ and
HLG pass as the code values that they are, with their tags."""


@dataclass(frozen=True)
class Error:
    """In code values of the format's own depth."""

    picture: str
    pixel_format: str
    range: str
    luma_most: int
    luma_mean: float
    chroma_most: int
    chroma_mean: float


def sample_frame(pixel_format: str, codes: tuple[int, int, int], is_full: bool) -> av.VideoFrame:
    """A frame of the sample clip, turned into a format and tagged; the code values are what counts, not their look."""
    with av.open(str(CLIP)) as container:
        frame = next(frame for n, frame in enumerate(container.decode(video=0)) if n == FRAME)
    made = frame.reformat(format=pixel_format, threads=1)
    made.colorspace, made.color_primaries, made.color_trc = codes
    made.color_range = 2 if is_full else 1
    made.pts, made.time_base = 0, Fraction(1, 25)
    return made


def write(path: Path, frame: av.VideoFrame, codes: tuple[int, int, int], is_full: bool) -> None:
    """One frame in FFV1, which has RGB of 8 bits in another order."""
    if frame.format.name == "gbrp":
        frame = frame.reformat(format="bgr0", threads=1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = codes
        context.color_range = 2 if is_full else 1
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)


def planes(frame: av.VideoFrame) -> list[np.ndarray]:
    """The code values of each plane, as whole numbers."""
    kind = np.uint8 if frame.format.components[0].bits == 8 else np.dtype("<u2")
    return [
        np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : plane.width].astype(np.int64)
        for plane in frame.planes
    ]


def difference(picture: str, name: str, is_full: bool, before: av.VideoFrame, after: av.VideoFrame) -> Error:
    """How far two frames of one format are apart."""
    gaps = [np.abs(a - b) for a, b in zip(planes(before), planes(after), strict=True)]
    # Of RGB, all three planes are alike.
    luma, chroma = (np.stack(gaps), None) if name == "gbrp" else (gaps[0], gaps[1:])
    most = max((int(gap.max()) for gap in chroma or ()), default=0)
    mean = float(np.mean([gap.mean() for gap in chroma])) if chroma else 0.0
    words = "full" if is_full else "limited"
    return Error(picture, name, words, int(luma.max()), round(float(luma.mean()), 4), most, round(mean, 4))


def through_the_road(folder: Path) -> Iterator[Error]:
    """Every kind of picture through `upscale_file`."""
    for picture, codes in MATRICES.items():
        for name in FORMATS:
            for is_full in (False, True):
                is_gray_or_rgb = name in ("gray", "gbrp")
                if is_gray_or_rgb and (picture != "BT.709" or not is_full):
                    continue
                if codes[2] in (16, 18) and "p10" not in name and "p12" not in name:
                    continue
                source, output = folder / "source.mkv", folder / "output.mkv"
                mine = (0, *codes[1:]) if name == "gbrp" else codes
                before = sample_frame(name, mine, is_full)
                write(source, before, mine, is_full)
                upscale_file(
                    source, output, UpscaleOptions(model="bicubic", scale=1, encoder="ffv1", overwrite=True, jobs=1)
                )
                with av.open(str(output)) as container:
                    after = next(container.decode(video=0))
                if after.format.name == "bgr0":
                    after = after.reformat(format="gbrp", threads=1)
                assert after.format.name == name, f"{name} came out as {after.format.name}"
                yield difference("R'G'B'" if name == "gbrp" else picture, name, is_full, before, after)


def through_a_script() -> Iterator[Error]:
    """RGB of 8 bits and back, as FFmpeg's scaler does it when nobody tells it anything."""
    for name in ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le"):
        before = sample_frame(name, MATRICES["BT.709"], False)
        reformatter = VideoReformatter()
        rgb = av.VideoFrame.from_ndarray(before.to_ndarray(format="rgb24"), format="rgb24")
        after = reformatter.reformat(rgb, format=name, threads=1)
        yield difference("BT.709, by a script", name, False, before, after)


def page(errors: list[Error]) -> str:
    """docs/color.md."""
    introduction = (__doc__ or "").split("\n\n", 2)[2].strip()
    lines = [
        "# Colour, there and back",
        "",
        "Made by `python benchmarks/color.py` (figures: benchmarks/results/color.json).",
        "",
        introduction,
        "",
        _ERRORS,
        "",
        "| picture | format | range | luma, most | luma, mean | chroma, most | chroma, mean |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {e.picture} | {e.pixel_format} | {e.range} | {e.luma_most} | {e.luma_mean:.4f} | {e.chroma_most} |"
        f" {e.chroma_mean:.4f} |"
        for e in errors
    ]
    lines += [
        "",
        _SETTLED,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes both files."""
    with tempfile.TemporaryDirectory() as folder:
        errors = [*through_the_road(Path(folder)), *through_a_script()]
    RESULT.write_text(json.dumps([asdict(error) for error in errors], indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(errors), encoding="utf-8")
    print(f"{PAGE}: {len(errors)} kinds of pictures")


if __name__ == "__main__":
    main()
