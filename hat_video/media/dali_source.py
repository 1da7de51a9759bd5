"""NVIDIA DALI: whole files decoded on the GPU. The only file that imports nvidia.dali.

DALI fails in silence where a file is out of the ordinary: a tail that is left out, frames from another version of the
file, memory that was never written. So only what `dali_reasons` lets pass comes here, every frame's number is checked,
and the first frames are compared with PyAV's. See docs/gpu.md.

Source: DALI 2.4, dali/operators/video/; its kernels for colour are in frames_decoder_gpu.cc and color_space.cu.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from av.error import FFmpegError
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hat_video.media.gpu_source import GpuSource, picture_reasons
from hat_video.media.opening import demux
from hat_video.media.probe import Probe, open_container

__all__ = ["DaliSource", "dali_reasons", "decoded_chroma", "install_reasons"]

_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
_TESTED = (2, 4)
# Others it decodes too, but pairs packets with frames one by one: VP9 and AV1 have packets that only show an old one.
_CODECS = ("h264", "hevc")
# Frames that DALI makes at once, and what one such sequence may take; about four are alive at a time.
_MOST_FRAMES, _MOST_BYTES = 8, 64 << 20
# The inverse of the filter [1/8, 3/4, 1/8] is sqrt(2) * (2 * sqrt(2) - 3)^|k|; beyond this |k| it is below 1e-5.
_REACH = 6
_TAPS = tuple(2**0.5 * (2 * 2**0.5 - 3) ** abs(k) for k in range(-_REACH, _REACH + 1))


def dali_reasons(probe: Probe, device_index: int) -> list[str]:
    """Every reason why a file cannot go through DALI, one an entry; empty if it can be tried.

    Args:
        probe: of the file, prepared: what it says is what is to be read.
        device_index: of the CUDA device.

    Raises:
        SourceError: the file cannot be opened any more.
    """
    reasons = install_reasons() + picture_reasons(probe, device_index)
    video, pts = probe.video, probe.index.pts
    if probe.codec not in _CODECS:
        reasons.append(f"its codec is {probe.codec}: {' and '.join(_CODECS)} are trusted here")
    if video.pixel_format.opaque.name not in ("yuv420p", "yuvj420p"):
        reasons.append(f"its pixel format is {video.pixel_format.name}: DALI gives 4:2:0 of 8 bits")
    if pts[0] < 0:
        reasons.append(f"it starts before zero (pts {pts[0]}): DALI leaves such frames out")
    # BufferedFrame::pts_ in frames_decoder_gpu.h is an int.
    if pts[-1] >= 1 << 31:
        reasons.append(f"its timestamps reach {pts[-1]}: DALI keeps 31 bits of them")
    if probe.path.is_file():
        reasons += _packet_reasons(probe)
    return reasons


def install_reasons() -> list[str]:
    """Why DALI cannot be used here at all, one an entry; empty if it is installed."""
    for package in _PACKAGES:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", installed)[:2])) < _TESTED:
            return [f"{package} {installed} is installed, {'.'.join(map(str, _TESTED))} or later is needed"]
        return []
    return ["it is not installed: pip install 'hat-video[dali-cuda13]' (or [dali-cuda12], as torch has it)"]


def _packet_reasons(probe: Probe) -> list[str]:
    """What only the packets show. DALI takes every packet of the stream that FFmpeg likes best for one frame."""
    found: dict[str, None] = {}
    times: list[int | None] = []
    settings: set[bytes] = set()
    with open_container(probe.path) as container:
        best = container.streams.best("video")
        if best is None or best.index != probe.stream_index:
            return [f"its video stream {probe.stream_index} is not the one that DALI would take"]
        extradata = best.codec_context.extradata or b""
        for packet in _packets(demux(container, best), found):
            if packet.is_keyframe:
                here = _sequence_parameters(bytes(packet), probe.codec, extradata)
                if settings and not here <= settings:
                    found["its pictures' parameters change half-way"] = None
                settings |= here
            if not times and not packet.is_keyframe:
                found["it does not start with a key frame"] = None
            if packet.is_discard:
                found["some of its frames are outside the edit list"] = None
            if packet.is_corrupt:
                found["some of its packets are marked as damaged"] = None
            if packet.has_sidedata("new_extradata") or packet.has_sidedata("param_change"):
                found["its pictures' parameters change half-way"] = None
            times.append(packet.pts)
    known = [time for time in times if time is not None]
    if not known or times[0] != min(known):
        found["its first frames need others from before the file (an open GOP)"] = None
    if sorted(known) != list(probe.index.pts) and not (probe.index.is_counted or probe.deinterlace != "off" or found):
        found["it has changed since it was probed"] = None
    return list(found)


def _packets(demuxed: Iterator[Any], found: dict[str, None]) -> Iterator[Any]:
    try:
        yield from (packet for packet in demuxed if packet.size)
    except FFmpegError as error:
        found[f"reading it stops with an error ({error.strerror})"] = None


def _sequence_parameters(data: bytes, codec: str, extradata: bytes) -> set[bytes]:
    """The sequence parameter sets within a packet of H.264 or HEVC: where they change, the picture's size may.

    Source: ITU-T H.264 and H.265, 7.3.1 and Annex B; ISO/IEC 14496-15, 5.3.3.1 and 8.3.3.1, for the units' lengths.
    """
    if codec not in _CODECS:
        return set()
    is_hevc = codec == "hevc"
    if data.startswith((b"\0\0\1", b"\0\0\0\1")):
        units = [unit.rstrip(b"\0") for unit in data.split(b"\0\0\1")]
    else:
        place = 21 if is_hevc else 4
        size = 1 + (extradata[place] & 3) if len(extradata) > place else 4
        units = []
        while len(data) > size:
            end = size + int.from_bytes(data[:size], "big")
            units.append(data[size:end])
            data = data[end:]
    return {unit for unit in units if unit and ((unit[0] >> 1 & 63) == 33 if is_hevc else (unit[0] & 31) == 7)}


class DaliSource(GpuSource):
    """`GpuSource` by NVIDIA DALI: one pipeline a file, read from its first frame to its last.

    A range that begins where the last one ended just goes on, and so costs nothing. DALI is never asked to seek: in
    front of a range further on, frames are decoded and dropped, and for one further back the file begins anew. That
    costs the GPU's decoder time, but a frame has the same pixels whatever range it is read in, which a change to PyAV
    in between would not give.

    Luma is the decoder's own. DALI enlarges chroma to 4:4:4 and rounds it; `decoded_chroma` undoes that.
    """

    name = "dali"
    chroma_tolerance = 2

    def _open(self) -> None:
        video, count = self.info, len(self._probe.index.pts)
        self._length = max(1, min(_MOST_FRAMES, _MOST_BYTES // (3 * video.width * video.height)))
        self._start = self._count = 0
        self._video: Tensor | None = None
        self._planes: tuple[Tensor, ...] | None = None
        self._stream: torch.cuda.Stream | None = None
        # DALI keeps an index of every path that it has seen in this process, and never looks whether the file is still
        # the same one. A fresh link has a fresh path; it also has none of the characters that DALI trips over.
        self._folder = tempfile.TemporaryDirectory(prefix="hat-video-dali-")
        suffix = self._probe.path.suffix
        alias = Path(self._folder.name, f"clip{suffix}" if re.fullmatch(r"\.\w{1,5}", suffix, re.ASCII) else "clip")
        alias.symlink_to(self._probe.path.resolve())
        try:
            with warnings.catch_warnings():
                # It misses libraries that its other operators need.
                warnings.simplefilter("ignore")
                self._pipe: Any = pipeline(alias, self._device, self._length)
                self._pipe.build()
                sequences = self._pipe.epoch_size("R")
        except RuntimeError as error:
            raise self._failed(0, error) from error
        if sequences != -(-count // self._length):
            raise self._failed(
                0, f"it finds {sequences} sequences of {self._length} frames, the file's index has {count} frames"
            )
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def _shut(self) -> None:
        if getattr(self, "_folder", None) is None:
            return
        self._video = self._planes = None
        if getattr(self, "_pipe", None) is not None:
            self._pipe = None
            _release()
        self._folder.cleanup()

    @property
    def _checked_frames(self) -> int:
        # One sequence: the frames are still there when they are read.
        return min(self._length, len(self._probe.index.pts))

    def _batches(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        if first < self._start or self._pipe is None:
            self._shut()
            self._open()
        while first < last:
            size = min(self._batch, last - first)
            yield self._frames(first, first + size)
            first += size

    def _frames(self, first: int, last: int) -> tuple[Tensor, ...]:
        parts = []
        while first < last:
            while first >= self._start + self._count:
                self._advance()
            begin, end = first - self._start, min(last - self._start, self._count)
            parts.append([plane[begin:end] for plane in self._converted()])
            first = self._start + end
        with self._on_stream():
            planes = tuple(torch.cat(group) if len(group) > 1 else group[0] for group in zip(*parts, strict=True))
        if self._stream is not None and len(parts) > 1:
            self._stream.synchronize()
        return planes

    def _advance(self) -> None:
        """The next sequence; everything about it that can be checked is."""
        first, video = self._start + self._count, self.info
        total = len(self._probe.index.pts)
        self._video = self._planes = None
        try:
            # The reader never stops: after the last frame comes the first one again.
            if first >= total:
                raise self._failed(first, "it was asked for more frames than there are")
            with self._on_stream():
                frames, numbers = self._pipe.run() if self._stream is None else self._pipe.run(self._stream)
                # DALI's memory, not torch's, and ours until the tensor is gone.
                tensor = from_dlpack(frames[0])
                named = from_dlpack(numbers[0]).cpu().reshape(-1).tolist()
        except RuntimeError as error:
            self._break()
            raise self._failed(first, error) from error
        # The last sequence is filled up, with frames of the number -1.
        count = min(self._length, total - first)
        if named != [*range(first, first + count), *[-1] * (self._length - count)]:
            self._break()
            raise self._failed(first, f"it gave the frames {named} instead of {first} to {first + count - 1}")
        if tensor.dtype != torch.uint8 or tensor.shape != (self._length, video.height, video.width, 3):
            self._break()
            raise self._failed(
                first,
                f"it gave {tensor.dtype} of the shape {tuple(tensor.shape)},"
                f" not uint8 of {(self._length, video.height, video.width, 3)}",
            )
        self._start, self._count, self._video = first, count, tensor[:count]

    def _break(self) -> None:
        """After an error the pipeline is dead, and whatever comes next begins anew."""
        self._start, self._count, self._pipe = 0, 0, None

    def _converted(self) -> tuple[Tensor, ...]:
        if self._planes is None:
            assert self._video is not None
            try:
                with self._on_stream():
                    self._planes = self._planes_of(self._video)
                if self._stream is not None:
                    # Only then may DALI have its memory back, and other streams see the planes.
                    self._stream.synchronize()
            except RuntimeError as error:
                raise self._failed(self._start, error) from error
            self._video = None
        return self._planes

    def _planes_of(self, frames: Tensor) -> tuple[Tensor, ...]:
        """(F, H, W, 3) uint8 as DALI gave them to the source's planes, in memory of their own."""
        return frames[..., 0].contiguous(), *decoded_chroma(frames[..., 1:])

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def pipeline(path: Path, device: torch.device, length: int) -> Any:
    """DALI's pipeline of one file: (video (F, H, W, 3) uint8, numbers (F,)), not yet built.

    Args:
        path: absolute.
        device: on a CUDA device the frames are Y'CbCr. On the CPU, which the tests use, they are R'G'B' by BT.601: its
            Y'CbCr does not work there; neither do H.264 and HEVC.
        length: frames in a sequence.
    """
    kind = "gpu" if device.type == "cuda" else "cpu"
    # Without a number, which the tests use, a graph for the GPU can be made where there is none.
    return _graph()(
        str(path), kind, length, batch_size=1, num_threads=1, prefetch_queue_depth=2, device_id=device.index
    )


