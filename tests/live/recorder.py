"""A process that records in real time until it is killed; it says the time of each picture that it has handed over.

`python recorder.py SECONDS SOUND OUTPUT...`, where SOUND is a file, or `-` for none.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from hat_video.live.encode import AudioLine
from hat_video.live.outputs import FanOut, parse_output
from tests.live.feeding import RATE, head_of, made_encoder, packets, sound


def main() -> None:
    seconds, tone, *names = sys.argv[1:]
    line = None if tone == "-" else AudioLine(head_of(Path(tone)), "copy")
    heard = [] if line is None else sound(line, Path(tone))
    encoder = made_encoder(line)
    segment = 2.0 if any("%" in name for name in names) else None
    plans = [parse_output(name, segment_seconds=segment if "%" in name else None) for name in names]
    with FanOut(encoder, plans, stop=threading.Event()) as outputs:
        start = time.monotonic()
        for number, made in enumerate(packets(encoder, range(int(float(seconds) * RATE)))):
            time.sleep(max(0.0, start + number / RATE - time.monotonic()))
            outputs.send(made)
            while heard and heard[0].pts <= made[0].pts + 2000:
                outputs.send([heard.pop(0)])
            sys.stdout.write(f"{number / RATE}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
