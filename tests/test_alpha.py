"""Transparency: decoded, upscaled beside the colour, kept in webm, mkv and mov, or refused by name."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.codec import CodecContext
from av.video.reformatter import VideoReformatter
from torch.utils.dlpack import from_dlpack

from hat_video import UpscaleOptions, open_source, probe, upscale_file
from hat_video.color import alpha_from_unit, alpha_to_unit, from_rgb, to_rgb
from hat_video.errors import OptionError, StrictError
from hat_video.frames import ColorInfo, PixelFormat
from hat_video.media.formats import choose_format
from hat_video.model.resample import enlarge
from tests.clips import moving_picture

WIDTH, HEIGHT, FRAMES = 64, 48, 10
OPTIONS = {
    "libvpx-vp9": {"crf": "8", "b": "0"},
    "libvpx": {"auto-alt-ref": "0", "b": "2M"},
    "prores_ks": {"profile": "4"},
}


def disc(index: int) -> np.ndarray:
    """(H, W) uint8: an opaque disc that moves, with a soft edge, in a transparent picture."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    away = np.hypot(x - 16 - 3 * index, y - HEIGHT / 2)
    return (255 - 12 * np.maximum(away - 10, 0)).clip(0, 255).astype(np.uint8)


def alpha_clip(path: Path, codec: str, pix_fmt: str, *, alphas: list[np.ndarray] | None = None) -> Path:
    alphas = alphas or [disc(i) for i in range(FRAMES)]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=OPTIONS.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        if codec.startswith("libvpx"):
            stream.metadata["alpha_mode"] = "1"
        for i, alpha in enumerate(alphas):
            rgba = np.dstack([moving_picture(i, WIDTH, HEIGHT), alpha])
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def upscaled(clip: Path, output: Path, **choices: object) -> list[str]:
    options = UpscaleOptions(**{"model": "bicubic", "scale": 2, **choices})  # type: ignore[arg-type]
    report = upscale_file(clip, output, options)
    assert report.verification is not None
    assert report.verification.startswith("proven")
    return report.notes