@cache
def _graph() -> Any:
    from nvidia.dali import fn, pipeline_def, types

    def video(path: str, device: str, length: int) -> tuple[Any, ...]:
        return tuple(
            fn.experimental.readers.video(
                name="R",
                device=device,
                filenames=[path],
                sequence_length=length,
                # Without, frames that do not fill a sequence are left out.
                pad_mode="constant",
                enable_frame_num="sequence",
                # Its R'G'B' is BT.601, whatever the file says.
                image_type=types.YCbCr if device == "gpu" else types.RGB,
                prefetch_queue_depth=1,
                initial_fill=1,
                dont_use_mmap=True,
            )
        )

    return pipeline_def(video)


def _release() -> None:
    from nvidia.dali import backend

    backend.ReleaseUnusedMemory()


def decoded_chroma(enlarged: Tensor) -> tuple[Tensor, Tensor]:
    """The 4:2:0 chroma that a decoder gave, from what DALI made of it.

    DALI samples chroma bilinearly between the samples' centres, with the edges repeated, and rounds: along each axis
    the mean of two neighbours is the chroma filtered by [1/8, 3/4, 1/8]. The inverse of that filter gives it back.
    The rounding leaves an error of 0.3 code values (standard deviation): on a model of DALI's kernel 86 to 97 % of the
    samples of six natural clips come back exactly and the rest off by 1; only a checkerboard of 0 and 255 is off by 2.

    Args:
        enlarged: (N, H, W, 2) uint8, Cb and Cr; H and W even.

    Returns:
        Cb and Cr, (N, H/2, W/2) uint8 on the same device.
    """
    count, height, width, _ = enlarged.shape
    # One channel at a time, since floats take four times the room.
    made = []
    for channel in enlarged.unbind(-1):
        means = channel.reshape(count, height // 2, 2, width // 2, 2).float().mean((2, 4))
        made.append(_sharpened(_sharpened(means, 1), 2).round_().clamp_(0, 255).to(torch.uint8))
    return made[0], made[1]


def _sharpened(planes: Tensor, axis: int) -> Tensor:
    """Repeated edges are a reflection at half a sample to this filter, and so to its inverse."""
    size = planes.shape[axis]
    places = torch.arange(-_REACH, size + _REACH, device=planes.device) % (2 * size)
    padded = planes.index_select(axis, torch.minimum(places, 2 * size - 1 - places))
    # Not a convolution: cuDNN would round its inputs to TF32, which is too coarse for this.
    total = torch.zeros_like(planes)
    for k, tap in enumerate(_TAPS):
        total.add_(padded.narrow(axis, k, size), alpha=tap)
    return total
