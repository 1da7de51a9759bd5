"""The plan: one pass over the source, every choice settled and written down, everything that can be refused refused.

The manifest is all that a worker needs. Its key names the work folder: it is a hash over the source's packets and over
every choice that can change a byte of the result, so that segments of two different recipes can never meet.
"""

from __future__ import annotations

import hashlib
import os
import platform
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import av
import torch
from pydantic import TypeAdapter

from hat_video.errors import OptionError, StrictError
from hat_video.frames import VideoInfo
from hat_video.inference.backends import Backend
from hat_video.inference.fit import Fit, fit_to_gpu, gpu_memory, trial_bytes
from hat_video.inference.openvino_backend import openvino_version
from hat_video.inference.processors import cpu_count
from hat_video.inference.upscaler import Upscaler, choose_devices
from hat_video.jobs.choices import load_chosen_model, make_upscaler, settle_span, size_notes
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.size import parse_size, settle_size
from hat_video.media.deinterlace import prepare, settle_deinterlace
from hat_video.media.encoder import EncoderSpec, plan_encoder
from hat_video.media.formats import encoder_losses
from hat_video.media.losses import tags_that_get_lost
from hat_video.media.passthrough import StreamPlan, plan_streams
from hat_video.media.probe import FrameIndex, Probe, probe
from hat_video.media.source import open_source
from hat_video.media.span import Span
from hat_video.model.hat import HATConfig
from hat_video.model.zoo import Model
from hat_video.paths import JsonPath

__all__ = [
    "CONTAINERS",
    "ENCODER_THREADS",
    "Manifest",
    "Plan",
    "Recipe",
    "Segment",
    "cut_segments",
    "plan_file",
]

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""FFmpeg's muxer for every suffix that an output may have."""

_VERSION = 1
# x264's bytes depend on its number of threads, so it is a part of the recipe and not of the machine. Where a GPU
# computes the network, the CPU has little else to do: on an H100 two threads took four fifths of the time.
ENCODER_THREADS = {"cpu": 2, "cuda": 8}
_GPU_ENCODER = "h264_nvenc"
# Measured peak of the CPU path, in bytes a source pixel and channel of the trunk (fp32), with the tail's share in it.
_BYTES_PER_PIXEL_AND_CHANNEL = 100


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of frames that is made, committed and, after a crash, reused as one."""

    id: int
    """Place in the film, from 0."""
    start_pts: int
    """First tick that belongs to it."""
    end_pts: int
    """First tick that does not."""
    pts: tuple[int, ...]
    """Timestamps of its frames, in presentation order."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every choice that can change a byte of the result, settled."""

    model: str
    model_sha256: str
    scale: int
    resize: tuple[int, int] | None
    """(width, height) that a last Lanczos resample makes of what the network gives; None where that is the output."""
    span: Span | None
    """The range of the source that is made; None for all of it."""
    device: str
    backend: Backend
    precision: str
    trunk_exponent: int
    attention_pool: int
    """`HATConfig.attention_pool`; 0 for what has no such attention, too."""
    tile: int | None
    batch: int
    decoder: str
    is_decoder_free: bool
    """True where `auto` chose it: should it fail half-way, PyAV goes on."""
    deinterlace: str
    """off, frame or field; with `-all` where no frame is marked as interlaced and each is taken to be."""
    segment_seconds: float
    container: str
    encoder: EncoderSpec
    versions: dict[str, str]
    """Of what computes and encodes, with the instruction set of the processor: other ones give other bytes."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A planned clip: what `work` needs to make any of its segments, here or on another machine."""

    version: int
    key: str
    """blake2b over the source's packets, the recipe and the cuts, in hex: the name of the work folder."""
    source: JsonPath
    digest: str
    """The source's identity: a hash over all its packets."""
    recipe: Recipe
    source_video: VideoInfo
    video: VideoInfo
    """What the output's video stream will be."""
    index: FrameIndex
    """Of the frames that are made: in a range, of those alone."""
    streams: tuple[StreamPlan, ...]
    segments: tuple[Segment, ...]
    notes: tuple[str, ...]

    def to_json(self) -> bytes:
        """The manifest as indented JSON."""
        return TypeAdapter(Manifest).dump_json(self, indent=1)

    @staticmethod
    def from_json(text: bytes) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        return TypeAdapter(Manifest).validate_json(text)


@dataclass(frozen=True, slots=True)
class Plan:
    """A manifest, with what was opened to make it."""

    manifest: Manifest
    probe: Probe
    upscaler: Upscaler


