"""How one stream travels from the source to the output: as it is, as sound encoded anew, or as text converted."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol, cast

import av
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.bitstream import BitStreamFilterContext
from av.container import Container, InputContainer, OutputContainer
from av.error import FFmpegError
from av.format import Flags
from av.packet import Packet
from av.stream import Disposition, Stream
from av.subtitles.codeccontext import SubtitleCodecContext
from av.subtitles.stream import SubtitleStream
from av.subtitles.subtitle import AssSubtitle, SubtitleSet

from hat_video.errors import SourceError
from hat_video.media.opening import demux, open_file
from hat_video.media.span import Span

__all__ = [
    "Carrier",
    "ConvertAudio",
    "ConvertText",
    "Copy",
    "Cue",
    "CueReader",
    "add_audio",
    "add_copy",
    "clean_metadata",
    "copied_packets",
    "open_input",
    "plain_text",
    "readable",
    "sentence_of",
    "tag_flags",
]

# Seconds. Subtitle encoders write 2^32 - 1 milliseconds for "until the next one", which MP4 cannot hold as a number.
_FOREVER, _A_WHILE = 1 << 21, 10
_MILLISECOND = Fraction(1, 1000)
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_OPUS_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
_MUXER_TAGS = {
    "encoder", "major_brand", "minor_version", "compatible_brands", "handler_name", "vendor_id", "duration", "bps",
    "number_of_frames", "number_of_bytes", "timecode",
}  # fmt: skip
_PHONES = ("com.apple.quicktime.", "com.android.")


def open_input(path: str | os.PathLike[str]) -> InputContainer:
    """Opens `path` for demuxing; tags that are not UTF-8 do not fail it.

    Raises:
        SourceError: the file is missing or FFmpeg does not understand it.
    """
    try:
        return open_file(Path(path), tag_errors="surrogateescape")
    except SourceError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be opened ({sentence_of(error)}); give a video file") from None


def clean_metadata(tags: dict[str, str]) -> dict[str, str]:
    """`tags` without those that a muxer wrote about its own file and that would be lies in another file."""
    return {
        key: value
        for key, value in tags.items()
        if key.lower() not in _MUXER_TAGS
        and not key.upper().startswith("_STATISTICS")
        and key.upper().split("-")[0] not in ("BPS", "NUMBER_OF_FRAMES", "NUMBER_OF_BYTES", "DURATION")
    }


def tag_flags(tags: Iterable[str]) -> str:
    """The `movflags` that mp4 and mov need to keep tags of these names.

    Names that FFmpeg does not know need another box than the usual one, and all of a file's tags go with them. Players
    look for titles in the usual box, so the other is taken only for what phones write, whose files have it themselves.
    """
    return "+use_metadata_tags" if any(name.startswith(_PHONES) for name in tags) else ""


def readable(text: str) -> str:
    """A tag as text that can be printed: `open_input` reads it so that bytes which are no UTF-8 reach the output."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def sentence_of(error: BaseException) -> str:
    """The last thing that FFmpeg said about `error`, in one line."""
    text = str(error).split("last error log:")[-1].strip()
    return " ".join(text.split()) or type(error).__name__


def add_copy(out: OutputContainer, s: Stream) -> Stream:
    """Adds a stream to `out` for the packets of `s` as they are."""
    # opaque: without it an encoder of that name is looked up, which decode-only codecs do not have.
    o = out.add_stream_from_template(s, opaque=True) if s.codec_context else out.add_stream_from_template(s)
    if isinstance(s, AudioStream) and isinstance(o, AudioStream):
        layout = s.codec_context.layout
        # Matroska does not say which speakers PCM is for, and MP4 refuses PCM that does not.
        if "channels" in layout.name and layout.nb_channels in _LAYOUTS and s.codec_context.name.startswith("pcm_"):
            o.codec_context.layout = _LAYOUTS[layout.nb_channels]
    return o


