"""Real clips: made smaller, compressed, enlarged again by the real command, and compared with what they were."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import hat_video
from hat_video.analysis.metrics import flicker, mean_squared_error, psnr_of_error, seam_profiles, seam_ratio, ssim
from hat_video.analysis.vmaf import vmaf
from hat_video.color import from_rgb, to_rgb
from hat_video.errors import SourceError, UsageError, WorkError
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.media.encoder import SegmentWriter, plan_encoder
from hat_video.media.probe import Probe, probe
from hat_video.media.source import open_source
from hat_video.model.resample import resize

__all__ = ["ClipResult", "ClipScore", "check_clip", "evaluate_clip"]

# Low-resolution pixels cut off at the left and the top: the original's own blocks of 8 and 16 then do not fall on the
# edges of the networks' windows, where they could not be told from a grid of ours.
_SHIFT = 3


@dataclass(frozen=True, slots=True)
class ClipScore:
    """One candidate's figures on one clip, all on luma as the file has it, 8 bits, no border cut off."""

    candidate: str
    psnr: float
    """dB, of the mean squared error over all frames, as FFmpeg's filter `psnr` averages."""
    ssim: float
    """Mean over the frames."""
    flicker: float
    """See `hat_video.analysis.metrics.flicker`; code values, lower is better."""
    grid: dict[int, float]
    """Window period in output pixels -> `seam_ratio`, the mean of both axes; NaN where the picture is too small."""
    vmaf: float | None
    """None where there is no FFmpeg with libvmaf."""
    vmaf_neg: float | None


@dataclass(frozen=True, slots=True)
class ClipResult:
    """One clip's figures at one strength of compression."""

    clip: str
    """The file's name."""
    scale: int
    crf: int
    width: int
    """Of the compared picture, in pixels: the original's, cut to a multiple of twice the scale after a small shift."""
    height: int
    frames: int
    scores: tuple[ClipScore, ...]