def cut_segments(index: FrameIndex, ticks: int) -> tuple[Segment, ...]:
    """Cuts a film into segments of about `ticks` ticks.

    A segment ends at the first key frame in [T, 1.5 T) after its start, since seeking there is free; where there is
    none (half of all clips have a single key frame) at the first frame from T on, so that no clip is one long segment.
    """
    pts, keys, cuts = index.pts, index.key_pts, [0]
    while True:
        start = pts[cuts[-1]]
        key = bisect_left(keys, start + ticks)
        if key < len(keys) and 2 * (keys[key] - start) < 3 * ticks:
            cut = bisect_left(pts, keys[key])
        else:
            cut = bisect_left(pts, start + ticks)
        if cut >= len(pts):
            break
        cuts.append(cut)
    ends = [*cuts[1:], len(pts)]
    last = pts[-1] + index.last_duration
    return tuple(
        Segment(i, pts[a], pts[b] if b < len(pts) else last, pts[a:b])
        for i, (a, b) in enumerate(zip(cuts, ends, strict=True))
    )


def plan_file(
    source: Path, output: Path, options: UpscaleOptions, model: Model | None = None, found: Probe | None = None
) -> Plan:
    """Plans one clip; reads the source once and computes no frame.

    Args:
        source: the clip.
        output: what will be made of it; its suffix says the container.
        options: the choices.
        model: the model that `options` choose, where the caller has loaded it already.
        found: the probe of the source, where the caller has it already.

    Raises:
        SourceError, ModelError, OptionError, UsageError: the request cannot be met.
        StrictError: `options.strict`, and something would be lost.
    """
    container = CONTAINERS.get(output.suffix.lower())
    if container is None:
        raise OptionError(
            f"{output}: cannot write {output.suffix or 'a file without a suffix'}; use {' '.join(CONTAINERS)}"
        )
    found = _prepared(found or probe(source, options.limits()), options)
    span = settle_span(options, found)
    index = found.index if span is None else span.cut_index(found.index, found.video.time_base)
    target = None if options.size is None else settle_size(parse_size(options.size), found.video)
    device = str(choose_devices(options.device)[0])
    with open_source(source, decoder=options.decoder, probe=found, device=device) as opened:
        decoder, decoder_notes = opened.name, list(opened.notes)
    model = model or load_chosen_model(options, None if target is None else target.needed)
    scale = model.scale
    large = (found.video.width * scale, found.video.height * scale)
    width, height = large if target is None else (target.width, target.height)
    shaped = found.video if target is None else replace(found.video, sample_aspect_ratio=Fraction(1))
    spec, video, encoder_notes = _plan_encoder(container, shaped, width, height, options)
    losses = encoder_losses(shaped, video, spec.name, options.pixel_format)
    streams = plan_streams(source, container, video_index=found.stream_index)
    if options.strict:
        tags = tags_that_get_lost(source, container)
        dropped = [f"{container} does not keep the tags {', '.join(tags)}"] if tags else []
        _refuse_losses(found, streams, [*losses, *dropped])
    upscaler = make_upscaler(model, options)
    fit = _fit(upscaler, found.video, options)
    upscaler.tile = fit.tile
    recipe = Recipe(
        model=model.name,
        model_sha256=model.sha256,
        scale=scale,
        resize=None if (video.width, video.height) == large else (video.width, video.height),
        span=span,
        device=upscaler.device.type,
        backend=upscaler.backend,
        precision=upscaler.precision,
        trunk_exponent=upscaler.trunk_exponent,
        attention_pool=model.config.attention_pool if isinstance(model.config, HATConfig) else 0,
        tile=fit.tile,
        batch=fit.batch,
        decoder=decoder,
        is_decoder_free=options.decoder == "auto",
        deinterlace=found.deinterlace,
        segment_seconds=options.segment,
        container=container,
        encoder=spec,
        versions=_versions(upscaler.device, upscaler.backend),
    )
    segments = cut_segments(index, max(1, round(Fraction(options.segment) / found.video.time_base)))
    manifest = Manifest(
        version=_VERSION,
        key=_key(found.digest, recipe, segments),
        source=source.resolve(),
        digest=found.digest,
        recipe=recipe,
        source_video=found.video,
        video=video,
        index=index,
        streams=streams,
        segments=segments,
        notes=(
            *found.notes,
            *_picture_notes(found),
            *decoder_notes,
            *encoder_notes,
            *losses,
            *size_notes(options, target, model),
            *upscaler.notes,
        ),
    )
    return Plan(manifest, found, upscaler)


