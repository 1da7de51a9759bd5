"""NVDEC through PyAV: FFmpeg demuxes and the GPU decodes; pictures stay there, in 8, 10 and 12 bits.

The demuxer, the timestamps and the seeking are those of `PyavSource`. See docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import av
import torch
from av.codec.codec import Codec, UnknownCodecError
from av.codec.hwaccel import HWAccel, HWDeviceType, hwdevices_available
from av.error import FFmpegError
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hat_video.errors import SourceError
from hat_video.frames import PixelFormat
from hat_video.media.gpu_source import GpuSource, picture_reasons
from hat_video.media.opening import safe_options
from hat_video.media.probe import Probe
from hat_video.media.pyav_source import PyavSource

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.plane import VideoPlane

__all__ = ["HardwareDecoder", "NvdecSource", "nvdec_reasons", "planar"]

# Their standards say what every bit of a picture is; of the older ones a GPU may make something slightly different. So
# does AV1, but FFmpeg opens it with dav1d, which has no way to a GPU.
_CODECS = ("h264", "hevc", "vp8", "vp9")
_FORMATS = ("yuv420p", "yuvj420p", "yuv420p10le", "yuv420p12le")
_LAYOUTS = {8: "nv12", 10: "p010le", 12: "p016le"}
"""Bit depth -> FFmpeg's name of what NVDEC gives: luma, and the two chroma planes woven into one."""


def nvdec_reasons(probe: Probe, device_index: int) -> list[str]:
    """Every reason why a file cannot go through NVDEC, one an entry; empty if it can be tried.

    Whether this GPU knows the codec's profile and the size shows when it is opened.

    Args:
        probe: of the file, prepared: what it says is what is to be read.
        device_index: of the CUDA device.
    """
    reasons = picture_reasons(probe, device_index)
    if "cuda" not in hwdevices_available():
        reasons.append(f"PyAV {av.__version__} is built without CUDA")
    if probe.codec not in _CODECS:
        reasons.append(f"its codec is {probe.codec}: {', '.join(_CODECS)} are trusted here")
    elif not _has_accelerator(probe.codec):
        reasons.append(f"PyAV {av.__version__} is built without NVDEC for {probe.codec}")
    name = probe.video.pixel_format.opaque.name
    if name not in _FORMATS:
        reasons.append(f"its pixel format is {name}: NVDEC gives {', '.join(_FORMATS)}")
    return reasons


def _has_accelerator(codec: str) -> bool:
    try:
        configs = Codec(codec, "r").hardware_configs or ()
    except UnknownCodecError:
        return False
    return any(config.device_type == HWDeviceType.cuda and config.is_supported for config in configs)


