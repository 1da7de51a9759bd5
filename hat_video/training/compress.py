"""A real encoder and its decoder, in memory: what H.264 and H.265 leave of a short shot.

No container, no thread, no log: packets go straight from one codec context into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import torch
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hat_video.errors import WorkError
from hat_video.frames import PixelFormat

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

__all__ = ["CODECS", "PRESETS", "round_trip"]

CODECS = {"libx264": "h264", "libx265": "hevc"}
"""Encoder -> the decoder that understands it."""

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium")
"""Of both encoders, those that are quick enough to run inside a training step."""

_RATE = Fraction(25)


def round_trip(
    planes: Sequence[Tensor], pixel_format: PixelFormat, *, codec: str, crf: float, preset: str
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Encodes a shot and decodes it again; the same planes and options always give the same bits.

    Args:
        planes: (T, h, w) uint8 each, on the CPU, in the order and of the sizes that `pixel_format` says; the picture
            is of whole chroma samples, and of at least 16x16.
        pixel_format: `yuv420p` or `yuv444p`.
        codec: one of `CODECS`.
        crf: constant quality, 0 (best) to 51.
        preset: one of `PRESETS`, or a slower one.

    Returns:
        The decoded planes, of the same shape, and how each frame was coded: `I`, `P` or `B`; in presentation order.

    Raises:
        WorkError: the encoder is missing from this build of FFmpeg, refuses the picture or loses a frame.
    """
    height, width = planes[0].shape[1:]
    try:
        encoder = _encoder(codec, width, height, pixel_format.name, crf, preset)
        decoder = av.CodecContext.create(CODECS[codec], "r")
        assert isinstance(decoder, VideoCodecContext)
        decoder.thread_count = 1
        decoded: list[VideoFrame] = []
        for i in range(len(planes[0])):
            # The encoder reads the tensors' memory; only rows that follow each other make a plane.
            picture = tuple(plane[i].contiguous() for plane in planes)
            frame = av.VideoFrame.from_dlpack(picture, format=pixel_format.name)
            frame.pts, frame.time_base = i, 1 / _RATE
            for packet in encoder.encode(frame):
                decoded += decoder.decode(packet)
        for packet in encoder.encode(None):
            decoded += decoder.decode(packet)
        decoded += decoder.decode(None)
    except (FFmpegError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise WorkError(f"{codec} at {width}x{height}, crf {crf:g}, preset {preset}: {said}") from None
    if [frame.pts for frame in decoded] != list(range(len(planes[0]))):
        raise WorkError(
            f"{codec} at {width}x{height}, preset {preset}: {len(decoded)} frames for {len(planes[0])}, or not in order"
        )
    copies = [[from_dlpack(plane) for plane in frame.planes] for frame in decoded]
    types = tuple(PictureType(frame.pict_type).name for frame in decoded)
    return tuple(torch.stack(plane) for plane in zip(*copies, strict=True)), types


def _encoder(codec: str, width: int, height: int, pixel_format: str, crf: float, preset: str) -> VideoCodecContext:
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, pixel_format
    encoder.time_base, encoder.framerate = 1 / _RATE, _RATE
    # FRAME, because PyAV's default makes x264 cut pictures into slices.
    encoder.thread_type, encoder.thread_count = "FRAME", 1
    encoder.options = {"crf": f"{crf:g}", "preset": preset, **_parameters(codec, width)}
    return encoder


def _parameters(codec: str, width: int) -> dict[str, str]:
    """What makes the encoder quiet, safe, and its bits the same every time."""
    if codec == "libx265":
        # For pictures up to 48 wide, x265's tree of costs writes past the end of its own memory (seen in 4.2).
        tree = ":cutree=0" if width < 64 else ""
        return {"x265-params": f"pools=none:frame-threads=1:log-level=none{tree}"}
    # x264's AVX-512 code is not repeatable (docs/adr/0004). Naming AVX2 where there is none would crash.
    has_avx2 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return {"x264-params": "asm=AVX2"} if has_avx2 else {}
