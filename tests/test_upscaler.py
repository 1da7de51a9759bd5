"""The upscaler: any size, any precision, no NaN gets out, tiles, and what it refuses."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from hat_video.errors import OptionError, OutOfMemoryError, WorkError
from hat_video.inference.precision import has_fast_bf16
from hat_video.inference.tiling import overlap_of, tile_starts, tiled
from hat_video.inference.upscaler import Upscaler
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.plan import plan_file
from hat_video.jobs.work import Worker
from hat_video.media.source import open_source
from hat_video.model.resample import enlarge
from hat_video.model.zoo import Model, load_model
from tests.clips import make_clip
from tests.reference import FP32


@pytest.fixture(scope="module")
def nano() -> Model:
    return load_model("hat-nano", scale=2)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean()))


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (8, 8), (9, 7), (31, 33), (40, 64)])
def test_any_size(nano: Model, size: tuple[int, int]) -> None:
    frames = torch.rand(2, 3, *size)
    large = Upscaler(nano, precision="fp32")(frames)
    assert large.shape == (2, 3, 2 * size[0], 2 * size[1])
    assert large.dtype == torch.float32
    assert large.min() >= 0
    assert large.max() <= 1


def test_padding_is_upstreams(nano: Model) -> None:
    """Reflection on the right and below, then a crop."""
    frame = torch.rand(1, 3, 20, 29)
    padded = torch.nn.functional.pad(frame, (0, 3, 0, 4), mode="reflect")
    assert nano.network is not None
    with torch.inference_mode():
        expected = nano.network(padded)[:, :, :40, :58].clamp(0, 1)
    assert (Upscaler(nano, precision="fp32")(frame) - expected).abs().max() < FP32


def test_precisions_agree(nano: Model) -> None:
    frame = torch.rand(1, 3, 32, 32)
    exact = Upscaler(nano, precision="fp32")(frame)
    assert psnr(Upscaler(nano, precision="bf16")(frame), exact) > 40
    assert psnr(Upscaler(nano, precision="fp16")(frame), exact) > 60
    auto = Upscaler(nano)
    assert auto.precision == ("bf16" if has_fast_bf16(auto.device) else "fp32")


def poisoned(nano: Model, factor: float) -> Model:
    """A model whose last layers leave fp16's range."""
    import copy

    network = copy.deepcopy(nano.network)
    assert network is not None
    network.conv_last.weight.data.mul_(factor)
    return replace(nano, network=network)


def test_a_batch_that_is_not_finite_is_redone_safer(nano: Model) -> None:
    model = poisoned(nano, 1e6)
    frame = torch.rand(1, 3, 16, 16)
    guarded = Upscaler(model, precision="fp16")
    out = guarded(frame)
    assert guarded.redone == 1
    assert torch.equal(out, Upscaler(model, precision="bf16", backend="torch")(frame))


def test_unchecked_says_whether_all_is_finite(nano: Model) -> None:
    frame = torch.rand(1, 3, 16, 16)
    fine = Upscaler(nano, precision="fp32")
    out, is_finite = fine.unchecked(frame)
    assert bool(is_finite)
    assert torch.equal(out, fine(frame))
    assert not bool(Upscaler(poisoned(nano, 1e6), precision="fp16").unchecked(frame)[1])


