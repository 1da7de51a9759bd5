"""What an NVIDIA GPU of this machine can do for us, each thing tried for real: `hat-video doctor --gpu`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch

from hat_video.errors import HatVideoError, OptionError
from hat_video.frames import ColorInfo, FrameBatch, PixelFormat, VideoInfo
from hat_video.inference.fit import fit_to_gpu, gpu_memory, trial_bytes
from hat_video.inference.upscaler import Upscaler
from hat_video.media.encoder import SegmentWriter, plan_encoder
from hat_video.media.source import open_source
from hat_video.model.zoo import default_model_name, load_model

__all__ = ["GpuCheck", "check_gpu"]

_HEIGHT, _WIDTH, _FRAMES = 180, 320, 48
_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """One thing that was tried."""

    name: str
    works: bool
    text: str
    """What was found, or why it does not work; one line."""


def check_gpu(device: str = "cuda") -> Iterator[GpuCheck]:
    """Tries everything, one after the other; what does not work is reported and does not stop the rest."""
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield GpuCheck("torch", False, f"torch {torch.__version__}, {built}, sees no GPU; is there a driver?")
        return
    gpu = torch.device(device)
    memory = gpu_memory(gpu)
    major, minor = torch.cuda.get_device_capability(gpu)
    yield GpuCheck(
        "torch",
        True,
        f"{torch.cuda.get_device_name(gpu)}, {memory.total / (1 << 30):.1f} GiB, {memory.free / (1 << 30):.1f} free,"
        f" compute {major}.{minor}; torch {torch.__version__}, CUDA {torch.version.cuda}",
    )
    yield _tried("precision", partial(_precision, device))
    yield _tried("tile and batch", partial(_fit, gpu, device))
    yield _tried("speed", partial(_speed, device))
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mkv"
        _write_clip(clip)
        for decoder in ("dali", "nvdec"):
            yield _tried(decoder, partial(_decoder, decoder, clip, device))
    for encoder in ("h264_nvenc", "hevc_nvenc", "av1_nvenc"):
        yield _tried(encoder, partial(_encoder, encoder))


def _tried(name: str, work: Callable[[], str]) -> GpuCheck:
    try:
        return GpuCheck(name, True, work())
    except (HatVideoError, RuntimeError) as error:
        return GpuCheck(name, False, " ".join(str(error).split()))


def _upscaler(device: str, precision: str = "auto") -> Upscaler:
    return Upscaler(load_model(default_model_name(2), scale=2), device=device, precision=precision)


def _precision(device: str) -> str:
    frame = torch.rand(1, 3, _HEIGHT, _WIDTH, generator=torch.Generator().manual_seed(0))
    chosen, exact = _upscaler(device), _upscaler(device, "fp32")
    error = float(((chosen(frame) - exact(frame)) ** 2).mean())
    return f"auto is {chosen.precision}, {-10 * torch.log10(torch.tensor(max(error, 1e-20))):.1f} dB from fp32 on noise"


def _fit(gpu: torch.device, device: str) -> str:
    upscaler = _upscaler(device)

    def trial(tile: int | None, frames: int) -> int | None:
        upscaler.tile = tile
        return trial_bytes(upscaler, frames, 1080, 1920)

    fit = fit_to_gpu(1080, 1920, gpu_memory(gpu), trial)
    return f"1920x1080: {f'tiles of {fit.tile}' if fit.tile else 'whole frames'}, {fit.batch} at once"


def _speed(device: str) -> str:
    upscaler = _upscaler(device)
    frames = torch.rand(8, 3, _HEIGHT, _WIDTH, device=device)
    upscaler(frames)
    torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS:
        upscaler.unchecked(frames)
        torch.cuda.synchronize()
        count += len(frames)
    pace = count / (time.perf_counter() - began)
    return f"{pace:.0f} frames/s of {_WIDTH}x{_HEIGHT} through {upscaler.model.name} x2, the network alone"


def _info() -> VideoInfo:
    color = ColorInfo(1, 1, 1, False, "left")
    return VideoInfo(_WIDTH, _HEIGHT, Fraction(1, 25), Fraction(25), PixelFormat.parse("yuv420p"), color)


def _write_clip(path: Path) -> None:
    """H.264 with B-frames, every frame different."""
    spec, info = plan_encoder("matroska", _info(), _WIDTH, _HEIGHT)
    ramp = torch.arange(_WIDTH).expand(_HEIGHT, _WIDTH)
    with SegmentWriter(path, spec, info) as writer:
        for number in range(_FRAMES):
            luma = ((ramp + 5 * number) % 200 + 20).to(torch.uint8)[None]
            chroma = torch.full((1, _HEIGHT // 2, _WIDTH // 2), 96 + number, dtype=torch.uint8)
            writer.write(FrameBatch((luma, chroma, chroma), (number,)))
        writer.close()


def _decoder(name: str, clip: Path, device: str) -> str:
    with open_source(clip, decoder=name, device=device, goes_on=False) as source:
        began = time.perf_counter()
        count = sum(len(batch) for batch in source)
        pace = count / (time.perf_counter() - began)
    return f"{count} frames as PyAV gives them, {pace:.0f} frames/s of {_WIDTH}x{_HEIGHT}"


def _encoder(name: str) -> str:
    size = (2 * _WIDTH, 2 * _HEIGHT)
    plan_encoder("mp4", _info(), *size, name=name)
    try:
        plan_encoder("mp4", _info(), *size, name=name, from_gpu=True)
    except OptionError as error:
        return f"opens, but does not take frames where the GPU left them: {error}"
    return "opens, and takes frames where the GPU left them"
