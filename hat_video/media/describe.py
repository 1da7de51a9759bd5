"""What the pictures of one video stream are: told by its first frames, and by a few from further on.

Size, pixel format, colour, rotation and HDR metadata are all read from decoded frames, since a container may say
nothing, or something else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from av.codec import CodecContext
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from av.video.format import VideoFormat
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hat_video.errors import SourceError
from hat_video.frames import ColorInfo, PixelFormat, Siting, VideoInfo
from hat_video.media.hdr import dynamic_hdr_of, hdr_of, side_data_of
from hat_video.media.opening import demux
from hat_video.media.stereo import is_spherical, stereo_of

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = [
    "decoder_of",
    "describe",
    "has_idle_alpha",
    "is_see_through",
    "look",
    "nearest_planar",
    "planes_of",
    "to_fraction",
]

# Telecined film has two woven frames in five, a studio's first second may have none: so many frames are asked from the
# beginning, and so many in each of three places further on.
_LOOK, _LOOK_FURTHER = 12, 4
# Codecs that know no fields; and those whose decoders give an alpha channel to every picture, transparent or not.
_PROGRESSIVE = ("vp8", "vp9", "av1", "libdav1d", "gif", "png", "apng", "webp", "bmp", "tiff")
_ALWAYS_ALPHA = ("gif", "bmp")
_PROGRESSIVE_ORDER = 1  # AV_FIELD_PROGRESSIVE; 0 is unknown, 2 to 5 are the ways to weave two fields
_IDENTITY = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def to_fraction(value: Any) -> Fraction | None:
    """A time base or rate of any PyAV version (Fraction, AVRational, None, 0/1) as a Fraction; None if unset."""
    if not value or not value.numerator:
        return None
    return Fraction(value.numerator, value.denominator)


def decoder_of(stream: VideoStream) -> VideoCodecContext:
    """The decoder that gives all there is in the pictures: FFmpeg's own VP8 and VP9 pass over the alpha."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    # FFmpeg's own muxer writes the tag twice, once in capitals.
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if name is None or tags.get("alpha_mode") != "1":
        return stream.codec_context
    return cast("VideoCodecContext", CodecContext.create(name, "r"))


def look(
    container: InputContainer, stream: VideoStream, time_base: Fraction, rate: Fraction | None, places: Sequence[int]
) -> tuple[VideoInfo, list[str]] | None:
    """The facts of a video stream, and anything odd, one line each; None if not one frame can be decoded.

    Args:
        container: freshly opened.
        stream: one of its streams.
        time_base: of the stream.
        rate: average frames a second, if known.
        places: pts of key frames to look at besides the first, for the marks of interlacing.
    """
    context = decoder_of(stream)
    context.thread_count = 1
    # The marks may come late, the picture's facts stand in the first frame; no more than that one is kept.
    frames = _decoded(container, stream, context)
    first = next(frames, None)
    if first is None:
        return None
    has_fields = bool(first.interlaced_frame) or int(stream.codec_context.field_order) > _PROGRESSIVE_ORDER
    if stream.codec_context.name not in _PROGRESSIVE:
        has_fields = has_fields or any(frame.interlaced_frame for frame in islice(frames, _LOOK - 1))
        for pts in places:
            if has_fields:
                break
            has_fields = any(frame.interlaced_frame for frame in _at(container, stream, pts))
    is_transparent = True
    if has_idle_alpha(first, stream):
        # GIF has an alpha channel always and transparency seldom: only its pictures can tell, and all of them must.
        reformatter = VideoReformatter()
        is_transparent = any(is_see_through(frame, reformatter) for frame in _again(container, stream, context))
    return describe(first, stream, time_base, rate, is_interlaced=has_fields, is_transparent=is_transparent)


