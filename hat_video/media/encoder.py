"""Frames to packets: the choice of an encoder, proven by opening it, and the writing of one segment."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

import av
import torch
from av.codec import Codec
from av.codec.context import Flags
from av.error import FFmpegError

from hat_video.errors import OptionError, OutputError
from hat_video.frames import ColorInfo, FrameBatch, PixelFormat, VideoInfo
from hat_video.media.encoder_frames import WOVEN, EncoderFrames, can_be_woven
from hat_video.media.ffmpeg_log import hear_ffmpeg
from hat_video.media.formats import choose_format, choose_shape
from hat_video.media.hdr import hdr_options, hdr_written_by
from hat_video.media.stereo import stereo_options, stereo_written_by

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["EncoderSpec", "SegmentFacts", "SegmentWriter", "add_video", "plan_encoder"]


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """An encoder with every choice settled."""

    name: str
    """FFmpeg's name."""
    pixel_format: str
    """The video's planar format, or one of the same code values in another order, to which PyAV turns frames."""
    crf: int | None
    """None where the encoder has no such thing."""
    preset: str | None
    options: dict[str, str]
    """Further private options."""
    threads: int
    """Fixed: another number gives other bytes."""
    memory: Literal["host", "cuda"] = "host"
    """Where its frames lie."""

    def private_options(self) -> dict[str, str]:
        """All that is handed to the encoder by name."""
        crf = {} if self.crf is None else {_CRF_NAME.get(self.name, "crf"): str(self.crf)}
        preset = {} if self.preset is None else {"preset": self.preset}
        return {**crf, **preset, **self.options}


@dataclass(frozen=True, slots=True)
class _Defaults:
    crf: int | None
    preset: str | None
    options: dict[str, str]
    crf_range: tuple[int, int] = (0, 51)


Quality = Literal["archive", "draft", "lossless"]
"""What a picture is for, whichever encoder makes it."""

_X26_PRESETS = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
    "placebo",
)
_CRF_NAME = {"h264_nvenc": "cq", "hevc_nvenc": "cq", "av1_nvenc": "cq"}
_DEFAULTS = {
    "libx264": _Defaults(16, "medium", {}),
    "libx265": _Defaults(18, "medium", {"x265-params": "log-level=none"}),
    "libsvtav1": _Defaults(24, "8", {}, (0, 63)),
    "libvpx-vp9": _Defaults(22, None, {"b": "0", "deadline": "good", "cpu-used": "3", "row-mt": "1"}, (0, 63)),
    "ffv1": _Defaults(None, None, {"level": "3", "slicecrc": "1"}),
    "prores_ks": _Defaults(None, None, {"profile": "3"}),
    "h264_nvenc": _Defaults(18, "p5", {"rc": "vbr"}),
    "hevc_nvenc": _Defaults(20, "p5", {"rc": "vbr"}),
    "av1_nvenc": _Defaults(24, "p5", {"rc": "vbr"}, (0, 63)),
}
# `_DEFAULTS` for other ends. VP9's were chosen to be to its default what x264's are to x264's.
_AIMS: dict[str, dict[Quality, _Defaults]] = {
    "libx264": {
        "archive": _Defaults(12, "slow", {}),
        "draft": _Defaults(23, "veryfast", {}),
        "lossless": _Defaults(None, "medium", {"qp": "0"}),  # its crf 0 is without loss at 8 bits only
    },
    "libx265": {
        "archive": _Defaults(12, "slow", {}),
        "draft": _Defaults(23, "veryfast", {}),
        "lossless": _Defaults(None, "medium", {"x265-params": "lossless=1"}),
    },
    "libsvtav1": {"archive": _Defaults(16, "6", {}), "draft": _Defaults(35, "10", {})},
    "libvpx-vp9": {
        "archive": _Defaults(12, None, {"cpu-used": "1"}),
        "draft": _Defaults(33, None, {"cpu-used": "5"}),
        "lossless": _Defaults(None, None, {"lossless": "1"}),
    },
    "ffv1": dict.fromkeys(get_args(Quality), _Defaults(None, None, {})),
    "prores_ks": dict.fromkeys(("archive", "draft"), _Defaults(None, None, {})),
    "h264_nvenc": {"archive": _Defaults(12, "slow", {}), "draft": _Defaults(23, "p2", {})},
    "hevc_nvenc": {"archive": _Defaults(12, "slow", {}), "draft": _Defaults(23, "p2", {})},
    "av1_nvenc": {"archive": _Defaults(16, "slow", {}), "draft": _Defaults(35, "p2", {})},
}


