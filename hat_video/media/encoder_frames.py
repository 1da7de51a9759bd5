"""Planes as the pictures that an encoder takes: in the memory where they lie, on the GPU too."""

from __future__ import annotations

from collections.abc import Sequence

import av
import numpy as np
import torch
from av.video.frame import CudaContext, VideoFrame
from torch import Tensor

from hat_video.frames import PixelFormat, VideoInfo

__all__ = ["WOVEN", "EncoderFrames", "can_be_woven", "weave"]

WOVEN = {"nv12": "yuv420p", "p010le": "yuv420p10le", "p016le": "yuv420p16le"}
"""Formats with the two chroma planes woven into one, and the planar ones of the same code values."""

# NVENC wants rows that begin at such multiples.
_PITCH = 256


def can_be_woven(pixel_format: str, width: int, height: int) -> bool:
    """Whether pictures of that size exist in a woven format: there are no half chroma samples."""
    return pixel_format in WOVEN and width % 2 == 0 and height % 2 == 0


class EncoderFrames:
    """Makes the frames for one encoder and knows how long it needs their memory.

    Planar frames are the planes' own memory. Woven ones (NV12, P010, P016) get luma and chroma in one allocation, since
    NVENC takes the chroma to lie behind the luma. These buffers are few and used again: NVENC registers each address,
    and keeps only so many. A buffer is free when the packet of its picture has come out.

    Args:
        pixel_format: FFmpeg's name of what the encoder is given.
        info: the facts of the stream; `pixel_format` holds its code values.
    """

    def __init__(self, pixel_format: str, info: VideoInfo) -> None:
        self._info = info
        self._woven = pixel_format if can_be_woven(pixel_format, info.width, info.height) else ""
        self._free: list[Tensor] = []
        self._taken: dict[int, Tensor] = {}
        self._context: CudaContext | None = None

    @property
    def buffers(self) -> int:
        """Buffers that exist, taken or free."""
        return len(self._free) + len(self._taken)

    def frame(self, planes: Sequence[Tensor], pts: int) -> VideoFrame:
        """One picture.

        Args:
            planes: (h, w) as the stream's planar pixel format says.
            pts: of the picture, in ticks of the stream's time base; each only once until it is released.
        """
        made = self._woven_frame(planes, pts) if self._woven else self._planar_frame(planes)
        color = self._info.color
        made.colorspace, made.color_range = color.matrix, 2 if color.is_full_range else 1
        made.pts, made.time_base, made.pict_type = pts, self._info.time_base, 0
        return made

    def release(self, pts: int | None) -> None:
        """Tells that the packet with that pts has come out of the encoder, which needs the picture no more."""
        buffer = None if pts is None else self._taken.pop(pts, None)
        if buffer is not None:
            self._free.append(buffer)

    def _planar_frame(self, planes: Sequence[Tensor]) -> VideoFrame:
        info = self._info
        fmt = info.pixel_format
        if not (info.width % (1 << fmt.log2_chroma_w) or info.height % (1 << fmt.log2_chroma_h)):
            return av.VideoFrame.from_dlpack(tuple(plane.contiguous() for plane in planes), format=fmt.name)
        # DLPack import takes only whole chroma samples.
        frame = av.VideoFrame(info.width, info.height, fmt.name)
        for plane, tensor in zip(frame.planes, planes, strict=True):
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
            data = np.ascontiguousarray(tensor.cpu().numpy()).view(np.uint8).reshape(plane.height, -1)
            rows[:, : data.shape[1]] = data
        return frame

    def _woven_frame(self, planes: Sequence[Tensor], pts: int) -> VideoFrame:
        height, width = self._info.height, self._info.width
        buffer = self._taken[pts] = self._free.pop() if self._free else self._allocated(planes[0].device)
        weave(planes, buffer, self._info.pixel_format)
        luma, chroma = buffer[:height, :width], buffer[height:, :width]
        if not buffer.is_cuda:
            return av.VideoFrame.from_dlpack((luma, chroma), format=self._woven)
        # FFmpeg reads on a stream of its own.
        torch.cuda.current_stream(buffer.device).synchronize()
        if self._context is None:
            # torch has set the device's context up already, and FFmpeg would be refused another.
            self._context = CudaContext(buffer.device.index, primary_ctx=False, current_ctx=True)
        return av.VideoFrame.from_dlpack((luma, chroma), format=self._woven, cuda_context=self._context)

    def _allocated(self, device: torch.device) -> Tensor:
        fmt = self._info.pixel_format
        size = 1 if fmt.bit_depth == 8 else 2
        pitch = -(-self._info.width * size // _PITCH) * _PITCH // size
        return torch.empty((self._info.height * 3 // 2, pitch), dtype=fmt.dtype, device=device)


def weave(planes: Sequence[Tensor], out: Tensor, pixel_format: PixelFormat) -> None:
    """4:2:0 planes into NV12, P010 or P016.

    Args:
        planes: Y (H, W), Cb and Cr (H/2, W/2), uint8, or uint16 with the code values in the low bits.
        out: (3H/2, W or more) of the same dtype: luma, then rows of Cb and Cr in turns; code values in the high bits.
        pixel_format: of the planes.
    """
    luma, cb, cr = planes
    height, width = luma.shape
    if pixel_format.bit_depth > 8:
        # torch shifts int16 everywhere, and uint16 on few devices; to the left that is the same.
        spare = 16 - pixel_format.bit_depth
        luma, cb, cr = (plane.view(torch.int16).bitwise_left_shift(spare) for plane in (luma, cb, cr))
        out = out.view(torch.int16)
    out[:height, :width] = luma
    out[height:, 0:width:2] = cb
    out[height:, 1:width:2] = cr
