"""Many clips: which files they are, what each becomes, and one after the other without stopping at a bad one."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from hat_video.errors import CancelledError, HatVideoError, OptionError, OutputError, SourceError, UsageError
from hat_video.frames import ColorInfo, PixelFormat, VideoInfo
from hat_video.inference.upscaler import choose_devices
from hat_video.jobs.choices import load_chosen_model, make_upscaler, output_label
from hat_video.jobs.estimate import Estimate
from hat_video.jobs.file import default_output, upscale_file
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.plan import CONTAINERS
from hat_video.jobs.report import FileReport, Progress, check_report
from hat_video.jobs.workspace import WORK_FOLDER, is_product
from hat_video.media.encoder import plan_encoder
from hat_video.media.sequence import is_sequence
from hat_video.model.zoo import Model

__all__ = ["Clip", "DirectoryReport", "plan_clips", "upscale_clips", "upscale_directory"]

VIDEO_SUFFIXES = frozenset(
    {".3g2", ".3gp", ".apng", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265", ".hevc", ".ivf"}
    | {".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf"}
    | {".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m"}
)
"""What a directory is searched for; a file given by name is taken whatever it is called."""
_ORDINARY = VideoInfo(
    640, 360, Fraction(1, 25), Fraction(25), PixelFormat.parse("yuv420p"), ColorInfo(1, 1, 1, is_full_range=False)
)


@dataclass(frozen=True, slots=True)
class Clip:
    """A source, and the file that it becomes."""

    source: Path
    output: Path


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    """What was done to many clips."""

    clips: list[FileReport]
    skipped: list[Path]
    """Files that are not video, by their names."""

    @property
    def failed(self) -> list[FileReport]:
        """The clips that could not be made."""
        return [clip for clip in self.clips if clip.status == "failed"]


def plan_clips(
    inputs: Sequence[Path], output: str | os.PathLike[str] | None, label: str
) -> tuple[list[Clip], list[Path]]:
    """Finds the clips among files and directories, and names what they become.

    Args:
        inputs: files and directories; directories are searched through.
        output: a file, or a directory if it is one, ends in `/`, or there is more than one clip.
        label: goes into the default names: `x2`.

    Returns:
        The clips, and the files that were passed over because they are not video.

    Raises:
        SourceError: an input is missing, or a directory has no video in it.
        OutputError: an output would be an input.
        UsageError: two clips would become one file.
    """
    target = Path(output) if output is not None else None
    has_slash = output is not None and str(output).endswith(("/", os.sep))
    roots = [path for path in inputs if path.is_dir()]
    is_folder = target is not None and (has_slash or target.is_dir() or bool(roots) or len(inputs) > 1)
    if is_folder and target is not None and target.is_file():
        raise OutputError(f"{target}: is a file; with several clips or a directory, -o must be a directory")
    clips: list[Clip] = []
    skipped: list[Path] = []
    ours: list[Path] = []
    for path in inputs:
        if path.is_dir():
            folder = path.resolve().with_name(f"{path.resolve().name}_{label}") if target is None else target
            if target is not None and len(inputs) > 1:
                folder = target / path.resolve().name
            if folder.resolve() == path.resolve():
                raise OutputError(f"{folder}: is the input folder itself; give another -o")
            sources = _videos(path, folder, skipped, ours)
            found = [Clip(source, _writable(folder / source.relative_to(path))) for source in sources]
            if not found:
                made = f", and {len(ours)} videos that hat-video made itself; give those by name" if ours else ""
                raise SourceError(
                    f"{path}: no video in this directory; {len(skipped)} other files were passed over{made}"
                )
            clips += found
        elif not path.exists() and not is_sequence(path):
            raise SourceError(f"{path}: no such file or directory")
        elif target is not None and not is_folder:
            clips.append(Clip(path, target))
        else:
            name = default_output(path, label)
            clips.append(Clip(path, name if target is None else target / name.name))
    clips = _told_apart(clips)
    _refuse_collisions(clips)
    return clips, skipped


def _writable(path: Path) -> Path:
    return path if path.suffix.lower() in CONTAINERS else path.with_suffix(".mkv")


def _told_apart(clips: Sequence[Clip]) -> list[Clip]:
    """Where clips would become one file, those whose container changes keep the name of the old: `film.avi_x2.mkv`."""
    count = Counter(clip.output.resolve() for clip in clips)
    return [
        replace(clip, output=clip.output.with_name(clip.source.name + clip.output.name.removeprefix(clip.source.stem)))
        if count[clip.output.resolve()] > 1
        and clip.source.suffix.lower() not in CONTAINERS
        and not is_sequence(clip.source)
        else clip
        for clip in clips
    ]


def _videos(root: Path, output: Path, skipped: list[Path], ours: list[Path]) -> Iterator[Path]:
    """The video files below `root`, in order, without our own products, which go to `ours`."""
    products = output.resolve()
    been = {root.resolve()}
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        found = {name: (here / name).resolve() for name in sorted(folders) if name != WORK_FOLDER}
        # A link may lead back to where the walk has been.
        folders[:] = [name for name, place in found.items() if place != products and place not in been]
        been.update(found.values())
        for name in sorted(names):
            path = here / name
            if name.endswith(".part"):
                continue
            if is_product(path):
                ours.append(path)
            elif name.startswith("._"):
                skipped.append(path)  # what macOS keeps beside a file on other disks, under the file's suffix
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                yield path
            else:
                skipped.append(path)


def _refuse_collisions(clips: Sequence[Clip]) -> None:
    taken: dict[Path, Path] = {}
    sources = {clip.source.resolve() for clip in clips}
    for clip in clips:
        output = clip.output.resolve()
        other = taken.setdefault(output, clip.source)
        if other is not clip.source:
            raise UsageError(
                f"{other} and {clip.source} would both become {clip.output}; rename one, or run them apart"
            )
        if output in sources:
            raise OutputError(f"{clip.output}: is the input itself; give another -o")


def _refuse_for_all(clips: Sequence[Clip], options: UpscaleOptions, model: Model) -> OptionError | None:
    """Refuses what is wrong whatever the clip, before any is read.

    Returns:
        What the encoder has against an ordinary clip in any of the containers. A few encoders take certain sizes only,
        so it is refused once a real clip fails, too.
    """
    check_report(options.trace, "--trace")
    if options.trace is not None and len(clips) > 1:
        raise UsageError(f"--trace {options.trace}: shows one clip's stages, and there are {len(clips)}; give one")
    if options.rate is not None and not any(is_sequence(clip.source) for clip in clips):
        raise UsageError(
            f"--rate {options.rate}: is for numbered pictures (frame_%04d.png); clips have times of their own"
        )
    make_upscaler(model, options)
    if options.encoder == "auto" and choose_devices(options.device)[0].type == "cuda":
        return None  # which encoder it will be depends on the clip
    wrong = None
    for container in {CONTAINERS.get(clip.output.suffix.lower(), "matroska") for clip in clips}:
        try:
            plan_encoder(
                container,
                _ORDINARY,
                2 * _ORDINARY.width,
                2 * _ORDINARY.height,
                name=None if options.encoder == "auto" else options.encoder,
                crf=options.crf,
                preset=options.preset,
                quality=options.quality,
                options=options.encoder_options(),
                pixel_format=options.pixel_format,
            )
        except OptionError as error:
            wrong = error
        else:
            return None
    return wrong


def upscale_clips(
    clips: Sequence[Clip],
    options: UpscaleOptions | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    on_report: Callable[[FileReport], None] | None = None,
    cancel: threading.Event | None = None,
) -> list[FileReport]:
    """Upscales clips one after the other. A clip that fails is reported and does not stop the rest.

    Args:
        clips: what to do, for instance from `plan_clips`.
        options: the choices, the same for all.
        on_progress: as for `upscale_file`; `clip` and `clips` say which one.
        on_estimate: as for `upscale_file`; of the clip at work.
        on_report: called after each clip.
        cancel: set it from another thread to stop.

    Raises:
        CancelledError: `cancel` was set.
        ModelError, OptionError, UsageError: no clip could succeed: the model cannot be had, or an option has a value
            that is wrong whatever the clip.
    """
    options = options or UpscaleOptions()
    chosen = load_chosen_model(options)
    hint = _refuse_for_all(clips, options, chosen)
    # Where a size is asked for, each clip may need another scale.
    model: Model | None = None if options.size is not None and options.scale is None else chosen
    reports: list[FileReport] = []
    for number, clip in enumerate(clips, 1):

        def tell(progress: Progress, number: int = number) -> None:
            if on_progress is not None:
                on_progress(replace(progress, clip=number, clips=len(clips)))

        try:
            report = upscale_file(
                clip.source,
                clip.output,
                options,
                on_progress=tell,
                on_estimate=on_estimate,
                cancel=cancel,
                model=model,
            )
        except CancelledError:
            raise
        except HatVideoError as error:
            # An ordinary clip could not be made either, so that the options are to blame and not this clip.
            if hint is not None and isinstance(error, OptionError):
                raise
            report = FileReport("failed", clip.source, clip.output, error=str(error))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one clip, the others are wanted
            said = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
            report = FileReport("failed", clip.source, clip.output, error=said)
        reports.append(report)
        if on_report is not None:
            on_report(report)
    return reports


def upscale_directory(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: UpscaleOptions | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_report: Callable[[FileReport], None] | None = None,
    cancel: threading.Event | None = None,
) -> DirectoryReport:
    """Upscales every clip below a directory into a tree of the same shape.

    Args:
        source: the directory.
        output: the directory to make; `<source>_x2` beside it, or what else `options` make of it, if None.
        options, on_progress, on_report, cancel: as for `upscale_clips`.

    Raises:
        SourceError: no such directory, or no video in it.
        CancelledError, ModelError, OutputError, UsageError: as for `plan_clips` and `upscale_clips`.
    """
    options = options or UpscaleOptions()
    folder = Path(source)
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such directory")
    clips, skipped = plan_clips([folder], output, output_label(options))
    return DirectoryReport(
        upscale_clips(clips, options, on_progress=on_progress, on_report=on_report, cancel=cancel), skipped
    )
