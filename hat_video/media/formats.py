"""What pictures an encoder is given: which pixel format, which shape of samples, and what the source loses by it."""

from __future__ import annotations

from fractions import Fraction

from av.codec import Codec

from hat_video.errors import OptionError
from hat_video.frames import PixelFormat, VideoInfo
from hat_video.media.encoder_frames import WOVEN

__all__ = ["choose_format", "choose_shape", "encoder_losses"]

_PACKED = {
    **WOVEN,
    "rgb24": "gbrp",
    "bgr0": "gbrp",
    "rgb48le": "gbrp16le",
    "rgb48be": "gbrp16le",
    "bgra": "gbrap",
    "rgba": "gbrap",
    "argb": "gbrap",
    "rgba64le": "gbrap16le",
    "rgba64be": "gbrap16le",
    "gray16be": "gray16le",
    "p210le": "yuv422p10le",
}
"""An encoder's format -> the planar one of the very same code values."""

_LOSSLESS = ("ffv1", "qtrle", "apng", "png", "utvideo", "huffyuv", "ffvhuff", "magicyuv")
"""Encoders to which RGB is given as RGB; others are for players, which want YUV."""

# Formats that FFmpeg lists and that do not open: libvpx codes alpha beside 4:2:0 only, and PyAV's x265 not at all.
_REFUSED = {
    "libvpx-vp9": ("yuva422p", "yuva444p", "gbrap"),
    "libx265": ("yuva420p", "yuva420p10le"),
}
# Elsewhere their alpha, which travels beside the packet, would be lost without a word.
_BESIDE = ("libvpx", "libvpx-vp9")
# Their bitstreams tell the shape of a sample, so any container does.
_TELLS_SHAPE = ("libx264", "libx264rgb", "libx265", "h264_nvenc", "hevc_nvenc", "mpeg4", "mpeg2video", "mpeg1video")
# What no encoder of ours goes beyond.
_LARGEST = 16384
_CURE = (
    "libvpx-vp9 (.webm, .mkv), prores_ks (.mov, .mkv), ffv1 (.mkv) and qtrle (.mov) keep it,"
    " for instance --encoder {encoder} -o NAME{suffix}; or leave it out with --alpha drop"
)


def choose_format(encoder: str, container: str, source: PixelFormat, asked: str = "auto") -> tuple[str, PixelFormat]:
    """The encoder's pixel format, and the planar one that flows: the same code values, if in another order.

    `auto` keeps the kind, the depth and the chroma resolution of the source where the encoder has them; RGB becomes
    4:2:0 YUV, except in lossless encoders.

    Args:
        encoder: FFmpeg's name.
        container: FFmpeg's name of the muxer.
        source: what the source's frames are.
        asked: FFmpeg's name of a format, or `auto`.

    Raises:
        OptionError: the encoder has no such format, or none that keeps the source's transparency.
    """
    known = _known_formats(encoder)
    if asked != "auto":
        if asked not in known:
            has = f"; {encoder} has {', '.join(known)}" if known else ""
            raise OptionError(f"--pixel-format {asked}: no format of {encoder} that is written here{has}")
        if source.has_alpha and not known[asked].has_alpha:
            raise OptionError(
                f"--pixel-format {asked}: has no place for the source's transparency ({source.name});"
                f" {_cure(container)}"
            )
        return asked, known[asked]
    is_beside = encoder in _BESIDE and container not in ("matroska", "webm")
    fitting = {
        name: planar
        for name, planar in known.items()
        if planar.has_alpha == source.has_alpha and not (source.has_alpha and is_beside)
    }
    if source.has_alpha and not fitting:
        raise OptionError(
            f"the source is transparent ({source.name}), and {encoder} in {container} cannot keep that;"
            f" {_cure(container)}"
        )
    if not fitting:
        raise OptionError(f"--encoder {encoder}: takes no planar pixel format; use a software encoder")
    return min(fitting.items(), key=lambda item: _distance(item[1], source, is_lossless=encoder in _LOSSLESS))


