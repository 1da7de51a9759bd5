"""The field's protocol on a set of stills: low resolution by MATLAB's bicubic, PSNR and SSIM on luma, no border."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hat_video.analysis.metrics import luma, psnr, ssim
from hat_video.analysis.pictures import read_picture
from hat_video.errors import SourceError, UsageError
from hat_video.model.resample import resize

__all__ = ["Look", "StillScore", "StillsResult", "Upscale", "check_stills", "evaluate_stills", "set_name"]

Upscale = Callable[[Tensor], Tensor]
"""(1, 3, H, W) float32 RGB in [0, 1] to (1, 3, scale * H, scale * W): an `Upscaler`, or a network in training."""

Look = Callable[[str, Tensor, Tensor, Tensor], None]
"""Is shown a picture's label and its low, upscaled and original resolution, each (1, 3, H, W) in [0, 1]."""

_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class StillScore:
    """One picture's figures."""

    image: str
    """The file's stem."""
    psnr: float
    """dB, on luma."""
    ssim: float
    """On luma; NaN where it was not asked for."""


@dataclass(frozen=True, slots=True)
class StillsResult:
    """One set's figures."""

    name: str
    """The folder's."""
    scale: int
    images: tuple[StillScore, ...]

    @property
    def psnr(self) -> float:
        """dB, the mean over the pictures."""
        return sum(score.psnr for score in self.images) / len(self.images)

    @property
    def ssim(self) -> float:
        """The mean over the pictures; NaN where it was not asked for."""
        return sum(score.ssim for score in self.images) / len(self.images)


def evaluate_stills(
    upscale: Upscale,
    folder: Path,
    scale: int,
    *,
    limit: int | None = None,
    with_ssim: bool = True,
    look: Look | None = None,
) -> StillsResult:
    """Upscales a set and compares it with its originals.

    The low resolution is read from `LR_x<scale>/` where the set has it (a file of the original's name); else it is made
    as MATLAB's imresize does, from the original cut to a multiple of the scale. The output is rounded to 8 bits,
    `scale` pixels on each side are left out, and luma is BT.601's, not rounded. A gray picture (`bridge` of Set14) is
    read as RGB, as BasicSR does, which scores 1.3 dB more than reading it as gray: Set14's mean gains 0.09 dB by it.

    Args:
        upscale: what is evaluated; called with one picture at a time.
        folder: holds `HR/*.png`, and perhaps `LR_x<scale>/`.
        scale: of `upscale`.
        limit: only so many pictures, in the order of their names.
        with_ssim: False spares its time.
        look: is shown every picture.

    Raises:
        UsageError: `folder` is not laid out so, or Pillow is not installed.
        SourceError: a picture cannot be read, or is too small, or its two resolutions do not belong together.
        ValueError: `upscale` gives another size.
    """
    originals = _originals(folder)[:limit]
    scores = []
    for path in originals:
        low, high = _read(path, folder / f"LR_x{scale}", scale)
        if low is None:
            size = (high.shape[2] // scale, high.shape[3] // scale)
            low = resize(high.double(), size, rounded=True).clamp_(0, 1).float()
        output = upscale(low).detach().cpu()
        if output.shape != high.shape:
            raise ValueError(f"{tuple(low.shape)} became {tuple(output.shape)}; x{scale} is {tuple(high.shape)}")
        output = (output.float() * 255).round_().clamp_(0, 255).div_(255)
        if look is not None:
            look(f"{set_name(folder)}/{path.stem}", low, output, high)
        mine, theirs = luma(output), luma(high)
        likeness = ssim(mine, theirs, border=scale) if with_ssim else math.nan
        scores.append(StillScore(path.stem, psnr(mine, theirs, border=scale), likeness))
    return StillsResult(set_name(folder), scale, tuple(scores))


def set_name(folder: Path) -> str:
    """What a set is called: as its folder, however that was given."""
    return folder.resolve().name


def check_stills(folder: Path, scale: int) -> None:
    """Raises what `evaluate_stills` would raise, as far as can be seen without upscaling anything.

    Raises:
        UsageError: `folder` is not laid out so, or Pillow is not installed.
        SourceError: the first of its pictures cannot be used.
    """
    for path in _originals(folder):
        _read(path, folder / f"LR_x{scale}", scale)


def _originals(folder: Path) -> list[Path]:
    found = sorted(path for path in (folder / "HR").glob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise UsageError(f"--stills {folder}: has no pictures in {folder / 'HR'} ({', '.join(_SUFFIXES)})")
    return found


def _read(path: Path, low_folder: Path, scale: int) -> tuple[Tensor | None, Tensor]:
    """The low resolution, where it is stored, and the part of the original that it shows."""
    high = read_picture(path)
    height, width = (size // scale * scale for size in high.shape[2:])
    if min(height, width) < 11 + 2 * scale:
        raise SourceError(f"{path}: {width}x{height} is too small to be evaluated at x{scale}")
    if not low_folder.is_dir():
        return None, high[:, :, :height, :width]
    low_path = low_folder / path.name
    low = read_picture(low_path)
    if low.shape[2:] != torch.Size((height // scale, width // scale)):
        raise SourceError(
            f"{low_path}: is {low.shape[3]}x{low.shape[2]}; x{scale} of {path} is {width // scale}x{height // scale}"
        )
    return low, high[:, :, :height, :width]
