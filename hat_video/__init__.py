"""Video super-resolution with HAT, the Hybrid Attention Transformer: upscale a file, a directory of clips, a camera.

>>> from hat_video import UpscaleOptions, upscale_file
>>> report = upscale_file("clip.mp4", "clip_x2.mp4", UpscaleOptions(scale=2))
>>> report.verification
'proven: 128 frames, every timestamp, ...'
"""

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
