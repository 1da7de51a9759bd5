"""The proof alone: two files, and nothing known of how one was made of the other."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from hat_video.errors import OptionError
from hat_video.frames import VideoInfo
from hat_video.jobs.choices import settle_span
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.plan import cut_segments
from hat_video.jobs.sequence import as_film
from hat_video.jobs.size import shown_size
from hat_video.media.deinterlace import prepare
from hat_video.media.hdr import hdr_written_by
from hat_video.media.opening import Limits
from hat_video.media.passthrough import StreamPlan, plan_streams
from hat_video.media.probe import FrameIndex, Probe, probe
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
    start: str | None = None,
    duration: str | None = None,
    rate: str | None = None,
    limits: Limits | None = None,
) -> Verification:
    """Compares an upscaled file with its source; how it was made is inferred from the two.

    Args:
        source: the file that was upscaled.
        output: what was made of it.
        is_full: also decode every frame.
        start, duration: the range that the output is of, as `upscale` was given it.
        rate: of numbered pictures, likewise.
        limits: what the files may ask of this machine.

    Returns:
        The verdict, and what it rests on.

    Raises:
        SourceError: one of them cannot be read.
        OptionError: the output is of a container that is not written here.
    """
    options = UpscaleOptions(start=start, duration=duration, rate=rate)
    made = probe(output, limits)
    with tempfile.TemporaryDirectory() as folder, as_film(Path(source), Path(folder) / "film", options) as film:
        found = probe(film, limits)
        readings = _readings(found, made)
        for n, (mode, words) in enumerate(readings, 1):
            result = _compare(prepare(found, deinterlace=mode), made, words, options, is_full=is_full)
            # Woven frames may have been left as they are: the file then is right in that way.
            if result.verdict.is_ok or n == len(readings):
                return result
    raise AssertionError("there is always one reading")


def _compare(found: Probe, made: Probe, assumed: list[str], options: UpscaleOptions, *, is_full: bool) -> Verification:
    container = _container_of(made)
    span = settle_span(options, found)
    index = found.index if span is None else span.cut_index(found.index, found.video.time_base)
    lost, corrupt = _undecodable(found, index, made, assumed)
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
        span=span,
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


def _readings(found: Probe, made: Probe) -> list[tuple[str, list[str]]]:
    """How the source may have been read, and what is assumed with that."""
    if not found.video.is_interlaced:
        return [("off", [])]
    kind = "field" if len(made.index.pts) > 1.5 * len(found.index.pts) else "frame"
    return [
        (kind, [f"the source is interlaced: taken as deinterlaced, one frame a {kind}"]),
        ("off", ["the source is interlaced: taken as upscaled as it is"]),
    ]


def _undecodable(found: Probe, index: FrameIndex, made: Probe, assumed: list[str]) -> tuple[set[int], set[int]]:
    """Frames of the source that no decoder gives; looked for only where the output has fewer frames."""
    if len(made.index.pts) >= len(index.pts):
        return set(), set()
    with open_source(found.path, decoder="pyav", probe=found) as frames:
        for _ in frames.read(index.pts[0], index.pts[-1] + 1):
            pass
        lost, corrupt = set(frames.lost), set(frames.corrupt)
    if lost:
        assumed.append(f"{len(lost)} frames of the source cannot be decoded, and may be missing")
    if len(made.index.pts) < len(index.pts) - len(lost):
        assumed.append("that this is all of the source: for a range, say which (--start, --duration)")
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
    # Nothing here makes a picture smaller than it is shown, but for a side that becomes even.
    is_smaller = any(now + 2 < was for was, now in zip(shown_size(before), shown_size(after), strict=True))
    if not is_smaller:
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
        width=before.width if is_smaller else after.width,
        height=before.height if is_smaller else after.height,
        pixel_format=after.pixel_format,
        color=color,
        sample_aspect_ratio=shape,
    )
