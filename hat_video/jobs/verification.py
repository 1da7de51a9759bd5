"""The proof alone: two files, and nothing known of how one was made of the other."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from hat_video.errors import OptionError
from hat_video.frames import VideoInfo
from hat_video.jobs.plan import cut_segments
from hat_video.media.deinterlace import prepare
from hat_video.media.hdr import hdr_written_by
from hat_video.media.opening import Limits
from hat_video.media.passthrough import StreamPlan, plan_streams
from hat_video.media.probe import Probe, probe
from hat_video.media.source import open_source
from hat_video.media.stereo import stereo_written_by
from hat_video.media.verify import Verdict, verify

__all__ = ["Verification", "verify_files"]

# Codec to the encoder that would have written it here.
_ENCODERS = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1", "libdav1d": "libsvtav1"}
_SECONDS_BETWEEN_PLACES = 10


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found, and what had to be assumed to find it."""

    verdict: Verdict
    assumed: tuple[str, ...]
    """What the two files do not say and was inferred, or cannot be known at all; one line each."""


def verify_files(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    is_full: bool = False,
    limits: Limits | None = None,
) -> Verification:
    """Compares an upscaled file with its source; how it was made is inferred from the two.

    Args:
        source: the file that was upscaled.
        output: what was made of it.
        is_full: also decode every frame.
        limits: what the files may ask of this machine.

    Returns:
        The verdict, and what it rests on.

    Raises:
        SourceError: one of them cannot be read.
        OptionError: the output is of a container that is not written here.
    """
    found, made = probe(source, limits), probe(output, limits)
    container = _container_of(made)
    assumed: list[str] = []
    found = _as_read(found, made, assumed)
    lost, corrupt = _undecodable(found, made, assumed)
    index = found.index
    streams = plan_streams(found.path, container, video_index=found.stream_index)
    _note_streams(streams, container, assumed)
    ticks = max(1, round(_SECONDS_BETWEEN_PLACES / found.video.time_base))
    verdict = verify(
        found,
        made.path,
        video=_expected(found, made, assumed),
        pts=[pts for pts in index.pts if pts not in lost],
        durations={pts: index.duration_of(i) for i, pts in enumerate(index.pts)},
        streams=streams,
        segment_starts=[segment.start_pts for segment in cut_segments(index, ticks)],
        lost=sorted(lost),
        corrupt=sorted(corrupt),
        is_full=is_full,
    )
    return Verification(verdict, tuple(assumed))


def _container_of(made: Probe) -> str:
    names = made.format_name.split(",")
    suffix = made.path.suffix.lower()
    if "matroska" in names:
        return "webm" if suffix == ".webm" else "matroska"
    if "mp4" in names:
        return "mov" if suffix == ".mov" else "mp4"
    raise OptionError(f"{made.path}: is {made.format_name}; what can be verified is mp4, mov, mkv and webm")


def _as_read(found: Probe, made: Probe, assumed: list[str]) -> Probe:
    if not found.video.is_interlaced:
        return found
    kind = "field" if len(made.index.pts) > 1.5 * len(found.index.pts) else "frame"
    assumed.append(f"the source is interlaced: taken as deinterlaced, one frame a {kind}")
    return prepare(found, deinterlace=kind)


def _undecodable(found: Probe, made: Probe, assumed: list[str]) -> tuple[set[int], set[int]]:
    """Frames of the source that no decoder gives; looked for only where the output has fewer frames."""
    if len(made.index.pts) >= len(found.index.pts):
        return set(), set()
    with open_source(found.path, decoder="pyav", probe=found) as frames:
        for _ in frames.read():
            pass
        lost, corrupt = set(frames.lost), set(frames.corrupt)
    if lost:
        assumed.append(f"{len(lost)} frames of the source cannot be decoded, and may be missing")
    if len(made.index.pts) < len(found.index.pts) - len(lost):
        assumed.append("a range of the source (--start, --duration) cannot be told from missing frames")
    return lost, corrupt


def _note_streams(streams: tuple[StreamPlan, ...], container: str, assumed: list[str]) -> None:
    for plan in streams:
        if plan.action == "drop":
            assumed.append(f"{plan.kind} {plan.index} ({plan.codec}) is not looked for in {container}: {plan.reason}")


def _expected(found: Probe, made: Probe, assumed: list[str]) -> VideoInfo:
    """The facts that the output's video should have."""
    before, after = found.video, made.video
    wide, high = after.width / before.width, after.height / before.height
    times = f"x{wide:g}" if wide == high else f"x{wide:.3f} wide, x{high:.3f} high"
    assumed.append(f"the size, {times}, is what was asked for")
    color = replace(before.color, assumed=())
    if before.pixel_format.kind != "yuv":
        color = after.color
        assumed.append(f"the colour tags of a {before.pixel_format.kind} source follow the encoder: taken as they are")
    shape = before.sample_aspect_ratio
    if after.sample_aspect_ratio != shape:
        display = wide / high * after.sample_aspect_ratio / shape
        if abs(display - 1) < 0.02:
            assumed.append(f"samples were made square (they were {shape}), the picture's shape is kept")
            shape = after.sample_aspect_ratio
    if after.pixel_format.bit_depth < before.pixel_format.bit_depth:
        assumed.append(f"{before.pixel_format.bit_depth} bits became {after.pixel_format.bit_depth}")
    hdr = hdr_written_by(_ENCODERS.get(made.codec, ""), before.hdr)
    if hdr != before.hdr and after.hdr is None:
        assumed.append(f"{made.codec} was written without the source's HDR metadata")
    stereo = stereo_written_by(_ENCODERS.get(made.codec, ""), _container_of(made), before.stereo)
    if stereo != before.stereo:
        assumed.append(f"two views ({before.stereo}) cannot be told in this file")
    return replace(
        before,
        hdr=hdr,
        stereo=stereo,
        width=after.width,
        height=after.height,
        pixel_format=after.pixel_format,
        color=color,
        sample_aspect_ratio=shape,
    )