class NvdecSource(GpuSource):
    """`GpuSource` by NVDEC, through PyAV. Its frames are PyAV's, to the bit, and so are the ranges it can read."""

    name = "nvdec"

    def _open(self) -> None:
        try:
            self._decoder = self._make()
        except PermissionError as error:
            # That is all that FFmpeg says.
            raise self._failed(0, "the NVIDIA driver (libcuda.so.1) is missing or gives no access") from error
        except (FFmpegError, OSError, RuntimeError, NotImplementedError) as error:
            raise self._failed(0, error) from error

    def _shut(self) -> None:
        decoder = getattr(self, "_decoder", None)
        if decoder is not None:
            decoder.close()

    def _batches(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        pts = self._probe.index.pts
        batches = self._decoder.read(pts[first], pts[last] if last < len(pts) else None)
        while first < last:
            try:
                batch = next(batches, None)
            except (FFmpegError, SourceError, RuntimeError, NotImplementedError) as error:
                raise self._failed(first, error) from error
            expected = pts[first : min(first + self._batch, last)]
            if batch is None or batch.pts != expected:
                given = "none" if batch is None else f"those with pts {', '.join(map(str, batch.pts))}"
                raise self._failed(first, f"of the frames with pts {', '.join(map(str, expected))} it gave {given}")
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            yield batch.planes
            first += len(batch)

    def _make(self) -> HardwareDecoder:
        accelerator = HWAccel(
            "cuda",
            device=str(self._device.index),
            allow_software_fallback=False,
            options={"primary_ctx": "0", "current_ctx": "1"},
            is_hw_owned=True,
        )
        return HardwareDecoder(self._probe, self._batch, self._device, accelerator)


class HardwareDecoder(PyavSource):
    """`PyavSource` with the decoder and the planes on a GPU; any error of the decoder ends it.

    Args:
        probe: what is known of the file.
        batch: frames to a batch.
        device: where the planes shall lie.
        accelerator: None: the decoder is the usual one, but must give NV12, P010 or P016.
    """

    name = "nvdec"

    def __init__(self, probe: Probe, batch: int, device: torch.device, accelerator: HWAccel | None) -> None:
        self._device = device
        self._accelerator = accelerator
        super().__init__(probe, batch=batch)

    def _open(self) -> None:
        self._container = _open_with(self._probe, self._accelerator)
        self._stream = self._container.streams[self._probe.stream_index]  # type: ignore[assignment]
        self._context = self._stream.codec_context
        if self._accelerator is not None and not self._context.is_hwaccel:
            self._container.close()
            raise SourceError(f"{self._probe.path}: NVDEC does not take its {self._context.name} video")
        # Threads that wait for a GPU only hold more of its surfaces.
        self._context.thread_count = 1

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        # Not as on the CPU, where damaged packets are passed over: it may as well be the GPU that failed.
        return self._decoded()

    def _planes(self, frame: VideoFrame, tick: int) -> tuple[Tensor, ...]:
        info = self.info
        layout = (frame.sw_format or frame.format).name
        if (frame.width, frame.height) != (info.width, info.height) or layout != _LAYOUTS[info.pixel_format.bit_depth]:
            raise SourceError(
                f"{self._probe.path}: the picture changes from {info.width}x{info.height} {info.pixel_format.name}"
                f" to {frame.width}x{frame.height} {layout} at {self._place(tick)}"
            )
        if self._device.type != "cuda":
            return _planes_of(frame, info.pixel_format)
        # FFmpeg's CUDA stream is the default one: there, and only there, the frame is complete. Before the surface goes
        # back to the decoder, which has few, it must be read.
        stream = torch.cuda.default_stream(self._device)
        with torch.cuda.stream(stream):
            planes = _planes_of(frame, info.pixel_format)
        stream.synchronize()
        return planes


def _open_with(probe: Probe, accelerator: HWAccel | None) -> InputContainer:
    if accelerator is None or not torch.cuda.is_available():
        return _open_plainly(probe, accelerator)
    # FFmpeg would set up the device's context otherwise than torch did, and be refused. It is told to take the one that
    # is current in this thread, which the first kernel makes torch's.
    with torch.cuda.device(accelerator.device_id):
        torch.zeros(1, device="cuda")
        return _open_plainly(probe, accelerator)


def _open_plainly(probe: Probe, accelerator: HWAccel | None) -> InputContainer:
    name = str(probe.path.absolute())
    if int(av.__version__.split(".")[0]) < 19:
        return av.open(name, "r", options=safe_options(), metadata_errors="replace", hwaccel=accelerator)
    return av.open(name, "r", options=safe_options(), hwaccel=accelerator)


def _planes_of(frame: VideoFrame, pixel_format: PixelFormat) -> tuple[Tensor, ...]:
    luma, chroma = map(_tensor, frame.planes)
    return planar(luma, chroma, pixel_format)


def _tensor(plane: VideoPlane) -> Tensor:
    """A plane without a copy, and without its stream: PyAV refuses to be told one, and torch would tell it."""
    tensor: Tensor = from_dlpack(plane.__dlpack__())
    return tensor


def planar(luma: Tensor, chroma: Tensor, pixel_format: PixelFormat) -> tuple[Tensor, Tensor, Tensor]:
    """NV12, P010 or P016 as planes, in memory of their own.

    Args:
        luma: (H, W) uint8, or uint16 with the code values in the high bits.
        chroma: (H/2, W/2, 2) of the same, Cb and Cr.
        pixel_format: of the planes to make, 4:2:0.

    Returns:
        Y, Cb and Cr, (h, w) as `pixel_format.dtype` says, with the code values in the low bits.
    """
    if pixel_format.bit_depth == 8:
        return luma.clone(), chroma[..., 0].contiguous(), chroma[..., 1].contiguous()
    # torch shifts int16, which keeps the sign, and uint16 on few devices.
    spare = 16 - pixel_format.bit_depth
    mask = (1 << pixel_format.bit_depth) - 1

    def low(plane: Tensor) -> Tensor:
        shifted = plane.view(torch.int16).bitwise_right_shift(spare).bitwise_and_(mask)
        return shifted.contiguous().view(torch.uint16)

    return low(luma), low(chroma[..., 0]), low(chroma[..., 1])