def describe(
    frame: VideoFrame,
    stream: VideoStream,
    time_base: Fraction,
    rate: Fraction | None,
    *,
    is_interlaced: bool | None = None,
    is_transparent: bool = True,
) -> tuple[VideoInfo, list[str]]:
    """The facts of a video stream, from one of its frames; and anything odd, one line each.

    Args:
        frame: the frame.
        stream: where it is from.
        time_base: of the stream.
        rate: average frames a second, if known.
        is_interlaced: what other frames say; None: what this one says.
        is_transparent: False: an alpha channel is known to be opaque in every frame, and is left out.
    """
    pixel_format = nearest_planar(frame.format.name)
    if not is_transparent:
        pixel_format = pixel_format.opaque
    notes = [f"its {name} (HDR metadata of single scenes) is dropped" for name in dynamic_hdr_of(frame)]
    if side_data_of(frame) is None:
        notes.append("its frames carry side data of a kind unknown here: HDR metadata, if there is any, is lost")
    if is_spherical(frame):
        notes.append("that its picture is spherical is dropped: it cannot be written here")
    is_woven = bool(frame.interlaced_frame) if is_interlaced is None else is_interlaced
    if is_woven:
        notes.append("its frames are interlaced: woven of two fields each")
    video = VideoInfo(
        width=frame.width,
        height=frame.height,
        time_base=time_base,
        rate=rate,
        pixel_format=pixel_format,
        color=_color(frame, stream, pixel_format),
        sample_aspect_ratio=to_fraction(stream.sample_aspect_ratio) or Fraction(1),
        display_matrix=_display_matrix(frame),
        is_interlaced=is_woven,
        hdr=hdr_of(frame),
        stereo=stereo_of(frame),
    )
    return video, notes


def _decoded(container: InputContainer, stream: VideoStream, context: VideoCodecContext) -> Iterator[VideoFrame]:
    packets = demux(container, stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, FFmpegError):
            return
        if not packet.size and (packet.dts is not None or packet.pts is not None):
            continue  # Theora says so that the picture stays; to a decoder it would be the end
        try:
            yield from context.decode(packet if packet.size else None)
        except FFmpegError:
            continue
        if not packet.size:
            return


def _at(container: InputContainer, stream: VideoStream, pts: int) -> Iterator[VideoFrame]:
    try:
        container.seek(pts, stream=stream, backward=True)
    except FFmpegError:
        return iter(())
    return islice(_decoded(container, stream, stream.codec_context), _LOOK_FURTHER)


def _again(container: InputContainer, stream: VideoStream, context: VideoCodecContext) -> Iterator[VideoFrame]:
    try:
        container.seek(0)
    except FFmpegError:
        return iter(())
    context.flush_buffers()
    return _decoded(container, stream, context)


def has_idle_alpha(frame: VideoFrame, stream: VideoStream) -> bool:
    """Whether the frame has alpha as all of its codec's frames have, transparent or not."""
    name = frame.format.name
    return nearest_planar(name).has_alpha and (stream.codec_context.name in _ALWAYS_ALPHA or name == "pal8")


def is_see_through(frame: VideoFrame, reformatter: VideoReformatter) -> bool:
    """Whether any pixel is less than opaque."""
    alpha = reformatter.reformat(frame, format="gbrap", threads=1).planes[-1]
    return bool((from_dlpack(alpha) < 255).any())


def _display_matrix(frame: VideoFrame) -> tuple[int, ...] | None:
    side_data = side_data_of(frame)
    if side_data is None:
        # Source: FFmpeg, libavutil/display.c, av_display_rotation_set; here without rounding errors of right angles.
        across, down = {0: (1, 0), 90: (0, -1), 180: (-1, 0), -180: (-1, 0), -90: (0, 1)}[
            90 * round(frame.rotation / 90)
        ]
        matrix = (across << 16, down << 16, 0, -down << 16, across << 16, 0, 0, 0, 1 << 30)
        return None if matrix == _IDENTITY else matrix
    for data in side_data:
        if data.type == SideDataType.DISPLAYMATRIX:
            # The identity says nothing; leaving it out keeps files without rotation free of it.
            matrix = struct.unpack("<9i", bytes(data)[:36])
            return None if matrix == _IDENTITY else matrix
    return None


