"""HAT on a GPU: frames a second from file to file, where the time goes, and beside the reference implementation.

    python benchmarks/gpu.py             # writes benchmarks/results/gpu-<name of the GPU>.json

Networks are timed in turns in one process, by the GPU's own clock: ours in fp16, bf16 and fp32, and spandrel's HAT in
bf16 as it comes. The share of the peak is against the fastest large matrix product of the same run. End to end, the
sample clip goes through `upscale_file`; its trace tells how much of the other stages is hidden behind the network. What
this machine lacks (DALI, NVDEC, NVENC) is reported and does not stop the rest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the reference is the tests'

from benchmarks.timing import slug  # noqa: E402
from hat_video import UpscaleOptions, Upscaler, load_model, upscale_file  # noqa: E402
from hat_video.errors import HatVideoError  # noqa: E402
from hat_video.inference.backends import Network, build  # noqa: E402
from hat_video.inference.fit import gpu_memory  # noqa: E402
from hat_video.inference.timeline import busy_share  # noqa: E402
from hat_video.jobs.doctor import examine  # noqa: E402
from hat_video.model.checkpoint import infer_config  # noqa: E402
from hat_video.model.hat import HAT, HATConfig  # noqa: E402

CLIP = ROOT / "samples" / "bbb_320x180.mp4"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gpu_seconds(work: Callable[[], object]) -> float:
    """Seconds that one call takes on the GPU."""
    begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    work()
    done.record()
    done.synchronize()
    return begun.elapsed_time(done) / 1000


def in_turns(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each form, round by round, A B C A B C."""
    for work in forms.values():
        for _ in range(3):
            work()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, work in forms.items():
            times[name].append(gpu_seconds(work))
    return times


def peak_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product, the best of several."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    return 2 * 8192**3 / min(in_turns({"product": lambda: a @ b}, 8)["product"]) / 1e12


def compare(
    reference: torch.nn.Module | None,
    network: HAT,
    frames: torch.Tensor,
    peaks: dict[str, float],
    rounds: int,
    *,
    is_compiled: bool = False,
) -> dict[str, object]:
    """One network in all forms."""
    device = torch.device("cuda")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(frames[:1])
    flops = counter.get_total_flops() * frames.shape[0]
    frames = frames.to(device)
    ours: dict[str, Network] = {name: build(network, "torch", precision=name, device=device) for name in DTYPES}
    if is_compiled:
        ours["fp16 compiled"] = build(network, "torch-compiled", precision="fp16", device=device)
    forms: dict[str, Callable[[], object]] = {
        f"ours {name}": (lambda form=form: form(frames)) for name, form in ours.items()
    }
    if reference is not None:
        theirs, given = reference.to(device, torch.bfloat16), frames.to(torch.bfloat16)
        forms["reference bf16"] = lambda: theirs(given)
    with torch.inference_mode():
        times = in_turns(forms, rounds)
    result: dict[str, object] = {"input": list(frames.shape), "gflop_a_frame": flops / frames.shape[0] / 1e9}
    for form, values in times.items():
        median = statistics.median(values)
        result[form] = {
            "frames_per_second": frames.shape[0] / median,
            "tflops": flops / median / 1e12,
            "share_of_peak": flops / median / 1e12 / peaks[form.split()[1]],
        }
        if "reference bf16" in times:
            ratios = (a / b for a, b in zip(times["reference bf16"], values, strict=True))
            result[form]["speedup_over_reference"] = statistics.median(ratios)  # type: ignore[index]
    return result


def precision_psnr() -> dict[str, dict[str, float]]:
    """dB of each precision against fp32 on the GPU, for the shipped models, on noise and edges."""
    result = {}
    for scale in (2, 4):
        model = load_model("hat-nano", scale=scale)
        frames = torch.rand(2, 3, 180, 320)
        exact = Upscaler(model, device="cuda", precision="fp32")(frames)
        decibels = {}
        for precision in ("fp16", "bf16"):
            error = Upscaler(model, device="cuda", precision=precision)(frames) - exact
            decibels[precision] = float(-10 * torch.log10((error**2).mean()))
        result[f"hat-nano x{scale}"] = decibels
    return result


