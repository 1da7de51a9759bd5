"""Segments and passthrough become the finished file: every timestamp given back, DTS made anew over the whole film.

Segment files keep time to a millisecond only, so their packets get their pts from the sidecars here, and nothing in
this module computes a time from a frame rate.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, cast

import av
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from hat_video.errors import CancelledError, HatVideoError, OutputError, WorkError
from hat_video.frames import VideoInfo
from hat_video.media.carry import clean_metadata, readable, tag_flags
from hat_video.media.losses import lost_in
from hat_video.media.opening import open_file
from hat_video.media.passthrough import Passthrough, StreamPlan
from hat_video.media.probe import to_fraction
from hat_video.media.span import Span, advance_timecode

if TYPE_CHECKING:
    from av.container.core import Chapter  # a type of the stubs only

__all__ = ["JoinFacts", "SegmentFile", "join"]

_MILLISECOND = Fraction(1, 1000)
_MOVIE_TICKS = 90_000
_REDO = "remove it and run again, it is then made anew"


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """One finished segment of the main video."""

    path: Path
    pts: tuple[int, ...]
    """The packets' pts in decode order, in ticks of the source's time base, from the sidecar."""


@dataclass(frozen=True, slots=True)
class JoinFacts:
    """What `join` wrote."""

    frames: int
    """Packets of the main video."""
    offset: Fraction
    """Seconds added to every time of every stream; 0 unless the film started late or before zero."""
    notes: tuple[str, ...]
    """One line each: tags or geometry that the container does not keep, damage in the source's other streams."""