def _color(frame: VideoFrame, stream: VideoStream, pixel_format: PixelFormat) -> ColorInfo:
    """What the code values mean; what the file leaves open is settled by the height, as players do."""
    context = stream.codec_context
    tagged = {
        name: int(getattr(frame, name)) if int(getattr(frame, name)) not in unset else int(getattr(context, name))
        for name, unset in (
            ("colorspace", (2, 3)),
            ("color_primaries", (0, 2)),
            ("color_trc", (0, 2)),
            ("color_range", (0,)),
        )
    }
    assumed: list[str] = []
    # BT.601 names its 525-line variant; players treat the two alike.
    by_height = 1 if frame.height >= 720 else 6

    def settle(field_name: str, value: int, unset: tuple[int, ...], rule: int) -> int:
        if value not in unset:
            return value
        assumed.append(field_name)
        return rule

    is_rgb = pixel_format.kind == "rgb"
    matrix = 0 if is_rgb else settle("matrix", tagged["colorspace"], (0, 2, 3), by_height)
    # A file that names its matrix only means the rest of that standard.
    standard = {1: 1, 5: 5, 6: 6, 7: 7, 9: 9}.get(matrix, 1 if is_rgb else by_height)
    primaries = settle("primaries", tagged["color_primaries"], (0, 2), standard)
    transfer = settle("transfer", tagged["color_trc"], (0, 2), {0: 13, 9: 14, 5: 6}.get(matrix, standard))
    if tagged["color_range"] not in (1, 2):
        assumed.append("range")
    is_full = tagged["color_range"] == 2 or (
        tagged["color_range"] != 1 and (frame.format.name.startswith("yuvj") or pixel_format.kind in ("rgb", "gray"))
    )
    return ColorInfo(matrix, primaries, transfer, is_full, _siting(frame, context.name), tuple(assumed))


def _siting(frame: VideoFrame, codec: str) -> Siting:
    # PyAV 18 cannot say where the chroma lies; then the codec's own rule holds.
    named: dict[int, Siting] = {1: "left", 2: "center", 3: "topleft"}
    location = named.get(int(getattr(frame, "chroma_location", 0) or 0))
    if location is not None:
        return location
    if codec in ("mjpeg", "mpeg1video", "h263", "flv", "flv1", "theora", "vp8", "gif", "png"):
        return "center"
    return "topleft" if codec == "dvvideo" else "left"


def planes_of(frame: VideoFrame, wanted: PixelFormat) -> tuple[Tensor, ...]:
    """(h, w) tensors that own their memory, of a frame that is `wanted`, or would be with or without alpha."""
    planes = [from_dlpack(plane).clone() for plane in frame.planes]
    if wanted.has_alpha and len(planes) == 3:
        # A stream may leave the alpha out of a picture that is all opaque.
        planes.append(torch.full_like(planes[0], (1 << wanted.bit_depth) - 1))
    return tuple(planes if wanted.has_alpha else planes[:3])


def nearest_planar(name: str) -> PixelFormat:
    """The planar format that holds what FFmpeg's format `name` holds.

    Raises:
        SourceError: it is no picture of samples (a hardware surface, Bayer, XYZ).
    """
    try:
        return PixelFormat.parse(name)
    except ValueError:
        pass
    layout = VideoFormat(name, 64, 64)
    parts = [part for part in layout.components if not part.is_alpha]
    if not parts or name.startswith(("xyz", "bayer")):
        raise SourceError(f"pixel format {name} cannot be converted without loss; decode it to yuv or rgb first")
    # FFmpeg does not count a palette's alpha among the components.
    has_alpha = layout.has_palette or len(parts) < len(layout.components)
    bits = max(8, *(part.bits for part in parts), 8)
    # Planes with alpha come in fewer depths.
    bits = next(depth for depth in ((8, 10, 12, 16) if has_alpha else (8, 9, 10, 12, 14, 16)) if depth >= bits)
    suffix = "" if bits == 8 else f"{bits}le"
    if layout.is_rgb or layout.has_palette or (len(parts) == 1 and has_alpha):
        return PixelFormat.parse(f"gbr{'a' if has_alpha else ''}p{suffix}")
    if len(parts) == 1:
        return PixelFormat.parse(f"gray{suffix}")
    ratio = {(64, 64): "444", (32, 64): "422", (32, 32): "420", (64, 32): "440", (16, 64): "411", (16, 16): "410"}
    return PixelFormat.parse(f"yuv{'a' if has_alpha else ''}{ratio[parts[1].width, parts[1].height]}p{suffix}")