def alphas_of(path: Path) -> list[np.ndarray]:
    """(H, W) in 0..255 of each frame, by PyAV alone: libvpx where a tag says that there is alpha, swscale."""
    alphas, reformatter = [], VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        if {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1":
            context = CodecContext.create({"vp9": "libvpx-vp9", "vp8": "libvpx"}[context.name], "r")
        for packet in container.demux(stream):
            for frame in context.decode(packet if packet.size else None):
                assert any(part.is_alpha for part in frame.format.components), frame.format.name
                # Of 8 bits swscale makes 16 by a shift; so each depth has its own way.
                is_8_bit = frame.format.components[0].bits == 8
                rgba = reformatter.reformat(frame, format="rgba" if is_8_bit else "rgba64le", threads=1).to_ndarray()
                alphas.append(rgba[..., 3] / (1 if is_8_bit else 257))
    return alphas


@pytest.mark.parametrize(
    ("name", "depth", "kind", "chroma"),
    [
        ("yuva420p", 8, "yuv", (1, 1)),
        ("yuva422p10le", 10, "yuv", (1, 0)),
        ("yuva444p12le", 12, "yuv", (0, 0)),
        ("yuva444p16le", 16, "yuv", (0, 0)),
        ("gbrap", 8, "rgb", (0, 0)),
        ("gbrap16le", 16, "rgb", (0, 0)),
    ],
)
def test_formats(name: str, depth: int, kind: str, chroma: tuple[int, int]) -> None:
    fmt = PixelFormat.parse(name)
    assert (fmt.bit_depth, fmt.kind, (fmt.log2_chroma_w, fmt.log2_chroma_h)) == (depth, kind, chroma)
    assert fmt.has_alpha
    assert fmt.plane_sizes(5, 3)[-1] == (3, 5)
    assert len(fmt.plane_sizes(5, 3)) == 4
    assert fmt.opaque == PixelFormat.parse(name.replace("yuva", "yuv").replace("gbrap", "gbrp"))
    assert not fmt.opaque.has_alpha
    assert fmt.opaque.opaque == fmt.opaque


@pytest.mark.parametrize("name", ["yuva420p", "gbrap", "yuva444p10le", "yuva422p12le", "gbrap16le"])
def test_every_alpha_comes_back_and_colour_does_not_see_it(name: str) -> None:
    fmt = PixelFormat.parse(name)
    color = ColorInfo(0 if fmt.kind == "rgb" else 1, 1, 1, fmt.kind == "rgb")
    top = (1 << fmt.bit_depth) - 1
    alpha = torch.linspace(0, top, 4096).round().to(torch.int32).to(fmt.dtype).reshape(1, 64, 64)
    planes = [torch.full((1, *size), 100 << (fmt.bit_depth - 8), dtype=fmt.dtype) for size in fmt.plane_sizes(64, 64)]
    unit = alpha_to_unit([*planes[:3], alpha], fmt)
    assert unit is not None
    assert torch.equal(alpha_from_unit(unit, fmt), alpha)
    assert torch.equal(to_rgb([*planes[:3], alpha], fmt, color), to_rgb(planes[:3], fmt.opaque, color))
    assert len(from_rgb(torch.rand(1, 3, 8, 8), fmt, color)) == 3
    assert alpha_to_unit(planes[:3], fmt.opaque) is None


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix", "planar"),
    [
        ("libvpx-vp9", "yuva420p", ".webm", "yuva420p"),
        ("libvpx-vp9", "yuva420p", ".mkv", "yuva420p"),
        ("libvpx", "yuva420p", ".webm", "yuva420p"),
        ("prores_ks", "yuva444p10le", ".mov", "yuva444p12le"),
        ("qtrle", "argb", ".mov", "gbrap"),
        ("apng", "rgba", ".apng", "gbrap"),
        ("ffv1", "bgra", ".mkv", "gbrap"),
        ("ffv1", "yuva422p10le", ".mkv", "yuva422p10le"),
    ],
)
def test_decoders_give_the_alpha(tmp_path: Path, codec: str, pix_fmt: str, suffix: str, planar: str) -> None:
    clip = alpha_clip(tmp_path / f"clip{suffix}", codec, pix_fmt)
    found = probe(clip)
    assert found.video.pixel_format.name == planar
    expected = alphas_of(clip)
    assert np.abs(expected[0] - disc(0)).max() < (40 if codec.startswith("libvpx") else 1)
    top = (1 << found.video.pixel_format.bit_depth) - 1
    with open_source(clip, probe=found) as source:
        batches = list(source.read())
        assert len(batches) == FRAMES
        for batch, alpha in zip(batches, expected, strict=True):
            assert np.abs(batch.planes[3][0].numpy() / top * 255 - alpha).max() < 0.51
        # From a place in the middle, too: the decoder of VP9's alpha is not the container's own.
        pts = found.index.pts
        late = list(source.read(pts[4], pts[7]))
        assert [batch.pts[0] for batch in late] == list(pts[4:7])
        assert all(torch.equal(a.planes[3], b.planes[3]) for a, b in zip(late, batches[4:7], strict=True))


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix", "encoder", "output", "error"),
    [
        ("libvpx-vp9", "yuva420p", ".webm", None, ".webm", 8.0),
        ("libvpx-vp9", "yuva420p", ".webm", "libvpx-vp9", ".mkv", 8.0),
        ("libvpx-vp9", "yuva420p", ".webm", "libvpx", ".webm", 12.0),
        ("apng", "rgba", ".apng", "libvpx-vp9", ".webm", 8.0),
        ("prores_ks", "yuva444p10le", ".mov", "prores_ks", ".mov", 0.2),
        ("prores_ks", "yuva444p10le", ".mov", "ffv1", ".mkv", 0.51),
        ("qtrle", "argb", ".mov", "qtrle", ".mov", 0.51),
        ("ffv1", "bgra", ".mkv", "ffv1", ".mkv", 0.51),
        ("apng", "rgba", ".apng", "prores_ks", ".mov", 0.51),
    ],
)
def test_round_trip(
    tmp_path: Path, codec: str, pix_fmt: str, suffix: str, encoder: str | None, output: str, error: float
) -> None:
    """Against the source's alpha, enlarged here: no colour shines through, nothing is shifted, in several segments."""
    clip = alpha_clip(tmp_path / f"clip{suffix}", codec, pix_fmt)
    made = tmp_path / f"out{output}"
    upscaled(clip, made, encoder=encoder, segment=0.15)
    sources, results = alphas_of(clip), alphas_of(made)
    assert len(results) == FRAMES
    for source, result in zip(sources, results, strict=True):
        assert result.shape == (2 * HEIGHT, 2 * WIDTH)
        large = enlarge(torch.from_numpy(source)[None, None] / 255, 2, "bicubic").clamp(0, 1)[0, 0].numpy() * 255
        assert np.abs(result - large).mean() < max(0.5, error / 8)
        assert np.abs(result - large).max() < 6 * error