def plan_encoder(
    container: str,
    source: VideoInfo,
    width: int,
    height: int,
    *,
    name: str | None = None,
    crf: int | None = None,
    preset: str | None = None,
    quality: Quality | None = None,
    options: Mapping[str, str] | None = None,
    pixel_format: str = "auto",
    threads: int = 2,
    from_gpu: bool = False,
) -> tuple[EncoderSpec, VideoInfo]:
    """Settles the encoder, its pixel format and its tags, and opens it once to see that it takes them.

    The depth and the chroma resolution of the source are kept where the encoder has them; RGB becomes 4:2:0 YUV, except
    in lossless encoders that know RGB. Transparency is kept, or it is an error. Where the file cannot hold the sample
    aspect ratio, the picture that is promised is larger and has square samples.

    Args:
        container: FFmpeg's name of the muxer: mp4, mov, matroska or webm.
        source: the facts of the source.
        width: of the output, in samples.
        height: of the output, in samples.
        name: FFmpeg's name of the encoder; libx264, or libvpx-vp9 in webm, if None.
        crf: constant quality; the encoder's default of ours if None.
        preset: likewise.
        quality: takes the place of our defaults; what is given besides wins over it.
        options: private options of the encoder.
        pixel_format: FFmpeg's name of one that the encoder has, or `auto`.
        threads: encoder threads, a part of the result.
        from_gpu: the frames lie on a GPU, and NVENC shall take them there, if it can have them of that format.

    Returns:
        The encoder, and the facts of the video stream that it will make.

    Raises:
        OptionError: no such encoder or option, a value that it refuses, a size that it cannot code, or a codec that the
            container cannot hold.
    """
    name = name or ("libvpx-vp9" if container == "webm" else "libx264")
    name = _named(name)
    defaults = _DEFAULTS.get(name, _Defaults(None, None, {}))
    _check_quality(name, defaults, crf, preset, options or {})
    aim = defaults if quality is None else _aim(name, quality, crf)
    given, planar = choose_format(name, container, source.pixel_format, pixel_format)
    width, height, shape = choose_shape(source, width, height, name, container)
    hdr = hdr_written_by(name, source.hdr)
    own: Mapping[str, str] = {**defaults.options, **_repeatable(name), **_safe(name, width), **_of_format(name, planar)}
    for more in (hdr_options(name, hdr), stereo_options(name, source.stereo)):
        own = _merged(own, more)
    spec = EncoderSpec(
        name=name,
        pixel_format=given,
        # FFmpeg's wrappers pass `qp` over where a crf is set.
        crf=None if "qp" in (options or {}) else aim.crf if crf is None else crf,
        preset=preset or aim.preset,
        options=_merged(own if quality is None else _merged(own, aim.options), options or {}),
        threads=threads,
    )
    video = replace(
        source,
        width=width,
        height=height,
        pixel_format=planar,
        color=_output_color(source, planar),
        sample_aspect_ratio=shape,
        hdr=hdr,
        stereo=stereo_written_by(name, container, source.stereo),
    )
    woven = next((name for name, same in WOVEN.items() if same == planar.name), "")
    if from_gpu and name.endswith("_nvenc") and can_be_woven(woven, width, height):
        spec = replace(spec, pixel_format=woven, memory="cuda")
    _try(spec, video, container)
    return spec, video


