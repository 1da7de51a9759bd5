"""Re-opens the finished file and proves it against the source. The caller decides what a difference means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from hat_video.errors import SourceError
from hat_video.frames import VideoInfo
from hat_video.media.carry import open_input, readable
from hat_video.media.describe import look
from hat_video.media.full_check import check_frames
from hat_video.media.opening import open_file
from hat_video.media.passthrough import StreamPlan
from hat_video.media.picture_check import check_picture
from hat_video.media.probe import Probe
from hat_video.media.span import Span
from hat_video.media.stream_check import Pair, Tally, check_names, check_streams

__all__ = ["Verdict", "verify"]

_MILLISECOND = Fraction(1, 1000)
_MATRICES = {0: "rgb", 1: "bt709", 5: "bt601", 6: "bt601", 9: "bt2020", 10: "bt2020"}
_UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the proof found."""

    is_ok: bool
    problems: tuple[str, ...]
    """One line a difference; empty if the file is what was promised."""
    checked: dict[str, int | str]
    """How much was compared: frames, streams, chapters, places of the picture; JSON-able."""

    @property
    def line(self) -> str:
        """The one line that people read."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            return f"DIFFERS: {self.problems[0]}{more}"
        c = self.checked
        parts = [f"{c['frames']} frames", "every timestamp"]
        for key, one, many in (
            ("copied", "stream byte for byte", "streams byte for byte"),
            ("converted", "stream converted", "streams converted"),
            ("chapters", "chapter", "chapters"),
        ):
            if c[key]:
                parts.append(f"{c[key]} {one if c[key] == 1 else many}")
        parts += [f"colour {c['color']}", f"picture checked at {c['places']} places"]
        if c.get("identical"):
            parts.append(f"{c['identical']} decoded frames identical to what was encoded")
        elif c.get("decoded"):
            parts.append(f"{c['decoded']} frames decoded, none below {c.get('lowest_psnr', 'inf')} dB of the source")
        if c["static"]:
            parts.append(f"{c['static']} without motion")
        if c["left_out"]:
            parts.append(f"{c['left_out']} lost or corrupt frames left out")
        return f"proven: {', '.join(parts)}"


def verify(
    source: Probe,
    output: Path,
    *,
    video: VideoInfo,
    pts: Sequence[int],
    durations: Mapping[int, int],
    streams: Sequence[StreamPlan],
    segment_starts: Sequence[int],
    lost: Sequence[int] = (),
    corrupt: Sequence[int] = (),
    span: Span | None = None,
    is_full: bool = False,
    hashes: Mapping[int, str] | None = None,
) -> Verdict:
    """Compares `output` with what was promised of it; a difference is reported, never raised.

    Args:
        source: the probe of the source.
        output: the finished file, under whatever name.
        video: the facts that the output's video stream must have; its time base is the source's.
        pts: the source's pts of every frame that must be in the output, rising.
        durations: pts to duration, in ticks of `video.time_base`.
        streams: what was planned for every stream of the source.
        segment_starts: first pts of each segment.
        lost: pts of frames that could not be decoded (they are not in `pts`).
        corrupt: pts of frames that were decoded with damage.
        span: the range of the source that the output is; None for all of it.
        is_full: also decode every frame.
        hashes: pts to `hash_planes` of every frame that a lossless encoder was given; for `is_full`.

    Returns:
        The verdict.
    """
    proof = _Proof(source, output, video, pts, durations, streams, span)
    proof.checked["left_out"] = len(lost) + len(corrupt)
    try:
        with open_input(output) as film:
            index = proof.check_film(film)
        if index is not None and not proof.problems:
            facts = check_picture(
                source,
                output,
                video=video,
                stream_index=index,
                pts=pts,
                output_pts=proof.output_pts,
                output_keys=proof.output_keys,
                segment_starts=segment_starts,
                left_out={*lost, *corrupt},
                span=span,
            )
            proof.problems += facts.problems
            proof.checked |= {"places": facts.places, "static": facts.static, "unclear": facts.unclear}
            if is_full and not proof.problems:
                proof.check_frames(index, hashes or {})
    except (FFmpegError, SourceError, OSError, ValueError) as error:
        proof.problems.append(f"{output.name} cannot be read back: {' '.join(str(error).split())}")
    return Verdict(not proof.problems, tuple(map(readable, proof.problems)), proof.checked)


class _Proof:
    """One comparison while it grows."""

    def __init__(
        self,
        source: Probe,
        output: Path,
        video: VideoInfo,
        pts: Sequence[int],
        durations: Mapping[int, int],
        streams: Sequence[StreamPlan],
        span: Span | None,
    ) -> None:
        self._source, self._output, self._video, self._span = source, output, video, span
        self._pts, self._durations, self._plans = pts, durations, streams
        self.problems: list[str] = []
        self.checked: dict[str, int | str] = dict.fromkeys(
            ("frames", "copied", "converted", "chapters", "places", "static", "unclear", "left_out"), 0
        )
        self.checked["color"] = _MATRICES.get(video.color.matrix, str(video.color.matrix))
        self.output_pts: list[int] = []
        """Rising, in the output's ticks."""
        self.output_keys: list[int] = []

    def check_film(self, film: InputContainer) -> int | None:
        """Everything but the picture. Gives the index of the output's main video."""
        is_isom = "mp4" in film.format.name.split(",")
        pairs = self._pair(film)
        main = next((s for plan, s in pairs if plan.action == "video"), None)
        if not isinstance(main, VideoStream):
            self.problems.append("the output has no video stream")
            return None
        self._tallies = self._read(film, main)
        offset = self._check_times(main, is_exact=is_isom)
        self._check_facts(main, is_isom=is_isom)
        if offset is not None:
            self._check_streams(film, pairs, offset)
            self._check_chapters(film, offset)
        return main.index

    def check_frames(self, index: int, hashes: Mapping[int, str]) -> None:
        """Decodes every frame of the output; see `full_check`."""
        facts = check_frames(
            self._source,
            self._output,
            video=self._video,
            stream_index=index,
            pts=self._pts,
            output_pts=self.output_pts,
            hashes=hashes,
        )
        self.problems += facts.problems
        self.checked |= {"decoded": facts.decoded, "identical": facts.identical}
        if facts.lowest_psnr is not None:
            self.checked["lowest_psnr"] = f"{facts.lowest_psnr:.1f}"

    def _pair(self, film: InputContainer) -> list[Pair]:
        """The output's stream of each plan, kind by kind in order; one too few or too many is a problem."""
        pairs: list[Pair] = []
        for kind in ("video", "audio", "subtitle"):
            planned = [p for p in self._plans if p.kind == kind and p.action in ("video", "copy", "convert")]
            found = [s for s in film.streams if s.type == kind and not s.disposition & Disposition.attached_pic]
            if len(planned) != len(found):
                self.problems.append(f"{len(found)} {kind} streams, {len(planned)} were planned")
            pairs += zip(planned, found, strict=False)
        covers = sum(p.kind == "cover" and p.action in ("copy", "attach") for p in self._plans)
        attached = sum(bool(s.disposition & Disposition.attached_pic) for s in film.streams)
        if covers != attached:
            self.problems.append(f"{attached} cover pictures, {covers} were planned")
        files = sum(p.kind == "attachment" and p.action == "attach" for p in self._plans)
        there = sum(s.type == "attachment" for s in film.streams)
        if files != there:
            self.problems.append(f"{there} attachments, {files} were planned")
        return pairs

    def _read(self, film: InputContainer, main: VideoStream) -> dict[int, Tally]:
        tallies = {s.index: Tally() for s in film.streams}
        for packet in film.demux():
            if not packet.size or packet.pts is None:
                continue
            if packet.stream is main:
                self.output_pts.append(packet.pts)
                if packet.is_keyframe:
                    self.output_keys.append(packet.pts)
            elif not _is_gap(packet):
                tallies[packet.stream.index].add(packet)
        self.output_pts.sort()
        return tallies

    def _check_times(self, main: VideoStream, *, is_exact: bool) -> Fraction | None:
        """Gives the one offset in seconds between the output's times and the source's."""
        tick, own = main.time_base or Fraction(1), self._video.time_base
        theirs = [p * own for p in self._pts]
        ours = [p * tick for p in self.output_pts]
        self.checked["frames"] = len(ours)
        if not ours or not theirs:
            self.problems.append(f"{len(ours)} frames, the source has {len(theirs)}")
            return None
        offset, wrong = _best_offset(ours, theirs, is_exact=is_exact)
        if len(ours) != len(theirs):
            self.problems.append(f"{len(ours)} frames, the source has {len(theirs)}")
        if wrong:
            k, more = wrong[0], f" (+{len(wrong) - 1} more)" if len(wrong) > 1 else ""
            self.problems.append(
                f"frame {k} has pts {float(ours[k]):.3f} s, the source {float(theirs[k] + offset):.3f} s{more}"
            )
        if is_exact and main.duration is not None and len(ours) == len(theirs):
            span = theirs[-1] + self._durations[self._pts[-1]] * own - theirs[0]
            if abs(main.duration * tick - span) > _MILLISECOND:
                self.problems.append(f"the video lasts {float(main.duration * tick):.3f} s, not {float(span):.3f} s")
        return offset

    def _check_facts(self, main: VideoStream, *, is_isom: bool) -> None:
        video, color, context = self._video, self._video.color, main.codec_context
        # H.273 has two code points for the BT.601 matrix; a container may keep either.
        facts: list[tuple[str, object, object]] = [
            ("size", (context.width, context.height), (video.width, video.height)),
            ("colour matrix", _one_name(context.colorspace), _one_name(color.matrix)),
            ("colour primaries", int(context.color_primaries), color.primaries),
            ("colour transfer", int(context.color_trc), color.transfer),
            # QuickTime has no word for the range of RGB, which is full without one.
            ("colour range", int(context.color_range) or 2 * (color.matrix == 0), 2 if color.is_full_range else 1),
        ]
        # Elsewhere only Matroska itself could tell, and PyAV cannot make it; `join` notes that.
        if is_isom or context.name in ("h264", "hevc"):
            shape = main.sample_aspect_ratio or Fraction(1)
            facts.append(("sample aspect ratio", shape, video.sample_aspect_ratio))
        for name, found, wanted in facts:
            if found != wanted:
                self.problems.append(f"{name} is {found}, not {wanted}")
        self._check_first_frame(main.index)

    def _check_first_frame(self, index: int) -> None:
        """What no container tells, or not reliably."""
        video, seen = self._video, _look_at(self._output, index)
        if seen is None:
            self.problems.append("not one frame of the output can be decoded")
            return
        found, wanted = seen.color, video.color
        for what, is_told, one, other in (
            ("matrix", "matrix" not in found.assumed, _one_name(found.matrix), _one_name(wanted.matrix)),
            ("primaries", "primaries" not in found.assumed, found.primaries, wanted.primaries),
            ("transfer", "transfer" not in found.assumed, found.transfer, wanted.transfer),
            ("range", "range" not in found.assumed, found.is_full_range, wanted.is_full_range),
        ):
            # The stream's own word goes before the container's, and players believe it.
            if is_told and one != other:
                self.problems.append(f"colour {what} is {one} in the pictures themselves, not {other}")
        if seen.display_matrix != video.display_matrix:
            self.problems.append(
                f"display matrix is {seen.display_matrix or _UPRIGHT}, not {video.display_matrix or _UPRIGHT}"
            )
        if seen.pixel_format.has_alpha != video.pixel_format.has_alpha:
            self.problems.append(f"the picture is {seen.pixel_format.name}, not {video.pixel_format.name}")
        # Where none was promised, an option of the encoder may still have written some.
        if video.hdr is not None and seen.hdr != video.hdr:
            self.problems.append(f"HDR metadata is {seen.hdr}, not {video.hdr}")
        if video.stereo is not None and seen.stereo != video.stereo:
            self.problems.append(f"views lie {seen.stereo or 'nowhere'}, not {video.stereo}")

    def _check_streams(self, film: InputContainer, pairs: Sequence[Pair], offset: Fraction) -> None:
        with open_input(self._source.path) as source:
            found, copied, converted = check_streams(source, pairs, self._tallies, offset, self._span)
            self.problems += found
            self.problems += check_names(film, source, pairs)
        self.checked |= {"copied": copied, "converted": converted}

    def _check_chapters(self, film: InputContainer, offset: Fraction) -> None:
        with open_input(self._source.path) as source:
            wanted = source.chapters() if self._span is None else self._span.cut_chapters(source.chapters())
        found = film.chapters()
        self.checked["chapters"] = len(found)
        if len(found) != len(wanted):
            self.problems.append(f"{len(found)} chapters, the source has {len(wanted)}")
        for n, (ours, theirs) in enumerate(zip(found, wanted, strict=False)):
            start = ours["start"] * (ours["time_base"] or _MILLISECOND)
            there = max(Fraction(0), theirs["start"] * (theirs["time_base"] or _MILLISECOND) + offset)
            if abs(start - there) > _MILLISECOND:
                self.problems.append(
                    f"chapter {n} starts at {float(start):.3f} s, in the source at {float(there):.3f} s"
                )
            title = theirs["metadata"].get("title")
            if title and ours["metadata"].get("title") != title:
                self.problems.append(f"chapter {n} is called {ours['metadata'].get('title')!r}, not {title!r}")


