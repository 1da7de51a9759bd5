"""Kinds of source whose time is odd."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from tests.conformance.kinds import AAC, chart, kind, noise, plain, x264
from tests.conformance.tools import ffmpeg

TIME, SHORT, RAW = "Time", "Short and slow", "Without timestamps"
MPEG4 = ("-c:v", "mpeg4", "-q:v", "3", "-bf", "2", "-g", "8")


@kind(TIME, "constant rate, B-frames, mp4")
def constant_rate(folder: Path) -> Path:
    return plain(folder / "clip.mp4")


@kind(TIME, "30000/1001 frames a second, mov")
def ntsc_rate(folder: Path) -> Path:
    return plain(folder / "clip.mov", rate="30000/1001")


@kind(TIME, "variable rate, mp4")
def variable_rate(folder: Path) -> Path:
    select = "select='lt(n,12)+not(mod(n,5))'"
    ffmpeg(*chart(2, 30), *noise(2), *x264(), *AAC, "-vf", select, "-fps_mode", "passthrough", folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(TIME, "variable rate in milliseconds, mkv")
def variable_rate_mkv(folder: Path) -> Path:
    select = "select='lt(n,20)+not(mod(n,7))'"
    ffmpeg(*chart(2, 30), *noise(2), *x264(), *AAC, "-vf", select, "-fps_mode", "passthrough", folder / "clip.mkv")
    return folder / "clip.mkv"


@kind(TIME, "pyramid of B-frames")
def b_pyramid(folder: Path) -> Path:
    path = folder / "clip.mp4"
    ffmpeg(*chart(), *noise(), *x264(24, 6, "b-pyramid=normal:ref=4:b-adapt=0"), *AAC, path)
    return path


@kind(TIME, "open GOP, H.264, mkv")
def open_gop(folder: Path) -> Path:
    path = folder / "clip.mkv"
    ffmpeg(*chart(2), *noise(2), *x264(8, 3, "open-gop=1:b-adapt=0:ref=3"), *AAC, path)
    return path


@kind(TIME, "open GOP, HEVC, mp4")
def open_gop_hevc(folder: Path) -> Path:
    path = folder / "clip.mp4"
    params = "log-level=none:open-gop=1:keyint=8:bframes=3:b-adapt=0"
    ffmpeg(*chart(2, size="128x96"), *noise(2), "-c:v", "libx265", "-preset", "ultrafast", "-x265-params", params,
           "-pix_fmt", "yuv420p", *AAC, path)  # fmt: skip
    return path


@kind(TIME, "cut in the middle of a GOP (edit list), mp4")
def edit_list(folder: Path) -> Path:
    whole = folder / "whole.mp4"
    ffmpeg(*chart(2), *noise(2), *x264(12), *AAC, whole)
    ffmpeg("-ss", "0.7", "-i", whole, "-c", "copy", folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(TIME, "cut in the middle of a GOP (edit list), mov")
def edit_list_mov(folder: Path) -> Path:
    whole = folder / "whole.mov"
    ffmpeg(*chart(2), *noise(2), *x264(12), "-c:a", "pcm_s16le", whole)
    ffmpeg("-ss", "0.3", "-i", whole, "-c", "copy", folder / "clip.mov")
    return folder / "clip.mov"


@kind(TIME, "video starts half a second after the sound, mp4")
def late_video(folder: Path) -> Path:
    path = folder / "clip.mp4"
    ffmpeg("-itsoffset", "0.5", *chart(), *noise(1.5), *x264(), *AAC, path)
    return path


@kind(TIME, "video starts half a second after the sound, mkv")
def late_video_mkv(folder: Path) -> Path:
    path = folder / "clip.mkv"
    ffmpeg("-itsoffset", "0.5", *chart(), *noise(1.5), *x264(), *AAC, path)
    return path


@kind(TIME, "sound starts 0.7 s after the video, mp4")
def late_audio(folder: Path) -> Path:
    path = folder / "clip.mp4"
    ffmpeg(*chart(2), "-itsoffset", "0.7", *noise(1), *x264(), *AAC, path)
    return path


@kind(TIME, "sound starts 0.7 s after the video, mkv")
def late_audio_mkv(folder: Path) -> Path:
    path = folder / "clip.mkv"
    ffmpeg(*chart(2), "-itsoffset", "0.7", *noise(1), *x264(), "-c:a", "flac", path)
    return path


@kind(TIME, "starts at -0.5 s, ts")
def negative_times(folder: Path) -> Path:
    return plain(folder / "clip.ts", "-output_ts_offset", "-0.5", "-muxdelay", "0", "-muxpreload", "0")


@kind(TIME, "starts at 30 000 s, ts")
def ts_at_30000(folder: Path) -> Path:
    return plain(folder / "clip.ts", "-output_ts_offset", "30000", "-muxdelay", "0", "-muxpreload", "0")


@kind(TIME, "timestamps wrap around (33 bits), ts")
def ts_wrap(folder: Path) -> Path:
    return plain(folder / "clip.ts", "-output_ts_offset", "95443.2", "-muxdelay", "0", "-muxpreload", "0")


@kind(TIME, "starts at 100 s, mkv")
def mkv_at_100(folder: Path) -> Path:
    return plain(folder / "clip.mkv", "-output_ts_offset", "100")


@kind(TIME, "sound longer than the video")
def long_audio(folder: Path) -> Path:
    ffmpeg(*chart(0.5), *noise(2), *x264(), *AAC, folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(TIME, "sound shorter than the video")
def short_audio(folder: Path) -> Path:
    ffmpeg(*chart(2), *noise(0.4), *x264(), *AAC, folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(SHORT, "one frame")
def one_frame(folder: Path) -> Path:
    ffmpeg(*chart(1, 1), *x264(), "-frames:v", "1", folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(SHORT, "two frames")
def two_frames(folder: Path) -> Path:
    ffmpeg(*chart(1, 24), *x264(), "-frames:v", "2", folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(SHORT, "the last frame has no duration")
def last_without_duration(folder: Path) -> Path:
    ffmpeg(
        *chart(), *x264(), "-bsf:v", "setts=pts=PTS:dts=DTS:duration='if(gte(N,23),0,DURATION)'", folder / "clip.mkv"
    )
    return folder / "clip.mkv"


@kind(SHORT, "one frame in two seconds")
def low_rate(folder: Path) -> Path:
    ffmpeg(*chart(10, "1/2"), *noise(10), *x264(), *AAC, folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(SHORT, "240 frames a second")
def high_rate(folder: Path) -> Path:
    ffmpeg(*chart(0.3, 240), *noise(0.3), *x264(), *AAC, folder / "clip.mp4")
    return folder / "clip.mp4"


@kind(RAW, "raw .h264 with B-frames", rate=25, reported="have no timestamp")
def raw_h264(folder: Path) -> Path:
    ffmpeg(*chart(1, 25), *x264(), folder / "clip.h264")
    return folder / "clip.h264"


@kind(RAW, "raw .h265 with B-frames", rate=25, reported="have no timestamp")
def raw_h265(folder: Path) -> Path:
    params = "log-level=none:keyint=8:bframes=2"
    ffmpeg(*chart(1, 25, "128x96"), "-c:v", "libx265", "-preset", "ultrafast", "-x265-params", params,
           "-pix_fmt", "yuv420p", folder / "clip.h265")  # fmt: skip
    return folder / "clip.h265"


@kind(RAW, "raw MPEG-2 video", rate=25)
def raw_mpeg2(folder: Path) -> Path:
    ffmpeg(*chart(1, 25), "-c:v", "mpeg2video", "-q:v", "3", "-bf", "2", "-g", "8", folder / "clip.m2v")
    return folder / "clip.m2v"


@kind(RAW, "MJPEG as a camera sends it", rate=25)
def raw_mjpeg(folder: Path) -> Path:
    ffmpeg(*chart(1, 25), "-c:v", "mjpeg", "-q:v", "3", "-pix_fmt", "yuvj420p", "-f", "mjpeg", folder / "clip.mjpeg")
    return folder / "clip.mjpeg"


@kind(RAW, "Xvid with packed B-frames, avi", rate=24)
def xvid_packed(folder: Path) -> Path:
    path = folder / "clip.avi"
    ffmpeg(*chart(), *noise(), "-c:v", "libxvid", "-q:v", "3", "-bf", "2", "-g", "8", "-c:a", "libmp3lame", path)
    return path


@kind(RAW, "MPEG-4 with B-frames, avi", rate=24)
def mpeg4_avi(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), *MPEG4, "-c:a", "libmp3lame", folder / "clip.avi")
    return folder / "clip.avi"


@kind(RAW, "H.264 with B-frames, avi", rate=24, start=Fraction(1, 24))
def h264_avi(folder: Path) -> Path:
    ffmpeg(*chart(), *noise(), *x264(), "-c:a", "libmp3lame", folder / "clip.avi")
    return folder / "clip.avi"


@kind(RAW, "decode times instead of presentation times, mkv")
def decode_times(folder: Path) -> Path:
    ffmpeg(*chart(), *x264(), "-bsf:v", "setts=ts=DTS", folder / "clip.mkv")
    return folder / "clip.mkv"


@kind(RAW, "every frame has the same timestamp twice, mkv", reported="repeat a timestamp")
def doubled_times(folder: Path) -> Path:
    path = folder / "clip.mkv"
    ffmpeg(*chart(), "-c:v", "mjpeg", "-q:v", "3", "-pix_fmt", "yuvj420p",
           "-bsf:v", "setts=ts='floor(N/2)*2*DURATION'", path)  # fmt: skip
    return path


@kind(RAW, "numbered pictures, PNG, 23.976 a second", rate=Fraction(24000, 1001), options=("--rate", "23.976"))
def numbered_png(folder: Path) -> Path:
    ffmpeg(*chart(), folder / "frame_%04d.png")
    return folder / "frame_%04d.png"


@kind(RAW, "numbered pictures, JPEG, 1 to 24", rate=30, options=("--rate", "30"))
def numbered_jpeg(folder: Path) -> Path:
    ffmpeg(*chart(), "-pix_fmt", "yuvj420p", folder / "take-%d.jpg")
    return folder / "take-%d.jpg"