def _of_format(name: str, planar: PixelFormat) -> dict[str, str]:
    """Options that a pixel format needs."""
    if name == "prores_ks" and planar.log2_chroma_w == 0:
        return {"profile": "4"}  # ProRes 4444, the lowest with full chroma and alpha
    # VP8 refuses alpha with hidden frames.
    return {"auto-alt-ref": "0"} if name == "libvpx" and planar.has_alpha else {}


def _named(name: str) -> str:
    """The encoder's own name: that of a codec, as h264, stands for FFmpeg's encoder of it."""
    try:
        codec = Codec(name, "w")
    except ValueError:
        codec = None
    if codec is None or codec.type != "video":
        raise OptionError(f"--encoder {name}: no such video encoder; for instance {', '.join(sorted(_DEFAULTS))}")
    return codec.name


def _aim(name: str, quality: Quality, crf: int | None) -> _Defaults:
    aim = _AIMS.get(name, {}).get(quality)
    if aim is None:
        able = ", ".join(sorted(name for name, known in _AIMS.items() if quality in known))
        raise OptionError(f"--quality {quality}: not known how with {name}; leave it out, or --encoder {able}")
    if crf is not None and quality == "lossless":
        raise OptionError(f"--crf {crf}: --quality lossless says otherwise; give one of the two")
    return aim


def _check_quality(
    name: str, defaults: _Defaults, crf: int | None, preset: str | None, options: Mapping[str, str]
) -> None:
    lowest, highest = defaults.crf_range
    if crf is not None and name in _DEFAULTS:
        if defaults.crf is None:
            raise OptionError(f"--crf {crf}: {name} has no constant quality; leave it out")
        if not lowest <= crf <= highest:
            raise OptionError(f"--crf {crf}: {name} takes {lowest} (best) to {highest}")
    same = {_CRF_NAME.get(name, "crf"), "qp"} & options.keys()
    if crf is not None and same:
        raise OptionError(f"--crf {crf}: --encoder-option {same.pop()}=... says otherwise; give one of the two")
    # libx264 and libx265 complain about these on the terminal, past every log; so they are not asked.
    if name in ("libx264", "libx265") and preset is not None and preset not in _X26_PRESETS:
        raise OptionError(f"--preset {preset}: {name} has {', '.join(_X26_PRESETS)}")
    if preset is not None and name in ("libvpx-vp9", "ffv1", "prores_ks"):
        raise OptionError(f"--preset {preset}: {name} has no presets; leave it out")
    tunes = ("film", "animation", "grain", "stillimage", "psnr", "ssim", "fastdecode", "zerolatency")
    if name == "libx264" and any(tune not in tunes for tune in options.get("tune", "film").split(",")):
        raise OptionError(f"--encoder-option tune={options['tune']}: {name} has {', '.join(tunes)}")


def _repeatable(name: str) -> dict[str, str]:
    """What makes an encoder give the same bytes for the same frames, every time.

    With AVX-512 the x264 in PyAV's wheels does not: its macroblock tree comes out differently from run to run, on one
    thread too. AVX2 is repeatable, and the encoder is a small part of the work (docs/adr/0004).
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return {"x264-params": "asm=AVX2"} if name == "libx264" and has_avx512 else {}


def _safe(name: str, width: int) -> dict[str, str]:
    """For pictures up to 48 wide, x265's tree of costs writes past the end of its own memory (seen in 4.2)."""
    return {"x265-params": "log-level=none:cutree=0"} if name == "libx265" and width < 64 else {}