def _plan_encoder(
    container: str, source: VideoInfo, width: int, height: int, options: UpscaleOptions
) -> tuple[EncoderSpec, VideoInfo, list[str]]:
    """The encoder by name; by `auto` the GPU's where it opens and loses nothing, else the usual one, and why."""
    device = choose_devices(options.device)[0].type
    is_on_gpu = device == "cuda"

    def planned(name: str | None, *, from_gpu: bool = False) -> tuple[EncoderSpec, VideoInfo]:
        return plan_encoder(
            container,
            source,
            width,
            height,
            name=name,
            crf=options.crf,
            preset=options.preset,
            quality=options.quality,
            options=options.encoder_options(),
            pixel_format=options.pixel_format,
            threads=ENCODER_THREADS[device],
            from_gpu=from_gpu,
        )

    def shortest(name: str | None) -> tuple[EncoderSpec, VideoInfo, list[str]]:
        """Without the way through the host's memory, if it can be."""
        if is_on_gpu:
            try:
                return *planned(name, from_gpu=True), []
            except OptionError as error:
                spec, video = planned(name)
                return spec, video, [f"frames go to {spec.name} through the host's memory: {error}"]
        return *planned(name), []

    if options.encoder != "auto" or not is_on_gpu or container == "webm":
        return shortest(None if options.encoder == "auto" else options.encoder)
    try:
        spec, video, notes = shortest(_GPU_ENCODER)
        reasons = encoder_losses(source, video, spec.name, options.pixel_format)
    except OptionError as error:
        reasons = [str(error)]
    if not reasons:
        return spec, video, notes
    return *planned(None), [f"encoded on the CPU, not by {_GPU_ENCODER}: {'; '.join(reasons)}"]


def _prepared(found: Probe, options: UpscaleOptions) -> Probe:
    """The source as it is read: progressive, and without alpha where that is not wanted."""
    if found.deinterlace != "off":
        return found
    mode = settle_deinterlace(options.deinterlace, found.video)
    return prepare(found, deinterlace=mode, has_alpha=found.video.pixel_format.has_alpha and options.alpha != "drop")


def _picture_notes(found: Probe) -> list[str]:
    notes = []
    if found.deinterlace == "off" and found.video.is_interlaced:
        notes.append("interlaced frames are upscaled as they are (--deinterlace off)")
    elif found.deinterlace != "off":
        every = "every frame is taken as interlaced, though none is marked so" if "-all" in found.deinterlace else ""
        what = "each field becomes a frame" if found.deinterlace.startswith("field") else "each frame stays one"
        notes.append(f"deinterlaced by bwdif, {what}{'; ' if every else ''}{every}")
    return notes


def _refuse_losses(found: Probe, streams: tuple[StreamPlan, ...], losses: list[str]) -> None:
    if losses:
        raise StrictError(f"{found.path}: --strict refuses: {'; '.join(losses)}")
    if found.is_truncated:
        raise StrictError(f"{found.path}: {found.notes[-1]}; --strict refuses a truncated source")
    dropped = [
        f"#{stream.index} {stream.kind}/{stream.codec} ({stream.reason})"
        for stream in streams
        if stream.action == "drop"
    ]
    if dropped:
        raise StrictError(
            f"{found.path}: --strict refuses to drop {'; '.join(dropped)}; .mkv holds the most kinds of streams"
        )


def _fit(upscaler: Upscaler, video: VideoInfo, options: UpscaleOptions) -> Fit:
    if upscaler.device.type != "cuda":
        tile = options.tile or _tile_that_fits(upscaler.model, video, options.jobs or cpu_count())
        return Fit(tile, options.batch or 1)

    def trial(tile: int | None, frames: int) -> int | None:
        upscaler.tile = tile
        return trial_bytes(upscaler, frames, video.height, video.width)

    memory = gpu_memory(upscaler.device)
    return fit_to_gpu(video.height, video.width, memory, trial, tile=options.tile, batch=options.batch)


def _tile_that_fits(model: Model, video: VideoInfo, in_flight: int) -> int | None:
    """None where whole frames fit in half of the machine's memory, else the side of the largest tile that does."""
    if model.config is None:
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pixels = memory // 2 // in_flight // (_BYTES_PER_PIXEL_AND_CHANNEL * model.config.embed_dim)
    if video.width * video.height <= pixels:
        return None
    return max(64, int(pixels**0.5) // 64 * 64)


def _versions(device: torch.device, backend: Backend) -> dict[str, str]:
    libraries = av.library_versions
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    own = {"openvino": openvino_version() or "none"} if backend == "openvino" else {}
    return {
        **gpu,
        **own,
        "hat_video": version("hat-video"),
        "torch": torch.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "av": av.__version__,
        **{name: ".".join(map(str, libraries[name])) for name in ("libavcodec", "libavformat", "libswscale")},
    }


def _key(digest: str, recipe: Recipe, segments: tuple[Segment, ...]) -> str:
    cuts = [segment.start_pts for segment in segments]
    facts = TypeAdapter(dict[str, object]).dump_json(
        {"version": _VERSION, "digest": digest, "recipe": asdict(recipe), "cuts": cuts}, by_alias=False
    )
    return hashlib.blake2b(facts, digest_size=10).hexdigest()
