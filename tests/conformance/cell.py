"""One cell of the table: a kind of source into a container, judged by the referee."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from hat_video.cli import main
from tests.conformance.kinds import Kind
from tests.conformance.referee import Film, best_offset, look, sound_lag

__all__ = ["CONTAINERS", "Outcome", "run_cell"]

CONTAINERS = ("mp4", "mov", "mkv", "webm")
_MILLISECOND = Fraction(1, 1000)
_NOT_YUV = ("rgb", "gbr", "bgr", "gray", "pal8")
_FAST = {"webm": ("--encoder-option", "deadline=realtime", "--encoder-option", "cpu-used=8")}


@dataclass
class Outcome:
    """What became of one kind of source in one container."""

    word: str = "exact"
    """exact, converted or refused."""
    what: list[str] = field(default_factory=list)
    """What was converted, dropped or moved, and damage that was reported; or why it was refused."""
    faults: list[str] = field(default_factory=list)
    """What the referee objects to: the table must have none."""

    def says(self, text: str) -> None:
        """Notes a difference that the command reported."""
        self.word = "converted"
        if text not in self.what:
            self.what.append(text)


def run_cell(kind: Kind, source: Path, container: str, folder: Path) -> Outcome:
    """Upscales `source` into `container` with the real command and compares the result with it."""
    output, report = folder / f"out.{container}", folder / "report.json"
    said = io.StringIO()
    words = ["upscale", source, "-o", output, "--report", report, "--model", "bicubic", "--scale", "2",
             "--segment", "0.4", *_FAST.get(container, ("--preset", "ultrafast")), *kind.options]  # fmt: skip
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main([str(word) for word in words])
    lines = said.getvalue().strip().splitlines()
    if code:
        return _refusal(kind, lines, source, output)
    outcome = Outcome()
    if kind.refused is not None:
        outcome.faults.append(f"was made, but must be refused: {kind.refused}")
        return outcome
    told = json.loads(report.read_text())["clips"][0]
    _Judge(kind, look(source), look(output), told, container, outcome).judge()
    return outcome


def _refusal(kind: Kind, lines: list[str], source: Path, output: Path) -> Outcome:
    last = lines[-1] if lines else "(nothing was said)"
    reason = last.removeprefix("hat-video: ").replace(str(source), source.name).replace(str(output), output.name)
    outcome = Outcome("refused", [reason.split(";")[0]])
    if kind.refused is None or not re.search(kind.refused, last):
        outcome.faults.append(f"refused: {last}")
    if "hat-video: unexpected" in last:
        outcome.faults.append(last)
    if "Traceback" in "\n".join(lines):
        outcome.faults.append("a traceback was shown")
    if output.exists():
        outcome.faults.append("a refused output was left behind")
    return outcome


@dataclass
class _Judge:
    """The comparison of one output with its source."""

    kind: Kind
    source: Film
    output: Film
    told: dict[str, Any]
    container: str
    outcome: Outcome

    def judge(self) -> None:
        self._told_of()
        offset = self._times()
        self._sounds(offset)
        self._others()
        self._names()
        self._picture()

    def _told_of(self) -> None:
        wanted = self.kind.reported
        if wanted is None:
            return
        note = next((note for note in self.told["notes"] if re.search(wanted, note)), None)
        if note is None:
            self.outcome.faults.append(f"no note says {wanted!r}: {self.told['notes']}")
        else:
            self.outcome.says(note)

    def _reported(self, *words: str) -> str | None:
        """The note that holds all of `words`."""
        return next((note for note in self.told["notes"] if all(word.lower() in note.lower() for word in words)), None)

    def _differs(self, what: str, *words: str) -> None:
        """A difference is fine where it was reported, else a fault."""
        if self._reported(*words) is not None:
            self.outcome.says(what)
        else:
            self.outcome.faults.append(f"{what}; not reported")

    # Time

    def _expected(self) -> list[Fraction]:
        """When each frame of the output must be shown, on the source's clock."""
        frames = self.told["frames"]
        if self.kind.rate is not None:
            start = self.source.times[0] if self.kind.start is None else self.kind.start
            return [start + Fraction(k) / self.kind.rate for k in range(len(self.source.times))]
        if frames["lost"] or frames["corrupt"]:
            self.outcome.says(f"{frames['lost']} frames lost, {frames['corrupt']} damaged, as in the source")
        return self.source.times_shown if frames["lost"] else self.source.times

    def _times(self) -> Fraction:
        film, outcome = self.output, self.outcome
        wanted, found = self._expected(), film.times
        if self.told["frames"]["in"] != self.told["frames"]["out"] + self.told["frames"]["lost"]:
            outcome.faults.append(f"the report does not add up: {self.told['frames']}")
        if len(found) != len(wanted):
            outcome.faults.append(f"{len(found)} frames, ffprobe counts {len(wanted)} in the source")
            return found[0] - wanted[0] if found and wanted else Fraction(0)
        self._lasts()
        is_exact = self.container in ("mp4", "mov")
        offset, error = best_offset(found, wanted, None if is_exact else _MILLISECOND)
        if error > (0 if is_exact else _MILLISECOND / 2):
            outcome.faults.append(f"a frame is {float(error) * 1000:.3f} ms off")
        if offset:
            # Without timestamps the source has no clock to be moved against.
            if self.kind.rate is None and self._reported("all times") is None:
                outcome.faults.append(f"all times {_signed(offset)}; not reported")
            if self.kind.rate is None:
                outcome.what.append(f"all times {_signed(offset)}")
        return offset

    def _lasts(self) -> None:
        """The last frame is shown as long as in the source, where source and container say so."""
        if self.kind.rate is not None or self.kind.chapter == "Damaged" or self.container not in ("mp4", "mov"):
            return
        before, now = self.source.span(self.source.main), self.output.span(self.output.main)
        if before and abs(before - now) > _MILLISECOND:
            self.outcome.faults.append(f"the video lasts {float(now):.3f} s, {float(before):.3f} s in the source")

    # Streams

    def _plans(self, kind: str) -> list[dict[str, Any]]:
        return [s for s in self.told["streams"] if s["kind"] == kind and s["action"] in ("copy", "convert")]

    def _sounds(self, offset: Fraction) -> None:
        there, plans = self.source.of("audio"), self._plans("audio")
        ours = self.output.of("audio")
        for plan in self.told["streams"]:
            if plan["kind"] == "audio" and plan["action"] == "drop":
                self.outcome.faults.append(f"{plan['codec']} sound was dropped: {plan['reason']}")
        if len(ours) != len(plans):
            self.outcome.faults.append(f"{len(ours)} sounds, {len(there)} in the source, {len(plans)} planned")
            return
        numbers = {s["index"]: n for n, s in enumerate(there)}
        for n, plan in enumerate(plans):
            codec, old = ours[n]["codec_name"], plan["codec"]
            if plan["action"] == "convert":
                self.outcome.says(f"{old} to {codec}")
            elif not old.startswith(("pcm", "mp2")) and codec != there[numbers[plan["index"]]]["codec_name"]:
                self.outcome.faults.append(f"sound {n} is {codec}, {old} was to be copied")
            if self.kind.chapter == "Damaged":
                continue
            lag = sound_lag(self.output, self.source, n, numbers[plan["index"]])
            if lag is None:
                self.outcome.faults.append(f"sound {n} is not like the source's")
            elif abs(lag - offset) > _MILLISECOND:
                self.outcome.faults.append(f"sound {n} is {float(lag - offset) * 1000:+.2f} ms off against the picture")

    def _others(self) -> None:
        for kind in ("subtitle", "attachment", "cover", "data", "video"):
            for plan in (s for s in self.told["streams"] if s["kind"] == kind):
                name = f"{plan['codec']} {kind}" if kind != "attachment" else "font"
                if plan["action"] == "drop":
                    if not plan["reason"]:
                        self.outcome.faults.append(f"{name} was dropped without a reason")
                    self.outcome.says(f"without {name}")
                elif plan["action"] == "convert":
                    self.outcome.says(f"{plan['codec']} to {plan['target']}")
        kept = [s for s in self.told["streams"] if s["kind"] == "subtitle" and s["action"] != "drop"]
        ours = self.output.of("subtitle")
        if len(kept) != len(ours):
            self.outcome.faults.append(f"{len(ours)} subtitles, {len(kept)} planned")
        by_index = {s["index"]: s for s in self.source.streams}
        for plan, stream in zip(kept, ours, strict=False):
            want, have = self.source.count(by_index[plan["index"]]), self.output.count(stream)
            if want != have and "bitmap" not in self.kind.name:
                self.outcome.faults.append(f"{have} subtitle packets, {want} in the source")
        for kind, found in (("cover", self.output.covers), ("attachment", self.output.of("attachment"))):
            planned = [s for s in self.told["streams"] if s["kind"] == kind and s["action"] != "drop"]
            if len(planned) != len(found):
                self.outcome.faults.append(f"{len(found)} {kind}s, {len(planned)} planned")
        indexes = {s["index"] for s in self.told["streams"]}
        missing = [s for s in self.source.streams if s["index"] not in indexes]
        if missing:
            self.outcome.faults.append(f"the report says nothing of {len(missing)} streams")

    def _names(self) -> None:
        theirs, ours = _tags(self.source.format), _tags(self.output.format)
        for key in sorted(theirs.keys() - ours.keys()):
            self._differs(f"without the tag {key}", "does not keep", key)
        for key in theirs.keys() & ours.keys():
            if theirs[key] != ours[key]:
                self.outcome.faults.append(f"tag {key} is {ours[key]!r}, not {theirs[key]!r}")
        for kind in ("audio", "subtitle"):
            by_index = {s["index"]: s for s in self.source.streams}
            for plan, stream in zip(self._plans(kind), self.output.of(kind), strict=False):
                before = by_index[plan["index"]]
                for key in ("language", "title"):
                    value, now = before.get("tags", {}).get(key), stream.get("tags", {}).get(key)
                    if value not in (None, "und") and now != value and stream["tags"].get("handler_name") != value:
                        self._differs(f"without {kind} {key}s" if now is None else f"{kind} {key} {now}", key, value)
                lost = {k for k, v in before["disposition"].items() if v and not stream["disposition"].get(k)}
                for flag in sorted(lost - {"default"}):
                    self._differs(f"{kind} not marked {flag}", "disposition", flag)
        self._chapters()
        timecode = next((s["tags"]["timecode"] for s in self.source.streams if s.get("tags", {}).get("timecode")), None)
        now = [s.get("tags", {}) for s in (*self.output.streams, self.output.format)]
        if timecode and timecode not in [v for tags in now for k, v in tags.items() if k.lower() == "timecode"]:
            self._differs("without the timecode", "timecode")

    def _chapters(self) -> None:
        theirs, ours = self.source.chapters, self.output.chapters
        if len(theirs) != len(ours):
            self._differs(f"{len(theirs) - len(ours)} chapters less", "chapters")
            return
        for a, b in zip(theirs, ours, strict=True):
            if a.get("tags", {}).get("title") != b.get("tags", {}).get("title"):
                self.outcome.faults.append(f"chapter {a['tags']} is called {b.get('tags')}")
            if abs(float(a["start_time"]) - float(b["start_time"])) > 0.05:
                self.outcome.faults.append(f"chapter at {a['start_time']} is at {b['start_time']}")

    # Pictures

    def _picture(self) -> None:
        before, now = self.source.main, self.output.main
        size = (now["width"], now["height"])
        # ffprobe has no PNG decoder, and tells no size of a sequence of them.
        if before["width"] and size != (2 * before["width"], 2 * before["height"]):
            self._differs(f"{size[0]}x{size[1]} pixels", "size")
        for name in ("color_space", "color_primaries", "color_transfer", "color_range"):
            tag = before.get(name, "unknown")
            if tag in ("unknown", "reserved", "gbr") or before.get("pix_fmt", "").startswith(_NOT_YUV):
                continue
            if tag != now.get(name) and {tag, now.get(name)} != {"bt470bg", "smpte170m"}:
                self.outcome.faults.append(f"{name} is {now.get(name)}, not {tag}")
        shapes = [
            Fraction(s.get("sample_aspect_ratio", "1:1").replace(":", "/").replace("0/1", "1/1")) for s in (before, now)
        ]
        if shapes[0] != shapes[1]:
            self._differs(f"samples are {shapes[1]} wide, not {shapes[0]}", "sample aspect")
        if _rotation(before) != _rotation(now):
            self.outcome.faults.append(f"rotated by {_rotation(now)}, not {_rotation(before)}")
        formats = [s.get("pix_fmt", "unknown").replace("yuvj", "yuv") for s in (before, now)]
        if formats[0] != formats[1]:
            self.outcome.says(f"{formats[0].replace('unknown', 'RGB')} to {formats[1]}")


def _rotation(stream: dict[str, Any]) -> int:
    return next((d["rotation"] % 360 for d in stream.get("side_data_list", []) if "rotation" in d), 0)


def _tags(about: dict[str, Any]) -> dict[str, str]:
    written = ("encoder", "major_brand", "minor_version", "compatible_brands", "duration", "timecode")
    return {k.lower(): v for k, v in about.get("tags", {}).items() if k.lower() not in written}


def _signed(value: Fraction) -> str:
    return f"{float(value):+.3f} s".replace(".000 s", " s")
