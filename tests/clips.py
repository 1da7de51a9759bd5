"""Clips made when a test needs them: real encoders, real containers, pictures in which every frame is its own."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

__all__ = ["color_bars", "make_clip", "moving_picture"]

# Text encoders of FFmpeg want to be told a style, in the form that ASS files have.
ASS_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, Underline, \\
StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
""".replace(b"\\\n", b"")
SUBTITLES = [(200, 500, "first line"), (900, 600, "second — ünïcode")]


def moving_picture(index: int, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8: moving texture, with a bright bar whose place says which frame it is."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    shift = 3.0 * index
    wave = np.sin((x + shift) * 0.35) + np.sin((y + 0.7 * shift) * 0.28) + np.sin((x + y - 1.3 * shift) * 0.11)
    red = 128 + 36 * wave
    green = 128 + 30 * np.roll(wave, 5, axis=1)
    blue = 255 - red
    rgb = np.stack([red, green, blue], axis=-1)
    left = (index * 5) % max(1, width - 6)
    rgb[height // 3 : height // 2, left : left + 6] = 235
    return rgb.clip(0, 255).astype(np.uint8)


def color_bars(width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8: white, yellow, cyan, green, magenta, red, blue, black at 75 %, and a gray ramp below."""
    bars = [(1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 1), (0, 0, 0)]
    picture = np.zeros((height, width, 3), np.uint8)
    for i, bar in enumerate(bars):
        picture[:, i * width // 8 : (i + 1) * width // 8] = np.array(bar) * 191
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    picture[height * 3 // 4 :] = ramp[None, :, None]
    return picture


def make_clip(
    path: Path,
    *,
    width: int = 64,
    height: int = 48,
    frames: int = 30,
    rate: int | Fraction = 30,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    codec: str | None = None,
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    bframes: int = 2,
    options: dict[str, str] | None = None,
    audio: Sequence[str] | None = None,
    audio_offset: Fraction = Fraction(0),
    subtitles: bool = False,
    chapters: bool = False,
    font: bool = False,
    title: str | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    bt709: bool | None = None,
    full_range: bool = False,
    sample_aspect_ratio: Fraction | None = None,
    display_matrix: tuple[int, ...] | None = None,
    flash_at: Fraction | None = None,
    container_format: str | None = None,
) -> Path:
    """Writes a clip.

    Args:
        path: its suffix says the container.
        pts: timestamps in `time_base`, one a frame; by default the frame's number in 1/`rate`.
        codec: libx264, or libvpx-vp9 in webm.
        gop: frames from key frame to key frame; 1000 gives a clip with a single one.
        audio: codecs, one a stream; aac, or libopus in webm, if None; () for none.
        audio_offset: seconds that the sound starts after time 0.
        pictures: RGB, one a frame, instead of the moving picture.
        bt709: tag and convert as BT.709 (True), BT.601 (False), or leave it untagged, as BT.601 (None).
        flash_at: the frame shown at this second is white.
    """
    is_webm = path.suffix == ".webm"
    if pts is None:
        pts, time_base = list(range(frames)), 1 / Fraction(rate)
    if time_base is None:
        raise ValueError("pts need a time_base")
    codecs = list(audio) if audio is not None else ["libopus" if is_webm else "aac"]
    with av.open(str(path), "w", format=container_format) as out:
        name = codec or ("libvpx-vp9" if is_webm else "libx264")
        video = out.add_stream(name, rate=Fraction(rate), options=_video_options(name, gop, bframes, options))
        _describe(video, width, height, pix_fmt, time_base, bt709, full_range, sample_aspect_ratio)
        if display_matrix is not None:
            video.set_display_matrix(display_matrix)
        sounds = [_add_audio(out, kind, i) for i, kind in enumerate(codecs)]
        text = _add_subtitles(out, path.suffix) if subtitles else None
        if font:
            out.add_attachment("font.ttf", "application/x-truetype-font", bytes(range(256)) * 4)
        if title is not None:
            out.metadata["title"] = title
        if chapters:
            out.set_chapters(_chapters(frames, Fraction(rate)))
        shown = list(pictures) if pictures is not None else [moving_picture(i, width, height) for i in range(len(pts))]
        if flash_at is not None:
            shown[[tick * time_base >= flash_at for tick in pts].index(True)] = np.full(
                (height, width, 3), 255, np.uint8
            )
        for picture, tick in zip(shown, pts, strict=True):
            for packet in video.encode(_video_frame(picture, pix_fmt, tick, time_base, bt709, full_range)):
                out.mux(packet)
        for packet in video.encode(None):
            out.mux(packet)
        seconds = (pts[-1] - pts[0]) * time_base + 1 / Fraction(rate)
        for i, sound in enumerate(sounds):
            _encode_tone(out, sound, seconds, audio_offset, 440 * (i + 1))
        if text is not None:
            _write_subtitles(out, text)
    return path


def _video_options(codec: str, gop: int, bframes: int, options: dict[str, str] | None) -> dict[str, str]:
    base: dict[str, str] = {"g": str(gop), "threads": "1"}
    if codec == "libx264":
        base |= {
            "preset": "veryfast",
            "bf": str(bframes),
            "crf": "18",
            "keyint_min": str(min(gop, 250)),
            "sc_threshold": "0",
        }
    elif codec == "libvpx-vp9":
        base |= {"crf": "20", "b": "0", "cpu-used": "8", "deadline": "realtime", "lag-in-frames": "0"}
    elif codec == "libx265":
        base |= {"preset": "ultrafast", "x265-params": f"log-level=none:keyint={gop}:bframes={bframes}"}
    return {**base, **(options or {})}


def _describe(
    video: Any,
    width: int,
    height: int,
    pix_fmt: str,
    time_base: Fraction,
    bt709: bool | None,
    full_range: bool,
    sample_aspect_ratio: Fraction | None,
) -> None:
    context = video.codec_context
    context.width, context.height, context.pix_fmt = width, height, pix_fmt
    context.time_base = video.time_base = time_base
    if bt709 is not None:
        code = 1 if bt709 else 6
        context.colorspace = context.color_primaries = context.color_trc = code
        context.color_range = 2 if full_range else 1
    if sample_aspect_ratio is not None:
        context.sample_aspect_ratio = sample_aspect_ratio


def _video_frame(
    picture: np.ndarray, pix_fmt: str, tick: int, time_base: Fraction, bt709: bool | None, full_range: bool
) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
        format=pix_fmt,
        threads=1,
        dst_colorspace="ITU709" if bt709 else "ITU601",
        dst_color_range="JPEG" if full_range else "MPEG",
        interpolation="BICUBIC",
    )
    frame.pts, frame.time_base, frame.pict_type = tick, time_base, 0
    return frame


def _add_audio(out: Any, codec: str, index: int) -> Any:
    rate = 48000 if codec == "libopus" else 44100
    stream = out.add_stream(codec, rate=rate, layout="stereo")
    stream.metadata["language"] = ["eng", "deu", "fra"][index % 3]
    return stream


def _encode_tone(out: Any, stream: Any, seconds: Fraction, offset: Fraction, hertz: int) -> None:
    context = stream.codec_context
    rate = context.sample_rate
    resampler = av.AudioResampler(
        format=context.format, layout="stereo", rate=rate, frame_size=context.frame_size or 1024
    )
    count = int(seconds * rate)
    wave = (np.sin(np.arange(count) * 2 * np.pi * hertz / rate) * 9000).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(np.stack([wave, wave], axis=1).reshape(1, -1), format="s16", layout="stereo")
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), int(offset * rate)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        for packet in stream.encode(piece):
            out.mux(packet)
    for packet in stream.encode(None):
        out.mux(packet)


def _chapters(frames: int, rate: Fraction) -> list[Any]:
    end = int(frames / rate * 1000)
    half = end // 2
    return [
        {"id": 1, "start": 0, "end": half, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}},
        {"id": 2, "start": half, "end": end, "time_base": Fraction(1, 1000), "metadata": {"title": "Two"}},
    ]


def _add_subtitles(out: Any, suffix: str) -> Any:
    stream = out.add_stream({".mp4": "mov_text", ".mov": "mov_text", ".webm": "webvtt"}.get(suffix, "subrip"))
    stream.codec_context.subtitle_header = ASS_HEADER
    stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
    stream.metadata["language"] = "eng"
    return stream


def _write_subtitles(out: Any, stream: Any) -> None:
    for start, length, text in SUBTITLES:
        data = text.encode()
        if stream.codec_context.name == "mov_text":
            data = len(data).to_bytes(2, "big") + data
        packet = av.Packet(data)
        packet.stream = stream
        packet.time_base = Fraction(1, 1000)
        packet.pts = packet.dts = start
        packet.duration = length
        out.mux(packet)
