"""What only a GPU can show. `make gpu-acceptance` runs these where there is one, and there none may be skipped."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from hat_video.color import from_rgb, to_rgb
from hat_video.errors import CancelledError, OptionError
from hat_video.frames import ColorInfo, FrameBatch, PixelFormat
from hat_video.inference.double_buffer import StreamLane, run_through
from hat_video.inference.fit import fit_to_gpu, gpu_memory, trial_bytes
from hat_video.inference.timeline import Timeline, busy_share
from hat_video.inference.upscaler import Upscaler
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.picture import FrameUpscaler
from hat_video.media.encoder import SegmentWriter, plan_encoder
from hat_video.media.source import open_source
from hat_video.model.zoo import load_model
from hat_video.training.loop import Training, _distance
from hat_video.training.recipe import Stage, TrainRecipe
from tests.clips import make_clip
from tests.command import sidecars, start, upscale, wait_for_segments
from tests.test_training import RECIPE, tiles
from tests.test_upscaler import poisoned

__all__ = ["tiles"]  # a fixture is used by its name alone

pytestmark = pytest.mark.gpu

CLIP = Path(__file__).parents[1] / "samples" / "bbb_320x180.mp4"


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a.double().cpu() - b.double().cpu()) ** 2).mean()))


def sample(count: int = 4) -> torch.Tensor:
    """(count, 3, 180, 320) of the sample clip, in [0, 1]."""
    with open_source(CLIP, batch=count) as source:
        batch = next(iter(source))
        return to_rgb(batch.planes, source.info.pixel_format, source.info.color).clamp(0, 1)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(("precision", "floor"), [("fp32", 60), ("bf16", 45), ("fp16", 50), ("auto", 50)])
def test_the_network_equals_the_cpus(scale: int, precision: str, floor: float) -> None:
    model, frames = load_model("hat-nano", scale=scale), sample(2)
    expected = Upscaler(model, device="cpu", precision="fp32")(frames)
    ours = Upscaler(model, device="cuda", precision=precision)
    assert psnr(ours(frames), expected) > floor
    assert precision != "auto" or ours.precision == "fp16"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_compiled_blocks_compute_the_same(precision: str) -> None:
    model, frames = load_model("hat-nano", scale=2), sample(2)
    eager = Upscaler(model, device="cuda", precision=precision)(frames)
    compiled = Upscaler(model, device="cuda", precision=precision, backend="torch-compiled")(frames)
    assert psnr(compiled, eager) > (70 if precision == "fp32" else 50)


@pytest.mark.parametrize("name", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "gbrp", "gray"])
@pytest.mark.parametrize("matrix", [1, 6, 9])
def test_colours_equal_the_cpus(name: str, matrix: int) -> None:
    fmt = PixelFormat.parse(name)
    color = ColorInfo(0 if fmt.kind == "rgb" else matrix, 1, 1, fmt.kind == "rgb", "left")
    rgb = sample(1)
    here = from_rgb(rgb, fmt, color)
    there = from_rgb(rgb.cuda(), fmt, color)
    for a, b in zip(here, there, strict=True):
        gap = (a.int() - b.cpu().int()).abs()
        assert gap.max() <= 1, "only what lies between two values may fall to either"
        assert (gap > 0).float().mean() < 0.001
    back = to_rgb([plane.cuda() for plane in here], fmt, color)
    assert (back.cpu() - to_rgb(here, fmt, color)).abs().max() < 1e-4


def film(path: Path) -> tuple[list[int], torch.Tensor]:
    """(pts, luma) of a whole film."""
    with open_source(path) as source:
        batches = list(source)
    return [b.pts[0] for b in batches], torch.stack([b.planes[0][0] for b in batches]).float() / 255


def test_a_film_equals_the_cpus(tmp_path: Path) -> None:
    reports = {}
    for device, precision in (("cpu", "fp32"), ("cuda", "auto")):
        options = UpscaleOptions(device=device, precision=precision, encoder="ffv1", duration="2")  # type: ignore[arg-type]
        reports[device] = upscale_file(CLIP, tmp_path / f"{device}.mkv", options)
    (pts, expected), (ours_pts, ours) = film(tmp_path / "cpu.mkv"), film(tmp_path / "cuda.mkv")
    assert ours_pts == pts
    assert psnr(ours, expected) > 45
    assert reports["cuda"].recipe["device"] == "cuda"
    assert reports["cuda"].recipe["precision"] == "fp16"


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    words = ("--device", "cuda", "--segment", "0.5", "--preset", "ultrafast", "--duration", "4")
    assert upscale(CLIP, "-o", tmp_path / "whole.mp4", *words, "-q") == 0
    output = tmp_path / "out.mp4"
    process = start("upscale", CLIP, "-o", output, *words)
    wait_for_segments(process, output, 2)
    process.kill()
    process.communicate()
    assert sidecars(output)
    assert upscale(CLIP, "-o", output, *words, "-q") == 0
    assert output.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_two_processes_on_one_gpu_give_the_same_bytes(tmp_path: Path) -> None:
    words = ("--segment", "0.5", "--duration", "3", "-q")
    assert upscale(CLIP, "-o", tmp_path / "one.mp4", *words, "--device", "cuda:0") == 0
    assert upscale(CLIP, "-o", tmp_path / "two.mp4", *words, "--device", "cuda:0,cuda:0") == 0
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


@pytest.mark.parametrize("slow", ["copy in", "model", "copy out"])
def test_no_stream_overtakes_another(slow: str) -> None:
    """Each stage waits a little on the GPU before it reads; memory that is free is overwritten at once."""
    device = torch.device("cuda")
    wait = 2_000_000  # cycles: about a millisecond

    def poison() -> None:
        torch.full((3, 96, 96), -7.0, device=device)

    def copy_in(batch: FrameBatch) -> FrameBatch:
        if slow == "copy in":
            torch.cuda._sleep(wait)
        made = FrameBatch(tuple(p.pin_memory().to(device, non_blocking=True) for p in batch.planes), batch.pts)
        poison()
        return made

    def model(batch: FrameBatch) -> FrameBatch:
        if slow == "model":
            torch.cuda._sleep(wait)
        made = FrameBatch(tuple(2 * p + 1 for p in batch.planes), batch.pts)
        poison()
        return made

    def copy_out(batch: FrameBatch) -> FrameBatch:
        if slow == "copy out":
            torch.cuda._sleep(wait)
        hosts = []
        for plane in batch.planes:
            host = torch.empty(plane.shape, pin_memory=True)
            hosts.append(host.copy_(plane, non_blocking=True))
        poison()
        return FrameBatch(tuple(hosts), batch.pts)

    def source() -> Iterator[FrameBatch]:
        for n in range(300):
            yield FrameBatch((torch.full((1, 96, 96), float(n)),), (n,))

    stages = [(StreamLane("copy in", device), copy_in), (StreamLane("model", device), model),
              (StreamLane("copy out", device), copy_out)]  # fmt: skip
    count = 0
    for n, batch in enumerate(run_through(source(), stages, depth=2, stop=threading.Event())):
        assert batch.pts == (n,)
        assert bool((batch.planes[0] == 2 * n + 1).all()), f"batch {n} was read or written too early"
        count += 1
    assert count == 300


def test_copies_and_the_model_overlap() -> None:
    device, timeline = torch.device("cuda"), Timeline(keeps_spans=True)
    frames = torch.zeros(1, 4096, 4096).pin_memory()
    stages = [
        (StreamLane("copy in", device, timeline), lambda batch: batch.planes[0].to(device, non_blocking=True)),
        (StreamLane("model", device, timeline), lambda plane: (torch.cuda._sleep(20_000_000), plane + 1)[1]),
        (StreamLane("copy out", device, timeline), lambda plane: torch.empty(plane.shape, pin_memory=True).copy_(
            plane, non_blocking=True)),
    ]  # fmt: skip
    items = (FrameBatch((frames,), (n,)) for n in range(60))
    assert sum(1 for _ in run_through(items, stages, depth=2, stop=threading.Event())) == 60
    # The first copies wait for pinned memory to be made.
    began = sorted(begin for lane, begin, _, _ in timeline.spans if lane == "model")
    spans = [span for span in timeline.spans if began[10] < span[1] < began[-2]]
    assert busy_share(spans, "model", during="copy in") > 0.9
    assert busy_share(spans, "model", during="copy out") > 0.9


@pytest.mark.parametrize(("repeated", "tile"), [(False, None), (True, None), (False, 64)])
def test_the_network_is_queued_without_waiting_for_the_gpu(repeated: bool, tile: int | None) -> None:
    with open_source(CLIP, batch=4) as source:
        batch, small = next(iter(source)), source.info
    large = replace(small, width=2 * small.width, height=2 * small.height)
    planes = tuple(plane[[0, 1, 1, 2]] if repeated else plane for plane in batch.planes)
    # Over the whole picture, so that tiles are those that are blended.
    model = load_model("hat-nano", scale=2).pooled(16 if tile is None else 0)
    frames = FrameUpscaler(Upscaler(model, device="cuda", tile=tile), small, large)
    for mode in ("default", "error"):
        frames.forget()
        task = frames.look(FrameBatch(planes, batch.pts))
        task = replace(task, batch=FrameBatch(tuple(plane.cuda() for plane in planes), batch.pts))
        torch.cuda.set_sync_debug_mode(mode)
        try:
            made = frames(task)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(frames.settled(made)) == 4
    assert frames.same == 2 * repeated


def test_memory_stays_flat_over_ten_thousand_frames(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=64, height=48, frames=10_000, gop=50, audio=(), rate=50)
    seen: list[tuple[int, int, int]] = []

    def watch(progress: object) -> None:
        done = getattr(progress, "frames_done", 0)
        seen.append((done, torch.cuda.memory_reserved(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

    options = UpscaleOptions(device="cuda", preset="ultrafast", segment=20)
    report = upscale_file(clip, tmp_path / "out.mp4", options, on_progress=watch)
    assert report.frames["out"] == 10_000
    early = next(row for row in seen if row[0] > 2000)
    assert seen[-1][1] <= early[1] + (64 << 20), "memory of the GPU grows"
    assert seen[-1][2] <= early[2] + (128 << 10), "memory grows"


def test_a_batch_that_does_not_fit_is_halved_and_a_frame_is_not_lost() -> None:
    model, frames = load_model("hat-nano", scale=2), sample(4)
    upscaler = Upscaler(model, device="cuda", precision="fp32")
    expected = upscaler(frames)
    one = trial_bytes(upscaler, 1, 180, 320)
    assert one is not None
    total = gpu_memory(upscaler.device).total
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2.5 * one) / total)
        assert trial_bytes(upscaler, 8, 180, 320) is None
        assert psnr(upscaler(torch.cat([frames, frames])), torch.cat([expected, expected])) > 60
        fit = fit_to_gpu(180, 320, replace(gpu_memory(upscaler.device), free=int(2.5 * one)),
                         lambda tile, n: trial_bytes(upscaler, n, 180, 320))  # fmt: skip
        assert fit.batch <= 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_frame_that_is_too_large_is_cut_into_tiles(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=1280, height=720, frames=5, audio=())
    torch.cuda.empty_cache()
    total = gpu_memory(torch.device("cuda")).total
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (512 << 20)) / total)
        report = upscale_file(clip, tmp_path / "out.mp4", UpscaleOptions(device="cuda", precision="fp32"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert report.recipe["tile"] >= 64
    assert report.frames["out"] == 5


def test_overflow_is_redone_in_a_film(tmp_path: Path) -> None:
    options = UpscaleOptions(device="cuda", precision="fp16", duration="0.4", encoder="ffv1")
    report = upscale_file(CLIP, tmp_path / "out.mkv", options, model=poisoned(load_model("hat-nano", scale=2), 1e6))
    assert any("non-finite" in note for note in report.notes)


def test_a_trace_has_the_gpus_lanes(tmp_path: Path) -> None:
    options = UpscaleOptions(device="cuda", duration="3", trace=tmp_path / "trace.json")
    upscale_file(CLIP, tmp_path / "out.mp4", options)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {event["cat"] for event in events if event["ph"] == "X"}
    assert lanes == {"decode", "copy in", "model", "copy out", "encode"}
    spans = [(e["cat"], e["ts"], e["ts"] + e["dur"], None) for e in events if e["ph"] == "X"]
    assert busy_share(spans, "model", during="encode") > 0


def test_frames_go_to_nvenc_where_they_lie(tmp_path: Path) -> None:
    with open_source(CLIP, batch=8) as source:
        batch, small = next(iter(source)), source.info
    try:
        host, info = plan_encoder("matroska", small, small.width, small.height, name="h264_nvenc")
    except OptionError:
        # Some data-centre GPUs have no encoder at all; then `auto` must say so and go on.
        report = upscale_file(CLIP, tmp_path / "out.mp4", UpscaleOptions(device="cuda", encoder="auto", duration="0.4"))
        assert any("not by h264_nvenc" in note for note in report.notes)
        return
    direct, _ = plan_encoder("matroska", small, small.width, small.height, name="h264_nvenc", from_gpu=True)
    assert (direct.memory, direct.pixel_format) == ("cuda", "nv12")
    films = []
    for spec, planes in ((host, batch.planes), (direct, tuple(plane.cuda() for plane in batch.planes))):
        path = tmp_path / f"{spec.memory}.mkv"
        with SegmentWriter(path, spec, info) as writer:
            for again in range(10):
                pts = tuple(again * len(batch) + pts for pts in range(len(batch)))
                writer.write(FrameBatch(planes, pts))
            writer.close()
        with open_source(path) as source:
            films.append([torch.cat(plane).float() / 255 for plane in zip(*(b.planes for b in source), strict=True)])
    for plane, (a, b) in enumerate(zip(*films, strict=True)):
        assert psnr(a, b) > 40, f"plane {plane} came out of the GPU's memory as another"


def test_a_film_stays_on_the_gpu_from_end_to_end(tmp_path: Path) -> None:
    report = upscale_file(CLIP, tmp_path / "a.mp4", UpscaleOptions(device="cuda", encoder="auto", duration="1"))
    assert report.frames["out"] == len(film(tmp_path / "a.mp4")[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("degradation", ["bicubic", "video"])
def test_training_learns_what_it_does_on_a_cpu(tiles: Path, tmp_path: Path, precision: str, degradation: str) -> None:
    stages = (
        Stage("pretrain", iterations=30, rate=2e-3, batch=8, patch=32, warmup=3),
        Stage("finetune", iterations=10, rate=5e-4, batch=8, patch=32, warmup=0, loss="l2", luma=0.75),
    )
    recipe: TrainRecipe = replace(RECIPE, stages=stages, precision=precision, degradation=degradation)  # type: ignore[arg-type]
    held_out = {}
    for device in ("cpu", "cuda"):
        training = Training(recipe, tiles, tmp_path / device, device=device, threads=2, workers=2)
        training.run(on_progress=lambda progress: None, cancel=threading.Event())
        held_out[device] = training.evaluate()["held out"]
    assert abs(held_out["cuda"] - held_out["cpu"]) < 0.1


def test_a_training_on_the_gpu_goes_on_where_it_stopped(tiles: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, evaluate_every=6)
    cancel = threading.Event()
    with pytest.raises(CancelledError):
        Training(recipe, tiles, tmp_path, device="cuda").run(on_progress=lambda _: cancel.set(), cancel=cancel)
    training = Training(recipe, tiles, tmp_path, device="cuda")
    assert 0 < training.iteration < recipe.iterations
    training.run(on_progress=lambda _: None, cancel=threading.Event())
    assert training.iteration == recipe.iterations
    assert load_model(tmp_path / "model.safetensors").scale == 2


def test_a_training_step_is_queued_without_waiting_for_the_gpu(tiles: Path, tmp_path: Path) -> None:
    stage = Stage("finetune", iterations=4, rate=1e-3, batch=4, patch=16, loss="l2", luma=0.75)
    training = Training(replace(RECIPE, stages=(stage,)), tiles, tmp_path, device="cuda")
    gradients = training._gradients(training._shared_out(), stage)
    hr = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8).pin_memory()
    for mode in ("default", "default", "error", "default", "error"):  # the fourth is recorded, the fifth played back
        torch.cuda.set_sync_debug_mode(mode)
        try:
            training._step(gradients, (hr,))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.02), ("bf16", 0.08)])
def test_a_recorded_step_computes_what_was_recorded(
    tiles: Path,
    tmp_path: Path,
    precision: Literal["fp32", "bf16"],
    tolerance: float,
    compile: bool,  # noqa: A002
) -> None:
    """Of new pictures, with new weights, and in a stage whose channel attention pools otherwise."""
    stages = tuple(Stage(f"pool {box}", 9, 1e-3, 4, 16, loss="psnr", luma=0.75, attention_pool=box) for box in (0, 16))
    training = Training(
        replace(RECIPE, stages=stages, precision=precision), tiles, tmp_path, device="cuda:0", compile=compile
    )
    module, parameters = training._shared_out(), list(training.network.parameters())

    def reference(hr: torch.Tensor, stage: Stage) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        # A graph that stays alive is a recording's enemy: it keeps nodes that belong to another stream.
        hr, lr = training._pair((hr,))
        loss = _distance(module(lr), hr, stage)
        return loss.detach(), torch.autograd.grad(loss, parameters)

    for stage in stages:
        training._enter(stage, 0)
        gradients = training._gradients(module, stage)
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            hr = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator).pin_memory()
            expected, theirs = reference(hr, stage)
            before = [value.detach().clone() for value in parameters]
            loss = training._step(gradients, (hr,))
            norm = torch.stack([value.norm() for value in theirs]).norm()
            clipped = (training.recipe.clip / norm).clamp(max=1)
            torch.testing.assert_close(loss, expected, rtol=tolerance, atol=1e-4)
            errors = [(value.grad - clipped * own).norm() for value, own in zip(parameters, theirs, strict=True)]
            assert torch.stack(errors).norm() < tolerance * clipped * norm
            assert any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
