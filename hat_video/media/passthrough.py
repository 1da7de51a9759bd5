"""Every stream but the main video: what becomes of each, decided by the muxer itself, and then their packets.

No table says what a container holds: `plan_streams` writes a header with just that stream into memory, and the muxer's
own sentence is the reason where it refuses.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, cast

import av
import av.logging
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import AttachmentStream, Discard, Disposition, Stream
from av.subtitles.stream import SubtitleStream

from hat_video.media.carry import (
    Carrier,
    ConvertAudio,
    ConvertText,
    Copy,
    add_audio,
    add_copy,
    clean_metadata,
    open_input,
    readable,
    sentence_of,
)
from hat_video.media.ffmpeg_log import hear_ffmpeg
from hat_video.media.opening import demux
from hat_video.media.span import Span

__all__ = ["Passthrough", "StreamPlan", "plan_open_streams", "plan_streams"]

# For sound that lost nothing so far, then for the rest.
_AUDIO_ENCODERS = {
    "matroska": ("flac", "aac"),
    "webm": ("libopus", "libopus"),
    "mp4": ("alac", "aac"),
    "mov": ("alac", "aac"),
}
_SUBTITLE_ENCODERS = {"mp4": "mov_text", "mov": "mov_text", "webm": "webvtt", "matroska": "ass"}
_MIME_TYPES = {"mjpeg": ("jpg", "image/jpeg"), "png": ("png", "image/png"), "webp": ("webp", "image/webp")}


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What becomes of one stream of the source."""

    index: int
    """Its place in the source."""
    kind: str
    """`video`, `audio`, `subtitle`, `attachment`, `data` or `cover`."""
    codec: str
    """FFmpeg's name of its codec; `unknown` where there is none."""
    action: Literal["video", "copy", "convert", "rebuild", "attach", "drop"]
    """`video` is the stream that is upscaled; `rebuild` means that the muxer makes it anew from tags or chapters."""
    target: str | None
    """The encoder (`convert`), the thing it is rebuilt from (`rebuild`), the file name (`attach` of a cover)."""
    reason: str | None
    """Why it is not simply copied, in the muxer's words where the muxer refused."""
    language: str | None
    title: str | None


def plan_streams(source: Path, container: str, *, video_index: int) -> tuple[StreamPlan, ...]:
    """Decides for every stream of `source` whether `container` can hold it as it is, converted, or not at all.

    Args:
        source: the file whose streams are carried.
        container: FFmpeg's muxer name: `mp4`, `mov`, `matroska` or `webm`.
        video_index: index of the stream that is upscaled.

    Returns:
        One plan a stream, in the source's order.

    Raises:
        SourceError: the source cannot be opened.
    """
    with open_input(source) as inp:
        return plan_open_streams(inp, container, video_index=video_index)


def plan_open_streams(inp: InputContainer, container: str, *, video_index: int) -> tuple[StreamPlan, ...]:
    """As `plan_streams`, for a source that is open already; reads nothing of it."""
    has_chapters = bool(inp.chapters())
    names: set[str] = set()
    return tuple(
        _plan(s, container, is_main=s.index == video_index, has_chapters=has_chapters, names=names) for s in inp.streams
    )


