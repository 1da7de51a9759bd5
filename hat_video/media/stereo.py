"""Two views in one picture: how they lie there, out of frames and into the encoders and containers that can say it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from av.sidedata.sidedata import Type as SideDataType

from hat_video.media.hdr import side_data_of

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

__all__ = ["is_spherical", "stereo_of", "stereo_options", "stereo_written_by"]

# FFmpeg's AVStereo3DType -> Matroska's names, left view first and right view first, and x264's number for left first.
_MODES = {
    1: ("left_right", "right_left", 3),
    2: ("top_bottom", "bottom_top", 4),
    3: ("block_lr", "block_rl", 5),
    4: ("checkerboard_lr", "checkerboard_rl", 0),
    6: ("row_interleaved_lr", "row_interleaved_rl", 2),
    7: ("col_interleaved_lr", "col_interleaved_rl", 1),
}
_IN_WEBM = ("left_right", "right_left", "top_bottom", "bottom_top")


def stereo_of(frame: VideoFrame) -> str | None:
    """How two views lie in a frame, by Matroska's name; None for a single view.

    Source: FFmpeg, libavutil/stereo3d.h: AVStereo3D begins with the type and the flags, of which 1 is right view first.
    """
    for data in side_data_of(frame) or ():
        if data.type == SideDataType.STEREO3D:
            kind, flags = struct.unpack("=2i", bytes(data)[:8])
            left, right, _ = _MODES.get(kind, (None, None, None))
            return right if flags & 1 else left
    return None


def is_spherical(frame: VideoFrame) -> bool:
    """Whether the picture is a sphere's, to be looked around in."""
    return any(data.type == SideDataType.SPHERICAL for data in side_data_of(frame) or ())


def stereo_written_by(encoder: str, container: str, stereo: str | None) -> str | None:
    """What a reader of the finished file will find; None where neither the encoder nor the container can say it."""
    if container == "matroska" or (container == "webm" and stereo in _IN_WEBM) or stereo_options(encoder, stereo):
        return stereo
    return None


def stereo_options(encoder: str, stereo: str | None) -> dict[str, str]:
    """The private options by which an encoder writes it; empty where it cannot."""
    number = next((number for left, _, number in _MODES.values() if left == stereo), None)
    return {"x264-params": f"frame-packing={number}"} if encoder == "libx264" and number is not None else {}
