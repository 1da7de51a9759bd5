"""A few seconds upscaled for real: how it looks, and what the whole clip will take, before anybody pays for it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import torch
from torch import Tensor

from hat_video.color import from_rgb, to_rgb
from hat_video.errors import CancelledError, OptionError, OutputError, UsageError
from hat_video.frames import FrameBatch, VideoInfo
from hat_video.jobs.choices import settle_span
from hat_video.jobs.estimate import Estimate, film_bytes, peak_gpu_memory_bytes, peak_memory_bytes
from hat_video.jobs.file import default_output, upscale_file
from hat_video.jobs.options import UpscaleOptions, parse_time
from hat_video.jobs.plan import CONTAINERS, Plan, plan_file
from hat_video.jobs.report import FileReport, Progress
from hat_video.jobs.sequence import as_film
from hat_video.jobs.size import is_turned, shown_size
from hat_video.jobs.workspace import WORK_FOLDER, locked, made_folder
from hat_video.media.encoder import SegmentWriter, plan_encoder
from hat_video.media.mux import SegmentFile, join
from hat_video.media.passthrough import plan_streams
from hat_video.media.probe import Probe, probe
from hat_video.media.sequence import is_sequence, plain_name
from hat_video.media.source import open_source
from hat_video.media.span import Span
from hat_video.model.resample import resize
from hat_video.paths import JsonPath

__all__ = ["PreviewReport", "preview_file"]

# Side by side that makes a clip which everything plays; the picture keeps its full size.
_WIDEST = 3840
_MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True, slots=True)
class PreviewReport:
    """What a preview showed."""

    source: JsonPath
    clip: JsonPath
    """The source, enlarged by bicubic, left; the result right; with the sound."""
    picture: JsonPath
    """One frame of it, as PNG."""
    start_seconds: float
    """Of the source's first frame in it."""
    frames: int
    fps: float
    """Frames a second, measured."""
    whole: Estimate
    """The whole clip, with the same options on this machine."""
    verification: str
    """What was proven of the seconds that were made."""
    notes: list[str]


def preview_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: UpscaleOptions | None = None,
    *,
    at: str | None = None,
    seconds: str = "5",
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> PreviewReport:
    """Upscales a few seconds of a clip, and puts source and result side by side.

    Args:
        source: the clip.
        output: the clip to make, the picture gets its name with `.png`; if None `<stem>_preview.mp4` beside the source,
            or `<stem>_preview_90.5s.mp4` where `at` is given.
        options: the choices, as for `upscale_file`; their range is not looked at.
        at: where, in seconds or `HH:MM:SS.mmm`; the middle if None.
        seconds: how long.
        on_progress, cancel: as for `upscale_file`.

    Returns:
        What was measured, and what follows for the whole clip.

    Raises:
        HatVideoError: as for `upscale_file`; nothing is left behind then.
    """
    options = options or UpscaleOptions()
    path, stop = Path(source), cancel or threading.Event()
    start = parse_time(at, "--at")
    parse_time(seconds, "--seconds", is_above_zero=True)
    stem = plain_name(path) if is_sequence(path) else path.stem
    moment = "" if start is None else f"_{float(start):.12g}s"
    clip = path.with_name(f"{stem}_preview{moment}.mp4") if output is None else Path(output)
    picture = clip.with_suffix(".png")
    _check_names(path, clip, picture, options)
    with made_folder(clip.parent), locked(clip), as_film(path, clip, options) as film:
        shown = _preview(film, clip, picture, replace(options, rate=None), at, seconds, on_progress, stop)
        return replace(shown, source=path)


