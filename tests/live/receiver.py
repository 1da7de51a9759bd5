"""A server for one stream, in a process of its own because PyAV's listening holds Python's lock.

`python receiver.py URL FORMAT [NAME=VALUE]...` waits for a sender, then says each picture's time in seconds and its
luma in the middle, and each packet of sound as `sound SECONDS`.
"""

from __future__ import annotations

import sys

import av


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    url, form, *pairs = sys.argv[1:]
    options = dict(pair.split("=", 1) for pair in pairs) | {"probesize": "20000", "analyzeduration": "500000"}
    say("listening")
    with av.open(url, format=form, options=options) as container:
        context = container.streams.video[0].codec_context
        context.thread_type = "SLICE"
        say(
            f"open {context.name} {context.width}x{context.height} {int(context.colorspace)} {int(context.color_range)}"
        )
        for packet in container.demux():
            if packet.stream.type == "audio":
                if packet.pts is not None:
                    say(f"sound {float(packet.pts * packet.time_base):.3f}")
                continue
            for frame in packet.decode():
                if frame.pts is None:
                    continue  # RTSP does not say when its first picture is
                say(f"picture {float(frame.pts * frame.time_base):.3f}")
    say("end")


if __name__ == "__main__":
    main()