def evaluate_clip(
    clip: Path,
    candidates: Mapping[str, str],
    scale: int,
    *,
    crf: int = 23,
    frames: int = 60,
    periods: Sequence[int] = (),
    options: Sequence[str] = (),
    ffmpeg: Path | None = None,
    look: Callable[[str, str, Tensor, Tensor, Tensor], None] | None = None,
) -> ClipResult:
    """Makes the clip smaller by MATLAB's bicubic, encodes it by libx264, and upscales that with every candidate.

    Args:
        clip: any file that `hat-video` reads; its first frames are taken.
        candidates: label -> what `--model` shall be.
        scale: times smaller, and larger again.
        crf: of libx264 for the small clip; 0 is lossless for 8 bits.
        frames: at most so many.
        periods: of the networks' windows, in output pixels: where to look for a grid.
        options: more words for `hat-video upscale`, for instance `--precision fp32`.
        ffmpeg: for VMAF, from `find_vmaf`.
        look: is shown the middle frame of every candidate: the candidate's label, the clip's, and the low, upscaled
            and original resolution, each (1, 3, H, W) in [0, 1].

    Raises:
        SourceError: the clip cannot be read, or is too small.
        UsageError: no frames are asked for.
        WorkError: the command failed; the message is its last line.
    """
    if frames < 1:
        raise UsageError(f"--frames {frames}: must be 1 or more")
    found = probe(clip)
    ends = found.index.pts[frames:]
    with tempfile.TemporaryDirectory(prefix="hat-video-") as folder:
        low = Path(folder) / "low.mkv"
        original, shown = _make_low(found, ends[0] if ends else None, low, scale, crf)
        count, height, width = original.shape
        small = _frame_rgb(low, count // 2) if look is not None else None
        scores = []
        for label, model in candidates.items():
            made = Path(folder) / "made.mkv"
            _run_command(clip, low, made, "--model", model, "--scale", str(scale), *options)
            output = _luma_of(made)
            if output.shape != original.shape:
                raise WorkError(f"{clip}: {label} made {tuple(output.shape)} of {tuple(original.shape)} (N, H, W)")
            scores.append(_score(label, output, original, scale, periods, ffmpeg))
            if look is not None and small is not None:
                look(label, f"{clip.name} crf {crf}", small, _frame_rgb(made, count // 2), shown)
    return ClipResult(clip.name, scale, crf, width, height, count, tuple(scores))


def check_clip(clip: Path, scale: int) -> None:
    """Raises what `evaluate_clip` would raise, as far as can be seen without decoding.

    Raises:
        SourceError: the clip cannot be read, is transparent or too small.
    """
    _small_size(probe(clip), scale)


def _small_size(found: Probe, scale: int) -> tuple[int, int]:
    """Width and height of the small clip: whole chroma samples, so that no edge is made up."""
    video = found.video
    width, height = (max(0, size - _SHIFT * scale) // (2 * scale) * 2 for size in (video.width, video.height))
    if video.pixel_format.has_alpha:
        raise SourceError(f"{found.path}: is transparent; only opaque clips are evaluated")
    if min(width, height) < 16:
        raise SourceError(f"{found.path}: {video.width}x{video.height} is too small to be evaluated at x{scale}")
    return width, height


def _make_low(found: Probe, end: int | None, low: Path, scale: int, crf: int) -> tuple[Tensor, Tensor]:
    """Writes the small clip; returns the original's luma (N, H, W) and its middle frame, (1, 3, H, W) in [0, 1]."""
    video = found.video
    width, height = _small_size(found, scale)
    shift = _SHIFT * scale
    rows, columns = (slice(shift, shift + size * scale) for size in (height, width))
    # The file that is written says nothing of where chroma lies, which means left; and of pixels that are not square,
    # which the command would have to resample for the lossless encoder, not a word either.
    square = replace(video, sample_aspect_ratio=Fraction(1), display_matrix=None)
    source = replace(square, color=replace(video.color, siting="left"))
    spec, small = plan_encoder("matroska", source, width, height, name="libx264", crf=crf)
    original: list[Tensor] = []
    pictures: list[Tensor] = []
    with open_source(found.path, probe=found) as frames, SegmentWriter(low, spec, small) as writer:
        for batch in frames.read(None, end):
            rgb = to_rgb(batch.planes, video.pixel_format, video.color)[..., rows, columns]
            planes = from_rgb(resize(rgb, (height, width)).clamp_(0, 1), small.pixel_format, small.color)
            writer.write(FrameBatch(planes, batch.pts))
            original.append(_original_luma(batch.planes[0][:, rows, columns], rgb, video, small))
            pictures.append((rgb.clamp(0, 1) * 255).round_().to(torch.uint8))
        if not original:
            raise SourceError(f"{found.path}: no frame could be decoded")
        writer.close()
    return torch.cat(original), pictures[len(pictures) // 2].float() / 255


def _original_luma(plane: Tensor, rgb: Tensor, video: VideoInfo, small: VideoInfo) -> Tensor:
    """In the code values that the outputs will have: as decoded where these are the same, else converted."""
    mine, theirs = video.pixel_format, small.pixel_format
    same = (mine.kind, video.color.matrix, video.color.is_full_range)
    if same == (theirs.kind, small.color.matrix, small.color.is_full_range):
        return _eight_bit(plane, mine.bit_depth)
    return _eight_bit(from_rgb(rgb, theirs, small.color)[0], theirs.bit_depth)


def _eight_bit(plane: Tensor, bit_depth: int) -> Tensor:
    """Float32 code values of 8 bits; deeper ones keep their fractions."""
    return plane.float() / (1 << (bit_depth - 8))


def _run_command(clip: Path, low: Path, output: Path, *words: str) -> None:
    """`hat-video upscale`, without loss by the encoder, in a process of its own, as people run it."""
    home = str(Path(hat_video.__file__).parents[1])
    command = [sys.executable, "-m", "hat_video", "upscale", str(low), "-o", str(output), "--encoder", "ffv1", *words]
    done = subprocess.run(
        [*command, "--overwrite", "--quiet"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise WorkError(f"{clip}: hat-video upscale {' '.join(words)}: {said.removeprefix('hat-video: ')}")


def _luma_of(path: Path) -> Tensor:
    """(N, H, W) in code values of 8 bits."""
    found = probe(path)
    with open_source(path, probe=found) as frames:
        return torch.cat([_eight_bit(batch.planes[0], found.video.pixel_format.bit_depth) for batch in frames])


def _frame_rgb(path: Path, number: int) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    found = probe(path)
    with open_source(path, probe=found) as frames:
        batch = next(frames.read(found.index.pts[number]))
    return to_rgb(batch.planes, found.video.pixel_format, found.video.color).clamp_(0, 1)


def _score(
    label: str, output: Tensor, original: Tensor, scale: int, periods: Sequence[int], ffmpeg: Path | None
) -> ClipScore:
    residual = output - original
    # Frame by frame: in fp64 a whole clip would not fit in memory.
    frames = [(output[i : i + 1], original[i : i + 1]) for i in range(len(output))]
    error = sum(mean_squared_error(mine, theirs) for mine, theirs in frames) / len(frames)
    likeness = sum(ssim(mine, theirs) for mine, theirs in frames) / len(frames)
    changes = [flicker(residual[[i, j]]) ** 2 for i, j in pairwise(range(len(residual)))]
    vmaf_score, vmaf_neg = vmaf(ffmpeg, output, original) if ffmpeg is not None else (None, None)
    return ClipScore(
        candidate=label,
        psnr=psnr_of_error(error),
        ssim=likeness,
        flicker=(sum(changes) / len(changes)) ** 0.5 if changes else 0.0,
        grid=_grids(residual, scale, periods),
        vmaf=vmaf_score,
        vmaf_neg=vmaf_neg,
    )


def _grids(residual: Tensor, scale: int, periods: Sequence[int]) -> dict[int, float]:
    profiles = [seam_profiles(frame[None]) for frame in residual]
    means = [torch.stack(axis).mean(dim=0) for axis in zip(*profiles, strict=True)]
    grids = {}
    for period in periods:
        values = torch.tensor([seam_ratio(profile, period, scale) for profile in means])
        grids[period] = float(values.nanmean())
    return grids