def add_audio(out: OutputContainer, s: AudioStream, encoder: str) -> AudioStream:
    """Adds a stream to `out` that encodes the sound of `s` anew, at its rate and layout where `encoder` has them."""
    c = s.codec_context
    codec = av.Codec(encoder, "w")
    rates = codec.audio_rates
    rate = c.sample_rate
    if rates and rate not in rates:
        rate = min((r for r in rates if r > rate), default=max(rates))
    a = cast(AudioStream, out.add_stream(encoder, rate=rate))
    channels = c.layout.nb_channels
    # "2 channels" names no speakers; encoders want to know them.
    if encoder == "libopus":
        # It knows one layout for each number of channels; the two places of a surround pair are one to it.
        a.codec_context.layout = _OPUS_LAYOUTS.get(channels, "7.1")
    else:
        a.codec_context.layout = _LAYOUTS.get(channels, "stereo") if "channels" in c.layout.name else c.layout.name
    if codec.lossless:
        depth = "s16" if c.format.name.startswith(("u8", "s16")) else "s32"
        a.codec_context.format = next(f.name for f in codec.audio_formats or () if f.name.startswith(depth))
    else:
        a.codec_context.bit_rate = 64000 * max(1, channels) + 32000
    return a


def _may_repeat_times(container: Container) -> bool:
    return bool(container.format.flags & cast(int, Flags.ts_nonstrict.value))


class Carrier(Protocol):
    """One stream on its way: a source packet in, packets for the output out."""

    def feed(self, packet: Packet[Stream]) -> list[Packet[Stream]]: ...
    def flush(self) -> list[Packet[Stream]]: ...


class Copy:
    """Packets as they are. Also the rule of `verify` for what a copied stream must hold."""

    def __init__(self, s: Stream, out: Stream | None) -> None:
        self._is_audio = s.type == "audio"
        self._is_cover = bool(s.disposition & Disposition.attached_pic)
        # MP4 fills the gaps between texts with empty ones; its muxer makes them anew.
        self._has_gaps = s.type == "subtitle" and s.codec_context.name == "mov_text"
        self._out = out
        # Damaged streams say a time twice, and so do milliseconds of short packets; some muxers refuse the second.
        is_strict = out is not None and not _may_repeat_times(out.container)
        self._rate = s.codec_context.sample_rate if is_strict and isinstance(s, AudioStream) else 0
        self._last: int | None = None
        self._written: Fraction | None = None
        self.backward = 0
        """Packets left out because their dts went backwards, which no muxer takes."""
        self._filter: BitStreamFilterContext | None = None
        if self._is_audio and s.codec_context.name == "aac" and not s.codec_context.extradata:
            # AAC out of a transport stream carries its header in every packet; other containers keep it once.
            self._filter = BitStreamFilterContext("aac_adtstoasc", s)

    def feed(self, packet: Packet[Stream]) -> list[Packet[Stream]]:
        if self._is_cover and packet.size:
            packet.pts = packet.dts = 0  # some demuxers give a picture that belongs to no moment no time
        if packet.pts is None and packet.dts is None:
            return []  # the demuxer's flush packet
        if self._has_gaps and bytes(packet)[:2] == b"\0\0":
            return []
        if packet.duration and packet.duration * packet.time_base > _FOREVER:
            packet.duration = int(_A_WHILE / packet.time_base)
        if packet.pts is None:
            packet.pts = packet.dts
        if packet.dts is None:
            packet.dts = packet.pts
        if self._is_audio and packet.is_discard and packet.duration and (packet.pts or 0) + 2 * packet.duration <= 0:
            return []  # wholly before the start of the edit list; one packet of priming stays
        dts = packet.dts or 0
        if self._last is not None and dts < self._last:
            self.backward += 1
            return []
        if self._is_audio and not packet.duration and self._last is not None:
            # Matroska may say none. An mp4's edit list would end where the last packet begins, and hide it.
            packet.duration = dts - self._last
        self._last = dts
        if self._rate:
            self._written = self._later(packet)
        # filter() empties the packet that it is given.
        time_base = packet.time_base
        packets = self._filter.filter(packet) if self._filter else [packet]
        for p in packets:
            p.time_base = time_base
            if self._out is not None:
                p.stream = self._out
        return packets

    def _later(self, packet: Packet[Stream]) -> Fraction:
        """Its time, which is moved to the sample after the last packet's if it is not later than that."""
        time = (packet.dts or 0) * packet.time_base
        if self._written is None or time * self._rate >= self._written * self._rate + 1:
            return time
        packet.duration = round((packet.duration or 0) * packet.time_base * self._rate)
        packet.time_base = Fraction(1, self._rate)
        packet.pts = packet.dts = math.ceil(self._written * self._rate) + 1
        return packet.dts * packet.time_base

    def flush(self) -> list[Packet[Stream]]:
        return []


