"""Is every stream of the finished file what it was in the source: its bytes, each of its times, its name?"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, cast

from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.subtitles.stream import SubtitleStream

from hat_video.media.carry import Cue, CueReader, clean_metadata, copied_packets, plain_text, readable
from hat_video.media.passthrough import StreamPlan
from hat_video.media.span import Span

__all__ = ["Pair", "Tally", "check_names", "check_streams"]

Pair = tuple[StreamPlan, Stream]
"""What was planned for a stream of the source, and the output's stream that came of it."""

_MILLISECOND = Fraction(1, 1000)
# A converted stream may gain an encoder's delay and the padding of its last packet; its packets are cut otherwise.
_CONVERTED_SLACK = Fraction(1, 5)
# Converted texts keep their times; ASS counts in hundredths of a second.
_PICTURES = ("dvd_subtitle", "dvb_subtitle", "hdmv_pgs_subtitle", "xsub")
_TEXT_SLACK = Fraction(1, 100)
# Codes of the same language: ISO 639-2 has two for some, and MP4 knows one of them.
_SAME_LANGUAGE = {
    "alb": "sqi", "arm": "hye", "baq": "eus", "bur": "mya", "chi": "zho", "cze": "ces", "dut": "nld", "fre": "fra",
    "geo": "kat", "ger": "deu", "gre": "ell", "ice": "isl", "mac": "mkd", "mao": "mri", "may": "msa", "per": "fas",
    "rum": "ron", "slo": "slk", "tib": "bod", "wel": "cym",
}  # fmt: skip