def _plan(s: Stream, container: str, *, is_main: bool, has_chapters: bool, names: set[str]) -> StreamPlan:
    codec = _codec_name(s)
    is_cover = s.type == "video" and bool(s.disposition & Disposition.attached_pic)
    kind = "cover" if is_cover else s.type if s.type in ("video", "audio", "subtitle", "attachment") else "data"

    def plan(action: str, target: str | None = None, reason: str | None = None) -> StreamPlan:
        chosen = cast('Literal["video", "copy", "convert", "rebuild", "attach", "drop"]', action)
        language, title = (readable(text) if text else None for text in (s.language, s.metadata.get("title")))
        return StreamPlan(s.index, kind, codec, chosen, target, reason, language, title)

    if is_main:
        return plan("video")
    if kind == "data":
        if s.metadata.get("timecode"):
            return plan("rebuild", "timecode", "a timecode track is written anew from its tag")
        if has_chapters and codec == "bin_data":
            return plan("rebuild", "chapters", "the chapters' text track is written anew from the chapters")
        return plan("drop", reason="data of this kind cannot be carried to another file")
    if s.codec_context is None and kind != "attachment":
        return plan("drop", reason=f"{kind} of an unknown codec cannot be carried to another file")
    if kind == "attachment" and container == "webm":
        return plan("drop", reason="WebM has no attachments")  # its muxer takes them and writes nothing
    if is_cover and container == "mov":
        return plan("drop", reason="QuickTime files have no place for a cover")  # its muxer takes it and writes nothing
    if is_cover and container == "matroska":
        if codec not in _MIME_TYPES:
            return plan("drop", reason=f"a {codec} picture cannot be attached")
        return plan("attach", _cover_name(s, codec, names), "Matroska holds covers as attachments")
    # MP4 says what it thinks of PCM only in the moov box, which is otherwise written last.
    early = {"movflags": "empty_moov"} if container in ("mp4", "mov") and codec.startswith("pcm_") else None
    why = _refusal(container, partial(add_copy, s=s), early)
    if why is None:
        return plan("attach" if kind == "attachment" else "copy")
    if kind == "audio":
        target = _audio_target(cast(AudioStream, s), codec, container)
        if target is not None:
            return plan("convert", target, why)
    if kind == "subtitle" and container in _SUBTITLE_ENCODERS and s.codec_context.codec.text_sub:
        return plan("convert", _SUBTITLE_ENCODERS[container], why)
    return plan("drop", reason=why)


def _codec_name(s: Stream) -> str:
    if s.codec_context is not None:
        return s.codec_context.codec.canonical_name
    # An attachment's `name` is its file name, not a codec.
    return (s.name if s.type == "data" else None) or "unknown"


def _cover_name(s: Stream, codec: str, names: set[str]) -> str:
    # Players know a cover by this name; a second picture keeps its own or gets a number.
    suffix = _MIME_TYPES[codec][0]
    given = s.metadata.get("filename") or f"cover.{suffix}"
    name, n = given, 2
    while name in names:
        name, n = f"{Path(given).stem}_{n}{Path(given).suffix}", n + 1
    names.add(name)
    return name


def _audio_target(s: AudioStream, codec: str, container: str) -> str | None:
    lossless, lossy = _AUDIO_ENCODERS.get(container, ("aac", "aac"))
    # The companding of telephony calls itself lossless, too.
    is_lossless = s.codec_context.codec.lossless and codec not in ("pcm_mulaw", "pcm_alaw")
    for encoder in (lossless, lossy) if is_lossless else (lossy,):
        if _refusal(container, partial(add_audio, s=s, encoder=encoder)) is None:
            return encoder
    return None


def _refusal(
    container: str, add: Callable[[OutputContainer], Stream], options: dict[str, str] | None = None
) -> str | None:
    """Why `container` cannot hold the stream that `add` adds; None if it can. Only the header is proof."""
    # So that an exception carries the muxer's sentence.
    with hear_ffmpeg(av.logging.PANIC):
        out = av.open(io.BytesIO(), "w", format=container, options=options)
        try:
            add(out)
            out.start_encoding()
        except (FFmpegError, ValueError, OSError, NotImplementedError) as error:
            return sentence_of(error)
        finally:
            # After a header the trailer must follow before memory is freed; after a failed one there is nothing to do.
            with suppress(FFmpegError, ValueError, OSError):
                out.close()
    return None


