"""The newest pictures as JPEG, made when someone asks for one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

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
        """The newest frame for a moving picture: 4:2:0, good; None if there is none."""
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
        if which not in shown.pictures:
            return None
        made = self._made.get((which, is_best))
        if made is None or made.number != shown.number:
            planes, info = shown.pictures[which]
            frame = (_exact_frame if is_best else _quick_frame)([plane.cpu() for plane in planes], info)
            encoder = self._encoders.get((which, is_best))
            if encoder is None or not encoder.fits(frame):
                encoder = self._encoders[which, is_best] = _JpegEncoder(frame, 2 if is_best else 4)
            made = self._made[which, is_best] = Jpeg(shown.number, encoder.encode(frame))
        return made


def _quick_frame(planes: Sequence[Tensor], info: VideoInfo) -> VideoFrame:
    """Through FFmpeg's scaler: up to three code values off, in a tenth of the time of the exact way."""
    if info.pixel_format.kind == "gray":
        return _exact_frame(planes, info, "yuvj420p")  # of gray, the scaler forgets the range
    opaque = replace(info, pixel_format=info.pixel_format.opaque)
    frame = EncoderFrames(opaque.pixel_format.name, opaque).frame(planes[:3], 0)
    is_rgb = opaque.pixel_format.kind == "rgb"
    return frame.reformat(
        format="yuvj420p",
        src_colorspace=None if is_rgb else info.color.matrix,
        src_color_range=2 if info.color.is_full_range else 1,
        dst_colorspace=5,
        dst_color_range=2,
        interpolation="BICUBIC",
        threads=1,
    )


def _exact_frame(planes: Sequence[Tensor], info: VideoInfo, name: str = "yuvj444p") -> VideoFrame:
    pixel_format = PixelFormat.parse(name)
    rgb = to_rgb([plane[None] for plane in planes], info.pixel_format, info.color).clamp_(0, 1)
    made = from_rgb(rgb, pixel_format, _JPEG)
    jpeg_info = VideoInfo(info.width, info.height, Fraction(1, 25), None, pixel_format, _JPEG)
    return EncoderFrames(name, jpeg_info).frame([plane[0] for plane in made], 0)


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
