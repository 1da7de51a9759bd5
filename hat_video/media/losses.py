"""What a container does not keep: found out beforehand by writing a tiny film, and afterwards on the finished one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from hat_video.frames import VideoInfo
from hat_video.media.carry import clean_metadata, open_input, readable, tag_flags
from hat_video.media.opening import safe_options
from hat_video.media.passthrough import StreamPlan

__all__ = ["lost_in", "tags_that_get_lost"]


def tags_that_get_lost(source: Path, container: str) -> tuple[str, ...]:
    """The names of the source's tags that `container` would not keep, from one black frame written with them.

    Raises:
        SourceError: the source cannot be opened.
    """
    with open_input(source) as inp:
        tags = clean_metadata(inp.metadata)
    if not tags:
        return ()
    file = io.BytesIO()
    # The values are of no matter, but must be text.
    options = {"fflags": "+bitexact"}
    if container in ("mp4", "mov") and (flags := tag_flags(tags)):
        options["movflags"] = flags
    with av.open(file, "w", format=container, options=options) as out:
        stream: VideoStream = out.add_stream("libvpx-vp9" if container == "webm" else "mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        out.metadata.update({readable(key): readable(value) for key, value in tags.items()})
        frame = av.VideoFrame(64, 64, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.pts = 0
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)
    file.seek(0)
    with av.open(file, "r", options=safe_options()) as done:
        return _missing(tags, done.metadata)


def lost_in(
    film: Path, source: InputContainer, plans: Sequence[StreamPlan], container: str, video: VideoInfo, chapters: int
) -> list[str]:
    """One line for each thing that a finished film does not have, though its source has it.

    Args:
        film: the finished film.
        source: its source, open.
        plans: what became of each stream.
        container: the film's.
        video: what its video was to be.
        chapters: how many it was to have.
    """
    with open_input(film) as done:
        tags = _missing(clean_metadata(source.metadata), done.metadata)
        lost = [f"{container} does not keep the tags {', '.join(tags)}"] if tags else []
        lost += _lost_names(done, source, plans, container)
        missing = chapters - len(done.chapters())
        if missing > 0:
            lost.append(f"{container} does not keep {missing} of the chapters")
        stream = next(s for s in done.streams.video if not s.disposition & Disposition.attached_pic)
        shape = stream.sample_aspect_ratio or Fraction(1)
        if shape != video.sample_aspect_ratio:
            lost.append(
                f"{container} does not keep the sample aspect ratio {video.sample_aspect_ratio} of "
                f"{stream.codec_context.name}; players will show {shape}"
            )
    return lost


def _missing(wanted: dict[str, str], found: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted({readable(key).lower() for key in wanted} - {readable(key).lower() for key in found}))


def _lost_names(done: InputContainer, source: InputContainer, plans: Sequence[StreamPlan], container: str) -> list[str]:
    lost = []
    for kind in ("audio", "subtitle"):
        kept = [p for p in plans if p.kind == kind and p.action in ("copy", "convert")]
        for plan, s in zip(kept, (s for s in done.streams if s.type == kind), strict=False):
            titles = {readable(s.metadata.get(key, "")) for key in ("title", "handler_name")}
            if plan.title and plan.title not in titles:
                lost.append(f"{container} does not keep the title {plan.title!r} of {kind} {plan.index}")
            if plan.language not in (None, "und", readable(s.language or "")):
                lost.append(f"{container} keeps language {plan.language} of {kind} {plan.index} as {s.language}")
            flags = source.streams[plan.index].disposition & ~s.disposition & ~Disposition.default
            if flags:
                names = ", ".join(flag.name or "" for flag in Disposition if flag & flags)
                lost.append(f"{container} does not keep the disposition {names} of {kind} {plan.index}")
    return lost
