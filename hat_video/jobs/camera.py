"""A camera, upscaled while it runs: capture, the newest frame to the network, one encoder, many outputs."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from hat_video.errors import CancelledError, OptionError, OutputError, UsageError
from hat_video.frames import VideoInfo
from hat_video.inference.processors import cpu_count
from hat_video.inference.upscaler import choose_device
from hat_video.jobs.camera_options import CameraOptions, parse_span
from hat_video.jobs.live_loop import LiveLoop, OnStall
from hat_video.jobs.options import encoder_options_of, parse_time
from hat_video.jobs.rungs import Rung, choose_models, load_rungs, measure_costs
from hat_video.live.capture import Capture
from hat_video.live.captured import Captured, Roi
from hat_video.live.clock import LIVE_TIME_BASE
from hat_video.live.encode import AudioLine, LiveEncoder
from hat_video.live.figures import LiveFigures, OutputFigures, RungFigures
from hat_video.live.ladder import Ladder, RungChange
from hat_video.live.mailbox import Mailbox
from hat_video.live.meter import Latencies, LiveMeter
from hat_video.live.outputs import FanOut, OutputEvent, parse_output
from hat_video.live.page import Page
from hat_video.live.sources import masked, parse_source
from hat_video.live.teller import Teller
from hat_video.media.encoder import EncoderSpec, plan_encoder

if TYPE_CHECKING:
    from av.packet import Packet
    from av.stream import Stream

__all__ = ["CameraEvent", "CameraReport", "upscale_camera"]

# Live pictures are looked at and forgotten; they have to be made in time.
_CRF, _PRESET = {"libx264": 20, "libx265": 22}, {"libx264": "veryfast", "libx265": "ultrafast"}
# Whatever an encoder may hold back is latency.
_PROMPT = {
    "libx264": {"tune": "zerolatency"},
    "libx265": {"tune": "zerolatency"},
    "h264_nvenc": {"tune": "ull", "zerolatency": "1", "delay": "0"},
    "hevc_nvenc": {"tune": "ull", "zerolatency": "1", "delay": "0"},
}
_GPU_ENCODER = "h264_nvenc"
# One thread gives every picture at once; more of them are needed only where one cannot keep up.
_PIXELS_OF_ONE_THREAD = 1280 * 720
_MOST_EVENTS = 1000
_TICK_SECONDS = 0.1
# The first frame of a pipe is taken at once, or something is wrong.
_FIRST_SECONDS = 0.5
# A camera that is silent for so long is called again.
_STALL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class CameraEvent:
    """Something that happened to a live run."""

    seconds: float
    """Since the run began."""
    kind: str
    """source, rung, output or note."""
    text: str


@dataclass(frozen=True, slots=True)
class CameraReport:
    """What a live run came to."""

    figures: LiveFigures
    latencies: Latencies
    """Of all frames."""
    settings: dict[str, object]
    """Models, device, precision, encoder and sizes, as they were chosen."""
    events: list[CameraEvent] = field(default_factory=list)
    """The newest thousand."""
    failed_outputs: list[str] = field(default_factory=list)
    """What is wrong with outputs that did not take all and end properly, one line each."""


def upscale_camera(
    source: str,
    outputs: Sequence[str] = (),
    options: CameraOptions | None = None,
    *,
    stdout_format: str = "nut",
    on_figures: Callable[[LiveFigures], None] | None = None,
    on_event: Callable[[CameraEvent], None] | None = None,
    cancel: threading.Event | None = None,
) -> CameraReport:
    """Upscales a camera until it is cancelled, the duration is over, or a pipe ends.

    Args:
        source: a camera (`0`, `/dev/video0`, its name), an address (`rtsp://...`), `screen:`, `test:`, or `-`.
        outputs: files (`.mp4`, `.mkv`, `.ts`, with `%Y...` in segments), a folder for HLS (`live/`), addresses to push
            to, `-`, or `vcam:`; none are needed where the options serve a page.
        options: all else.
        stdout_format: of the stream to standard output, `-`: `nut` or `mkv`.
        on_figures: called once a second.
        on_event: called when something happens. Both are called from a thread of their own, one after the other; what
            takes its time misses some, and what raises is called no more.
        cancel: set it to stop; files are finished properly.

    Raises:
        OptionError, UsageError, ModelError: the request cannot be met.
        SourceError: the camera cannot be opened, or was lost and `retries` are over.
        OutputError: an output cannot be opened at the start, or the only one is gone for good.
        WorkError: a frame cannot be computed.
        CancelledError: it was cancelled before the first frame.
    """
    options = options or CameraOptions()
    with ExitStack() as stack:
        run = _Run(source, outputs, options, stdout_format, on_event, cancel or threading.Event())
        return run.go(stack, on_figures)


class _Run:
    """One live run: what its threads share. It is the `LiveState` of its page."""

    def __init__(
        self,
        source: str,
        outputs: Sequence[str],
        options: CameraOptions,
        stdout_format: str,
        on_event: Callable[[CameraEvent], None] | None,
        stop: threading.Event,
    ) -> None:
        self._options, self._on_event, self._stop = options, on_event, stop
        self._began = time.monotonic()
        self._events: deque[CameraEvent] = deque(maxlen=_MOST_EVENTS)
        if not outputs and options.serve is None:
            raise UsageError(f"{masked(source)}: would go nowhere; give -o OUTPUT or --serve HOST:PORT")
        self._camera = parse_source(source, size=options.size, fps=options.fps, input_format=options.input_format)
        self._plans = [
            parse_output(
                text,
                segment_seconds=parse_span(options.segment, "--segment"),
                keep_seconds=parse_span(options.keep, "--keep"),
                may_replace=options.overwrite,
                stdout_format=stdout_format,
            )
            for text in outputs
        ]
        if options.segment is not None and not any(plan.segment_seconds for plan in self._plans):
            raise UsageError(f"--segment {options.segment}: is for recordings; give -o NAME-%Y%m%d-%H%M%S.mp4")
        self._is_pipe = self._camera.kind == "pipe"
        self._models, self._first = choose_models(options)
        self._is_on_gpu = choose_device(options.device).type == "cuda"
        self._in_flight = options.jobs or (1 if self._is_on_gpu else cpu_count())
        self._duration = parse_time(options.duration, "--duration")
        self._mailbox: Mailbox[Captured] = Mailbox(options.places())
        self._meter = LiveMeter()
        self._is_open = threading.Event()
        """Set once the networks are ready for frames."""
        self._is_gone = threading.Event()
        """Set once nobody takes frames any more, whatever the reason."""
        self._why: Literal["enough", "source", "outputs"] | None = None
        """What ended the run first; None: it goes on, or was stopped."""
        self._teller = Teller(lambda text: self._log("note", text))
        self._base = 0
        """Ticks of the first frame that is upscaled; at the outputs it is at 0."""
        self._before: Captured | None = None
        self._hearing = threading.Lock()
        """Held while sound is encoded: the capture still hears when the run's thread ends the sound."""
        self._is_over = False
        self._changes = 0
        self._rungs: list[Rung] = []
        self._loop: LiveLoop | None = None
        self._page: Page | None = None

    def go(self, stack: ExitStack, on_figures: Callable[[LiveFigures], None] | None) -> CameraReport:
        """From the first picture to the last."""
        options = self._options
        box = options.roi_box()
        stack.enter_context(self._teller)
        self._capture = capture = stack.enter_context(
            Capture(
                self._camera,
                on_frame=self._take,
                on_audio=None if options.audio == "none" else self._hear,
                on_event=lambda event: self._tell("source", event.message),
                retries=options.retries,
                roi=None if box is None else Roi(*box),
                record=options.record_source,
                # Nobody can be called again through a pipe.
                stall_seconds=math.inf if self._is_pipe else _STALL_SECONDS,
                stop=self._stop,
            )
        )
        stack.callback(self._is_gone.set)
        spec, self._large = self._plan_encoder(capture.info)
        self._audio = self._audio_line(capture)
        self._encoder = encoder = LiveEncoder(spec, self._large, self._audio)
        stack.callback(encoder.close)
        # What is wrong with an output shows before the networks are made ready, which takes longer.
        self._fan_out = stack.enter_context(FanOut(encoder, self._plans, stop=self._stop, on_event=self._tell_output))
        if options.serve is not None:
            self._page = stack.enter_context(
                Page(options.serve, token=options.token, state=self, encoder=encoder, stop=self._stop)
            )
            self._fan_out.add(self._page)
            self._tell("note", f"the page: {self._page.url}")
        self._loop = loop = self._ready_loop(capture)
        stack.enter_context(self._ticking(on_figures))
        self._is_open.set()
        loop.run()
        made = self._finish()
        # A camera that goes while the outputs are finished is nothing to a run that had all it wanted.
        if capture.error is not None and self._why == "source":
            raise capture.error
        return made

    # ---- What the page asks; from its thread.

    def figures(self) -> LiveFigures:
        """Everything so far."""
        meter, capture, loop = self._meter, self._capture, self._loop
        counts = capture.figures
        came, left = meter.rates()
        p50, p99 = meter.recent_latencies()
        roi, whole, small = capture.roi, capture.source_info, capture.info
        rung = self._rungs[0 if loop is None else loop.ladder.rung].model.name if self._rungs else ""
        dropped = Counter({"overload": self._mailbox.dropped, "late": 0})
        dropped.update(counts.dropped)
        if loop is not None:
            dropped.update(loop.dropped)
        return LiveFigures(
            source=self._camera.name,
            seconds=0.0 if meter.began is None else time.monotonic() - meter.began,
            is_source_up=counts.is_up,
            input_size=(small.width, small.height),
            output_size=(self._large.width, self._large.height),
            frames_in=meter.frames_in,
            frames_out=meter.frames_out,
            frames_held=meter.frames_held,
            dropped=dict(dropped),
            fps_in=came,
            fps_out=left,
            latency_p50_seconds=p50,
            latency_p99_seconds=p99,
            rung=rung,
            rungs=tuple(RungFigures(one.model.name, one.made, one.cost_seconds) for one in self._rungs),
            rung_changes=self._changes,
            reused_frames=sum(one.frames.same for one in self._rungs),
            reconnects=counts.reconnects,
            stage_seconds={"decode": counts.decode_seconds, **meter.stage_seconds},
            latency_buckets=meter.buckets(),
            latency_sum_seconds=meter.latency_sum,
            outputs=self._output_figures(),
            viewers=0 if self._page is None else self._page.viewers,
            roi=None if roi is None else (roi.x, roi.y, roi.width, roi.height),
            source_size=(whole.width, whole.height),
        )

    def move_roi(self, x: int, y: int) -> tuple[int, int] | None:
        """Where the part is now; None where the whole picture is upscaled."""
        return None if self._capture.roi is None else self._capture.move_roi(x, y)

    # ---- From the capture's thread, which waits for nobody.

    def _take(self, captured: Captured) -> None:
        before, self._before = self._before, captured
        if self._is_open.is_set():
            self._deliver(captured, before)
        elif self._is_pipe and before is not None:
            # A camera goes on while the networks are made ready; what comes through a pipe can wait, and is not lost.
            while not self._is_open.wait(_TICK_SECONDS):
                if self._stop.is_set() or self._is_gone.is_set():
                    return
            # Neither the duration nor the latency has begun before the networks were ready.
            self._deliver(replace(before, arrived=time.monotonic()), None)
            self._mailbox.wait_empty(_FIRST_SECONDS)
            self._deliver(replace(captured, arrived=time.monotonic()), before)

    def _deliver(self, captured: Captured, before: Captured | None) -> None:
        if self._meter.began is None:
            self._base = captured.ticks
        elif before is not None and self._loop is not None:
            self._loop.ladder.arrived((captured.ticks - before.ticks) * float(LIVE_TIME_BASE))
        if self._mailbox.put(replace(captured, ticks=captured.ticks - self._base)):
            self._meter.came(captured.arrived)

    def _hear(self, packet: Packet[Stream]) -> None:
        if self._meter.began is None or self._audio is None or packet.pts is None or packet.pts < self._base:
            return
        packet.pts, packet.dts = packet.pts - self._base, None
        with self._hearing:
            if not self._is_over:
                self._fan_out.send(self._audio.feed(packet))

    # ---- From the thread of the run.

    def _plan_encoder(self, small: VideoInfo) -> tuple[EncoderSpec, VideoInfo]:
        options, scale = self._options, self._models[0].scale
        given = encoder_options_of(options.encoder_option)
        is_settled = options.crf is not None or not given.keys().isdisjoint(("crf", "cq", "qp"))
        names = [options.encoder] if options.encoder else [*([_GPU_ENCODER] if self._is_on_gpu else []), "libx264"]
        width, height = small.width * scale, small.height * scale
        for name in names:
            try:
                return plan_encoder(
                    "matroska",
                    small,
                    width,
                    height,
                    name=name,
                    crf=options.crf if is_settled else _CRF.get(name),
                    preset=_PRESET.get(name) if options.preset is None else options.preset,
                    options={**_PROMPT.get(name, {}), **given},
                    pixel_format=_players_format(small, width, height),
                    threads=1 if width * height <= _PIXELS_OF_ONE_THREAD else cpu_count(),
                )
            except OptionError as error:
                if name == names[-1]:
                    raise
                self._tell("note", f"encoded on the CPU: {error}")
        raise AssertionError

    def _audio_line(self, capture: Capture) -> AudioLine | None:
        if capture.audio is None or self._options.audio == "none" or not self._plans:
            return None
        containers = [plan.container for plan in self._plans if plan.container is not None]
        line = AudioLine(capture.audio, self._options.audio, containers=containers)
        for note in line.notes:
            self._tell("note", note)
        return line

    def _ready_loop(self, capture: Capture) -> LiveLoop:
        """Loads and warms all rungs; the ladder begins where the camera's rate lets it."""
        options, small = self._options, capture.info
        self._rungs = load_rungs(self._models, options, small, self._large, self._in_flight, self._stop)
        assert self._before is not None
        measure_costs(self._rungs, self._before.planes, self._in_flight, self._stop)
        if self._stop.is_set():
            raise CancelledError("stopped before the first frame")
        most = None if options.max_latency is None else options.max_latency / 1000
        ladder = Ladder(
            [max(rung.cost_seconds, 1e-6) for rung in self._rungs],
            in_flight=self._in_flight,
            max_latency_seconds=most,
            interval_seconds=None if small.rate is None else float(1 / small.rate),
        )
        ladder.rung = max(ladder.rung, self._first)
        for rung in self._rungs:
            for note in rung.upscaler.notes:
                self._tell("note", note)
        costs = ", ".join(f"{rung.model.name} {1000 * rung.cost_seconds:.0f} ms" for rung in self._rungs)
        self._tell("rung", f"a frame takes {costs}; begins with {self._rungs[ladder.rung].model.name}")
        return LiveLoop(
            self._rungs,
            ladder,
            self._mailbox,
            self._encode,
            self._meter,
            in_flight=self._in_flight,
            large=self._large,
            on_stall=self._stall_policy(),
            on_change=self._changed,
            on_pair=None if self._page is None else self._show,
            most_latency_seconds=most,
            stop=self._stop,
        )

    def _stall_policy(self) -> OnStall:
        if self._options.on_stall != "auto":
            return self._options.on_stall
        return "hold" if any(plan.kind == "network" for plan in self._plans) else "gap"

    def _encode(self, planes: Sequence[Tensor], ticks: int, arrived: float) -> None:
        self._fan_out.send(self._encoder.encode(planes, ticks, arrived))
        self._fan_out.show(planes)

    def _show(self, captured: Captured, after: Sequence[Tensor]) -> None:
        if self._page is not None:
            capture = self._capture
            whole = None if captured.whole is None else (captured.whole, capture.source_info)
            self._page.show(captured.planes, capture.info, after, self._large, whole)

    def _changed(self, change: RungChange) -> None:
        self._changes += 1
        names = [rung.model.name for rung in self._rungs]
        way = "down" if change.after > change.before else "up"
        self._tell("rung", f"{way} from {names[change.before]} to {names[change.after]}: {change.reason}")

    @contextmanager
    def _ticking(self, on_figures: Callable[[LiveFigures], None] | None) -> Iterator[None]:
        """A thread that watches what ends the run, and has the figures told once a second."""
        over = threading.Event()
        thread = threading.Thread(target=self._tick, args=(over, on_figures), name="hat-video-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _tick(self, over: threading.Event, on_figures: Callable[[LiveFigures], None] | None) -> None:
        told = time.monotonic()
        while not over.wait(_TICK_SECONDS):
            began, now = self._meter.began, time.monotonic()
            self._why = self._why or self._reason(began, now)
            if self._why == "source" and self._is_pipe and began is None and self._before is not None:
                # A pipe of a single frame, which waited for a second one.
                self._deliver(replace(self._before, arrived=now), None)
            if self._why is not None:
                self._mailbox.close()
            if on_figures is not None and began is not None and now - told >= 1:
                told = now
                self._teller.tell(on_figures, self.figures())

    def _reason(self, began: float | None, now: float) -> Literal["enough", "source", "outputs"] | None:
        """What ends the run, if anything but `stop` does."""
        if self._stop.is_set():
            return None
        if self._duration is not None and began is not None and now - began >= self._duration:
            return "enough"
        if self._capture.is_ended:
            return "source"
        return "outputs" if self._has_no_taker() else None

    def _has_no_taker(self) -> bool:
        return self._fan_out.ended is not None

    def _output_figures(self) -> tuple[OutputFigures, ...]:
        pages = () if self._page is None else (self._page.output_figures,)
        return (*self._fan_out.figures, *pages)

    def _finish(self) -> CameraReport:
        """Hands over what is left, closes the outputs, and sums up."""
        ended = self._fan_out.ended
        if ended is not None and not self._stop.is_set():
            raise OutputError(ended)
        page = None if self._page is None else self._page.output_figures
        failed = [] if page is None or page.is_up else [f"{page.name}: {page.error or 'is down'}"]
        figures = self.figures()
        with self._hearing:
            self._is_over = True
            if self._audio is not None:
                self._fan_out.send(self._audio.flush())
        self._fan_out.send(self._encoder.flush())
        self._fan_out.close()
        spec = self._encoder.spec
        return CameraReport(
            figures=replace(figures, outputs=self._output_figures()),
            latencies=self._meter.latencies(),
            settings={
                "models": [
                    {"name": rung.model.name, "sha256": rung.model.sha256, "scale": rung.model.scale}
                    for rung in self._rungs
                ],
                "device": str(self._rungs[0].upscaler.device),
                "computed_by": {
                    rung.model.name: [rung.upscaler.backend, rung.upscaler.precision] for rung in self._rungs
                },
                "in_flight": self._in_flight,
                "encoder": asdict(spec),
                "audio": None if self._audio is None else self._audio.action,
                "on_stall": self._stall_policy(),
            },
            events=list(self._events),
            failed_outputs=[*self._fan_out.failed, *failed],
        )

    def _tell_output(self, event: OutputEvent) -> None:
        self._tell("output", f"{event.output}: {event.message}")

    def _tell(self, kind: str, text: str) -> None:
        self._teller.tell(self._on_event, self._log(kind, text))

    def _log(self, kind: str, text: str) -> CameraEvent:
        event = CameraEvent(round(time.monotonic() - self._began, 3), kind, masked(text))
        self._events.append(event)
        return event


def _players_format(small: VideoInfo, width: int, height: int) -> str:
    """What every player and browser shows: 4:2:0 of 8 bits; other pictures of odd size keep their own."""
    return "auto" if width % 2 or height % 2 else "yuv420p"
