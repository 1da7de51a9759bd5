"""The newest pictures as JPEG, made when someone asks for one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from av.codec.context import CodecContext, Flags
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from torch import Tensor

from hat_video.color import from_rgb, to_rgb
from hat_video.frames import ColorInfo, PixelFormat, VideoInfo
from hat_video.media.encoder_frames import EncoderFrames

__all__ = ["Jpeg", "Pictures", "Which"]

Which = Literal["result", "source", "camera"]
"""What was made; of what; and, where only a part is upscaled, all that the camera sees."""

_JPEG = ColorInfo(matrix=6, primaries=1, transfer=13, is_full_range=True, siting="center")
"""What JFIF says that the code values of a JPEG are."""
_STILL = PixelFormat.parse("yuvj444p")
_GRAY = PixelFormat.parse("gray")
_BAND, _MARGIN = 256, 16
_MOST_WIDE = 1920
_HELD = 4


class Jpeg(NamedTuple):
    """One picture."""

    number: int
    """Of the frame; the same for what was made and of what."""
    data: bytes


@dataclass(frozen=True, slots=True)
class _Shown:
    number: int
    pictures: dict[Which, tuple[tuple[Tensor, ...], VideoInfo]]


class Pictures:
    """Keeps the newest frame, as it came and as it was made, and turns either into JPEG.

    `show` may be called from any thread; everything else from one and the same.
    """

    def __init__(self) -> None:
        self._newest: _Shown | None = None
        self._held: OrderedDict[int, _Shown] = OrderedDict()
        self._made: dict[tuple[Which, bool], Jpeg] = {}
        self._encoders: dict[tuple[Which, bool], _JpegEncoder] = {}
        self._is_closed = False

    def close(self) -> None:
        """From now on there are no pictures; one that is being made is given up soon."""
        self._is_closed = True

    @property
    def number(self) -> int:
        """Of the newest frame; 0 before the first."""
        newest = self._newest
        return newest.number if newest is not None else 0

    @property
    def has_camera(self) -> bool:
        """Whether there is a picture of all that the camera sees."""
        newest = self._newest
        return newest is not None and "camera" in newest.pictures

    def show(
        self,
        before: tuple[Sequence[Tensor], VideoInfo],
        after: tuple[Sequence[Tensor], VideoInfo],
        camera: tuple[Sequence[Tensor], VideoInfo] | None = None,
    ) -> None:
        """Takes the newest frame: planes, (h, w) each, that nobody writes to any more. Costs nothing."""
        pictures: dict[Which, tuple[tuple[Tensor, ...], VideoInfo]] = {
            "source": (tuple(before[0]), before[1]),
            "result": (tuple(after[0]), after[1]),
        }
        if camera is not None:
            pictures["camera"] = (tuple(camera[0]), camera[1])
        self._newest = _Shown(self.number + 1, pictures)

    def quick(self, which: Which) -> Jpeg | None:
        """The newest frame for a moving picture: 4:2:0, good, 1920 wide at most; None if there is none."""
        newest = self._newest
        return None if newest is None else self._jpeg(newest, which, is_best=False)

    def best(self, which: Which, number: int | None = None) -> Jpeg | None:
        """A frame as a still: 4:4:4, converted as exactly as the video itself.

        Args:
            which: of its pictures.
            number: of the frame; the newest if None. The few that were asked for last are kept, so that two pictures of
                one frame can be had.

        Returns:
            The picture; None if there is none, or that frame is not kept.
        """
        shown = self._newest if number is None else self._held.get(number, self._newest)
        if shown is None or (number is not None and shown.number != number):
            return None
        self._held[shown.number] = shown
        while len(self._held) > _HELD:
            self._held.popitem(last=False)
        return self._jpeg(shown, which, is_best=True)

    def _jpeg(self, shown: _Shown, which: Which, *, is_best: bool) -> Jpeg | None:
        if which not in shown.pictures or self._is_closed:
            return None
        made = self._made.get((which, is_best))
        if made is None or made.number != shown.number:
            planes, info = shown.pictures[which]
            on_cpu = [plane.cpu() for plane in planes]
            frame = self._exact(on_cpu, info) if is_best else _quick_frame(on_cpu, info)
            if frame is None:
                return None
            encoder = self._encoders.get((which, is_best))
            if encoder is None or not encoder.fits(frame):
                encoder = self._encoders[which, is_best] = _JpegEncoder(frame, 2 if is_best else 4)
            made = self._made[which, is_best] = Jpeg(shown.number, encoder.encode(frame))
        return made

    def _exact(self, planes: Sequence[Tensor], info: VideoInfo) -> VideoFrame | None:
        """As exactly as the video itself, in bands: the whole of a large picture in floats would be half a gigabyte."""
        bands = []
        for top in range(0, info.height, _BAND):
            if self._is_closed:
                return None
            bands.append(_band(planes, info, top))
        made = [torch.cat(plane) for plane in zip(*bands, strict=True)]
        jpeg_info = VideoInfo(info.width, info.height, Fraction(1, 25), None, _STILL, _JPEG)
        return EncoderFrames(_STILL.name, jpeg_info).frame(made, 0)


def _quick_frame(planes: Sequence[Tensor], info: VideoInfo) -> VideoFrame:
    """Through FFmpeg's scaler: up to three code values off, in a tenth of the time of the exact way."""
    if info.pixel_format.kind == "gray":
        # Of gray, the scaler forgets the range.
        (values,) = from_rgb(to_rgb([planes[0][None]], info.pixel_format, info.color), _GRAY, _JPEG)
        info, planes = replace(info, pixel_format=_GRAY, color=_JPEG), [values[0]]
    opaque = replace(info, pixel_format=info.pixel_format.opaque)
    frame = EncoderFrames(opaque.pixel_format.name, opaque).frame(planes[:3], 0)
    is_rgb = opaque.pixel_format.kind == "rgb"
    width = min(_MOST_WIDE, info.width)
    return frame.reformat(
        width=width,
        height=max(1, round(info.height * width / info.width)),
        format="yuvj420p",
        src_colorspace=None if is_rgb else info.color.matrix,
        src_color_range=2 if info.color.is_full_range else 1,
        dst_colorspace=5,
        dst_color_range=2,
        interpolation="BICUBIC",
        threads=1,
    )


