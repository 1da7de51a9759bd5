"""Video super-resolution with HAT, the Hybrid Attention Transformer: upscale a file, or a directory of clips.

>>> from hat_video import UpscaleOptions, upscale_file
>>> report = upscale_file("clip.mp4", "clip_x2.mp4", UpscaleOptions(scale=2))
>>> report.verification
'proven: 128 frames, every timestamp, ...'
"""

from hat_video.errors import HatVideoError
from hat_video.frames import ColorInfo, FrameBatch, PixelFormat, VideoInfo
from hat_video.inference.upscaler import Upscaler
from hat_video.jobs.directory import DirectoryReport, upscale_directory
from hat_video.jobs.file import upscale_file
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.report import FileReport, Progress
from hat_video.media.probe import probe
from hat_video.media.source import open_source
from hat_video.model.zoo import load_model

__all__ = [
    "ColorInfo",
    "DirectoryReport",
    "FileReport",
    "FrameBatch",
    "HatVideoError",
    "PixelFormat",
    "Progress",
    "UpscaleOptions",
    "Upscaler",
    "VideoInfo",
    "load_model",
    "open_source",
    "probe",
    "upscale_directory",
    "upscale_file",
]
