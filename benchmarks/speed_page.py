"""The tables of docs/speed.md and its picture, from the JSON of `cpu.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "page_with"]

_ROOT = Path(__file__).parents[1]
_BEGIN, _END = "<!-- made by benchmarks/cpu.py -->", "<!-- /speed -->"
_FORMS = ("reference fp32", "torch fp32", "torch bf16", "openvino fp32", "openvino bf16")
# Y-PSNR on Set5 x2 of their authors, trained on DIV2K for days.
_PUBLISHED = {"CNN 10x32": ("ECBSR-M10C32, as published", 37.76)}
_SHORT = _ROOT / "benchmarks" / "results" / "shapes.json"


def _networks(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: facts for name, facts in result["networks"].items() if isinstance(facts, dict) and "gflop" in facts}


def _cell(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return ""
    ratio = facts.get("times_the_reference")
    against = "" if ratio is None or round(ratio, 6) == 1 else f" ({ratio:.1f}x)"
    return f"{facts['us_per_lr_pixel']:.2f}{against}, {facts['share_of_peak']:.0%}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{machine['processor']}, {machine['cpu']}, {machine['cpus']} CPUs; {versions}."


def _speed(result: dict[str, Any]) -> str:
    height, width = result["networks"]["input"][2:]
    peaks = result["networks"]["peak_gflops"]
    table = _table(
        ("network", "GFLOP", *_FORMS),
        [
            (name, f"{facts['gflop']:.2f}", *(_cell(facts.get(form)) for form in _FORMS))
            for name, facts in _networks(result).items()
        ],
    )
    return (
        f"Microseconds per source pixel on {width}x{height} (HAT-S: 64x64), times the reference, share of the "
        f"peak of matrix products ({peaks['fp32']:.0f} GFLOP/s in fp32, {peaks['bf16']:.0f} in bf16).\n\n{table}"
    )


def _tables(result: dict[str, Any], elsewhere: Sequence[dict[str, Any]]) -> str:
    memory = _table(
        ("model", "backend", "precision", "tile", "peak, MiB", "s"),
        [
            (
                name,
                form["backend"],
                form["precision"],
                str(form["tile"] or "none"),
                f"{form['peak_mib']:.0f}",
                f"{form['seconds']:.1f}",
            )
            for name, forms in result["memory_1920x1080"].items()
            for form in forms
        ],
    )
    ends = result["end_to_end"]
    outside = _table(
        ("", "backend", "precision", "network alone, s", "file to proven file, s", "outside the network"),
        [
            (
                name,
                facts["backend"],
                facts["precision"],
                f"{statistics.median(one['network_seconds'] for one in facts['rounds']):.1f}",
                f"{statistics.median(one['road_seconds'] for one in facts['rounds']):.1f}",
                f"{facts['share_outside']:.0%}",
            )
            for name, facts in ends.items()
        ],
    )
    tools = _table(
        ("command", "seconds", "hat-nano = 1", "remarks"),
        [
            (
                tool,
                f"{statistics.median(facts['seconds']):.1f}" if "seconds" in facts else "",
                f"{1 / facts['times_hat_nano']:.2f}" if "seconds" in facts else "",
                "; ".join(
                    str(facts[key]) for key in ("network", "weights", "version", "absent", "failed") if key in facts
                ),
            )
            for tool, facts in sorted(result["tools"].items(), key=lambda item: item[1].get("seconds", [9e9])[0])
        ],
    )
    return "\n\n".join(
        (
            _machine(result),
            "### Networks, one thread\n\n" + _speed(result),
            "Two frames in flight on two cores are "
            f"{result['frames_in_flight']['ratio']:.2f} times one; same bits: "
            f"{'yes' if result['frames_in_flight']['same_bits'] else 'NO'}.",
            "### Memory, one frame of 1920x1080 to 3840x2160\n\n" + memory,
            "### The sample clip (320x180, 5 s) to x2, end to end\n\n" + outside,
            tools,
            *(
                f"### Networks on another processor, one thread\n\n{_machine(one)}\n\n{_speed(one)}"
                for one in elsewhere
            ),
        )
    )


def page_with(text: str, result: dict[str, Any], elsewhere: Sequence[dict[str, Any]]) -> str:
    """The page with its tables made anew; `elsewhere`: what `--networks` found on other processors."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{_tables(result, elsewhere)}\n\n{_END}{after}"


def draw(result: dict[str, Any], path: Path) -> None:
    """dB against microseconds through OpenVINO in bf16: ours full, short trainings hollow, published ones crossed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    times = {
        name: facts["openvino bf16"]["us_per_lr_pixel"]
        for name, facts in _networks(result).items()
        if facts.get("openvino bf16")
    }

    def point(label: str, name: str, score: float, style: dict[str, Any], drop: int = 3) -> None:
        axes.plot(times[name], score, markersize=9, linestyle="none", **style)
        axes.annotate(label, (times[name], score), fontsize=9, xytext=(8, drop), textcoords="offset points")

    for name, score in result["set5_y_psnr"].items():
        point(name, name, score, {"marker": "o", "color": "tab:blue"})
    for name, shape in (("CNN 10x32", "cnn10x32"), ("Compact 16x64", "compact16x64"), ("Compact 8x32", "compact8x32")):
        runs = json.loads(_SHORT.read_text(encoding="utf-8"))["shapes"]
        if shape in runs:
            label = f"{name}, trained {runs[shape]['training_seconds'] / 60:.0f} min"
            style = {"marker": "o", "color": "tab:orange", "mfc": "white"}
            point(label, name, runs[shape]["y_psnr"]["Set5"], style, drop=-14)
    for name, (label, score) in _PUBLISHED.items():
        point(label, name, score, {"marker": "x", "color": "tab:orange", "markeredgewidth": 2})
    axes.text(0.99, 0.02, "bicubic: 33.7 dB", transform=axes.transAxes, ha="right", fontsize=9, color="0.4")
    axes.set_xlim(0, 1.2 * max(times[name] for name in result["set5_y_psnr"]))
    axes.set_ylim(36.6, 38.2)
    axes.set_xlabel("microseconds per source pixel, one thread, OpenVINO bf16")
    axes.set_ylabel("Set5 x2, Y-PSNR, dB")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