def _best_offset(ours: Sequence[Fraction], theirs: Sequence[Fraction], *, is_exact: bool) -> tuple[Fraction, list[int]]:
    """The constant offset that fits most frames, and the frames that it does not fit."""
    shared = range(min(len(ours), len(theirs)))
    tolerance = Fraction(0) if is_exact else _MILLISECOND / 2
    candidates = []
    # The first frame alone could be the wrong one; where frames are missing, only those before them still pair up.
    for k in {0, len(shared) // 2, len(shared) - 1} if len(ours) == len(theirs) else {0}:
        gap = ours[k] - theirs[k]
        # Matroska's offset is a whole number of milliseconds, and each time is rounded by half a one at most.
        candidates += [gap] if is_exact else [Fraction(f(gap * 1000), 1000) for f in (floor, ceil)]
    misses = {
        offset: [k for k in shared if abs(ours[k] - theirs[k] - offset) > tolerance]
        for offset in sorted(set(candidates))
    }
    best = min(misses, key=lambda offset: (len(misses[offset]), abs(offset)))
    return best, misses[best]


def _one_name(matrix: int) -> str:
    return _MATRICES.get(int(matrix), str(int(matrix)))


def _is_gap(packet: Packet[Stream]) -> bool:
    s = packet.stream
    return s.type == "subtitle" and s.codec_context.name == "mov_text" and bytes(packet)[:2] == b"\0\0"


def _look_at(path: Path, index: int) -> VideoInfo | None:
    """What the output's own first frame says of it; None if there is none."""
    with open_file(path) as film:
        stream: VideoStream = film.streams[index]  # type: ignore[assignment]
        seen = look(film, stream, stream.time_base or Fraction(1), None, ())
    return None if seen is None else seen[0]
