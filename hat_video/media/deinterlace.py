"""Interlaced video becomes progressive by bwdif; what is not marked as interlaced passes untouched.

`frame` makes one frame of each pair of fields and keeps every timestamp. `field` makes one of each field: the second
one is shown half-way to the next frame, in a time base half as long, so that every time stays a whole number. Both are
settled before a frame is computed. Telecined film is not undone: its woven frames are deinterlaced like others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import groupby
from typing import TYPE_CHECKING

from av.filter import Graph

from hat_video.frames import VideoInfo
from hat_video.media.probe import FrameIndex, Probe

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

__all__ = ["deinterlaced", "prepare", "settle_deinterlace"]


def settle_deinterlace(asked: str, video: VideoInfo) -> str:
    """`off`, `frame`, `field`, or `frame-all` and `field-all`, which do not ask for a frame's mark.

    Args:
        asked: `auto`, `off`, `frame` or `field`. The last two, of a file in which no frame is marked as interlaced,
            mean that its marks are wrong.
        video: the source.
    """
    if asked == "auto":
        return "frame" if video.is_interlaced else "off"
    return asked if asked == "off" or video.is_interlaced else f"{asked}-all"


def prepare(found: Probe, *, deinterlace: str = "off", has_alpha: bool = True) -> Probe:
    """What the probe would say if the file already were what is read from it; sources that are opened by it obey it.

    Args:
        found: the probe of the file as it is.
        deinterlace: as `settle_deinterlace` gives it.
        has_alpha: False: transparency is left out.
    """
    video = found.video
    if not has_alpha:
        video = replace(video, pixel_format=video.pixel_format.opaque)
    if deinterlace == "off":
        return replace(found, video=video)
    video = replace(video, is_interlaced=False)
    if deinterlace.startswith("frame"):
        return replace(found, video=video, deinterlace=deinterlace)
    return replace(
        found,
        video=replace(video, time_base=video.time_base / 2, rate=video.rate and 2 * video.rate),
        index=_index_of_fields(found.index),
        frame_bytes=tuple(size for packet in found.frame_bytes for size in (packet, 0)),
        deinterlace=deinterlace,
    )


def _index_of_fields(index: FrameIndex) -> FrameIndex:
    """In ticks half as long: each frame's time doubled, and the middle between it and the next."""
    ends = (*index.pts[1:], index.pts[-1] + index.last_duration)
    return replace(
        index,
        pts=tuple(tick for pts, end in zip(index.pts, ends, strict=True) for tick in (2 * pts, pts + end)),
        key_pts=tuple(2 * pts for pts in index.key_pts),
    )


def deinterlaced(
    decoded: Iterator[tuple[int, VideoFrame]], mode: str, ticks_of: Callable[[int], tuple[int, ...]]
) -> Iterator[tuple[int, VideoFrame]]:
    """Progressive frames with their ticks, one frame behind: bwdif looks at both neighbours.

    Args:
        decoded: (pts, frame) in presentation order, all of one size and planar format.
        mode: as `settle_deinterlace` gives it, not `off`.
        ticks_of: the ticks of what becomes of the frame at a pts: one, or in the `field` modes two.
    """
    graph: Graph | None = None
    waiting: dict[int, tuple[int, ...]] = {}
    # Frames are numbered on their way through the filter, which halves their time base: 2n and 2n + 1 are frame n's.
    for number, (pts, frame) in enumerate(decoded):
        graph = graph or _graph(frame, mode)
        waiting[number] = ticks_of(pts)
        frame.pts, frame.time_base = number, Fraction(1)
        graph.vpush(frame)
        yield from _drained(graph, waiting)
    if graph is not None:
        graph.vpush(None)
        yield from _drained(graph, waiting)


def _drained(graph: Graph, waiting: dict[int, tuple[int, ...]]) -> Iterator[tuple[int, VideoFrame]]:
    """All that the filter has ready; `waiting` has the ticks of the frames within it, by number."""
    for number, fields in groupby(_pulled(graph), key=lambda frame: (frame.pts or 0) // 2):
        made = list(fields)
        # What is not marked as interlaced comes once, and is shown for both of its times.
        yield from zip(waiting.pop(number), [*made, made[-1]], strict=False)


def _pulled(graph: Graph) -> Iterator[VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):
            return


def _graph(frame: VideoFrame, mode: str) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base="1/1",
        pixel_aspect="1/1",
    )
    which = "all" if mode.endswith("-all") else "interlaced"
    rate = "send_field" if mode.startswith("field") else "send_frame"
    bwdif = graph.add("bwdif", mode=rate, parity="auto", deint=which)
    sink = graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph
