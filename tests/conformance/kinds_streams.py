"""Kinds of source by what they carry beside the video, and by how their pictures are stored."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.kinds import AAC, chart, kind, noise, plain, x264
from tests.conformance.tools import ffmpeg

STREAMS, PICTURE = "Streams", "Pictures"
SRT = "1\n00:00:00,100 --> 00:00:00,500\n<i>first</i> line\n\n2\n00:00:00,900 --> 00:00:01,500\nünïcode — 二\n\n"


def _text(folder: Path) -> Path:
    path = folder / "text.srt"
    path.write_text(SRT, encoding="utf-8")
    return path


@kind(STREAMS, "six sound tracks in six languages, mkv")
def six_languages(folder: Path) -> Path:
    codecs = ("aac", "ac3", "flac", "libopus", "libmp3lame", "libvorbis")
    inputs = [word for n in range(6) for word in noise(1, n + 1)]
    maps = [word for n in range(7) for word in ("-map", str(n))]
    words = [word for n, codec in enumerate(codecs) for word in (f"-c:a:{n}", codec)]
    for n, language in enumerate(("eng", "deu", "fra", "jpn", "chi", "spa")):
        words += [f"-metadata:s:a:{n}", f"language={language}", f"-metadata:s:a:{n}", f"title=Track {n}"]
    ffmpeg(*chart(), *inputs, *maps, *x264(), *words, folder / "clip.mkv")
    return folder / "clip.mkv"


@kind(STREAMS, "two languages, mp4")
def two_languages(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(1, 1), *noise(1, 2), "-map", "0", "-map", "1", "-map", "2", *x264(),
           "-c:a:0", "aac", "-c:a:1", "ac3", "-metadata:s:a:0", "language=eng", "-metadata:s:a:1", "language=deu",
           folder / "clip.mp4")  # fmt: skip
    return folder / "clip.mp4"


@kind(STREAMS, "5.1 sound")
def surround(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), *x264(), "-af", "pan=5.1|c0=c0|c1=c0|c2=c0|c3=c0|c4=c0|c5=c0", "-c:a", "ac3",
           folder / "clip.mkv")  # fmt: skip
    return folder / "clip.mkv"


@kind(STREAMS, "DTS and TrueHD")
def studio_sound(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(1, 1), *noise(1, 2), "-map", "0", "-map", "1", "-map", "2", *x264(), "-ac", "2",
           "-strict", "-2", "-c:a:0", "dca", "-c:a:1", "truehd", folder / "clip.mkv")  # fmt: skip
    return folder / "clip.mkv"


@kind(STREAMS, "ALAC and 16-bit PCM, mov")
def lossless_sound(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(1, 1), *noise(1, 2), "-map", "0", "-map", "1", "-map", "2", *x264(),
           "-c:a:0", "alac", "-c:a:1", "pcm_s16be", folder / "clip.mov")  # fmt: skip
    return folder / "clip.mov"


@kind(STREAMS, "SubRip, ASS and WebVTT subtitles, mkv")
def text_subtitles(folder: Path) -> Path:
    text = _text(folder)
    ffmpeg(*chart(2), *noise(2), "-i", text, "-i", text, "-i", text, *(w for n in range(5) for w in ("-map", n)),
           *x264(), *AAC, "-c:s:0", "subrip", "-c:s:1", "ass", "-c:s:2", "webvtt", "-metadata:s:s:0", "language=eng",
           "-metadata:s:s:1", "language=deu", "-disposition:s:0", "default+forced", folder / "clip.mkv")  # fmt: skip
    return folder / "clip.mkv"


@kind(STREAMS, "timed text, mp4")
def timed_text(folder: Path) -> Path:
    ffmpeg(*chart(2), *noise(2), "-i", _text(folder), *x264(), *AAC, "-c:s", "mov_text",
           "-metadata:s:s:0", "language=fra", folder / "clip.mp4")  # fmt: skip
    return folder / "clip.mp4"


@kind(STREAMS, "DVD subtitles (pictures), mkv")
def bitmap_subtitles(folder: Path) -> Path:
    return _bitmaps(folder, "clip.mkv", "dvdsub")


@kind(STREAMS, "DVB subtitles (pictures), ts")
def dvb_subtitles(folder: Path) -> Path:
    return _bitmaps(folder, "clip.ts", "dvbsub")


def _bitmaps(folder: Path, name: str, codec: str) -> Path:
    # No encoder turns text into pictures; a Blu-ray stream of two pictures, written by hand, can be encoded anew.
    pictures = folder / "pictures.sup"
    pictures.write_bytes(_pgs(0.1) + _pgs(0.5, is_end=True) + _pgs(0.9) + _pgs(1.5, is_end=True))
    ffmpeg(*chart(2), *noise(2), "-i", pictures, *(w for n in range(3) for w in ("-map", n)), *x264(), *AAC,
           "-c:s", codec, "-s:s", "64x48", folder / name)  # fmt: skip
    return folder / name


def _pgs(seconds: float, *, is_end: bool = False) -> bytes:
    """One display set of Presentation Graphics: a 16x8 box, or nothing."""

    def segment(kind: int, body: bytes) -> bytes:
        return (
            b"PG"
            + int(seconds * 90000).to_bytes(4, "big")
            + bytes(4)
            + bytes([kind])
            + len(body).to_bytes(2, "big")
            + body
        )

    size = (64).to_bytes(2, "big") + (48).to_bytes(2, "big")
    number = int(seconds * 10).to_bytes(2, "big")
    if is_end:
        return segment(0x16, size + b"\x10" + number + b"\x00\x00\x00\x00") + segment(0x80, b"")
    rows = (b"\x00\x90\x01\x00\x00") * 8  # sixteen pixels of colour 1, end of line
    box = (16).to_bytes(2, "big") + (8).to_bytes(2, "big")
    picture = b"\x00\x01\x00\xc0" + (len(rows) + 4).to_bytes(3, "big") + box + rows
    return b"".join((
        segment(0x16, size + b"\x10" + number + b"\x80\x00\x00\x01" + b"\x00\x01\x00\x00\x00\x08\x00\x20"),
        segment(0x17, b"\x01\x00" + b"\x00\x08\x00\x20" + box),
        segment(0x14, b"\x00\x00\x01\xeb\x80\x80\xff"),
        segment(0x15, picture),
        segment(0x80, b""),
    ))  # fmt: skip


@kind(STREAMS, "Blu-ray subtitles (pictures), mkv")
def pgs_subtitles(folder: Path) -> Path:
    pictures = folder / "pictures.sup"
    pictures.write_bytes(_pgs(0.1) + _pgs(0.5, is_end=True) + _pgs(0.9) + _pgs(1.5, is_end=True))
    ffmpeg(*chart(2), *noise(2), "-i", pictures, *(w for n in range(3) for w in ("-map", n)), *x264(), *AAC,
           "-c:s", "copy", folder / "clip.mkv")  # fmt: skip
    return folder / "clip.mkv"


@kind(STREAMS, "fonts, mkv")
def fonts(folder: Path) -> Path:
    font = folder / "font.ttf"
    font.write_bytes(bytes(range(256)) * 4)
    return plain(folder / "clip.mkv", "-attach", str(font), "-metadata:s:t", "mimetype=application/x-truetype-font")


def _cover(folder: Path) -> Path:
    path = folder / "cover.png"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=32x32:d=1:r=1", "-frames:v", "1", path)
    return path


@kind(STREAMS, "cover picture, mp4")
def cover(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), "-i", _cover(folder), "-map", "0", "-map", "1", "-map", "2", *x264(), *AAC,
           "-c:v:1", "copy", "-disposition:v:1", "attached_pic", folder / "clip.mp4")  # fmt: skip
    return folder / "clip.mp4"


@kind(STREAMS, "cover picture, mkv")
def cover_mkv(folder: Path) -> Path:
    return plain(folder / "clip.mkv", "-attach", str(_cover(folder)), "-metadata:s:t", "mimetype=image/png")


@kind(STREAMS, "chapters")
def chapters(folder: Path) -> Path:
    meta = folder / "chapters.txt"
    meta.write_text(
        ";FFMETADATA1\ntitle=A title\n"
        "[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=700\ntitle=Öne\n"
        "[CHAPTER]\nTIMEBASE=1/1000\nSTART=700\nEND=2000\ntitle=Two\n",
        encoding="utf-8",
    )
    ffmpeg(*chart(2), *noise(2), "-i", meta, "-map_metadata", "2", *x264(), *AAC, folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(STREAMS, "timecode track, mov")
def timecode(folder: Path) -> Path:
    return plain(folder / "clip.mov", "-timecode", "01:02:03:04")


@kind(STREAMS, "titles, tags and dispositions, name and tags not ASCII")
def tags(folder: Path) -> Path:
    return plain(
        folder / "Füße — 映画 'x'.mkv",
        "-metadata", "title=Größe – 映画", "-metadata", "artist=Ünal", "-metadata", "comment=a comment",
        "-metadata", "MY_OWN_TAG=kept?", "-metadata:s:v", "title=Bild", "-metadata:s:a", "title=Ton",
        "-metadata:s:a", "language=deu", "-disposition:a", "default+comment",
    )  # fmt: skip


@kind(STREAMS, "data stream, ts")
def data_stream(folder: Path) -> Path:
    data = folder / "data.bin"
    data.write_bytes(bytes(range(256)) * 8)
    ffmpeg(*chart(), *noise(), "-f", "data", "-i", data, "-map", "0", "-map", "1", "-map", "2", *x264(), *AAC,
           "-c:d", "copy", folder / "clip.ts")  # fmt: skip
    return folder / "clip.ts"


@kind(STREAMS, "two programmes, two videos, ts")
def two_programmes(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), *chart(1, 24, "96x64"), *noise(1, 2), *(w for n in range(4) for w in ("-map", n)),
           *x264(), *AAC, "-program", "title=a:st=0:st=1", "-program", "title=b:st=2:st=3",
           folder / "clip.ts")  # fmt: skip
    return folder / "clip.ts"


@kind(PICTURE, "rotated by 90 degrees, mp4")
def rotated(folder: Path) -> Path:
    whole = plain(folder / "whole.mp4")
    ffmpeg("-display_rotation", "90", "-i", whole, "-c", "copy", folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(PICTURE, "samples 16:11 wide")
def wide_samples(folder: Path) -> Path:
    return plain(folder / "clip.mp4", "-vf", "setsar=16/11")


def _tagged(folder: Path, matrix: str, primaries: str, transfer: str, range_: str, *more: str) -> Path:
    tags = f"setparams=colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}:range={range_}"
    ffmpeg(*chart(), "-vf", f"scale=out_color_matrix={matrix}:out_range={range_},format=yuv420p,{tags}", *x264(),
           *more, folder / "clip.mp4")  # fmt: skip
    return folder / "clip.mp4"


@kind(PICTURE, "BT.709, tagged")
def bt709(folder: Path) -> Path:
    return _tagged(folder, "bt709", "bt709", "bt709", "tv")


@kind(PICTURE, "BT.601 525 lines, tagged")
def bt601(folder: Path) -> Path:
    return _tagged(folder, "smpte170m", "smpte170m", "smpte170m", "tv")


@kind(PICTURE, "full range, tagged")
def full_range(folder: Path) -> Path:
    return _tagged(folder, "bt709", "bt709", "bt709", "pc")


def _format(folder: Path, name: str, pixel_format: str, codec: str, *more: str, size: str = "64x48") -> Path:
    ffmpeg(*chart(size=size), "-pix_fmt", pixel_format, "-c:v", codec, *more, folder / name)
    return folder / name


@kind(PICTURE, "10 bit 4:2:0, HEVC")
def ten_bit(folder: Path) -> Path:
    return _format(folder, "clip.mp4", "yuv420p10le", "libx265", "-preset", "ultrafast", "-x265-params",
                   "log-level=none", size="128x96")  # fmt: skip


@kind(PICTURE, "10 bit 4:2:2, H.264")
def ten_bit_422(folder: Path) -> Path:
    return _format(folder, "clip.mov", "yuv422p10le", "libx264", "-preset", "ultrafast")


@kind(PICTURE, "4:2:2, H.264")
def chroma_422(folder: Path) -> Path:
    return _format(folder, "clip.mp4", "yuv422p", "libx264", "-preset", "ultrafast")


@kind(PICTURE, "4:4:4, H.264")
def chroma_444(folder: Path) -> Path:
    return _format(folder, "clip.mp4", "yuv444p", "libx264", "-preset", "ultrafast")


@kind(PICTURE, "gray, FFV1")
def gray(folder: Path) -> Path:
    return _format(folder, "clip.mkv", "gray", "ffv1")


@kind(PICTURE, "RGB, FFV1")
def rgb(folder: Path) -> Path:
    return _format(folder, "clip.mkv", "gbrp", "ffv1")


@kind(PICTURE, "RGB, QuickTime Animation")
def rgb_mov(folder: Path) -> Path:
    return _format(folder, "clip.mov", "rgb24", "qtrle")


@kind(PICTURE, "65x49, 4:2:0, VP9")
def odd_size(folder: Path) -> Path:
    return _format(folder, "clip.webm", "yuv420p", "libvpx-vp9", "-b:v", "1M", "-deadline", "realtime", size="65x49")


@kind(PICTURE, "65x49, 4:4:4, H.264")
def odd_size_444(folder: Path) -> Path:
    return _format(folder, "clip.mp4", "yuv444p", "libx264", "-preset", "ultrafast", size="65x49")


@kind(PICTURE, "2x2 pixels, FFV1")
def tiny(folder: Path) -> Path:
    return _format(folder, "clip.mkv", "yuv420p", "ffv1", size="16x2")


@kind(PICTURE, "interlaced, top field first, H.264")
def interlaced(folder: Path) -> Path:
    ffmpeg(*chart(1, 50), *noise(), "-vf", "tinterlace=interleave_top,fieldorder=tff", "-c:v", "libx264",
           "-preset", "ultrafast", "-flags", "+ildct+ilme", "-x264-params", "tff=1:threads=1", "-pix_fmt", "yuv420p",
           *AAC, folder / "clip.mp4")  # fmt: skip
    return folder / "clip.mp4"