def test_frames_that_are_not_finite_are_redone_in_a_film(nano: Model, tmp_path: Path) -> None:
    """A model whose fp16 overflows: the film is the one that bf16 gives, and the report says how often."""
    clip = make_clip(tmp_path / "clip.mp4", width=16, height=16, frames=5, audio=())
    model, films = poisoned(nano, 1e6), {}
    for precision in ("fp16", "bf16"):
        output = tmp_path / f"{precision}.mkv"
        options = UpscaleOptions(encoder="ffv1", precision=precision, jobs=2, backend="torch")  # type: ignore[arg-type]
        report = upscale_file(clip, output, options, model=model)
        with open_source(output) as source:
            films[precision] = [batch.planes for batch in source.read()]
        redone = [note for note in report.notes if "non-finite" in note]
        assert redone == (["5 batches gave non-finite values and were computed again one precision safer"]
                          if precision == "fp16" else [])  # fmt: skip
    for ours, theirs in zip(films["fp16"], films["bf16"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_frame_that_does_not_fit_is_named(nano: Model, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", width=16, height=16, frames=5, audio=(), rate=10)

    def limit(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes.")

    plan = plan_file(clip, tmp_path / "out.mkv", UpscaleOptions(precision="fp32", jobs=1, backend="torch"), nano)
    plan.upscaler._network("fp32", 0).register_forward_pre_hook(limit)
    folder = tmp_path / "work"
    folder.mkdir()
    worker = Worker(plan.manifest, folder, upscaler=plan.upscaler, jobs=1, stop=Event(), on_batch=lambda batch: None)
    with worker, pytest.raises(OutOfMemoryError, match=r"--tile 64 \(at the frame with pts 0\)"):
        worker.work(plan.manifest.segments[0])
    assert not list(folder.iterdir())


def test_a_network_that_is_never_finite_is_an_error(nano: Model) -> None:
    with pytest.raises(WorkError, match="NaN or infinite pixels even in fp32"):
        Upscaler(poisoned(nano, float("nan")), precision="fp32")(torch.rand(1, 3, 16, 16))


def test_a_batch_that_does_not_fit_is_halved(nano: Model) -> None:
    """The limit is set on the real network: more than one frame at once is more than this machine has."""
    upscaler = Upscaler(nano, precision="fp32", backend="torch")
    frames = torch.rand(4, 3, 16, 16)
    expected = upscaler(frames)

    def limit(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[0] > limit_frames:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes.")

    handle = upscaler._network("fp32", 0).register_forward_pre_hook(limit)
    limit_frames = 1
    assert (upscaler(frames) - expected).abs().max() < FP32
    limit_frames = 0
    with pytest.raises(OutOfMemoryError, match="--tile 64"):
        upscaler(frames)
    handle.remove()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_frames_reuse_memory() -> None:
    """A frame of this size touches some 60 MB; mapped anew, that is over 10,000 page faults a frame."""
    # In a process of its own: what other tests leave free in this one's heap has never been touched.
    code = """
import resource, threading, torch
from hat_video import Upscaler, load_model
from hat_video.inference.double_buffer import map_in_flight

upscaler = Upscaler(load_model("hat-nano"), precision="fp32", backend="torch")
frames = [torch.rand(1, 3, 96, 96) for _ in range(6)]

def run():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in map_in_flight(upscaler, frames, workers=1, stop=threading.Event()):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

run()
print(run() / len(frames))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 3000


def test_tiles_are_close_to_the_full_frame(nano: Model) -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 14), size=(96, 112), mode="bilinear")
    whole = Upscaler(nano, precision="fp32")(smooth)
    tiles = Upscaler(nano, precision="fp32", tile=64)(smooth)
    assert tiles.shape == whole.shape
    assert psnr(tiles, whole) > 45


def test_tiles_of_a_local_function_are_exact() -> None:
    """A bicubic filter reaches 2 pixels; tiles that share 16 must not show, at borders of tiles or of the frame."""
    frame = torch.rand(1, 3, 100, 71)

    def bicubic(piece: torch.Tensor) -> torch.Tensor:
        return enlarge(piece, 2, "bicubic")

    inner = (slice(None), slice(None), slice(6, -6), slice(6, -6))
    assert (tiled(bicubic, frame, 2, 64)[inner] - bicubic(frame)[inner]).abs().max() < 0.12
    ones = tiled(lambda piece: torch.ones(1, 1, 2 * piece.shape[2], 2 * piece.shape[3]), frame[:, :1], 2, 64)
    assert torch.allclose(ones, torch.ones_like(ones))


@pytest.mark.parametrize(("length", "tile"), [(10, 64), (64, 64), (65, 64), (1000, 64), (1080, 256)])
def test_tiles_cover_an_axis(length: int, tile: int) -> None:
    overlap = overlap_of(tile)
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile >= length
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))


def test_refusals(nano: Model) -> None:
    with pytest.raises(OptionError, match="--precision int8"):
        Upscaler(nano, precision="int8")
    with pytest.raises(OptionError, match="--device toaster"):
        Upscaler(nano, device="toaster")
    with pytest.raises(OptionError, match="--device mps"):
        Upscaler(nano, device="mps")
    with pytest.raises(OptionError, match="--tile 8"):
        Upscaler(nano, tile=8)
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="0 CUDA devices"):
            Upscaler(nano, device="cuda")
    for wrong in (torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\)"):
            Upscaler(nano)(wrong)


def test_resamplers_need_no_network() -> None:
    frame = torch.rand(1, 3, 9, 11)
    upscaler = Upscaler(load_model("lanczos", scale=3), precision="bf16", device="cpu")
    assert upscaler.precision == "fp32"
    assert upscaler(frame).shape == (1, 3, 27, 33)