@dataclass(slots=True)
class Tally:
    """What one stream holds, gathered packet by packet."""

    packets: int = 0
    size: int = 0
    digest: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end of each packet that has a time, in ticks."""
    time_base: Fraction = Fraction(1)
    texts: list[bytes] = field(default_factory=list)
    """What each of `spans` shows, if it is mov_text."""

    def add(self, packet: Packet[Stream]) -> None:
        """Takes note of a packet."""
        data = bytes(packet)
        self.packets += 1
        self.size += len(data)
        self.digest.update(data)
        if packet.pts is not None:
            self.time_base = packet.time_base
            self.spans.append((packet.pts, packet.pts + (packet.duration or 0)))
            if isinstance(packet.stream, SubtitleStream) and packet.stream.codec_context.name == "mov_text":
                self.texts.append(plain_text(data))

    @property
    def times(self) -> list[tuple[Fraction, Fraction]]:
        """Begin and end of each packet in seconds, by their beginning."""
        return [(begin * self.time_base, end * self.time_base) for begin, end in sorted(self.spans)]


def check_streams(
    source: InputContainer, pairs: Sequence[Pair], tallies: Mapping[int, Tally], offset: Fraction, span: Span | None
) -> tuple[list[str], int, int]:
    """Compares all but the main video.

    Args:
        source: the source, open.
        pairs: the streams.
        tallies: what was read of the output, by its stream's index.
        offset: seconds that every time of the output is later than the source's.
        span: the range of the source that the output is; None for all of it.

    Returns:
        Differences, one line each; how many streams were compared as copies, and how many as converted.
    """
    others = [(plan, s) for plan, s in pairs if plan.action != "video"]
    wanted = {plan.index: Tally() for plan, _ in others}
    rows = [plan.index for plan, _ in others if plan.action == "convert" and plan.target == "mov_text"]
    readers = {i: CueReader(cast(SubtitleStream, source.streams[i])) for i in rows}
    cues: dict[int, list[Cue]] = {i: [] for i in rows}
    for index, packet in copied_packets(source, sorted(wanted), span, rows):
        if index in readers:
            cue = readers[index].read(packet)
            cues[index] += [] if cue is None else [cue]
        elif packet.size:
            wanted[index].add(packet)
    problems: list[str] = []
    copied = 0
    for plan, s in others:
        name, ours, theirs = f"{plan.kind} stream {plan.index} ({plan.codec})", tallies[s.index], wanted[plan.index]
        if plan.action == "copy":
            copied += 1
            problems += _copy_problems(name, plan, ours, theirs, offset)
        elif plan.index in cues:
            problems += _row_problems(name, ours, cues[plan.index], offset)
        else:
            problems += _converted_problems(name, plan, ours, theirs, offset)
    return problems, copied, len(others) - copied


def _copy_problems(name: str, plan: StreamPlan, ours: Tally, theirs: Tally, offset: Fraction) -> Iterable[str]:
    # PCM has no packets of its own: every container cuts it as it likes.
    is_pcm = plan.codec.startswith("pcm_")
    if ours.packets != theirs.packets and not is_pcm:
        yield f"{name} has {ours.packets} packets, the source {theirs.packets}"
        return
    # Muxers rewrite the framing of these, so only times and the count can be compared.
    if plan.codec != "webvtt" and plan.kind != "video" and ours.digest.digest() != theirs.digest.digest():
        yield f"{name} differs from the source: {ours.size} bytes, there {theirs.size}"
        return
    here, there = ours.times, theirs.times
    if is_pcm:
        here, there = here[:1], there[:1]
    yield from _late(name, here, there, offset, _MILLISECOND)
    # Pictures say in themselves how long they are shown; what containers make of that is their own affair.
    if plan.kind == "subtitle" and plan.codec not in _PICTURES:
        for n, ((begin, end), (begins, ends)) in enumerate(zip(here, there, strict=False)):
            # Without a duration, a text stays until the next one, and containers say so as they can.
            if ends > begins and abs((end - begin) - (ends - begins)) > 2 * _MILLISECOND:
                yield f"{name}: text {n} is shown for {float(end - begin):.3f} s, not {float(ends - begins):.3f} s"
                return


def _converted_problems(name: str, plan: StreamPlan, ours: Tally, theirs: Tally, offset: Fraction) -> Iterable[str]:
    if not theirs.spans:
        return
    here, there = ours.times, theirs.times
    if not here:
        yield f"{name} is empty, the source has {theirs.packets} packets"
        return
    if plan.kind == "subtitle":
        if len(here) == len(there):
            yield from _late(name, here, there, offset, _TEXT_SLACK)
        return
    lasts = [max(end for _, end in times) - times[0][0] for times in (here, there)]
    if abs(lasts[0] - lasts[1]) > _CONVERTED_SLACK:
        yield f"{name} was converted to {float(lasts[0]):.3f} s, the source has {float(lasts[1]):.3f} s"
    # It starts earlier by its encoder's delay, which players cut off.
    yield from _late(name, here[:1], there[:1], offset, _CONVERTED_SLACK)
    holes = [max((b - a for (_, a), (b, _) in pairwise(times)), default=Fraction(0)) for times in (here, there)]
    if holes[0] > holes[1] + _CONVERTED_SLACK:
        yield f"{name} has a hole of {float(holes[0]):.3f} s that the source does not have"


def _row_problems(name: str, ours: Tally, cues: Sequence[Cue], offset: Fraction) -> Iterable[str]:
    """What is on the screen when: a track that shows one text at a time against cues that may overlap."""
    tick = ours.time_base
    here = sorted(
        (begin * tick - offset, end * tick - offset, text)
        for (begin, end), text in zip(ours.spans, ours.texts, strict=False)
        if end > begin
    )
    there = list(_screens(cues))
    for (begin, end, text), (begins, ends, wanted) in zip(here, there, strict=False):
        late, longer = begin - begins, end - ends
        at = f"at {float(begins):.3f} s"
        if text != wanted:
            yield f"{name} shows {_quoted(text)} {at}, not {_quoted(wanted)}"
        elif abs(late) > _TEXT_SLACK:
            yield f"{name}: the text {at} is {float(late) * 1000:+.1f} ms off against the picture"
        elif abs(longer) > _TEXT_SLACK:
            yield f"{name}: the text {at} is shown for {float(end - begin):.3f} s, not {float(ends - begins):.3f} s"
        else:
            continue
        return
    if len(here) < len(there):
        begins, _, wanted = there[len(here)]
        yield f"{name} does not show {_quoted(wanted)} at {float(begins):.3f} s"
    elif len(here) > len(there):
        begin, _, text = here[len(there)]
        yield f"{name} shows {_quoted(text)} at {float(begin):.3f} s, the source has no text there"


def _screens(cues: Sequence[Cue]) -> Iterable[tuple[Fraction, Fraction, bytes]]:
    """Begin, end and text of everything that is on the screen, where one text is followed by another or by none."""
    rising = sorted(cues, key=lambda cue: cue.begin)
    begins = [cue.begin for cue in rising]
    for cue in rising:
        n = bisect_right(begins, cue.begin)
        cue.stop_at(begins[n] if n < len(begins) else None)
    bounds = sorted({bound for cue in rising for bound in (cue.begin, cue.end or 0)})
    shown: list[Cue] = []
    waiting = deque(rising)
    for begin, end in pairwise(bounds):
        shown = [cue for cue in shown if (cue.end or 0) > begin]
        while waiting and waiting[0].begin <= begin:
            shown.append(waiting.popleft())
        if shown:
            yield begin * _MILLISECOND, end * _MILLISECOND, b"\n".join(cue.plain for cue in shown)


def _quoted(text: bytes) -> str:
    return repr(" ".join(text.decode("utf-8", "replace").split()))


def _late(
    name: str,
    here: Sequence[tuple[Fraction, Fraction]],
    there: Sequence[tuple[Fraction, Fraction]],
    offset: Fraction,
    allowed: Fraction,
) -> Iterable[str]:
    for n, ((ours, _), (theirs, _)) in enumerate(zip(here, there, strict=False)):
        late = ours - offset - theirs
        if abs(late) > allowed:
            where = f" from packet {n} on, at {float(theirs):.3f} s," if n else ""
            yield f"{name}{where} is {float(late) * 1000:+.1f} ms off against the picture"
            return


def check_names(film: InputContainer, source: InputContainer, pairs: Sequence[Pair]) -> list[str]:
    """What the output calls otherwise than the source; what it leaves out is another matter (see `losses`)."""
    problems = [f"the file's {what}" for what in _other_tags(source.metadata, film.metadata)]
    for plan, s in pairs:
        if plan.action == "video":
            continue
        name, original = f"{plan.kind} stream {plan.index} ({plan.codec})", source.streams[plan.index]
        ours, theirs = s.metadata.get("language"), original.metadata.get("language")
        if ours not in (None, "und") and _language(ours) != _language(theirs):
            problems.append(f"{name} has the language {ours}, not {theirs or 'any'}")
        title = s.metadata.get("title")
        if title is not None and readable(title) not in {
            readable(original.metadata.get(key, "")) for key in ("title", "handler_name")
        }:
            problems.append(f"{name} is called {title!r}, not {original.metadata.get('title', '')!r}")
        more = s.disposition & ~original.disposition & ~Disposition.default
        if more:
            flags = ", ".join(flag.name or "" for flag in Disposition if flag & more)
            problems.append(f"{name} is marked as {flags}, in the source it is not")
    return [*problems, *_attachment_problems(film, source)]


def _other_tags(theirs: dict[str, str], ours: dict[str, str]) -> Iterable[str]:
    wanted = {key.lower(): readable(value) for key, value in clean_metadata(theirs).items()}
    for key, value in clean_metadata(ours).items():
        expected = wanted.get(key.lower())
        if key.lower() in ("title", "artist", "comment", "description", "copyright") and readable(value) != expected:
            yield f"{key.lower()} is {readable(value)!r}, not {expected!r}"


def _language(code: str | None) -> str | None:
    return None if code is None else _SAME_LANGUAGE.get(code, code)


def _attachment_problems(film: InputContainer, source: InputContainer) -> Iterable[str]:
    """Attached files have no packets; they are compared by name and content."""
    wanted = {_file_name(s): _content(s) for s in source.streams if s.type == "attachment"}
    for s in film.streams:
        name = _file_name(s)
        if s.type == "attachment" and name in wanted and _content(s) != wanted[name]:
            yield f"the attached file {readable(name)} is not the source's"


def _file_name(s: Any) -> str:
    return str(s.metadata.get("filename") or getattr(s, "name", None) or s.index)


def _content(s: Any) -> bytes:
    return hashlib.blake2b(bytes(s.data or b"")).digest()