class ConvertAudio:
    """Sound decoded and encoded anew."""

    def __init__(self, s: AudioStream, out: AudioStream) -> None:
        self._decoder, self._out = s.codec_context, out
        self._resampler: AudioResampler | None = None
        self.bad = 0
        """Packets that could not be decoded."""

    def feed(self, packet: Packet[Stream]) -> list[Packet[Stream]]:
        if packet.pts is None and packet.dts is None:
            return []
        try:
            frames = self._decoder.decode(cast("Packet[AudioStream]", packet))
        except FFmpegError:
            self.bad += 1
            return []
        return [p for frame in frames for p in self._encode(frame)]

    def _encode(self, frame: AudioFrame | None) -> list[Packet[Stream]]:
        encoder: AudioCodecContext = self._out.codec_context
        if self._resampler is None:
            if not encoder.is_open:
                encoder.open(strict=False)
            # PyAV does not re-buffer: an encoder of fixed frames must get exactly its frame size.
            self._resampler = AudioResampler(
                encoder.format, encoder.layout, encoder.sample_rate, frame_size=encoder.frame_size or None
            )
        frames = self._resampler.resample(frame)
        return [cast("Packet[Stream]", p) for f in frames for p in self._out.encode(f)]

    def flush(self) -> list[Packet[Stream]]:
        try:
            frames = self._decoder.decode(None)
        except FFmpegError:
            frames = []
        packets = [p for frame in frames for p in self._encode(frame)]
        if self._resampler is not None:
            packets += self._encode(None)
            packets += [cast("Packet[Stream]", p) for p in self._out.encode(None)]
        return packets


@dataclass(slots=True)
class Cue:
    """A text and when it is shown, in milliseconds."""

    begin: int
    end: int | None
    """None: until the next cue, at most until `latest`."""
    latest: int
    packet: Packet[Stream]
    """Alone in mov_text, with the source's times."""
    style: bytes
    text: bytes
    """As ASS writes it, with its overrides."""

    @property
    def plain(self) -> bytes:
        """The text alone, in UTF-8."""
        return plain_text(bytes(self.packet))

    def stop_at(self, begin: int | None) -> None:
        """Gives it an end if it has none and the next cue, which starts at `begin`, comes later (None: never)."""
        if self.end is None and (begin is None or begin > self.begin):
            self.end = self.latest if begin is None else min(begin, self.latest)


def plain_text(sample: bytes) -> bytes:
    """The text of a mov_text sample, without the boxes that follow it."""
    return sample[2 : 2 + int.from_bytes(sample[:2], "big")]


