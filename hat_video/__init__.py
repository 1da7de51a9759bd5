"""Video super-resolution with HAT, the Hybrid Attention Transformer: upscale a file, a directory of clips, a camera.

>>> from hat_video import UpscaleOptions, upscale_file
>>> report = upscale_file("clip.mp4", "clip_x2.mp4", UpscaleOptions(scale=2))
>>> report.verification
'proven: 128 frames, every timestamp, ...'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hat_video.errors import HatVideoError
    from hat_video.frames import FrameBatch, VideoInfo
    from hat_video.inference.upscaler import Upscaler
    from hat_video.jobs.camera import upscale_camera
    from hat_video.jobs.camera_options import CameraOptions
    from hat_video.jobs.directory import upscale_directory
    from hat_video.jobs.file import upscale_file
    from hat_video.jobs.options import UpscaleOptions
    from hat_video.jobs.report import FileReport, Progress
    from hat_video.live.figures import LiveFigures
    from hat_video.media.probe import probe
    from hat_video.media.source import open_source
    from hat_video.model.zoo import load_model

__all__ = [
    "CameraOptions",
    "FileReport",
    "FrameBatch",
    "HatVideoError",
    "LiveFigures",
    "Progress",
    "UpscaleOptions",
    "Upscaler",
    "VideoInfo",
    "load_model",
    "open_source",
    "probe",
    "upscale_camera",
    "upscale_directory",
    "upscale_file",
]

# Found when they are first asked for: torch takes seconds to import, in which the command has to hear Ctrl-C.
_HOMES = {
    "CameraOptions": "jobs.camera_options",
    "FileReport": "jobs.report",
    "FrameBatch": "frames",
    "HatVideoError": "errors",
    "LiveFigures": "live.figures",
    "Progress": "jobs.report",
    "UpscaleOptions": "jobs.options",
    "Upscaler": "inference.upscaler",
    "VideoInfo": "frames",
    "load_model": "model.zoo",
    "open_source": "media.source",
    "probe": "media.probe",
    "upscale_camera": "jobs.camera",
    "upscale_directory": "jobs.directory",
    "upscale_file": "jobs.file",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
