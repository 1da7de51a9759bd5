"""What is in a file, by ffprobe's account; nothing of the library is used here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.conformance.tools import ffprobe

__all__ = ["Film", "best_offset", "look", "sound_lag"]

_SOUND_RATE = 8000


@dataclass(frozen=True)
class Film:
    """One file."""

    path: Path
    format: dict[str, Any]
    streams: tuple[dict[str, Any], ...]
    chapters: tuple[dict[str, Any], ...]
    packets: tuple[dict[str, Any], ...]
    frames: tuple[dict[str, Any], ...]
    """Decoded frames of the main video, in presentation order."""

    @cached_property
    def main(self) -> dict[str, Any]:
        """The video that is upscaled: the first that is no cover."""
        return next(s for s in self.streams if s.get("codec_type") == "video" and not is_cover(s))

    @cached_property
    def times(self) -> list[Fraction]:
        """When each frame is shown, in seconds: as decoded, or as the packets say where ffprobe has no decoder, or
        where the times are those of decoding.

        A frame without a time follows the one before it at the stream's rate; one that repeats a time is shown at the
        next tick.
        """
        base, index = Fraction(self.main["time_base"]), self.main["index"]
        ticks = [frame.get("pts", frame.get("best_effort_timestamp")) for frame in self.frames]
        known = [tick for tick in ticks if tick is not None]
        if not ticks or (len(known) == len(ticks) and known != sorted(known)):
            own = (p for p in self.packets if p["stream_index"] == index and "D" not in p["flags"])
            ticks = sorted(p.get("pts", p.get("dts")) for p in own)
        rate = Fraction(self.main["avg_frame_rate"]) if self.main["avg_frame_rate"] != "0/0" else Fraction(25)
        times: list[Fraction] = []
        for tick in ticks:
            last = times[-1] if times else -base
            time = tick * base if tick is not None else last + 1 / rate if times else Fraction(0)
            times.append(max(time, last + base) if times else time)
        return times

    @cached_property
    def times_shown(self) -> list[Fraction]:
        """When each frame is shown of a damaged film: a frame that is decoded after a later one comes too late."""
        base = Fraction(self.main["time_base"])
        times = [frame["pts"] * base for frame in self.frames]
        return [time for n, time in enumerate(times) if time >= max(times[: n + 1])]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The streams of a kind, covers left out."""
        return [s for s in self.streams if s.get("codec_type") == kind and not is_cover(s)]

    @property
    def covers(self) -> list[dict[str, Any]]:
        """The pictures that belong to no moment."""
        return [s for s in self.streams if is_cover(s)]

    def span(self, stream: dict[str, Any]) -> Fraction:
        """From a stream's first packet to the end of its last, in seconds; 0 if that is not known."""
        own = [p for p in self.packets if p["stream_index"] == stream["index"] and "D" not in p["flags"]]
        if not own or any("pts" not in p for p in own):
            return Fraction(0)
        last = max(own, key=lambda p: p["pts"])
        if not last.get("duration"):
            return Fraction(0)
        return (last["pts"] + last["duration"] - min(p["pts"] for p in own)) * Fraction(stream["time_base"])

    def count(self, stream: dict[str, Any]) -> int:
        """How many packets a stream has, empty ones left out."""
        return sum(p["stream_index"] == stream["index"] and int(p["size"]) > 2 for p in self.packets)


def is_cover(stream: dict[str, Any]) -> bool:
    return bool(stream.get("disposition", {}).get("attached_pic"))


def look(path: Path) -> Film:
    """Reads every packet of a file and decodes its main video."""
    about = json.loads(
        ffprobe("-show_format", "-show_streams", "-show_chapters", "-show_packets", "-of", "json", "-i", path)
    )
    streams = tuple(about["streams"])
    main = next((s["index"] for s in streams if s.get("codec_type") == "video" and not is_cover(s)), None)
    frames = []
    if main is not None:
        entries = "frame=pts,best_effort_timestamp,width,height,interlaced_frame,side_data_list"
        words = ("-select_streams", main, "-show_frames", "-show_entries", entries, "-of", "json", "-i", path)
        frames = json.loads(ffprobe(*words)).get("frames", [])
    return Film(path, about["format"], streams, tuple(about["chapters"]), tuple(about["packets"]), tuple(frames))


def best_offset(ours: list[Fraction], theirs: list[Fraction], step: Fraction | None) -> tuple[Fraction, Fraction]:
    """The one offset that fits all frames best, and the largest error that is left.

    Args:
        ours: the output's times.
        theirs: the source's, as many.
        step: the offset is a multiple of it; None where times are exact.
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    if step is None:
        return gaps[0], max(abs(gap - gaps[0]) for gap in gaps)
    middle = (max(gaps) + min(gaps)) / 2
    low = middle // step * step
    return min(((offset, max(abs(gap - offset) for gap in gaps)) for offset in (low, low + step)), key=lambda x: x[1])


def sound_lag(ours: Film, theirs: Film, n: int, m: int) -> Fraction | None:
    """Seconds that the output's sound `n` is later than the source's sound `m`, on the two files' own clocks.

    The decoded waves are laid upon each other; noise fits itself at one place only.

    Returns:
        None where the two are not alike.
    """
    (start_a, a), (start_b, b) = _wave(ours.path, n), _wave(theirs.path, m)
    size = min(len(a), len(b))
    if size < _SOUND_RATE // 10:
        return None
    length = 1 << (len(a) + len(b)).bit_length()
    match = np.fft.irfft(np.fft.rfft(a, length) * np.conj(np.fft.rfft(b, length)), length)
    shift = int(np.argmax(match))
    alike = match[shift] / max(1e-9, float(np.linalg.norm(a) * np.linalg.norm(b)))
    if alike < 0.5:
        return None
    shift -= length if shift > length // 2 else 0
    return start_a - start_b + Fraction(shift, _SOUND_RATE)


def _wave(path: Path, n: int) -> tuple[Fraction, np.ndarray]:
    """Start in seconds, and the mono wave, of a file's sound `n`; gaps between frames stay gaps."""
    start: Fraction | None = None
    place = 0
    rows: list[tuple[int, np.ndarray]] = []
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=48000)
        stream = container.streams.audio[n]
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                if frame.pts is None:
                    continue
                when = Fraction(frame.pts) * Fraction(frame.time_base)
                start = when if start is None else start
                # Containers round the times of sound that has no gap; only what is more than rounding is one.
                there = round((when - start) * 48000)
                place = there if abs(there - place) > 480 else place
                for piece in resampler.resample(frame):
                    rows.append((place, piece.to_ndarray()[0]))
                    place += rows[-1][1].shape[0]
    if start is None or not rows:
        return Fraction(0), np.zeros(0)
    wave = np.zeros(max(place + len(row) for place, row in rows))
    for place, row in rows:
        if place >= 0:
            wave[place : place + len(row)] = row
    # Six samples become one: 8 kHz resolves an eighth of a millisecond, and every codec keeps that band.
    return start, wave[: len(wave) // 6 * 6].reshape(-1, 6).mean(axis=1)