def test_the_network_enlarges_alpha(tmp_path: Path) -> None:
    clip, made = alpha_clip(tmp_path / "clip.mkv", "ffv1", "bgra"), tmp_path / "out.mkv"
    upscaled(clip, made, encoder="ffv1", model=None)
    for source, result in zip(alphas_of(clip), alphas_of(made), strict=True):
        large = enlarge(torch.from_numpy(source)[None, None] / 255, 2, "bicubic").clamp(0, 1)[0, 0].numpy() * 255
        assert 0 < np.abs(result - large).mean() < 3, "a disc like it, and not the bicubic one"


def test_even_alpha_stays_exactly_that(tmp_path: Path) -> None:
    alphas = [np.full((HEIGHT, WIDTH), value, np.uint8) for value in (255, 0, 77)]
    clip, made = alpha_clip(tmp_path / "clip.mkv", "ffv1", "bgra", alphas=alphas), tmp_path / "out.mkv"
    upscaled(clip, made, encoder="ffv1", model=None)
    assert [set(np.unique(alpha)) for alpha in alphas_of(made)] == [{255}, {0}, {77}]


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_players_are_told(tmp_path: Path, suffix: str) -> None:
    clip = alpha_clip(tmp_path / "clip.webm", "libvpx-vp9", "yuva420p")
    made, dropped = tmp_path / f"out{suffix}", tmp_path / f"dropped{suffix}"
    upscaled(clip, made, encoder="libvpx-vp9")
    element = b"\x53\xc0\x81\x01"  # Matroska's AlphaMode, 1
    assert element in made.read_bytes()[:4000]
    upscaled(clip, dropped, encoder="libvpx-vp9", alpha="drop")
    assert element not in dropped.read_bytes()[:4000]
    assert not probe(dropped).video.pixel_format.has_alpha
    with av.open(str(dropped)) as container:
        assert "alpha_mode" not in {key.lower() for key in container.streams.video[0].metadata}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("encoder", [None, "libx265", "libvpx-vp9"])
def test_refused_where_it_would_be_lost(tmp_path: Path, suffix: str, encoder: str | None) -> None:
    if (suffix, encoder) == (".mkv", "libvpx-vp9"):
        pytest.skip("keeps it")
    clip = alpha_clip(tmp_path / "clip.mov", "qtrle", "argb")
    with pytest.raises(OptionError, match=r"transparent.*libvpx-vp9.*prores_ks.*--alpha drop"):
        upscaled(clip, tmp_path / f"out{suffix}", encoder=encoder)
    assert not (tmp_path / f"out{suffix}").exists()


def test_drop_leaves_it_out(tmp_path: Path) -> None:
    clip, made = alpha_clip(tmp_path / "clip.mov", "qtrle", "argb"), tmp_path / "out.mp4"
    upscaled(clip, made, alpha="drop")
    assert probe(made).video.pixel_format.name == "yuv420p"


def test_prores_is_marked_4444(tmp_path: Path) -> None:
    clip, made = alpha_clip(tmp_path / "clip.mov", "prores_ks", "yuva444p10le"), tmp_path / "out.mov"
    upscaled(clip, made, encoder="prores_ks")
    with av.open(str(made)) as container:
        assert container.streams.video[0].codec_context.codec_tag == "ap4h"


