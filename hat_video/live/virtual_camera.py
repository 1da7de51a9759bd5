"""A virtual camera, as which other programs on this machine see the enlarged picture.

It takes pictures, not packets, and of those always the newest. Needs the extra `vcam` (pyvirtualcam, which is GPL-2)
and a driver: v4l2loopback on Linux, OBS on macOS and Windows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from torch import Tensor

from hat_video.errors import OutputError
from hat_video.frames import VideoInfo
from hat_video.live.output import Output, OutputEvent
from hat_video.live.packet import LivePacket
from hat_video.media.encoder_frames import EncoderFrames

__all__ = ["VirtualCamera"]


class VirtualCamera(Output):
    """Shows pictures on a virtual camera.

    Args:
        device: the driver's name for it, as `/dev/video2`; the first free one if empty.
        info: the facts of the pictures.
    """

    def __init__(
        self,
        name: str,
        device: str,
        info: VideoInfo,
        *,
        ask_for_key: Callable[[], None],
        on_event: Callable[[OutputEvent], None] | None = None,
    ) -> None:
        super().__init__(name, ask_for_key=ask_for_key, on_event=on_event)
        self._device, self._info = device, info
        self._changed = threading.Condition()
        self._newest: Sequence[Tensor] | None = None
        self._is_closing = False

    def send(self, packet: LivePacket) -> None:
        """Packets are for others."""

    def show(self, planes: Sequence[Tensor]) -> None:
        """Takes a picture in place of the last one, if that has not been shown yet. Never waits.

        Args:
            planes: (h, w) each, as the pixel format of `info` says; nobody may write into them any more.
        """
        with self._changed:
            if self._newest is not None:
                self._queue.count(1)
            self._newest = planes
            self._changed.notify()

    def close(self) -> None:
        super().close()
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def abort(self) -> None:
        super().abort()
        self.close()

    def connect(self) -> _Showing:
        """Opens the device."""
        try:
            import pyvirtualcam
        except ImportError:
            raise OutputError("needs pyvirtualcam; pip install 'hat-video[vcam]'") from None
        info = self._info
        try:
            camera = pyvirtualcam.Camera(
                width=info.width,
                height=info.height,
                fps=float(info.rate or Fraction(30)),
                fmt=pyvirtualcam.PixelFormat.I420,
                device=self._device or None,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise OutputError(f"no virtual camera can be opened ({' '.join(str(error).split())})") from None
        return _Showing(camera, info)

    def _take(self, session: Any) -> None:
        before = self._bytes
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._is_closing)
                planes, self._newest = self._newest, None
            if planes is None or self.aborted.is_set():
                return
            session.show(planes)
            self._frames += 1
            self._bytes = before + session.bytes


class _Showing:
    """A session with the device."""

    def __init__(self, camera: Any, info: VideoInfo) -> None:
        self._camera, self._info = camera, info
        self._frames = EncoderFrames(info.pixel_format.name, info)
        self._reformatter = VideoReformatter()
        self.bytes = 0

    def show(self, planes: Sequence[Tensor]) -> None:
        frame = self._frames.frame(planes, 0)
        if frame.format.name != "yuv420p" or self._info.color.is_full_range:
            frame = self._reformatter.reformat(
                frame, format="yuv420p", dst_color_range="MPEG", interpolation="BICUBIC", threads=1
            )
        picture = np.ascontiguousarray(frame.to_ndarray()).reshape(-1)
        try:
            self._camera.send(picture)
        except (RuntimeError, OSError) as error:
            raise OutputError(f"the virtual camera takes no picture ({error})") from None
        self.bytes += picture.nbytes

    def write(self, packet: LivePacket) -> bool:
        """As `Session` has it."""
        return False

    def finish(self) -> None:
        """As `Session` has it."""
        self._camera.close()

    def abandon(self) -> None:
        """As `Session` has it."""
        with suppress(RuntimeError, OSError, av.FFmpegError):
            self._camera.close()
