"""Every frame of the finished file, decoded: is it what went into the encoder, or at least the source's picture?

A lossless encoder must give back every sample, so its frames are compared with hashes that the work took of them. For
all others the output's luma, averaged down to the source's size, is compared with the source's luma. The floor is far
below what any network and quality of use gives (28 to 50 dB), and far above what two different pictures do (below 15).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path

import torch
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.dlpack import from_dlpack

from hat_video.frames import VideoInfo
from hat_video.media.encoder import EncoderSpec
from hat_video.media.opening import open_file
from hat_video.media.picture_check import luma_of
from hat_video.media.probe import Probe
from hat_video.media.source import open_source

__all__ = ["PSNR_FLOOR", "FullFacts", "check_frames", "hash_planes", "is_lossless"]

PSNR_FLOOR = 18.0
"""In dB: a frame below it does not show the source's picture."""


@dataclass(frozen=True, slots=True)
class FullFacts:
    """What decoding every frame found."""

    decoded: int
    identical: int
    """Frames whose every sample is what the encoder was given."""
    lowest_psnr: float | None
    """In dB, of the frame that is least like the source's; None where frames were compared by hash."""
    problems: tuple[str, ...]


def is_lossless(spec: EncoderSpec) -> bool:
    """Whether the encoder promises to give back every sample."""
    options = spec.private_options()
    # x264's crf 0 is lossless at 8 bits only; deeper, it is crf 0 of a longer scale.
    is_8_bit = not spec.pixel_format.endswith("le")
    return (
        spec.name in ("ffv1", "utvideo", "huffyuv", "ffvhuff")
        or (spec.name in ("libx264", "libx264rgb") and ((spec.crf == 0 and is_8_bit) or options.get("qp") == "0"))
        or (spec.name == "libx265" and "lossless=1" in options.get("x265-params", ""))
        or (spec.name == "libvpx-vp9" and options.get("lossless") == "1")
    )


def hash_planes(planes: Sequence[Tensor]) -> str:
    """blake2b over the samples of one frame.

    Args:
        planes: (h, w) each, uint8 or uint16, on the CPU.

    Returns:
        32 hex digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for plane in planes:
        digest.update(plane.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_frames(
    source: Probe,
    output: Path,
    *,
    video: VideoInfo,
    stream_index: int,
    pts: Sequence[int],
    output_pts: Sequence[int],
    hashes: Mapping[int, str],
) -> FullFacts:
    """Decodes every frame of `output`, and compares it.

    Args:
        source: the source.
        output: the finished file.
        video: the facts of the output's video stream.
        stream_index: its index in the output.
        pts: the source's pts of the output's frames, rising, in the source's ticks.
        output_pts: the output's pts of the same frames, in the output's ticks.
        hashes: pts to `hash_planes` of what the encoder was given; empty where the encoder is not lossless.

    Returns:
        What was found; a difference is reported, never raised.
    """
    problems: list[str] = []
    decoded = identical = 0
    lowest = inf
    expected = iter(enumerate(zip(pts, output_pts, strict=True)))
    references = None if hashes else _SourceFrames(source, pts)
    try:
        for tick, planes in _planes_of(output, stream_index, video):
            n, (own, wanted) = next(expected, (decoded, (0, None)))
            if tick != wanted:
                problems.append(f"frame {n} decodes with pts {tick}, the container says {wanted}")
                break
            decoded += 1
            if hashes:
                if hash_planes(planes) == hashes.get(own):
                    identical += 1
                else:
                    problems.append(f"frame {n} is not, sample for sample, what the encoder was given")
            elif references is not None:
                reference = references.luma(own)
                psnr = inf if reference is None else _psnr(luma_of(planes, video), reference)
                lowest = min(lowest, psnr)
                if psnr < PSNR_FLOOR:
                    problems.append(f"frame {n} is at {psnr:.1f} dB of the source's, the floor is {PSNR_FLOOR:g} dB")
    finally:
        if references is not None:
            references.close()
    if decoded < len(pts) and not problems:
        problems.append(f"only {decoded} of {len(pts)} frames can be decoded")
    return FullFacts(decoded, identical, None if hashes or lowest == inf else lowest, tuple(problems))


class _SourceFrames:
    """Luma of source frames, by pts, which must rise."""

    def __init__(self, source: Probe, pts: Sequence[int]) -> None:
        self._video = source.video
        self._frames = open_source(source.path, decoder="pyav", probe=source)
        self._batches = self._frames.read(pts[0], pts[-1] + 1) if pts else iter(())

    def close(self) -> None:
        self._frames.close()

    def luma(self, pts: int) -> Tensor | None:
        for batch in self._batches:
            if batch.pts[0] == pts:
                return luma_of([plane[0] for plane in batch.planes], self._video)
            if batch.pts[0] > pts:
                return None
        return None


def _planes_of(path: Path, stream_index: int, video: VideoInfo) -> Iterator[tuple[int | None, list[Tensor]]]:
    """(pts, planes) of every frame of a video stream."""
    reformatter = VideoReformatter()
    with open_file(path) as film:
        stream = film.streams[stream_index]
        stream.thread_count = 2  # type: ignore[attr-defined]  # goes to the codec context
        for packet in film.demux(stream):
            try:
                frames = packet.decode()
            except FFmpegError:
                continue
            for frame in frames:
                if not isinstance(frame, VideoFrame):
                    continue
                # Full range is a tag to us, and a name of its own to FFmpeg.
                name = frame.format.name.replace("yuvj", "yuv")
                picture = frame
                if name != video.pixel_format.name.replace("yuvj", "yuv"):
                    picture = reformatter.reformat(frame, format=video.pixel_format.name)
                yield frame.pts, [from_dlpack(plane) for plane in picture.planes]


def _psnr(luma: Tensor, reference: Tensor) -> float:
    small = adaptive_avg_pool2d(luma[None, None], (reference.shape[0], reference.shape[1]))[0, 0]
    error = float((small - reference).square().mean())
    return inf if error == 0 else -10 * log10(error)
