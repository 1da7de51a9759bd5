"""What a caller may choose for a camera, declared once: the API takes it, the command line is made from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from hat_video.errors import OptionError
from hat_video.jobs.options import encoder_options_of, parse_time
from hat_video.live.sources import check_asked

__all__ = ["CameraOptions", "parse_span"]

_SPAN = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MOST_QUEUED = 1000


@dataclass(frozen=True, slots=True)
class CameraOptions:
    """How a camera is upscaled.

    Raises:
        OptionError: a value is out of range.
    """

    # The text beside a type is the option's documentation, and its help on the command line.
    model: Annotated[
        str | None, "a model's name or a HAT checkpoint, for every frame; with --ladder: the rung to begin with"
    ] = None
    scale: Annotated[Literal[1, 2, 3, 4] | None, "times wider and higher; default: the model's own, else 2"] = None
    ladder: Annotated[
        str | None,
        "models from the best to the fastest, with commas: when one cannot keep up, the next takes over;"
        " default, without --model: the default one, a faster one where there is one, then bicubic",
    ] = None
    max_latency: Annotated[
        float | None, "milliseconds from a frame's arrival to its encoded picture that the ladder must keep below"
    ] = None
    policy: Annotated[
        str, "latest: the newest frame is always next, older ones are dropped; queue:N: up to N frames wait"
    ] = "latest"
    size: Annotated[str | None, "WxH that the camera is asked for"] = None
    fps: Annotated[str | None, "frames a second that the camera is asked for"] = None
    input_format: Annotated[str | None, "FFmpeg's name of the input's format, or of a camera's (mjpeg, yuyv422)"] = None
    audio: Annotated[
        Literal["copy", "aac", "none"], "copy: as it is, where the outputs take it, else as AAC; aac: encode it anew"
    ] = "copy"
    retries: Annotated[
        int | None,
        "how often a lost camera is tried again, 0 for never; default: for ever. The first time must succeed",
    ] = None
    on_stall: Annotated[
        Literal["auto", "gap", "hold", "slate"],
        "while no frames come: nothing, the last picture again and again, or a test card; auto: hold where something"
        " is pushed to a server, else gap",
    ] = "auto"
    duration: Annotated[str | None, "stop after so long: seconds or HH:MM:SS; default: until Ctrl-C"] = None
    roi: Annotated[str | None, "X,Y,W,H: only this part of the picture; it can be moved on the page"] = None
    record_source: Annotated[Path | None, "keep the camera's own packets in this file, too (mkv, mp4, ts)"] = None
    segment: Annotated[
        str | None, "begin another file so often (10m, 1h); the outputs' names need %Y%m%d-%H%M%S or the like"
    ] = None
    keep: Annotated[str | None, "delete recorded segments that are older (12h, 7d)"] = None
    overwrite: Annotated[bool, "replace files that exist"] = False
    serve: Annotated[str | None, "HOST:PORT of a page to look at, with metrics (pip install 'hat-video[live]')"] = None
    token: Annotated[
        str | None, "what the page asks for; needed where it is served beyond this machine. Also $HAT_VIDEO_TOKEN"
    ] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:N"] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], "the networks' arithmetic; auto: the fastest safe one"
    ] = "auto"
    backend: Annotated[
        Literal["auto", "torch", "openvino"], "who computes; auto: on a CPU OpenVINO, where it is installed"
    ] = "auto"
    reuse: Annotated[
        Literal["auto", "same", "changed"],
        "same: a frame equal to the one before is not computed; changed: nor are unchanged parts; auto: as for files",
    ] = "auto"
    jobs: Annotated[int | None, "frames computed at once; default: one a core, on a GPU 1"] = None
    encoder: Annotated[str | None, "FFmpeg's name; default: libx264, on a GPU h264_nvenc where it opens"] = None
    crf: Annotated[int | None, "constant quality, lower is better; default: 20 for libx264"] = None
    preset: Annotated[str | None, "the encoder's preset; default: veryfast for libx264"] = None
    encoder_option: Annotated[
        tuple[str, ...], "KEY=VALUE for the encoder, can be repeated; an unknown key is an error"
    ] = ()

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise OptionError(f"--jobs {self.jobs}: must be 1 or more")
        if self.retries is not None and self.retries < 0:
            raise OptionError(f"--retries {self.retries}: must be 0 or more; leave it out to try for ever")
        if self.max_latency is not None and not 0 < self.max_latency < float("inf"):
            raise OptionError(f"--max-latency {self.max_latency:g}: must be milliseconds above 0, for instance 300")
        check_asked(self.size, self.fps)
        if self.ladder is not None and not all(name.strip() for name in self.ladder.split(",")):
            raise OptionError(f"--ladder {self.ladder!r}: must be models with commas, for instance hat-nano,bicubic")
        if self.keep is not None and self.segment is None:
            raise OptionError(f"--keep {self.keep}: deletes old segments; give --segment, too")
        if self.token is not None and self.serve is None:
            raise OptionError("--token: is what the page asks for; give --serve HOST:PORT, too")
        parse_time(self.duration, "--duration", is_above_zero=True)
        self.places()
        self.roi_box()
        for name in ("segment", "keep"):
            parse_span(getattr(self, name), f"--{name}")
        encoder_options_of(self.encoder_option)

    def places(self) -> int:
        """Frames that may wait for the network.

        Raises:
            OptionError: neither `latest` nor `queue:N`.
        """
        if self.policy == "latest":
            return 1
        kind, _, number = self.policy.partition(":")
        if kind != "queue" or not number.isdecimal() or not 1 <= int(number) <= _MOST_QUEUED:
            raise OptionError(f"--policy {self.policy}: must be latest, or queue:N with N from 1 to {_MOST_QUEUED}")
        return int(number)

    def roi_box(self) -> tuple[int, int, int, int] | None:
        """(x, y, width, height) of the part.

        Raises:
            OptionError: not four such numbers.
        """
        if self.roi is None:
            return None
        words = self.roi.split(",")
        if len(words) != 4 or not all(word.strip().isdecimal() for word in words):
            raise OptionError(f"--roi {self.roi}: must be X,Y,W,H in the camera's pixels, for instance 100,50,320,180")
        x, y, width, height = map(int, words)
        if width < 16 or height < 16:
            raise OptionError(f"--roi {self.roi}: must be 16 or more pixels wide and high")
        return x, y, width, height


def parse_span(text: str | None, name: str) -> float | None:
    """A length of time with its unit, `10m`, `1.5h` or `7d`, in seconds; None for None.

    Args:
        text: what was written.
        name: the option's, for the error.

    Raises:
        OptionError: it is no such length, or 0.
    """
    if text is None:
        return None
    match = _SPAN.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise OptionError(f"{name} {text}: must be a number above 0 with s, m, h or d, for instance 10m")
    return float(match[1]) * _UNITS[match[2]]