def _preview(
    path: Path,
    clip: Path,
    picture: Path,
    options: UpscaleOptions,
    at: str | None,
    seconds: str,
    on_progress: Callable[[Progress], None] | None,
    stop: threading.Event,
) -> PreviewReport:
    found = probe(path, options.limits())
    choices = _ranged(options, found, at, seconds)
    name = default_output(Path(path.name), "whole").name
    with _workshop(clip) as folder:
        whole = plan_file(path, folder / name, replace(choices, start=None, duration=None), found=found)
        found = whole.probe  # as it is read: deinterlaced, for instance
        report = upscale_file(
            path, folder / "result" / name, choices, on_progress=on_progress, cancel=stop, found=found
        )
        memory = peak_memory_bytes()
        made = probe(report.output)
        span = settle_span(choices, found) or Span(None, None)
        estimate = _whole_clip(whole, report, made, span, memory)
        _Beside(found, made, span).write(folder / clip.name, folder / picture.name, stop)
        for part, target in ((folder / clip.name, clip), (folder / picture.name, picture)):
            part.replace(target)
    shown = found.index.pts[span.frames(found.index.pts, found.video.time_base)]
    return PreviewReport(
        source=path,
        clip=clip,
        picture=picture,
        start_seconds=float(shown[0] * found.video.time_base),
        frames=report.frames["out"],
        fps=report.fps or 0.0,
        whole=estimate,
        verification=report.verification or "",
        notes=report.notes,
    )


def _check_names(source: Path, clip: Path, picture: Path, options: UpscaleOptions) -> None:
    if clip.suffix.lower() not in CONTAINERS:
        raise OptionError(
            f"{clip}: cannot write {clip.suffix or 'a file without a suffix'}; use {' '.join(CONTAINERS)}"
        )
    for path in (clip, picture):
        if path.exists() and source.exists() and path.samefile(source):
            raise OutputError(f"{path}: is the input itself; give another -o")
        if path.is_dir() or (path.exists() and not options.overwrite):
            raise OutputError(f"{path}: exists; use --overwrite or another -o")


def _ranged(options: UpscaleOptions, found: Probe, at: str | None, seconds: str) -> UpscaleOptions:
    """The options for the seconds that are shown: kept nowhere, in the clip's middle unless said otherwise."""
    length = cast(Fraction, parse_time(seconds, "--seconds", is_above_zero=True))
    total = found.duration_seconds
    start = parse_time(at, "--at")
    # A clock that begins within the first second counts on; see `settle_span`.
    begin = found.start_seconds if 0 <= found.start_seconds < 1 else Fraction(0)
    if start is not None and start >= begin + total:
        raise UsageError(f"--at {at}: {found.path} lasts {float(total):.3f} s; give a moment before that")
    if at is None and length < total:
        at = f"{float(begin + (total - length) / 2):.3f}"
    return replace(options, start=at, duration=seconds, overwrite=False, keep_work=False, work_dir=None)


@contextmanager
def _workshop(clip: Path) -> Iterator[Path]:
    """A folder among the unfinished work, where `hat-video clean` finds it should the process be killed."""
    with tempfile.TemporaryDirectory(prefix="preview-", dir=clip.parent / WORK_FOLDER / clip.name) as name:
        yield Path(name)


def _whole_clip(whole: Plan, report: FileReport, made: Probe, span: Span, memory: int) -> Estimate:
    """From the seconds that were made to all of the clip."""
    manifest, found = whole.manifest, whole.probe
    index = found.index
    pts = index.pts[span.frames(index.pts, found.video.time_base)]
    frames, fps = len(index.pts), report.fps or 1.0
    spent = report.seconds
    grown = frames / len(pts)
    # The picture is compared at a few places of each segment.
    proofs = len(manifest.segments) / report.segments["total"]
    once = spent["total"] - spent["work"] - spent["join"] - spent["verify"]
    return Estimate(
        frames=frames,
        fps=fps,
        seconds=once + frames / fps + grown * spent["join"] + proofs * spent["verify"],
        bytes=film_bytes(made, pts, found, manifest) + int(grown * made.other_bytes),
        memory_bytes=memory,
        gpu_memory_bytes=peak_gpu_memory_bytes(manifest.recipe.device),
    )