class Passthrough:
    """The streams beside the main video, on their way from the source to one output. A context manager.

    Args:
        source: the file that `plans` were made for.
        plans: what becomes of each stream.
        span: the range that is carried; all of the source if None.

    Raises:
        SourceError: the source cannot be opened.
    """

    def __init__(self, source: Path, plans: Sequence[StreamPlan], span: Span | None = None) -> None:
        self._source, self._span = source, span
        self._inp = open_input(source)
        self._paths: dict[int, Carrier] = {}
        self._sounding: set[int] = set()
        self._held: deque[Packet[Stream]] = deque()
        self._reader: Iterator[Packet[Stream]] = iter(())
        self._plans = {plan.index: plan for plan in plans}
        self.notes: list[str] = []
        """What went wrong on the way, one line each; complete once `packets` is exhausted."""

    def __enter__(self) -> Passthrough:
        return self

    def __exit__(self, *exc: object) -> None:
        self._inp.close()

    @property
    def source(self) -> InputContainer:
        """The open source, for its tags and chapters."""
        return self._inp

    def add(self, plan: StreamPlan, out: OutputContainer) -> None:
        """Adds the stream of `plan` to `out`, which has no header yet; nothing for `drop`, `rebuild` and `video`."""
        if plan.action not in ("copy", "convert", "attach"):
            return
        s = self._inp.streams[plan.index]
        if plan.kind == "cover" and plan.action == "attach":
            mime_type = _MIME_TYPES[plan.codec][1]
            out.add_attachment(plan.target or "cover", mime_type, _first_packet(self._source, plan.index))
            return
        o: Stream
        if plan.action in ("copy", "attach"):
            o = add_copy(out, s)
            if not isinstance(s, AttachmentStream):
                self._paths[plan.index] = Copy(s, o)
        elif plan.kind == "audio":
            sound = add_audio(out, cast(AudioStream, s), plan.target or "aac")
            self._paths[plan.index], o = ConvertAudio(cast(AudioStream, s), sound), sound
        else:
            text = cast(SubtitleStream, out.add_stream(plan.target or "ass"))
            self._paths[plan.index], o = ConvertText(cast(SubtitleStream, s), text), text
        o.metadata.update(s.metadata if plan.kind == "attachment" else clean_metadata(s.metadata))
        o.disposition = s.disposition
        if plan.kind == "audio":
            self._sounding.add(plan.index)

    def first_seconds(self) -> Fraction | None:
        """Start of the earliest sound in the output, in seconds; None if no sound. Call after `add`, before `packets`.

        An encoder starts before zero by its own delay, so this reads, converts and keeps packets until each audio
        stream gave one (at most 4096).
        """
        self._reader = self._read()
        first: Fraction | None = None
        seen: set[int] = set()
        for packet in self._reader:
            self._held.append(packet)
            if packet.stream.type == "audio" and packet.pts is not None:
                seen.add(packet.stream.index)
                start = packet.pts * packet.time_base
                first = start if first is None else min(first, start)
            if len(seen) == len(self._sounding) or len(self._held) >= 4096:
                break
        return first

    def packets(self) -> Iterator[Packet[Stream]]:
        """Yields packets with the output's stream, in the source's order; times are the source's."""
        while self._held:
            yield self._held.popleft()
        yield from self._reader

    def _read(self) -> Iterator[Packet[Stream]]:
        if not self._paths:
            return
        for s in self._inp.streams:
            if s.index not in self._paths:
                s.discard = Discard.all
        texts = [path for path in self._paths.values() if isinstance(path, ConvertText)]
        demuxer = demux(self._inp, *(self._inp.streams[i] for i in sorted(self._paths)))
        while True:
            try:
                packet = next(demuxer, None)
            except FFmpegError as error:
                self.notes.append(f"the source's other streams end early: {sentence_of(error)}")
                break
            if packet is None:
                break
            path = self._paths.get(packet.stream.index)
            if path is not None and (self._span is None or self._span.cut(packet)):
                # Taken first: what feeds on a packet may empty it.
                heard = packet.dts * packet.time_base if packet.dts and packet.stream.type == "audio" else None
                yield from path.feed(packet)
                if heard is not None:
                    for text in texts:
                        yield from text.pass_time(heard)
        for path in self._paths.values():
            yield from path.flush()
        self._note_losses()

    def _note_losses(self) -> None:
        for index, path in sorted(self._paths.items()):
            name = f"stream {index} ({self._plans[index].kind}, {self._plans[index].codec})"
            if isinstance(path, Copy) and path.backward:
                self.notes.append(f"{name}: {path.backward} packets whose time goes backwards were left out")
            if isinstance(path, ConvertAudio) and path.bad:
                self.notes.append(f"{name}: {path.bad} packets could not be decoded and were left out")


def _first_packet(source: Path, index: int) -> bytes:
    with open_input(source) as inp:
        for packet in demux(inp, inp.streams[index]):
            if packet.size:
                return bytes(packet)
    return b""