def long_clip(folder: Path, times: int = 4) -> Path:
    """The sample clip several times over, so that what a run begins and ends with counts little."""
    path = folder / "long.mp4"
    with av.open(CLIP) as source, av.open(path, "w") as target:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        copy = target.add_stream_from_template(stream)
        step = (packets[1].dts or 0) - (packets[0].dts or 0)
        for _ in range(times):
            for packet in packets:
                packet.stream = copy
                target.mux(packet)
                packet.pts, packet.dts = packet.pts + len(packets) * step, packet.dts + len(packets) * step
    return path


def end_to_end(clip: Path, decoder: str, encoder: str | None, batch: int | None, processes: int) -> dict[str, object]:
    """A clip from file to proven file, by so many processes on the one GPU; or why it cannot go that way."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        options = UpscaleOptions(
            device=",".join(["cuda:0"] * processes),
            decoder=decoder,  # type: ignore[arg-type]
            encoder=encoder,
            batch=batch,
            segment=2,
            trace=trace if processes == 1 else None,
        )
        try:
            report = upscale_file(clip, Path(folder) / "out.mp4", options)
        except HatVideoError as error:
            return {"refused": str(error)}
        events = json.loads(trace.read_text())["traceEvents"] if processes == 1 else []
    spans = [(event["cat"], event["ts"], event["ts"] + event["dur"], None) for event in events if event["ph"] == "X"]
    others = ("decode", "copy in", "copy out", "encode")
    return {
        "frames_per_second": report.fps,
        "seconds": report.seconds,
        "recipe": {key: report.recipe[key] for key in ("precision", "tile", "batch", "decoder")},
        "busy_while_the_model_is": {lane: busy_share(spans, lane, during="model") for lane in others} if spans else {},
        "hidden_behind_the_model": {lane: busy_share(spans, "model", during=lane) for lane in others} if spans else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch sees no GPU here")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    peaks = {word: peak_tflops(dtype) for word, dtype in DTYPES.items()}
    hat = HATConfig(depths=(6,), num_heads=(6,))
    try:
        from tests.reference import reference_hat

        reference = reference_hat(hat)
        state = {key: value for key, value in reference.state_dict().items() if "position_index" not in key}
        large = HAT(infer_config(state, Path("reference"))).eval()
        large.load_state_dict(state)
    except ImportError as error:
        print(f"the reference is not installed: {error}")
        reference, large = None, HAT(hat).eval()
    nano = load_model("hat-nano", scale=2).network
    assert nano is not None
    target = ROOT / "benchmarks" / "results" / f"gpu-{slug(name)}.json"
    result: dict[str, object] = {
        "command": "python benchmarks/gpu.py",
        "gpu": name,
        "memory_gib": round(gpu_memory(torch.device("cuda")).total / (1 << 30), 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "peak_tflops": peaks,
    }
    folder = tempfile.TemporaryDirectory()
    clip = long_clip(Path(folder.name))
    parts: dict[str, Callable[[], object]] = {
        "doctor": examine,
        "precision_psnr_db": precision_psnr,
        **{
            f"end to end: {decoder}, {encoder or 'libx264'}, batch {batch or 'auto'}, {processes} process(es)": (
                lambda choice=(decoder, encoder, batch, processes): end_to_end(clip, *choice)
            )
            for decoder, encoder, batch, processes in (
                ("pyav", None, None, 1),
                ("nvdec", None, None, 1),
                ("dali", None, None, 1),
                ("pyav", None, None, 4),
                ("auto", "h264_nvenc", None, 1),
            )
        },
        "HAT, 1 RHAG of 6 HABs, x4": lambda: compare(
            reference, large, torch.rand(4, 3, 128, 128), peaks, arguments.rounds
        ),
        "hat-nano x2": lambda: compare(
            None, nano, torch.rand(8, 3, 184, 320), peaks, arguments.rounds, is_compiled=True
        ),
    }
    for part, measure in parts.items():
        result[part] = measure()
        # After each: machines with a GPU are often lent by the minute.
        target.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
        print(f"{part}: {json.dumps(result[part], default=str)}", flush=True)
    print(f"written to {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
