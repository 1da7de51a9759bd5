"""Kinds of source by what they are stored in, and those that are damaged."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.kinds import AAC, chart, kind, noise, plain, x264
from tests.conformance.tools import ffmpeg

FILES, DAMAGED = "Containers and codecs", "Damaged"


@kind(FILES, "MPEG-PS (.mpg): MPEG-2, MP2")
def mpeg_ps(folder: Path) -> Path:
    ffmpeg(*chart(1, 25), *noise(), "-c:v", "mpeg2video", "-q:v", "3", "-bf", "2", "-g", "8", "-c:a", "mp2",
           "-f", "vob", folder / "clip.mpg")  # fmt: skip
    return folder / "clip.mpg"


@kind(FILES, "MPEG-TS: MPEG-2, AC-3")
def mpeg_ts(folder: Path) -> Path:
    ffmpeg(*chart(1, 25), *noise(), "-c:v", "mpeg2video", "-q:v", "3", "-bf", "2", "-g", "8", "-c:a", "ac3",
           folder / "clip.ts")  # fmt: skip
    return folder / "clip.ts"


@kind(FILES, "Blu-ray transport stream (.m2ts): H.264, AC-3")
def m2ts(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), *x264(), "-c:a", "ac3", folder / "clip.m2ts")
    return folder / "clip.m2ts"


@kind(FILES, "Windows Media: WMV 2, WMA 2")
def wmv(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), "-c:v", "wmv2", "-q:v", "3", "-c:a", "wmav2", folder / "clip.wmv")
    return folder / "clip.wmv"


@kind(FILES, "Flash video: Sorenson, MP3")
def flv(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(1, rate=44100), "-c:v", "flv", "-q:v", "3", "-c:a", "libmp3lame", folder / "clip.flv")
    return folder / "clip.flv"


@kind(FILES, "Flash video: H.264, AAC")
def flv_h264(folder: Path) -> Path:
    return plain(folder / "clip.flv")


@kind(FILES, "Ogg: Theora, Vorbis")
def ogv(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), "-c:v", "libtheora", "-q:v", "7", "-c:a", "libvorbis", folder / "clip.ogv")
    return folder / "clip.ogv"


@kind(FILES, "3GP: H.263, AMR")
def mobile(folder: Path) -> Path:
    ffmpeg(*chart(1, 25, "128x96"), *noise(1, rate=8000), "-c:v", "h263", "-q:v", "3", "-c:a", "libopencore_amrnb",
           "-ar", "8000", "-ac", "1", "-b:a", "12.2k", folder / "clip.3gp")  # fmt: skip
    return folder / "clip.3gp"


@kind(FILES, "WebM: VP8, Vorbis")
def webm_vp8(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), "-c:v", "libvpx", "-b:v", "1M", "-deadline", "realtime", "-c:a", "libvorbis",
           folder / "clip.webm")  # fmt: skip
    return folder / "clip.webm"


@kind(FILES, "WebM: VP9, Opus")
def webm_vp9(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), "-c:v", "libvpx-vp9", "-b:v", "1M", "-deadline", "realtime", "-cpu-used", "8",
           "-c:a", "libopus", folder / "clip.webm")  # fmt: skip
    return folder / "clip.webm"


@kind(FILES, "AV1 in mp4")
def av1_mp4(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), "-c:v", "libsvtav1", "-preset", "12", "-g", "12", "-pix_fmt", "yuv420p", *AAC,
           folder / "clip.mp4")  # fmt: skip
    return folder / "clip.mp4"


@kind(FILES, "IVF: AV1, no sound")
def av1_ivf(folder: Path) -> Path:
    ffmpeg(*chart(), "-c:v", "libsvtav1", "-preset", "12", "-pix_fmt", "yuv420p", folder / "clip.ivf")
    return folder / "clip.ivf"


@kind(FILES, "ProRes 422 HQ, 24-bit PCM, mov")
def prores(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), "-c:v", "prores_ks", "-profile:v", "3", "-pix_fmt", "yuv422p10le", "-c:a", "pcm_s24le",
           folder / "clip.mov")  # fmt: skip
    return folder / "clip.mov"


@kind(FILES, "MJPEG, u8 PCM, avi")
def mjpeg_avi(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(1, rate=22050), "-c:v", "mjpeg", "-q:v", "3", "-pix_fmt", "yuvj422p", "-c:a", "pcm_u8",
           folder / "clip.avi")  # fmt: skip
    return folder / "clip.avi"


@kind(FILES, "animated GIF")
def gif(folder: Path) -> Path:
    ffmpeg(*chart(1, 10), folder / "clip.gif")
    return folder / "clip.gif"


@kind(FILES, "animated PNG")
def apng(folder: Path) -> Path:
    ffmpeg(*chart(1, 10), "-pix_fmt", "rgb24", "-f", "apng", folder / "clip.apng")
    return folder / "clip.apng"


@kind(FILES, "y4m")
def y4m(folder: Path) -> Path:
    ffmpeg(*chart(), "-pix_fmt", "yuv420p", folder / "clip.y4m")
    return folder / "clip.y4m"


@kind(FILES, "fragmented mp4")
def fragmented(folder: Path) -> Path:
    return plain(folder / "clip.mp4", "-movflags", "frag_keyframe+empty_moov+delay_moov")


@kind(DAMAGED, "mkv cut off in the middle", reported="truncated: 1.291 s are there")
def truncated_mkv(folder: Path) -> Path:
    return _cut(plain(folder / "clip.mkv", seconds=2), 0.6)


@kind(DAMAGED, "ts cut off in the middle of a packet")
def truncated_ts(folder: Path) -> Path:
    return _cut(plain(folder / "clip.ts", seconds=2), 0.6)


@kind(DAMAGED, "mp4 with its index first, cut off", reported="truncated: .* are there of the 2.000 s")
def truncated_mp4(folder: Path) -> Path:
    return _cut(plain(folder / "clip.mp4", "-movflags", "+faststart", seconds=2), 0.6)


@kind(DAMAGED, "mp4 that never got its index", refused="has no moov")
def without_moov(folder: Path) -> Path:
    return _cut(plain(folder / "clip.mp4"), 0.6)


@kind(DAMAGED, "every tenth packet of the video has random bytes, mkv")
def corrupt_packets(folder: Path) -> Path:
    whole = plain(folder / "whole.mkv", seconds=2)
    ffmpeg("-i", whole, "-c", "copy", "-bsf:v", "noise=amount='if(eq(mod(n,10),4),20,0)'", folder / "clip.mkv")
    return folder / "clip.mkv"


@kind(DAMAGED, "packets are missing, ts")
def missing_packets(folder: Path) -> Path:
    whole = plain(folder / "whole.ts", seconds=2)
    ffmpeg("-copyts", "-i", whole, "-c", "copy", "-bsf:v", "noise=drop='eq(mod(n,13),7)'", folder / "clip.ts")
    return folder / "clip.ts"


@kind(DAMAGED, "the first key frame is missing, mkv", reported="7 frames cannot be decoded and are lost")
def headless(folder: Path) -> Path:
    whole = plain(folder / "whole.mkv", seconds=2)
    ffmpeg("-i", whole, "-c", "copy", "-bsf:v", "noise=drop='eq(n,0)'", folder / "clip.mkv")
    return folder / "clip.mkv"


@kind(DAMAGED, "the picture's size changes, ts", refused=r"changes from 64x48 to 96x64 at .* \(pts \d+\)")
def size_change(folder: Path) -> Path:
    parts = [folder / "a.ts", folder / "b.ts"]
    ffmpeg(*chart(), *x264(), parts[0])
    ffmpeg(*chart(1, size="96x64"), *x264(), "-output_ts_offset", "1", parts[1])
    path = folder / "clip.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@kind(DAMAGED, "not a video at all", refused="not a media file")
def text_file(folder: Path) -> Path:
    path = folder / "clip.mp4"
    path.write_text("this is no video\n" * 100)
    return path


@kind(DAMAGED, "sound only", refused="no video stream")
def sound_only(folder: Path) -> Path:
    ffmpeg(*noise(), *AAC, folder / "clip.m4a")
    return (folder / "clip.m4a").rename(folder / "clip.mp4")


def _cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path