def gif(path: Path, *, is_transparent: bool) -> Path:
    """GIF's decoder gives an alpha channel always."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("gif", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "pal8" if is_transparent else "rgb8"
        for i in range(4):
            if is_transparent:
                palette = np.zeros((256, 4), np.uint8)
                palette[1] = (255, 200, 30, 20)  # A, R, G, B; 0 is transparent black
                frame = av.VideoFrame.from_ndarray(((disc(i) > 100).astype(np.uint8), palette), format="pal8")
            else:
                frame = av.VideoFrame.from_ndarray(moving_picture(i, WIDTH, HEIGHT), format="rgb24").reformat(
                    format="rgb8", threads=1
                )
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def test_an_opaque_gif_has_no_alpha(tmp_path: Path) -> None:
    clip = gif(tmp_path / "opaque.gif", is_transparent=False)
    assert probe(clip).video.pixel_format.name == "gbrp"
    upscaled(clip, tmp_path / "out.mp4")
    see_through = gif(tmp_path / "transparent.gif", is_transparent=True)
    assert probe(see_through).video.pixel_format.name == "gbrap"
    with pytest.raises(OptionError, match="transparent"):
        upscaled(see_through, tmp_path / "no.mp4")
    upscaled(see_through, tmp_path / "yes.webm")


def test_a_named_format_is_used_or_refused(tmp_path: Path) -> None:
    clip = alpha_clip(tmp_path / "clip.mkv", "ffv1", "bgra")
    upscaled(clip, tmp_path / "a.mkv", encoder="ffv1", pixel_format="yuva444p10le")
    assert probe(tmp_path / "a.mkv").video.pixel_format.name == "yuva444p10le"
    with pytest.raises(OptionError, match=r"--pixel-format yuv420p: has no place for the source's transparency"):
        upscaled(clip, tmp_path / "b.mkv", encoder="ffv1", pixel_format="yuv420p")
    with pytest.raises(OptionError, match=r"--pixel-format nv21: no format of libx264.*libx264 has yuv420p, yuv422p"):
        upscaled(clip, tmp_path / "c.mkv", encoder="libx264", pixel_format="nv21", alpha="drop")


def test_losses_of_format_are_said_and_strict_refuses(tmp_path: Path) -> None:
    clip = alpha_clip(tmp_path / "clip.mkv", "ffv1", "yuva444p10le")
    notes = upscaled(clip, tmp_path / "a.webm")
    assert any("10 bits a sample become 8" in note for note in notes)
    assert any("yuva444p10le is made yuva420p" in note for note in notes)
    with pytest.raises(StrictError, match="10 bits a sample become 8"):
        upscaled(clip, tmp_path / "b.webm", strict=True)
    upscaled(clip, tmp_path / "c.webm", strict=True, pixel_format="yuva420p")


@pytest.mark.parametrize(
    ("encoder", "container", "source", "given", "planar"),
    [
        ("ffv1", "matroska", "gbrap", "bgra", "gbrap"),
        ("ffv1", "matroska", "gbrp", "bgr0", "gbrp"),
        ("qtrle", "mov", "yuva420p", "argb", "gbrap"),
        ("prores_ks", "mov", "gbrap", "yuva444p10le", "yuva444p10le"),
        ("hevc_nvenc", "mp4", "yuv420p10le", "p010le", "yuv420p10le"),
        ("libvpx-vp9", "webm", "gbrap16le", "yuva420p", "yuva420p"),
    ],
)
def test_nearest_format(encoder: str, container: str, source: str, given: str, planar: str) -> None:
    assert choose_format(encoder, container, PixelFormat.parse(source)) == (given, PixelFormat.parse(planar))


@pytest.mark.parametrize("packed", ["rgb24", "bgr0", "bgra", "argb", "rgba64be", "p010le", "gray16be"])
def test_packed_formats_hold_the_same_values(packed: str) -> None:
    """What `EncoderSpec.pixel_format` may be: PyAV turns planes into it and back without changing one."""
    from hat_video.media.formats import _PACKED

    planar = PixelFormat.parse(_PACKED[packed])
    frame = av.VideoFrame(WIDTH, HEIGHT, planar.name)
    noise = np.random.default_rng(0)
    for plane in frame.planes:
        kind = np.uint8 if planar.bit_depth == 8 else np.uint16
        rows = np.frombuffer(memoryview(plane), kind).reshape(plane.height, -1)
        rows[:] = noise.integers(0, 1 << planar.bit_depth, rows.shape, kind)
    back = VideoReformatter().reformat(frame, format=packed, threads=1).reformat(format=planar.name, threads=1)
    for ours, theirs in zip(frame.planes, back.planes, strict=True):
        assert torch.equal(from_dlpack(ours), from_dlpack(theirs))