class CueReader:
    """Packets of a text stream as cues.

    Args:
        s: the stream of the source.
        encoder: of mov_text; one of its own if None.
    """

    def __init__(self, s: SubtitleStream, encoder: SubtitleCodecContext | None = None) -> None:
        self._decoder = s.codec_context
        self._decoder.open(strict=False)
        if encoder is None:
            encoder = av.CodecContext.create("mov_text", "w")
            encoder.subtitle_header = self._decoder.subtitle_header
            encoder.time_base = _MILLISECOND
        self._encoder = encoder
        # The source's container: a text that stays until the next one must not make the film longer.
        film = cast(InputContainer, s.container)
        start, length = film.start_time, film.duration
        self._last = None if start is None or length is None else (start + length) // 1000

    def read(self, packet: Packet[Stream]) -> Cue | None:
        """The cue of a packet; None if it shows nothing."""
        subtitles = _texts_of(self._decoder, packet)
        if subtitles is None:
            return None
        p = cast("Packet[Stream]", self._encoder.encode_subtitle(subtitles))
        if not plain_text(bytes(p)):
            return None
        p.time_base, p.duration = packet.time_base, packet.duration
        p.pts = p.dts = packet.pts
        ticks, length = packet.pts or 0, packet.duration or 0
        begin = _milliseconds(ticks * packet.time_base)
        end = None
        if 0 < length * packet.time_base <= _FOREVER:
            end = max(begin + 1, _milliseconds((ticks + length) * packet.time_base))
        events = [cast(AssSubtitle, rect).ass.split(b",", 8) for rect in subtitles]
        latest = begin + 1000 * _A_WHILE
        if self._last is not None:
            latest = max(begin + 1, min(latest, self._last))
        style = events[0][2] if len(events[0]) > 2 else b"Default"  # ASS packets may hold anything
        return Cue(begin, end, latest, p, style, b"".join(event[-1] for event in events))

    def join(self, cues: Sequence[Cue], begin: int, end: int) -> Packet[Stream]:
        """One packet that shows the texts of `cues` below each other."""
        if len(cues) == 1:
            p: Packet[Stream] = Packet(bytes(cues[0].packet))
        else:
            # Each text begins in its own style again: overrides need not be closed.
            text = b"\\N".join(b"{\\r%b}%b" % (cue.style, cue.text) for cue in cues)
            event = SubtitleSet.create(b"0,0,%b,,0,0,0,,%b" % (cues[0].style, text), 0, 0)
            try:
                p = cast("Packet[Stream]", self._encoder.encode_subtitle(event))
            except FFmpegError:
                return self.join(cues[:-1], begin, end)  # a sample holds 64 KiB of text
        p.pts = p.dts = begin
        p.duration, p.time_base = end - begin, _MILLISECOND
        return p


def _texts_of(decoder: SubtitleCodecContext, packet: Packet[Stream]) -> SubtitleSet | None:
    if packet.pts is None or not packet.size:
        return None
    try:
        subtitles = decoder.decode2(packet)
    except FFmpegError:
        return None
    # MP4 fills the gaps between texts with empty ones.
    return subtitles if subtitles is not None and len(subtitles) else None


def _milliseconds(seconds: Fraction) -> int:
    return math.floor(seconds * 1000 + Fraction(1, 2))


