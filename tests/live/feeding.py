"""What the tests of the outputs share: an encoder and its pictures, a sound, and who is left over in the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from hat_video.frames import ColorInfo, PixelFormat, VideoInfo
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.encode import AudioLine, LiveEncoder, LivePacket
from hat_video.media.encoder import plan_encoder

WIDTH, HEIGHT, RATE = 96, 64, 15
STEP = 90_000 // RATE


@dataclass(frozen=True)
class Head:
    """As the capture gives it."""

    codec: str = "aac"
    sample_rate: int = 48000
    layout: str = "stereo"
    extradata: bytes | None = None


AAC = Head(extradata=b"\x11\x90")


def made_encoder(audio: AudioLine | None = None, *, key_seconds: float = 1.0, **options: Any) -> LiveEncoder:
    info = VideoInfo(
        WIDTH, HEIGHT, LIVE_TIME_BASE, Fraction(RATE), PixelFormat.parse("yuv420p"), ColorInfo(1, 1, 1, False)
    )
    settings: dict[str, Any] = {"preset": "veryfast", "options": {"tune": "zerolatency"}, "threads": 1, **options}
    spec, large = plan_encoder("matroska", info, WIDTH, HEIGHT, **settings)
    return LiveEncoder(spec, large, audio, key_seconds=key_seconds)


def picture(number: int, *, noise: bool = False) -> tuple[torch.Tensor, ...]:
    """Gray with a bar; `noise` makes it as large as a picture can be."""
    luma = torch.full((HEIGHT, WIDTH), 60 + number * 7 % 120, dtype=torch.uint8)
    luma[:, number * 4 % WIDTH :][:, :4] = 220
    if noise:
        luma = torch.from_numpy(np.random.default_rng(number).integers(16, 235, (HEIGHT, WIDTH), dtype=np.uint8))
    chroma = torch.full((HEIGHT // 2, WIDTH // 2), 128, dtype=torch.uint8)
    return luma, chroma, chroma


def packets(encoder: LiveEncoder, numbers: range, *, noise: bool = False) -> Iterator[list[LivePacket]]:
    """The packets of each picture, at `RATE` pictures a second of their own time."""
    for number in numbers:
        yield encoder.encode(picture(number, noise=noise), number * STEP, time.monotonic())


def sound(line: AudioLine, path: Path, *, shift: int = 0) -> list[LivePacket]:
    """All sound of a file, through the line."""
    made: list[LivePacket] = []
    with av.open(str(path)) as source:
        for packet in source.demux(audio=0):
            if packet.pts is not None:
                unit = packet.time_base / LIVE_TIME_BASE
                live: av.Packet[Any] = av.Packet(bytes(packet))
                live.pts = live.dts = shift + round(packet.pts * unit)
                live.duration, live.time_base = round((packet.duration or 0) * unit), LIVE_TIME_BASE
                made += line.feed(live)
    return made


def head_of(path: Path) -> Head:
    with av.open(str(path)) as container:
        context = container.streams.audio[0].codec_context
        return Head(context.name, context.sample_rate, context.layout.name, context.extradata)


def make_sound(path: Path, seconds: float, *, codec: str = "aac", rate: int = 48000, layout: str = "stereo") -> Path:
    """A tone."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.codec_context.layout = layout
        out.start_encoding()
        context = stream.codec_context
        size = context.frame_size or 1024
        wave = (np.sin(np.arange(size * int(seconds * rate / size + 1)) * 2 * np.pi * 440 / rate) * 8000).astype(
            "int16"
        )
        resampler = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size or None)
        channels = context.layout.nb_channels
        frame = av.AudioFrame.from_ndarray(np.repeat(wave, channels).reshape(1, -1), "s16", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return path


@dataclass
class Seen:
    """What a file or a stream holds."""

    frames: int
    pts: list[Fraction]
    sound: list[Fraction]
    codec: list[str]
    tags: tuple[int, int, int, int]


def look(source: Any, **options: Any) -> Seen:
    """Decodes everything; seconds from the container's 0."""
    with av.open(source if hasattr(source, "read") else str(source), **options) as container:
        return look_at(container)


def look_at(container: Any) -> Seen:
    video, pts, heard = container.streams.video[0], [], []
    context = video.codec_context
    for packet in container.demux():
        if packet.stream.type == "audio":
            if packet.pts is not None:
                heard.append(packet.pts * packet.time_base)
            continue
        for frame in packet.decode():
            pts.append(frame.pts * frame.time_base)
    tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
    codecs = [stream.codec_context.name for stream in container.streams]
    return Seen(len(pts), pts, heard, codecs, tuple(int(tag) for tag in tags))


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up, "took too long"
        time.sleep(0.02)