def join(
    part: Path,
    container: str,
    segments: Sequence[SegmentFile],
    *,
    source: Path,
    streams: Sequence[StreamPlan],
    video: VideoInfo,
    durations: Mapping[int, int],
    span: Span | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> JoinFacts:
    """Writes the finished film to `part`; two joins of the same segments give the same bytes.

    Args:
        part: the file to write; renaming it is the caller's business, after the proof.
        container: FFmpeg's muxer name: `mp4`, `mov`, `matroska` or `webm`.
        segments: the segments in presentation order.
        source: where the other streams, tags and chapters come from.
        streams: what becomes of each stream of the source.
        video: the facts of the output's video stream; its time base is the source's.
        durations: pts to duration, both in ticks of `video.time_base`, for every frame.
        span: the range of the source that the segments are, and that the other streams are cut to; None for all.
        should_stop: asked once a packet.

    Returns:
        What was written.

    Raises:
        WorkError: a segment is missing, unreadable, or not what its sidecar says.
        OutputError: the file cannot be written, or the segments do not go into one stream.
        SourceError: the source cannot be opened.
        CancelledError: `should_stop` said so; `part` is left half written.
    """
    pts = [p for segment in segments for p in segment.pts]
    if not pts:
        raise WorkError(f"{part}: no segment holds a frame; there is nothing to join")
    film = _Film(part, container, segments, video, durations, span, should_stop or (lambda: False))
    try:
        with Passthrough(source, streams, span) as others:
            facts = film.write(others, streams)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    except HatVideoError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
        raise OutputError(
            f"{part}: cannot be written ({_reason(error)}); free space, or choose another place or container"
        ) from None
    return facts


def regenerate_dts(pts: Sequence[int]) -> list[int]:
    """Decode timestamps for packets in decode order: strictly rising, none later than its pts.

    Packet k is decoded when the picture that is D places before it in presentation order is shown, D being the most
    that any packet is ahead; the first D go on backwards at the first frame's pace.

    Args:
        pts: the packets' pts in decode order, all different, in ticks.

    Returns:
        One dts a packet, in ticks.

    Raises:
        WorkError: two packets have one pts.
    """
    order = sorted(pts)
    twice = next((a for a, b in pairwise(order) if a == b), None)
    if twice is not None:
        raise WorkError(f"two frames of the segments have the pts {twice}; every pts must be different; run again")
    delay = max(k - bisect_left(order, p) for k, p in enumerate(pts))
    step = order[1] - order[0] if len(order) > 1 else 1
    return [order[k - delay] if k >= delay else order[0] - (delay - k) * step for k in range(len(order))]


def fit_dts(pts: Sequence[int], dts: Sequence[int], end: int) -> tuple[list[int], int]:
    """Decode timestamps of `regenerate_dts` that mp4 and mov make the right length of.

    Those add up a track's length from the decode times and the last packet's duration, which with B-frames and a
    variable rate is another one than from the first frame to the end of the last: the packets that come before the
    first frame is shown, and the last packet, have to make up for it.

    Args:
        pts: the packets' pts in decode order, in ticks.
        dts: one a packet, in ticks.
        end: when the last frame ends, in ticks.

    Returns:
        One dts a packet, and the last packet's duration, in ticks.
    """
    first = min(pts)
    delay = bisect_left(dts, first)
    # Their sum is given. Every frame lasts a tick or more, so it is enough for a tick for each.
    room = end - dts[-1]
    if not delay:
        return list(dts), room
    # No longer than until the end, or the track's edit list would be.
    last = max(1, min(room - (first - dts[0]), end - pts[-1], room - delay))
    lead = room - last
    return [first - lead + lead * k // delay for k in range(delay)] + list(dts[delay:]), last


class _Film:
    """One output file while it is written."""

    def __init__(
        self,
        part: Path,
        container: str,
        segments: Sequence[SegmentFile],
        video: VideoInfo,
        durations: Mapping[int, int],
        span: Span | None,
        should_stop: Callable[[], bool],
    ) -> None:
        self._part, self._container, self._segments = part, container, segments
        self._video, self._durations, self._span, self._should_stop = video, durations, span, should_stop
        self._pts = [p for segment in segments for p in segment.pts]
        self._is_isom = container in ("mp4", "mov")
        self._notes: list[str] = []

    def write(self, others: Passthrough, plans: Sequence[StreamPlan]) -> JoinFacts:
        dts = regenerate_dts(self._pts)
        last = self._durations[self._pts[-1]]
        if self._is_isom:
            dts, last = fit_dts(self._pts, dts, max(p + self._durations[p] for p in self._pts))
        first = _open_segment(self._segments[0].path)
        out: OutputContainer | None = None
        try:
            out = self._open(clean_metadata(others.source.metadata))
            main = self._add_streams(out, _video_of(first, self._segments[0].path), others, plans)
            offset = self._offset(others.first_seconds())
            self._add_tags(out, main, others.source, plans, offset)
            self._write_packets(out, main, others, dts, last, offset)
            out.close()  # a full disk may show only here
        except BaseException:
            if out is not None:
                _close_quietly(out)
            raise
        finally:
            first.close()
        self._note_offset(offset)
        chapters = len(self._chapters(others.source))
        self._notes += lost_in(self._part, others.source, plans, self._container, self._video, chapters)
        return JoinFacts(len(self._pts), offset, tuple(map(readable, (*self._notes, *others.notes))))

    def _open(self, tags: Mapping[str, str]) -> OutputContainer:
        options = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}
        if self._is_isom:
            scale = self._video.time_base.denominator
            options["video_track_timescale"] = str(scale)
            # Edit lists count in this scale, and FFmpeg rounds them down: one of 1000 would put a late start off by
            # up to a millisecond.
            options["movie_timescale"] = str(scale * ceil(Fraction(_MOVIE_TICKS, scale)))
            options["movflags"] = f"+faststart{tag_flags(tags)}"
        path = str(self._part.absolute())
        if int(av.__version__.split(".")[0]) < 19:
            return av.open(path, "w", format=self._container, options=options, metadata_errors="surrogateescape")
        return av.open(path, "w", format=self._container, options=options)

    def _add_streams(
        self, out: OutputContainer, template: VideoStream, others: Passthrough, plans: Sequence[StreamPlan]
    ) -> VideoStream:
        main: VideoStream | None = None
        for plan in plans:
            if plan.action == "video":
                main = out.add_stream_from_template(template, opaque=True)
            else:
                others.add(plan, out)
        if main is None:
            raise OutputError(f"{self._part}: the plan names no main video among its {len(plans)} streams")
        video, context = self._video, main.codec_context
        main.time_base = video.time_base
        if context.name == "hevc" and self._is_isom:
            context.codec_tag = "hvc1"  # Apple's players know no other
        if context.name == "prores":
            # The tag is ProRes's profile, and the muxer's own guess is 422 HQ; others would be decoded as that.
            context.codec_tag = template.codec_context.codec_tag
        context.framerate = self._constant_rate() or Fraction(0, 1)
        context.sample_aspect_ratio = video.sample_aspect_ratio
        context.colorspace, context.color_primaries = video.color.matrix, video.color.primaries
        context.color_trc, context.color_range = video.color.transfer, 2 if video.color.is_full_range else 1
        if video.display_matrix is not None:
            main.set_display_matrix(video.display_matrix)
        return main

    def _constant_rate(self) -> Fraction | None:
        # Matroska writes the rate as a default duration, which would be a lie for variable frame rates. A source that
        # counts in milliseconds has durations that differ by one tick.
        spans = {self._durations[p] for p in self._pts}
        rate = self._video.rate
        return rate if rate and max(spans) - min(spans) <= 1 else None

    def _offset(self, sound: Fraction | None) -> Fraction:
        """Seconds to add to all streams, a whole number of video ticks (mp4, mov) or of milliseconds (mkv, webm)."""
        tick = self._video.time_base if self._is_isom else _MILLISECOND
        begin = None if self._span is None else self._span.start
        # What was there when a range began is at zero, whatever comes first after it.
        video = min(self._pts) * self._video.time_base if begin is None else begin
        start = video if sound is None else min(video, sound)
        if begin is None and start >= 1:
            return -floor(start / tick) * tick
        # mp4 and mov hold what is before zero in an edit list, Matroska has no times below zero.
        lowest = video if self._is_isom else start
        return ceil(-lowest / tick) * tick if lowest < 0 or begin is not None else Fraction(0)

    def _add_tags(
        self,
        out: OutputContainer,
        main: VideoStream,
        source: InputContainer,
        plans: Sequence[StreamPlan],
        offset: Fraction,
    ) -> None:
        original = next(source.streams[plan.index] for plan in plans if plan.action == "video")
        out.metadata.update(clean_metadata(source.metadata))
        tags = clean_metadata(original.metadata)
        # Says that alpha comes beside VP8's and VP9's packets: of the source no longer true, or not yet.
        tags = {key: value for key, value in tags.items() if key.lower() != "alpha_mode"}
        if self._video.pixel_format.has_alpha and main.codec_context.name in ("vp8", "vp9"):
            tags["alpha_mode"] = "1"
        if self._video.stereo is not None:
            tags["stereo_mode"] = self._video.stereo
        main.metadata.update(tags)
        main.disposition = original.disposition
        timecode = next(
            (source.streams[p.index].metadata["timecode"] for p in plans if p.target == "timecode"),
            original.metadata.get("timecode"),
        )
        if timecode and self._span is not None:
            begin = (original.start_time or 0) * (to_fraction(original.time_base) or 1)
            skipped = min(self._pts) * self._video.time_base - begin
            timecode = advance_timecode(timecode, skipped, to_fraction(original.average_rate))
            if timecode is None:
                self._notes.append("the timecode is left out: it cannot be counted on to the range's first frame")
        if timecode:
            main.metadata["timecode"] = timecode
        chapters = [_moved(chapter, offset) for chapter in self._chapters(source)]
        if chapters:
            out.set_chapters(chapters)

    def _chapters(self, source: InputContainer) -> list[Chapter]:
        return source.chapters() if self._span is None else self._span.cut_chapters(source.chapters())

    def _write_packets(
        self,
        out: OutputContainer,
        main: VideoStream,
        others: Passthrough,
        dts: Sequence[int],
        last: int,
        offset: Fraction,
    ) -> None:
        time_base = self._video.time_base
        side = others.packets()
        waiting = next(side, None)
        for k, packet in enumerate(self._video_packets()):
            now = dts[k] * time_base
            while waiting is not None and _decode_seconds(waiting) <= now:
                self._mux(out, waiting, offset)
                waiting = next(side, None)
            packet.stream = main
            packet.pts, packet.dts, packet.time_base = self._pts[k], dts[k], time_base
            packet.duration = self._durations[self._pts[k]] if k < len(dts) - 1 else last
            self._mux(out, packet, offset)
        while waiting is not None:
            self._mux(out, waiting, offset)
            waiting = next(side, None)

    def _mux(self, out: OutputContainer, packet: Packet[Stream], offset: Fraction) -> None:
        if self._should_stop():
            raise CancelledError(f"{self._part}: stopped while joining; the segments are kept")
        old = packet.time_base
        if not self._is_isom:
            # The muxer would round pts and offset together from whatever base; here every time is rounded once.
            base = _MILLISECOND
            packet.duration = round((packet.duration or 0) * old / base)
        else:
            base = old
        packet.pts = None if packet.pts is None else _nearest((packet.pts * old + offset) / base)
        packet.dts = None if packet.dts is None else _nearest((packet.dts * old + offset) / base)
        packet.time_base = base
        out.mux(packet)

    def _video_packets(self) -> Iterator[Packet[Stream]]:
        """The packets of all segments in order; each file must hold exactly what its sidecar says."""
        extradata: bytes | None = None
        for n, segment in enumerate(self._segments):
            with _open_segment(segment.path) as inp:
                stream = _video_of(inp, segment.path)
                own = stream.codec_context.extradata or b""
                if extradata is not None and own != extradata:
                    raise OutputError(
                        f"{segment.path}: its codec headers differ from those of {self._segments[0].path.name}; "
                        f"all segments must come from one encoder with the same options; {_REDO}"
                    )
                extradata = own
                count = 0
                try:
                    for packet in inp.demux(stream):
                        if not packet.size:
                            continue
                        count += 1
                        if count <= len(segment.pts):
                            yield cast("Packet[Stream]", packet)
                except FFmpegError as error:
                    raise WorkError(f"{segment.path}: segment {n} cannot be read ({_reason(error)}); {_REDO}") from None
            if count != len(segment.pts):
                raise WorkError(
                    f"{segment.path}: segment {n} holds {count} frames, its record says {len(segment.pts)}; {_REDO}"
                )

    def _note_offset(self, offset: Fraction) -> None:
        if offset and (self._span is None or self._span.start is None):
            why = "the source does not start at zero" if offset < 0 else f"{self._container} has no times before zero"
            self._notes.append(f"all times are moved by {float(offset):+.3f} s, of all streams alike: {why}")


def _open_segment(path: Path) -> InputContainer:
    try:
        return open_file(path)
    except (FFmpegError, OSError) as error:
        raise WorkError(f"{path}: segment cannot be opened ({_reason(error)}); {_REDO}") from None


def _video_of(inp: InputContainer, path: Path) -> VideoStream:
    if not inp.streams.video:
        raise WorkError(f"{path}: segment holds no video; {_REDO}")
    return inp.streams.video[0]


def _decode_seconds(packet: Packet[Stream]) -> Fraction:
    ticks = packet.dts if packet.dts is not None else packet.pts
    return (ticks or 0) * packet.time_base


def _nearest(value: Fraction) -> int:
    # Halves go up: round() would take them to the even neighbour, and equal steps would come out unequal.
    return floor(value + Fraction(1, 2))


def _moved(chapter: Chapter, offset: Fraction) -> Chapter:
    time_base = chapter["time_base"] or _MILLISECOND
    ticks = _nearest(offset / time_base)
    return {**chapter, "start": max(0, chapter["start"] + ticks), "end": max(0, chapter["end"] + ticks)}


def _close_quietly(out: OutputContainer) -> None:
    try:
        out.close()
    except (FFmpegError, OSError, ValueError):
        return  # the error that brought us here is the one to tell


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
