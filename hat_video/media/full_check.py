"""Every frame of the finished file, decoded: is it what went into the encoder, or at least the source's picture?

A lossless encoder must give back every sample, so its frames are compared with hashes that the work took of them. All
others are compared with the source in two ways. Colours, alpha included, are averaged over cells so coarse that neither
noise nor sharpness counts: the floor is far below what any network and quality of use gives there, and far above what
other colours or another picture do. And the picture must be more like its own source frame than like that one's
neighbours.
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

from hat_video.color import alpha_to_unit, to_rgb
from hat_video.frames import VideoInfo
from hat_video.media.encoder import EncoderSpec
from hat_video.media.opening import demux, open_file
from hat_video.media.picture_check import averaged, luma_of, slip
from hat_video.media.probe import Probe
from hat_video.media.source import open_source

__all__ = ["PSNR_FLOOR", "FullFacts", "check_frames", "hash_planes", "is_lossless"]

PSNR_FLOOR = 20.0
"""In dB, of cells: a frame below it does not show the source's picture, or not in its colours."""

_CELL = 4  # source pixels a side, at least
_CELLS = (72, 128)  # rows, columns, at most


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
                problem, psnr = references.compare(n, planes, video)
                lowest = min(lowest, psnr)
                if problem is not None:
                    problems.append(problem)
    finally:
        if references is not None:
            references.close()
    if decoded < len(pts) and not problems:
        problems.append(f"only {decoded} of {len(pts)} frames can be decoded")
    return FullFacts(decoded, identical, None if hashes or lowest == inf else lowest, tuple(problems))


@dataclass(frozen=True, slots=True)
class _Reference:
    """What is kept of a source frame."""

    cells: Tensor
    """(C, rows, columns): colours, and alpha where there is some."""
    luma: Tensor
    """(rows, columns), finer: for telling neighbours apart."""


class _SourceFrames:
    """The source's frames, of which each is compared with its frame in the output, one after the other."""

    def __init__(self, source: Probe, pts: Sequence[int]) -> None:
        self._video, self._pts = source.video, pts
        self._frames = open_source(source.path, decoder="pyav", probe=source)
        self._batches = self._frames.read(pts[0], pts[-1] + 1) if pts else iter(())
        self._known: dict[int, _Reference] = {}
        self._read = 0

    def close(self) -> None:
        self._frames.close()

    def compare(self, n: int, planes: Sequence[Tensor], video: VideoInfo) -> tuple[str | None, float]:
        """What is wrong with frame n of the output, and how many dB it is from its own frame of the source."""
        self._advance(n + 1)
        own = self._known.get(n)
        if own is None:
            return f"frame {n} has no frame in the source that can be decoded", inf
        channels = own.cells.shape[0] if video.pixel_format.has_alpha else 3
        error = float((_cells(planes, video, own.cells.shape[1:])[:channels] - own.cells[:channels]).square().mean())
        psnr = inf if error == 0 else -10 * log10(error)
        slipped = slip(
            averaged(luma_of(planes, video), own.luma.shape),
            own.luma,
            {k: self._known[k].luma for k in (n - 1, n + 1) if k in self._known},
        )
        if slipped is not None:
            return f"frame {n} shows the picture of the source's frame {slipped}", psnr
        if psnr < PSNR_FLOOR:
            return f"frame {n} is at {psnr:.1f} dB of the source's colours, the floor is {PSNR_FLOOR:g} dB", psnr
        return None, psnr

    def _advance(self, last: int) -> None:
        """Knows frame `last` and the two before it, as far as they can be decoded."""
        while self._read <= min(last, len(self._pts) - 1):
            batch = next(self._batches, None)
            if batch is None:
                return
            for k, pts in enumerate(batch.pts):
                # What is left out of the output is no neighbour either.
                while self._read < len(self._pts) and self._pts[self._read] < pts:
                    self._read += 1
                if self._read == len(self._pts) or self._pts[self._read] != pts:
                    continue
                planes = [plane[k] for plane in batch.planes]
                height, width = self._video.height, self._video.width
                shape = (
                    max(1, min(_CELLS[0], height // _CELL)),
                    max(1, min(_CELLS[1], width // _CELL)),
                )
                self._known[self._read] = _Reference(
                    _cells(planes, self._video, shape), averaged(luma_of(planes, self._video), None)
                )
                self._read += 1
        for n in [n for n in self._known if n < last - 2]:
            del self._known[n]


def _cells(planes: Sequence[Tensor], video: VideoInfo, shape: Sequence[int]) -> Tensor:
    """(3 or 4, rows, columns) of R'G'B' and alpha in [0, 1], averaged."""
    one = [plane[None] for plane in planes]
    picture = to_rgb(one, video.pixel_format, video.color).clamp_(0, 1)
    alpha = alpha_to_unit(one, video.pixel_format)
    if alpha is not None:
        picture = torch.cat([picture, alpha], 1)
    cells: Tensor = adaptive_avg_pool2d(picture, (int(shape[0]), int(shape[1])))[0]
    return cells


def _planes_of(path: Path, stream_index: int, video: VideoInfo) -> Iterator[tuple[int | None, list[Tensor]]]:
    """(pts, planes) of every frame of a video stream."""
    reformatter = VideoReformatter()
    with open_file(path) as film:
        stream = film.streams[stream_index]
        stream.thread_count = 2  # type: ignore[attr-defined]  # goes to the codec context
        for packet in demux(film, stream):
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
                    picture = reformatter.reformat(frame, format=video.pixel_format.name, threads=1)
                yield frame.pts, [from_dlpack(plane) for plane in picture.planes]