class _Beside:
    """Source and result in one picture, upright and with square pixels: as they are seen, not as they are stored."""

    def __init__(self, found: Probe, made: Probe, span: Span) -> None:
        self._found, self._made = found, made
        self._range = span.frames(found.index.pts, found.video.time_base)
        width, height = shown_size(made.video)
        self._size = _even(height), _even(width)

    def write(self, clip: Path, picture: Path, stop: threading.Event) -> None:
        """Writes both files. The clip is no larger than players like; the picture has the result's own size."""
        made, (height, width) = self._made, self._size
        shrink = min(Fraction(1), Fraction(_WIDEST, width))
        size = _even(height * shrink), _even(width * shrink)
        container = CONTAINERS[clip.suffix.lower()]
        plain = replace(
            made.video,
            pixel_format=made.video.pixel_format.opaque,
            sample_aspect_ratio=Fraction(1),
            display_matrix=None,
        )
        spec, video = plan_encoder(container, plain, 2 * size[1], size[0])
        segment = clip.with_name(".beside.mkv")
        middle = len(made.index.pts) // 2
        with SegmentWriter(segment, spec, video) as writer:
            for number, (tick, before, after) in enumerate(self._pairs()):
                if stop.is_set():
                    raise CancelledError("stopped")
                pair = torch.cat([resize(before, self._size).clamp_(0, 1), _sized(after, self._size)], dim=3)
                if number == middle:
                    _write_png(picture, pair[0])
                planes = from_rgb(_sized(pair, (size[0], 2 * size[1])), video.pixel_format, video.color)
                writer.write(FrameBatch(planes, (tick,)))
            facts = writer.close()
        # The sound of the range is in the result already, cut and in time.
        join(
            clip,
            container,
            [SegmentFile(segment, facts.pts)],
            source=made.path,
            streams=plan_streams(made.path, container, video_index=made.stream_index),
            video=video,
            durations={tick: made.index.duration_of(i) for i, tick in enumerate(made.index.pts)},
            should_stop=stop.is_set,
        )

    def _pairs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(pts of the result, source, result): each frame of the result beside what the source shows at that moment."""
        index, shown = self._found.index.pts[self._range], self._found.video
        with (
            open_source(self._found.path, probe=self._found) as source,
            open_source(self._made.path, probe=self._made) as result,
        ):
            frames = source.read(index[0], index[-1] + 1)
            batch = next(frames)
            begin, following = batch.pts[0] * shown.time_base, next(frames, None)
            for made in result.read():
                now = (made.pts[0] - self._made.index.pts[0]) * result.info.time_base + _MILLISECOND
                while following is not None and following.pts[0] * shown.time_base - begin <= now:
                    batch, following = following, next(frames, None)
                yield made.pts[0], _upright(batch, shown), _upright(made, result.info)


def _upright(batch: FrameBatch, video: VideoInfo) -> Tensor:
    """(1, 3, H, W) R'G'B', turned and mirrored as the display matrix says."""
    rgb, matrix = to_rgb(batch.planes, video.pixel_format, video.color), video.display_matrix
    if matrix is None:
        return rgb
    across, down = matrix[0], matrix[4]
    if is_turned(matrix):
        rgb, across, down = rgb.transpose(2, 3), matrix[3], matrix[1]
    return rgb.flip([dim for dim, sign in ((3, across), (2, down)) if sign < 0])


def _sized(rgb: Tensor, size: tuple[int, int]) -> Tensor:
    return rgb if tuple(rgb.shape[2:]) == size else resize(rgb, size, kernel="lanczos").clamp_(0, 1)


def _even(side: Fraction) -> int:
    return max(2, 2 * round(side / 2))


def _write_png(path: Path, rgb: Tensor) -> None:
    """Writes (3, H, W) R'G'B' in [0, 1]; colours as they are, without conversion."""
    pixels = (rgb * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = pixels.shape[1], pixels.shape[0], "rgb24"
    encoder.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))
