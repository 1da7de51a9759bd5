"""How good the shipped models are: on the field's stills by its protocol, and on real clips through the real command.

python benchmarks/quality.py --stills Set5 Set14 BSD100 --clips a.mp4 b.mp4   # results/quality.json, README's tables
python benchmarks/quality.py --stills ... --scales 4                          # one scale anew, the others are kept
python benchmarks/quality.py                                                  # README's tables from the JSON
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import machine, versions  # noqa: E402
from hat_video.analysis.evaluation import evaluate  # noqa: E402
from hat_video.model.zoo import list_models  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "quality.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- quality: made by benchmarks/quality.py -->", "<!-- /quality -->"


def shipped() -> dict[int, list[str]]:
    """Scale -> names of the networks that come with the package."""
    models = [model for model in list_models() if model.is_included and model.parameters]
    scales = sorted({scale for model in models for scale in model.scales})
    return {scale: [model.name for model in models if scale in model.scales] for scale in scales}


def measure(stills: list[Path], clips: list[Path], frames: int, scales: list[int]) -> dict[str, Any]:
    """Every shipped model at these scales of its own, or at all; other scales stay as the JSON has them."""
    chosen = {scale: names for scale, names in shipped().items() if not scales or scale in scales}
    scores = json.loads(RESULT.read_text(encoding="utf-8"))["scores"] if scales and RESULT.exists() else {}
    for scale, names in chosen.items():
        found = evaluate(
            names,
            scale,
            stills=stills,
            clips=clips if scale > 1 else (),
            crf=(0, 23),
            frames=frames,
            on_step=lambda step, scale=scale: print(f"x{scale} {step}", flush=True),
        )
        scores[f"x{scale}"] = json.loads(found.to_json())
    return {
        "command": "python benchmarks/quality.py --stills ... --clips ...",
        "machine": machine(),
        "versions": versions("torch", "av"),
        "scores": dict(sorted(scores.items())),
    }


def table(result: dict[str, Any]) -> str:
    """README's tables."""
    parts = []
    for scale, found in result["scores"].items():
        sets = [entry["name"] for entry in next(iter(found["stills"].values()), [])]
        clips = {crf: [clip for clip in found["clips"] if clip["crf"] == crf] for crf in (0, 23)}
        head = [scale, *sets]
        head += [f"{len(clips[crf])} clips, {'lossless' if crf == 0 else f'crf {crf}'}" for crf in clips if clips[crf]]
        rows = [head, ["---"] * len(head)]
        for label in found["candidates"]:
            row = [f"`{label}`", *(f"{entry['psnr']:.2f}" for entry in found["stills"].get(label, []))]
            for entries in clips.values():
                if entries:
                    row.append(_summary(entries, label))
            rows.append(row)
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def _summary(clips: list[dict[str, Any]], label: str) -> str:
    """Mean PSNR and VMAF-NEG, and in brackets the gains over Lanczos on the clip where each is least."""
    mine, lanczos = (
        [next(score for score in clip["scores"] if score["candidate"] == name) for clip in clips]
        for name in (label, "lanczos")
    )
    parts = []
    for name, digits in (("psnr", 2), ("vmaf_neg", 1)):
        if any(score[name] is None for score in (*mine, *lanczos)):
            continue
        least = min(score[name] - other[name] for score, other in zip(mine, lanczos, strict=True))
        gain = "" if label == "lanczos" else f" ({least:+.{digits}f})"
        parts.append(f"{statistics.mean(score[name] for score in mine):.{digits}f}{gain}")
    return " / ".join(parts)


def readme_with(text: str, result: dict[str, Any]) -> str:
    """README with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(result)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stills", type=Path, nargs="*", default=[])
    parser.add_argument("--clips", type=Path, nargs="*", default=[])
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--scales", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    if unknown := set(arguments.scales) - set(shipped()):
        parser.error(f"--scales {unknown.pop()}: must be of {', '.join(map(str, shipped()))}")
    if arguments.stills or arguments.clips:
        result = measure(arguments.stills, arguments.clips, arguments.frames, arguments.scales)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    README.write_text(readme_with(README.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
