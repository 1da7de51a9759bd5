"""What this machine can do, and what would be chosen on it."""

from __future__ import annotations

import platform
from importlib.metadata import version

import av
import torch
from av.codec import codecs_available

from hat_video.errors import HatVideoError
from hat_video.inference.processors import cpu_count
from hat_video.inference.upscaler import Upscaler
from hat_video.media.dali_source import install_reasons
from hat_video.model.zoo import default_model_name, load_model

__all__ = ["examine"]

_ENCODERS = (
    "libx264",
    "libx265",
    "libsvtav1",
    "libvpx-vp9",
    "ffv1",
    "prores_ks",
    "h264_nvenc",
    "hevc_nvenc",
    "av1_nvenc",
)


def examine() -> dict[str, object]:
    """Facts about the machine and the choices that follow from them; computes and writes nothing."""
    dali = install_reasons()
    facts: dict[str, object] = {
        "hat-video": version("hat-video"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "PyAV": f"{av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}",
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "frames in flight": cpu_count(),
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "not available to torch",
        "decoders": ["pyav", *(("nvdec", "dali")[: 1 + (not dali)] if torch.cuda.is_available() else ())],
        "DALI": dali[0] if dali else "installed; it decodes on an NVIDIA GPU only",
        # Being compiled in is no promise: a hardware encoder opens only where its driver is.
        "encoders": [name for name in _ENCODERS if name in codecs_available],
    }
    try:
        model = load_model(default_model_name(2), scale=2)
        upscaler = Upscaler(model)
        facts["default model"] = f"{model.name} x{model.scale}"
        facts["device"] = str(upscaler.device)
        facts["precision"] = upscaler.precision
        facts["computed by"] = upscaler.backend
    except HatVideoError as error:
        facts["default model"] = f"cannot be loaded: {error}"
    return facts