def _merged(defaults: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """Ours under theirs; parameter lists are joined rather than replaced."""
    merged = {**defaults, **options}
    for key in defaults.keys() & options.keys():
        if key.endswith("-params"):
            merged[key] = f"{defaults[key]}:{options[key]}"
    return merged


def _output_color(source: VideoInfo, pixel_format: PixelFormat) -> ColorInfo:
    """The source's colours; where RGB becomes YUV, by the matrix that players expect of such a picture."""
    color = replace(source.color, assumed=())
    if pixel_format.kind == "rgb":
        return replace(color, matrix=0, is_full_range=True)
    if source.pixel_format.kind != "rgb":
        # Gray is full range where nobody says otherwise, but players expect limited YUV.
        is_full = color.is_full_range and (source.pixel_format.kind != "gray" or pixel_format.kind == "gray")
        return replace(color, is_full_range=is_full)
    matrix = 9 if color.primaries == 9 else 1 if source.height >= 720 else 6
    return replace(color, matrix=matrix, is_full_range=False, siting="left")


def add_video(container: OutputContainer, spec: EncoderSpec, info: VideoInfo) -> VideoStream:
    """Adds the stream of an encoder to a container that has no header yet."""
    if spec.name == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # it writes to stderr by itself; 1 is errors only
    stream: VideoStream = container.add_stream(  # type: ignore[assignment]
        spec.name, rate=info.rate or Fraction(25), options=spec.private_options()
    )
    context = stream.codec_context
    context.width, context.height = info.width, info.height
    context.pix_fmt = "cuda" if spec.memory == "cuda" else spec.pixel_format
    context.time_base = stream.time_base = info.time_base
    context.sample_aspect_ratio = info.sample_aspect_ratio
    # FRAME, because PyAV's default makes x264 cut pictures into slices.
    context.thread_type, context.thread_count = "FRAME", spec.threads
    context.flags |= Flags.global_header | Flags.bitexact
    color = info.color
    context.colorspace, context.color_primaries, context.color_trc = color.matrix, color.primaries, color.transfer
    context.color_range = 2 if color.is_full_range else 1
    if info.pixel_format.has_alpha and spec.name in ("libvpx", "libvpx-vp9"):
        stream.metadata["alpha_mode"] = "1"  # or no player looks for it
    return stream


def _try(spec: EncoderSpec, info: VideoInfo, container: str) -> None:
    """Opens the encoder and writes a header in memory: what is wrong shows now and not after an hour."""
    asked = ", ".join(f"{key}={value}" for key, value in spec.private_options().items())
    try:
        with hear_ffmpeg(av.logging.WARNING), av.logging.Capture() as logs:
            left = _open_in_memory(spec, info, container)
    except (FFmpegError, ValueError, RuntimeError, NotImplementedError) as error:
        said = [text.strip() for _, _, text in logs] or [str(getattr(error, "strerror", None) or error)]
        raise OptionError(
            f"encoder {spec.name} at {info.width}x{info.height} in {container},"
            f" with {asked or 'no options'}: {said[-1]}"
        ) from None
    if left:
        raise OptionError(f"--encoder-option {', '.join(f'{k}={v}' for k, v in left.items())}: unknown to {spec.name}")
    # A typo inside x264-params or its like is no error to FFmpeg; it is only said in the log.
    for _, _, text in logs:
        if "option" in text.lower() and ("unknown" in text.lower() or "error parsing" in text.lower()):
            raise OptionError(f"encoder {spec.name}, with {asked}: {text.strip()}")


def _open_in_memory(spec: EncoderSpec, info: VideoInfo, container: str) -> dict[str, str]:
    """Returns the options that nobody took."""
    out = av.open(io.BytesIO(), "w", format=container)
    sizes = info.pixel_format.plane_sizes(info.width, info.height)
    try:
        stream = add_video(out, spec, info)
        if spec.memory == "cuda":
            # What memory its frames are of, the encoder learns from the first one, and only from that.
            black = [torch.zeros(size, dtype=info.pixel_format.dtype, device="cuda") for size in sizes]
            stream.encode(EncoderFrames(spec.pixel_format, info).frame(black, 0))
        out.start_encoding()
        return dict(stream.codec_context.options)
    finally:
        # There is no frame in it, which some muxers complain about.
        with suppress(FFmpegError):
            out.close()


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """What a finished segment file holds."""

    pts: tuple[int, ...]
    """Of the packets, in decode order, in ticks of the source's time base."""
    key: tuple[bool, ...]
    """Which of them are key frames."""
    extradata_sha256: str
    """Of the codec's parameter sets: the same for all segments of a film."""
    frames: int
    bytes: int
    sha256: str
    """Of the file."""


_ONLY_IN_MOV = ("qtrle", "magicyuv")


class SegmentWriter:
    """Encodes frames into one file that starts with a key frame and needs no other file.

    It is Matroska, or QuickTime for the few codecs that only that can hold, whatever its name says. Matroska rounds
    time to milliseconds, so the file's own timestamps are frame numbers and nothing more; the true ones are in the
    facts that `close` returns.

    Args:
        path: the file to write.
        spec: the encoder.
        info: the facts of the stream to make.

    Raises:
        OutputError: the file cannot be written, or the disk is full; also from `write` and `close`.
    """

    def __init__(self, path: Path, spec: EncoderSpec, info: VideoInfo) -> None:
        self._path, self._spec, self._info = path, spec, info
        self._frames = EncoderFrames(spec.pixel_format, info)
        self._numbers: dict[int, int] = {}
        self._pts: list[int] = []
        self._key: list[bool] = []
        self._is_closed = False
        try:
            self._container = av.open(
                str(Path(path).absolute()),
                "w",
                format="mov" if spec.name in _ONLY_IN_MOV else "matroska",
                options={"fflags": "+bitexact"},
            )
            self._stream = add_video(self._container, spec, info)
        except OSError as error:
            raise self._output_error(error) from None

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_closed:
            self._is_closed = True
            # An error is under way already; the file is rubbish either way.
            with suppress(OSError, ValueError):
                self._container.close()

    @property
    def frames_held(self) -> int:
        """Buffers in use or kept for use, for frames that are woven."""
        return self._frames.buffers

    def write(self, batch: FrameBatch) -> None:
        """Encodes a batch of planes in the format that `info` says.

        Raises:
            ValueError: they are of another format or size.
        """
        info = self._info
        wanted = [(info.pixel_format.dtype, size) for size in info.pixel_format.plane_sizes(info.width, info.height)]
        given = [(plane.dtype, tuple(plane.shape[1:])) for plane in batch.planes]
        if given != wanted:
            raise ValueError(f"planes are {given}; {info.pixel_format.name} of {info.width}x{info.height} is {wanted}")
        for i, pts in enumerate(batch.pts):
            self._numbers[pts] = len(self._numbers)
            self._encode(self._frames.frame([plane[i] for plane in batch.planes], pts))

    def close(self) -> SegmentFacts:
        """Flushes the encoder and finishes the file."""
        self._encode(None)
        extradata = self._stream.codec_context.extradata or b""
        self._is_closed = True
        try:
            self._container.close()
            with self._path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = self._path.stat().st_size
        except OSError as error:
            raise self._output_error(error) from None
        return SegmentFacts(
            pts=tuple(self._pts),
            key=tuple(self._key),
            extradata_sha256=hashlib.sha256(extradata).hexdigest(),
            frames=len(self._pts),
            bytes=size,
            sha256=sha256,
        )

    def _encode(self, frame: VideoFrame | None) -> None:
        try:
            for packet in self._stream.encode(frame):
                if packet.pts is None:
                    raise OutputError(
                        f"{self._path}: {self._spec.name} gave a packet without a time; use another encoder"
                    )
                self._frames.release(packet.pts)
                self._pts.append(packet.pts)
                self._key.append(packet.is_keyframe)
                number = self._numbers.get(packet.pts, packet.pts)
                packet.time_base = Fraction(1, 1000)
                packet.pts, packet.dts, packet.duration = 40 * number, 40 * (len(self._pts) - 1) - 4000, 40
                packet.stream = self._stream
                self._container.mux(packet)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise self._output_error(error) from None

    def _output_error(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path}: cannot be written: {error.strerror or error}")
