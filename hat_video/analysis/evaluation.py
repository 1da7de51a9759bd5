"""The whole evaluation: candidates on sets of stills and on clips, as data, as JSON and as tables to read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hat_video.analysis.clips import ClipResult, ClipScore, check_clip, evaluate_clip
from hat_video.analysis.sheet import Sheet
from hat_video.analysis.stills import StillsResult, check_stills, evaluate_stills, set_name
from hat_video.analysis.vmaf import HOW_TO_GET_VMAF, find_vmaf
from hat_video.errors import OutputError, UsageError
from hat_video.files import check_place, write_atomically
from hat_video.inference.upscaler import Upscaler
from hat_video.model.hat import HATConfig
from hat_video.model.zoo import default_model_name, load_model

__all__ = ["Evaluation", "evaluate"]

_BASELINES = {"bicubic": "bicubic", "lanczos": "lanczos"}
"""Label -> name."""
_INPUT = {"input": "lanczos"}
"""At x1 no resampler changes a pixel: what is compared with is the compressed clip itself."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What every candidate scored."""

    scale: int
    candidates: dict[str, str]
    """Label -> sha256 of the model: first bicubic and lanczos, or `input` at x1, then what was asked for."""
    stills: dict[str, tuple[StillsResult, ...]]
    """Label -> one result a set."""
    clips: tuple[ClipResult, ...]
    notes: tuple[str, ...]
    """What could not be measured, and why."""

    def to_json(self) -> str:
        """All figures; null where there is none."""
        facts = asdict(self)
        for label, results in self.stills.items():
            for entry, result in zip(facts["stills"][label], results, strict=True):
                entry.update(psnr=result.psnr, ssim=result.ssim)
        return json.dumps(_finite(facts), indent=1) + "\n"

    def write_json(self, path: Path) -> None:
        """Writes `to_json`.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            write_atomically(path, self.to_json().encode())
        except OutputError as error:
            raise OutputError(f"--json {error}") from None

    def tables(self) -> str:
        """Markdown that also reads well as plain text: stills, then clips, then notes."""
        parts = [self._stills_table()] if any(self.stills.values()) else []
        parts += [self._clips_table()] if self.clips else []
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts)

    def _stills_table(self) -> str:
        sets = next(iter(self.stills.values()))
        head = ["PSNR-Y, dB / SSIM", *(f"{result.name} x{result.scale} ({len(result.images)})" for result in sets)]
        rows = [
            [label, *(f"{result.psnr:.2f} / {result.ssim:.4f}" for result in results)]
            for label, results in self.stills.items()
        ]
        return _table(head, rows)

    def _clips_table(self) -> str:
        periods = sorted({period for result in self.clips for score in result.scores for period in score.grid})
        head = ["clip", "crf", "model", "PSNR-Y, dB", "SSIM", "VMAF", "VMAF-NEG", "flicker"]
        head += [f"grid {period}" for period in periods]
        rows = [
            [f"{result.clip} ({result.frames} frames)", str(result.crf), *_figures(score, periods)]
            for result in self.clips
            for score in result.scores
        ]
        return _table(head, rows)


def _figures(score: ClipScore, periods: Sequence[int]) -> list[str]:
    quality = [score.candidate, f"{score.psnr:.2f}", f"{score.ssim:.4f}"]
    quality += ["-" if value is None else f"{value:.2f}" for value in (score.vmaf, score.vmaf_neg)]
    grids = [score.grid[period] for period in periods]
    return [*quality, f"{score.flicker:.3f}", *("-" if math.isnan(value) else f"{value:.2f}" for value in grids)]


def evaluate(
    models: Sequence[str],
    scale: int | None = None,
    *,
    stills: Sequence[Path] = (),
    clips: Sequence[Path] = (),
    crf: Sequence[int] = (23,),
    frames: int = 60,
    device: str = "auto",
    precision: str = "auto",
    sheet: Path | None = None,
    crop: tuple[int, int, int, int] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluates models beside bicubic and Lanczos; at x1 beside the compressed clip as it is.

    Args:
        models: names or files of checkpoints; the included network of the scale if there are none.
        scale: 1 to 4; None for that of the first checkpoint among the models, or 2.
        stills: folders of sets, see `evaluate_stills`; not at x1, where they would be their own low resolution.
        clips: files, see `evaluate_clip`.
        crf: how strongly the small clips are compressed; each clip is evaluated at each.
        frames: of each clip, at most.
        device: see `Upscaler`.
        precision: likewise, but `auto` is fp32 on stills: the field's figures are, and the machine must not show.
        sheet: where to write a sheet of crops.
        crop: x, y, width, height of the sheet's crops in the original; chosen by detail if None.
        on_step: is told what comes next.

    Raises:
        UsageError: there is nothing to evaluate on, or no network of that scale, or Pillow is needed and missing.
        HatVideoError: whatever else `evaluate_stills`, `evaluate_clip` and `Sheet` raise.
    """
    if not stills and not clips:
        raise UsageError("nothing to evaluate on; give --stills DIR or --clips FILE")
    if scale is None:
        scale = next((load_model(name).scale for name in models if Path(name).is_file()), 2)
    if stills and scale == 1:
        raise UsageError("--stills at --scale 1: they would be their own low resolution; give --clips FILE")
    if sheet is not None:
        check_place(sheet, "--sheet")
    elif crop is not None:
        raise UsageError("--crop without --sheet: is of its crops; give --sheet FILE.png")
    for folder in stills:
        check_stills(folder, scale)
    for clip in clips:
        check_clip(clip, scale)
    baselines = _INPUT if scale == 1 else _BASELINES
    chosen = baselines | _labels(
        [name for name in models or [default_model_name(scale)] if name not in _BASELINES], baselines
    )
    loaded = {label: load_model(name, scale=scale) for label, name in chosen.items()}
    page = Sheet(scale, crop=crop) if sheet is not None else None
    shown = {label for label in chosen if label not in baselines or label in (next(iter(baselines)), *models)}
    say = on_step or (lambda step: None)

    def look(candidate: str, picture: str, low: Tensor, output: Tensor, high: Tensor) -> None:
        if page is not None and candidate in shown:
            page.add(candidate, picture, low, output, high)

    scores: dict[str, tuple[StillsResult, ...]] = {}
    for label, model in loaded.items() if stills else ():
        upscaler = Upscaler(model, device=device, precision="fp32" if precision == "auto" else precision)
        results = []
        for folder in stills:
            say(f"{set_name(folder)}: {label}")
            results.append(evaluate_stills(upscaler, folder, scale, look=partial(look, label)))
        scores[label] = tuple(results)

    ffmpeg = find_vmaf() if clips else None
    windows = {model.config.multiple * scale for model in loaded.values() if isinstance(model.config, HATConfig)}
    films = []
    for clip in clips:
        for strength in crf:
            say(f"{clip.name} at crf {strength}")
            films.append(
                evaluate_clip(
                    clip,
                    chosen,
                    scale,
                    crf=strength,
                    frames=frames,
                    periods=sorted(windows),
                    options=("--device", device, "--precision", precision),
                    ffmpeg=ffmpeg,
                    look=look if page is not None else None,
                )
            )
    if page is not None and sheet is not None:
        page.write(sheet)
    notes = (f"VMAF was not measured: {HOW_TO_GET_VMAF}",) if clips and ffmpeg is None else ()
    return Evaluation(scale, {label: model.sha256 for label, model in loaded.items()}, scores, tuple(films), notes)


def _labels(names: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """Label -> name: a file's stem, or the whole path where two files have the same or it is taken."""
    unique = list(dict.fromkeys(names))
    stems = [Path(name).stem if Path(name).is_file() else name for name in unique]
    all_stems = [*taken, *stems]
    return {stem if all_stems.count(stem) == 1 else name: name for stem, name in zip(stems, unique, strict=True)}


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