def _band(planes: Sequence[Tensor], info: VideoInfo, top: int) -> list[Tensor]:
    """Rows `top` to `top + _BAND`, made with the rows around them that chroma is interpolated from."""
    first, last = max(0, top - _MARGIN), min(info.height, top + _BAND + _MARGIN)
    fmt = info.pixel_format
    down = [fmt.log2_chroma_h if fmt.kind == "yuv" and k in (1, 2) else 0 for k in range(len(planes))]
    rows = [plane[None, first >> by : -(-last >> by)] for plane, by in zip(planes, down, strict=True)]
    made = from_rgb(to_rgb(rows, fmt, info.color).clamp_(0, 1), _STILL, _JPEG)
    return [plane[0, top - first : top - first + _BAND] for plane in made]


class _JpegEncoder:
    """FFmpeg's encoder, for pictures of one size and format."""

    def __init__(self, frame: VideoFrame, quality: int) -> None:
        context = CodecContext.create("mjpeg", "w")
        assert isinstance(context, VideoCodecContext)
        self._context = context
        context.width, context.height, context.pix_fmt = frame.width, frame.height, frame.format.name
        context.time_base, context.color_range, context.thread_count = Fraction(1, 25), 2, 1
        context.qmin = context.qmax = quality  # 2 is the best
        context.flags |= Flags.bitexact  # nothing about the software in each picture
        self._count = 0

    def fits(self, frame: VideoFrame) -> bool:
        context = self._context
        return (frame.width, frame.height, frame.format.name) == (context.width, context.height, context.pix_fmt)

    def encode(self, frame: VideoFrame) -> bytes:
        # Without numbers it takes the second frame for one out of order.
        frame.pts, frame.time_base = self._count, Fraction(1, 25)
        frame.pict_type = 0
        self._count += 1
        return b"".join(bytes(packet) for packet in self._context.encode(frame))
