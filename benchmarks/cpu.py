"""HAT's speed on one thread, against the reference implementation, and what a second core adds.

    python benchmarks/speed.py            # writes benchmarks/results/speed.json

All forms of one network are timed in turns in one process, so that a machine whose speed drifts slows them all. The
share of the peak is against the fastest large matrix product that the same thread reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the reference is the tests'

from hat_video import Upscaler, load_model  # noqa: E402
from hat_video.inference.double_buffer import map_in_flight  # noqa: E402
from hat_video.inference.openvino_backend import OpenVINOHAT, openvino_version  # noqa: E402
from hat_video.inference.optimize import optimize  # noqa: E402
from hat_video.model.checkpoint import infer_config  # noqa: E402
from hat_video.model.hat import HAT, HATConfig  # noqa: E402
from tests.reference import reference_hat, reference_of  # noqa: E402
from tests.test_hat import _index_buffers  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "speed.json"
CPU = torch.device("cpu")


def peak_gflops(dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product, the best of several, by whichever of torch's libraries is faster."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    # In fp32 a product goes to MKL, but the same as a 1x1 convolution of 16 pictures goes to oneDNN.
    pictures, kernel = a.view(16, 128, 1, 2048).permute(0, 3, 1, 2), b[:, :, None, None]
    forms: dict[str, Callable[[], object]] = {
        "product": lambda: F.linear(a, b),
        "convolution": lambda: F.conv2d(pictures, kernel),
    }
    with torch.inference_mode():
        times = in_turns(forms, 8)
    return 2 * 2048**3 / min(min(values) for values in times.values()) / 1e9


def processor_name() -> str:
    """The processor's own name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each form, round by round, A B C A B C."""
    for work in forms.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, work in forms.items():
            times[name].append(seconds(work))
    return times


def compare(name: str, reference: torch.nn.Module, network: HAT, frame: torch.Tensor, rounds: int) -> dict[str, object]:
    """One network in its forms, through torch and through OpenVINO."""
    fp32 = optimize(network, dtype=torch.float32, device=CPU)
    bf16 = optimize(network, dtype=torch.bfloat16, device=CPU)
    ov32, ov16 = (OpenVINOHAT(network, precision, in_flight=1) for precision in ("fp32", "bf16"))  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(frame)
    flops = counter.get_total_flops()
    peaks = {"fp32": peak_gflops(torch.float32), "bf16": peak_gflops(torch.bfloat16)}
    with torch.inference_mode():
        times = in_turns(
            {
                "reference fp32": lambda: reference(frame),
                "ours fp32": lambda: fp32(frame),
                "ours bf16": lambda: bf16(frame),
                "openvino fp32": lambda: ov32(frame),
                "openvino bf16": lambda: ov16(frame),
            },
            rounds,
        )
    result: dict[str, object] = {"input": list(frame.shape), "gflop": round(flops / 1e9, 3), "peak_gflops": peaks}
    for form, values in times.items():
        median = statistics.median(values)
        peak = peaks["bf16" if form.endswith("bf16") else "fp32"]
        result[form] = {
            "median_seconds": median,
            "us_per_lr_pixel": median * 1e6 / (frame.shape[2] * frame.shape[3]),
            "gflops": flops / median / 1e9,
            "share_of_peak": flops / median / 1e9 / peak,
            "speedup_over_reference": statistics.median(
                a / b for a, b in zip(times["reference fp32"], values, strict=True)
            ),
        }
        print(f"{name}: {form}: {median * 1e3:.1f} ms, {result[form]}")
    return result


def in_flight(rounds: int) -> dict[str, object]:
    """The shipped model on 320x180 frames: two frames in flight against one, and whether the bits are the same."""
    upscaler = Upscaler(load_model("hat-nano", scale=2))
    frames = [torch.rand(1, 3, 180, 320) for _ in range(16)]

    def run(workers: int) -> list[torch.Tensor]:
        return list(map_in_flight(upscaler, frames, workers=workers, stop=threading.Event()))

    one, two = run(1), run(2)
    is_equal = all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    times = in_turns({"1": lambda: run(1), "2": lambda: run(2)}, rounds)
    ratios = [a / b for a, b in zip(times["1"], times["2"], strict=True)]
    print(f"two frames in flight: {statistics.median(ratios):.3f} times one, same bits: {is_equal}")
    return {
        "precision": upscaler.precision,
        "backend": upscaler.backend,
        "frames_per_second": {name: len(frames) / statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "same_bits": is_equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    hat = HATConfig(depths=(6,), num_heads=(6,))
    reference = reference_hat(hat)
    state = {name: value for name, value in reference.state_dict().items() if "position_index" not in name}
    ours = HAT(infer_config(state, Path("reference"))).eval()
    ours.load_state_dict(state)
    nano = load_model("hat-nano", scale=2).network
    assert nano is not None
    nano_reference = reference_of(nano.state_dict() | _index_buffers(nano.config))
    result = {
        "command": "python benchmarks/speed.py",
        "machine": {
            "processor": processor_name(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cpus": os.cpu_count(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "openvino": openvino_version()},
        "threads": 1,
        "rounds": arguments.rounds,
        "HAT, 1 RHAG of 6 HABs, x4": compare("HAT", reference, ours, torch.rand(1, 3, 64, 64), arguments.rounds),
        "hat-nano x2": compare("hat-nano", nano_reference, nano, torch.rand(1, 3, 128, 128), arguments.rounds),
        "frames_in_flight": in_flight(arguments.rounds),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
