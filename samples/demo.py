"""`make demo`: upscales the sample clip with the command that everybody uses, and makes a before/after picture.

The picture shows one detail twice: what a player shows when it enlarges the source (bicubic), and the network's output.
"""

import sys
from pathlib import Path

import av
import numpy as np

from hat_video.cli import main as hat_video

HERE = Path(__file__).parent
CLIP = HERE / "bbb_320x180.mp4"
SECONDS = 2.5
# A detail with fur, edges and a smooth background, in source pixels: left, top, width, height.
DETAIL = (96, 36, 128, 108)


def frame_at(path: Path, seconds: float) -> av.VideoFrame:
    """The first frame at or after `seconds`."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.time >= seconds:
                return frame
    raise ValueError(f"{path} ends before {seconds} s")


def picture(frame: av.VideoFrame, scale: int, zoom: int) -> np.ndarray:
    """The detail as RGB, from a frame `scale` times the source; pixels are repeated up to `zoom` times."""
    left, top, width, height = (value * scale for value in DETAIL)
    rgb = frame.to_ndarray(format="rgb24", interpolation="BICUBIC")[top : top + height, left : left + width]
    return rgb.repeat(zoom // scale, axis=0).repeat(zoom // scale, axis=1)


def write_png(path: Path, rgb: np.ndarray) -> None:
    """Writes an (H, W, 3) uint8 array."""
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = rgb.shape[1], rgb.shape[0], "rgb24"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def before_after(source: Path, output: Path, png: Path) -> None:
    """Puts the bicubic enlargement of the source on the left and the output on the right."""
    after = frame_at(output, SECONDS)
    before = frame_at(source, SECONDS)
    scale = after.width // before.width
    before = before.reformat(width=after.width, height=after.height, format="rgb24", interpolation="BICUBIC")
    zoom = 2 * scale
    left, right = picture(before, scale, zoom), picture(after, scale, zoom)
    gap = np.full((left.shape[0], 8, 3), 255, np.uint8)
    write_png(png, np.concatenate([left, gap, right], axis=1))


def main() -> int:
    """Makes the video and the picture; prints where they are."""
    folder = Path("demo")
    output = folder / f"{CLIP.stem}_x2{CLIP.suffix}"
    code = hat_video(["upscale", str(CLIP), "-o", str(output), *sys.argv[1:]])
    if code == 0:
        png = folder / "before_after.png"
        before_after(CLIP, output, png)
        print(f"video:        {output}\nbefore/after: {png}  (bicubic | hat-video)")
    return code


if __name__ == "__main__":
    sys.exit(main())