class _OneAtATime:
    """Cues for a track that shows one text at a time: where some overlap, their texts are joined.

    Holds the cues that may still be on the screen when the next one starts.
    """

    def __init__(self, reader: CueReader) -> None:
        self._reader = reader
        self._open: list[Cue] = []
        self._done = -(1 << 62)
        """Nothing that is shown before can change any more; sources may start before zero."""

    def feed(self, packet: Packet[Stream]) -> list[Packet[Stream]]:
        cue = self._reader.read(packet)
        if cue is None:
            return []
        for other in self._open:
            other.stop_at(cue.begin)
        packets = self._until(cue.begin)
        self._open.append(cue)
        self._open.sort(key=lambda c: c.begin)
        return packets

    def pass_time(self, seconds: Fraction) -> list[Packet[Stream]]:
        """What is over for long enough at `seconds`: it must not wait for the next cue, which may be far away."""
        # Containers may hold a text as much later than the sound beside it as muxers wait for sparse streams.
        now = _milliseconds(seconds) - 1000 * _A_WHILE
        for cue in self._open:
            if cue.latest <= now:
                cue.stop_at(None)
        over = [cue.end for cue in self._open if cue.end is not None and cue.end <= now]
        return self._until(max(over)) if over else []

    def flush(self) -> list[Packet[Stream]]:
        for cue in self._open:
            cue.stop_at(None)
        return self._until(None)

    def _until(self, limit: int | None) -> list[Packet[Stream]]:
        packets: list[Packet[Stream]] = []
        # A packet that comes too late in the file: what would show it is on its way.
        self._open = [cue for cue in self._open if cue.end is None or cue.end > self._done]
        while self._open and (limit is None or self._open[0].begin < limit):
            begin = max(self._done, self._open[0].begin)
            shown = [cue for cue in self._open if cue.begin <= begin]
            # A cue without an end stays for what starts together with it; it has one when a later one is there.
            bounds = [cue.end for cue in shown if cue.end is not None]
            bounds += [cue.begin for cue in self._open if cue.begin > begin]
            bounds += [limit] if limit is not None else []
            end = min(bounds)
            if end <= begin:
                break
            packets.append(self._packet(shown, begin, end))
            self._done = end
            self._open = [cue for cue in self._open if cue.end is None or cue.end > end]
        return packets

    def _packet(self, shown: Sequence[Cue], begin: int, end: int) -> Packet[Stream]:
        alone = shown[0]
        if len(shown) > 1 or (alone.begin, alone.end) != (begin, end):
            return self._reader.join(shown, begin, end)
        length = alone.packet.duration or 0
        if not 0 < length * alone.packet.time_base <= _FOREVER:
            alone.packet.duration = round((end - begin) * _MILLISECOND / alone.packet.time_base)
        return alone.packet


class ConvertText:
    """Text subtitles in another notation; styles survive as far as it has them."""

    def __init__(self, s: SubtitleStream, out: SubtitleStream) -> None:
        self._decoder, self._out = s.codec_context, out
        self._decoder.open(strict=False)
        out.codec_context.subtitle_header = self._decoder.subtitle_header
        out.codec_context.time_base = _MILLISECOND
        out.time_base = _MILLISECOND
        # A track of mov_text is a row of samples, each of which ends where the next one begins.
        is_row = out.codec_context.name == "mov_text"
        self._row = _OneAtATime(CueReader(s, out.codec_context)) if is_row else None

    def feed(self, packet: Packet[Stream]) -> list[Packet[Stream]]:
        if self._row is not None:
            return self._sent(self._row.feed(packet))
        subtitles = _texts_of(self._decoder, packet)
        if subtitles is None:
            return []
        p = cast("Packet[Stream]", self._out.codec_context.encode_subtitle(subtitles))
        p.time_base, p.duration = packet.time_base, packet.duration
        p.pts = p.dts = packet.pts
        return self._sent([p])

    def pass_time(self, seconds: Fraction) -> list[Packet[Stream]]:
        """Packets that the streams beside it need not wait for any longer once they are at `seconds`."""
        return self._sent(self._row.pass_time(seconds)) if self._row is not None else []

    def flush(self) -> list[Packet[Stream]]:
        return self._sent(self._row.flush()) if self._row is not None else []

    def _sent(self, packets: list[Packet[Stream]]) -> list[Packet[Stream]]:
        for p in packets:
            p.stream = self._out
        return packets


def copied_packets(
    source: InputContainer, indexes: Sequence[int], span: Span | None = None, texts: Collection[int] = ()
) -> Iterator[tuple[int, Packet[Stream]]]:
    """(index, packet) of the copied streams as they must stand in the output; for `verify`. Ends quietly at damage.

    Those of `texts` come as the source has them.
    """
    rules = {i: Copy(source.streams[i], None) for i in indexes}
    demuxer = demux(source, *(source.streams[i] for i in indexes)) if indexes else iter(())
    while True:
        try:
            packet = next(demuxer, None)
        except FFmpegError:
            return
        if packet is None:
            return
        index = packet.stream.index
        if index in rules and (span is None or span.cut(packet)):
            for p in [packet] if index in texts else rules[index].feed(packet):
                yield index, p