def choose_shape(source: VideoInfo, width: int, height: int, name: str, container: str) -> tuple[int, int, Fraction]:
    """Size and sample aspect ratio of the output; square samples where Matroska as PyAV writes it would lose the ratio.

    Args:
        source: whose sample aspect ratio it is.
        width: of the output, if its samples had that shape.
        height: likewise.
        name: of the encoder.
        container: FFmpeg's name of the muxer.

    Raises:
        OptionError: there would be too many square samples.
    """
    ratio = source.sample_aspect_ratio
    if ratio == 1 or container not in ("matroska", "webm") or name in _TELLS_SHAPE:
        return width, height, ratio
    # Only ever larger, and even, as 4:2:0 wants it.
    wide = 2 * round(width * ratio / 2) if ratio > 1 else width
    high = 2 * round(height / ratio / 2) if ratio < 1 else height
    if max(wide, high) > _LARGEST:
        raise OptionError(
            f"{name} in {container} does not keep the sample aspect ratio {ratio}, and {wide}x{high} square samples are"
            " too many; use --encoder libx264, or --size"
        )
    return wide, high, Fraction(1)


def encoder_losses(source: VideoInfo, video: VideoInfo, encoder: str, pixel_format: str = "auto") -> list[str]:
    """What an encoder cannot keep of the source's pictures, one line each.

    Args:
        source: as `plan_encoder` took it.
        video: as `plan_encoder` gave it.
        encoder: FFmpeg's name.
        pixel_format: what was asked for; one by name is a wish and no loss.
    """
    losses = _format_losses(encoder, source, video.pixel_format) if pixel_format == "auto" else []
    if source.hdr is not None:
        kept = video.hdr
        for name, was, now in (
            ("mastering display", source.hdr.mastering, kept and kept.mastering),
            ("content light level", source.hdr.content_light, kept and kept.content_light),
        ):
            if was is not None and now is None:
                losses.append(f"its {name} (HDR10) is dropped: {encoder} cannot write it; libx265 and libsvtav1 can")
    if video.stereo != source.stereo:
        losses.append(
            f"that its picture holds two views ({source.stereo}) is dropped: {encoder} cannot say it, nor can this"
            " container; libx264 can where the left view comes first, .mkv always can"
        )
    if video.sample_aspect_ratio != source.sample_aspect_ratio:
        losses.append(
            f"its sample aspect ratio {source.sample_aspect_ratio.numerator}:{source.sample_aspect_ratio.denominator}"
            f" becomes square samples and a size of {video.width}x{video.height}: {encoder} does not keep it there"
        )
    return losses


def _format_losses(encoder: str, source: VideoInfo, made: PixelFormat) -> list[str]:
    was = source.pixel_format
    losses = []
    if made.bit_depth < was.bit_depth:
        losses.append(f"{was.bit_depth} bits a sample become {made.bit_depth}: {encoder} has no more")
    chroma = (was.log2_chroma_w, was.log2_chroma_h) if was.kind == "yuv" else (0, 0)
    if was.kind != "gray" and (made.log2_chroma_w > chroma[0] or made.log2_chroma_h > chroma[1]):
        losses.append(f"colour becomes coarser: {was.name} is made {made.name}; --pixel-format names another")
    return losses


def _known_formats(encoder: str) -> dict[str, PixelFormat]:
    known = {}
    for name in (fmt.name for fmt in Codec(encoder, "w").video_formats or ()):
        # The range is a tag and not a format of its own.
        if name.startswith("yuvj") or name in _REFUSED.get(encoder, ()):
            continue
        try:
            known[name] = PixelFormat.parse(_PACKED.get(name, name))
        except ValueError:
            continue
    return known


def _distance(candidate: PixelFormat, source: PixelFormat, *, is_lossless: bool) -> tuple[bool, bool, int, bool, int]:
    """Kind, then depth (not less if it can be), then chroma (not less)."""
    kind = source.kind if source.kind == "yuv" or is_lossless else "yuv"
    chroma = (source.log2_chroma_w, source.log2_chroma_h) if source.kind == "yuv" else (1, 1)
    mine = (candidate.log2_chroma_w, candidate.log2_chroma_h)
    return (
        candidate.kind != kind,
        candidate.bit_depth < source.bit_depth,
        abs(candidate.bit_depth - source.bit_depth),
        mine[0] > chroma[0] or mine[1] > chroma[1],
        abs(mine[0] - chroma[0]) + abs(mine[1] - chroma[1]),
    )


def _cure(container: str) -> str:
    encoder, suffix = {"mov": ("prores_ks", ".mov"), "matroska": ("ffv1", ".mkv")}.get(
        container, ("libvpx-vp9", ".webm")
    )
    return _CURE.format(encoder=encoder, suffix=suffix)
