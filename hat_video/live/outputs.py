"""Where the enlarged picture goes: what an output may be called, and the fan-out to all of them.

Each output has a thread and a bounded queue of its own, and those on the network have a process; one that is slow,
mute, dead or killed is felt by no other, nor by the encoder. It comes back by itself.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self
from urllib.parse import urlsplit

from torch import Tensor

from hat_video.errors import CancelledError, OptionError, OutputError
from hat_video.live.encode import LiveEncoder
from hat_video.live.figures import OutputFigures
from hat_video.live.hls import HlsOutput
from hat_video.live.muxing import check_container
from hat_video.live.names import RowNames, is_pattern
from hat_video.live.network import NETWORK_SCHEMES, NetworkOutput
from hat_video.live.output import Output, OutputEvent
from hat_video.live.packet import LivePacket
from hat_video.live.recording import RecordingOutput, StdoutOutput
from hat_video.live.sources import masked
from hat_video.live.virtual_camera import VirtualCamera

__all__ = ["FanOut", "OutputEvent", "OutputPlan", "Sink", "parse_output"]

_SUFFIXES = {".mp4": "mp4", ".mkv": "matroska", ".ts": "mpegts"}
_STDOUT = {"nut": "nut", "mkv": "matroska"}
_GRAMMAR = (
    f"a file ({', '.join(_SUFFIXES)}), a folder/ or playlist.m3u8 for HLS,"
    f" {' '.join(f'{scheme}://' for scheme in NETWORK_SCHEMES)}..., vcam:, or - for standard output"
)
_OPEN_SECONDS = 4.8
_CLOSE_SECONDS = 1.6
_LEAST_SECONDS = 1.0
# Sound that is ahead of the pictures waits for them; so long, or so many packets.
_HELD_SECONDS, _HELD_PACKETS = 5.0, 2000


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """One output, understood but not opened."""

    kind: Literal["file", "hls", "network", "stdout", "vcam"]
    name: str
    """For people: credentials masked."""
    container: str | None
    """FFmpeg's name of the muxer; None where pictures go, not packets."""
    target: str = field(repr=False)
    """Path, URL with credentials, or device."""
    segment_seconds: float | None = None
    """A row of files, each so long; None: one file."""
    keep_seconds: float | None = None
    """Files of the row that are older are deleted."""
    may_replace: bool = False


def parse_output(
    text: str,
    *,
    segment_seconds: float | None = None,
    keep_seconds: float | None = None,
    may_replace: bool = False,
    stdout_format: str = "nut",
) -> OutputPlan:
    """What an output given by a person means, and whether it can be made at all. Nothing is opened or written.

    Args:
        text: as `-o` has it: a file, whose name may be a pattern of `strftime`; `hls/` or `live.m3u8`; a URL; `vcam:`
            or `vcam:DEVICE`; `-`.
        segment_seconds: `--segment`: for patterns. HLS has pieces of its own, and others have none.
        keep_seconds: `--keep`: likewise.
        may_replace: `--overwrite`.
        stdout_format: what standard output gets: `nut` or `mkv`.

    Raises:
        OptionError: it is none of these, or an option does not go with it.
        OutputError: it exists, or its folder does not, or may not be written to.
    """
    shown = masked(text)
    if text == "-":
        if stdout_format not in _STDOUT:
            raise OptionError(f"--format {stdout_format}: standard output of a camera is {' or '.join(_STDOUT)}")
        return OutputPlan("stdout", "-", _STDOUT[stdout_format], "-")
    if text.startswith("vcam:"):
        return OutputPlan("vcam", text.removesuffix(":"), None, text.removeprefix("vcam:"))
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is not None:
        return OutputPlan("network", shown, _network_container(text, scheme[1].lower()), text)
    if not text:
        raise OptionError(f"-o: is empty; give {_GRAMMAR}")
    path = Path(text)
    if text.endswith(("/", os.sep)) or path.suffix.lower() == ".m3u8":
        return _hls(text, path, may_replace)
    if path.is_dir():
        raise OptionError(f"-o {text}: is a folder; write {text}/ to have HLS in it, or name a file")
    container = _SUFFIXES.get(path.suffix.lower())
    if container is None:
        raise OptionError(f"-o {text}: must be {_GRAMMAR}")
    return _file(text, path, container, segment_seconds, keep_seconds, may_replace)


def _network_container(text: str, scheme: str) -> str:
    shown = masked(text)
    if scheme not in NETWORK_SCHEMES:
        raise OptionError(f"-o {shown}: {scheme}:// is not known; must be {_GRAMMAR}")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise OptionError(f"-o {shown}: is no URL; its port must be a number below 65536") from None
    if not host or (port is None and scheme in ("srt", "tcp", "udp")):
        raise OptionError(f"-o {shown}: names no host and port, as in {scheme}://127.0.0.1:5000")
    if re.search(r"[?&](listen=[1-9]|mode=listener)", text):
        raise OptionError(f"-o {shown}: a run connects to others and waits for none; use --serve, or push to a server")
    return NETWORK_SCHEMES[scheme]


def _hls(text: str, path: Path, may_replace: bool) -> OutputPlan:
    playlist = path if path.suffix.lower() == ".m3u8" else path / "live.m3u8"
    folder = playlist.parent
    if folder.exists():
        _check_folder(text, folder)
    else:
        _check_folder(text, folder.parent)  # it is made; but not a whole road to it
    return OutputPlan("hls", text, "mpegts", str(playlist), may_replace=may_replace)


def _file(
    text: str, path: Path, container: str, segment: float | None, keep: float | None, may_replace: bool
) -> OutputPlan:
    plan = OutputPlan("file", text, container, text, may_replace=may_replace)
    if is_pattern(path):
        RowNames.check(path, f"-o {text}")
        base = RowNames(path).base
        _check_folder(text, base)
        if segment is None and keep is None:
            return plan
        if segment is None:
            raise OptionError(f"--keep {keep:g} s: is for recordings in files by time; give --segment too")
        if segment < _LEAST_SECONDS:
            raise OptionError(f"--segment {segment:g} s: must be {_LEAST_SECONDS:g} s or more")
        if keep is not None and keep < segment:
            raise OptionError(f"--keep {keep:g} s: must not be less than --segment, {segment:g} s")
        return OutputPlan("file", text, container, text, segment, keep, may_replace)
    if segment is not None or keep is not None:
        raise OptionError(
            f"-o {text}: --segment makes many files, and they need names;"
            f" for instance {path.with_stem(f'{path.stem}-%Y%m%d-%H%M%S')}"
        )
    _check_folder(text, path.parent)
    if path.exists() or path.is_symlink():
        if not path.is_file():
            raise OutputError(f"{text}: is a device, a pipe or a broken link; give the name of a file")
        if not may_replace:
            raise OutputError(f"{text}: exists; use --overwrite or another -o")
    return plan


def _check_folder(text: str, folder: Path) -> None:
    try:
        is_there = folder.is_dir()
    except OSError as error:
        raise OutputError(f"{text}: {error.strerror}") from None
    if not is_there:
        raise OutputError(f"{text}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{text}: you may not write into {folder}; choose another folder")


class Sink(Protocol):
    """What takes packets: an output, or the page. `send` must not wait."""

    def send(self, packet: LivePacket) -> None: ...
    def close(self) -> None: ...


class _Order:
    """Puts sound behind the picture it goes with: pictures are upscaled on the way, and so come later than sound.

    Pictures never wait.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[float, LivePacket]] = deque()
        self._reached = -1

    def put(self, packet: LivePacket) -> list[LivePacket]:
        """Takes a packet, gives those whose time has come."""
        if packet.kind == "video":
            ready = self._until(packet.pts)
            self._reached = max(self._reached, packet.pts)
            return [*ready, packet]
        now = time.monotonic()
        self._held.append((now, packet))
        ready = self._until(self._reached + 1)
        while self._held and (now - self._held[0][0] > _HELD_SECONDS or len(self._held) > _HELD_PACKETS):
            ready.append(self._held.popleft()[1])
        return ready

    def rest(self) -> list[LivePacket]:
        """What is still held."""
        packets = [packet for _, packet in self._held]
        self._held.clear()
        return packets

    def _until(self, pts: int) -> list[LivePacket]:
        ready = []
        while self._held and self._held[0][1].pts < pts:
            ready.append(self._held.popleft()[1])
        return ready


class FanOut:
    """Hands every packet to every output. A context manager; `send` and `show` may be called from any thread.

    Entering it opens all outputs and returns within five seconds; leaving it takes two seconds at most, in which they
    write what they have and finish properly. It must be left before the encoder is closed.

    Args:
        encoder: whose packets these are.
        plans: the outputs.
        stop: set: opening is given up.
        on_event: called for what happens to an output after that, on its thread.

    Raises:
        OptionError: two outputs are the same.
        OutputError: from entering: an output cannot be opened. Nothing is left of the others.
        CancelledError: from entering: `stop` was set.
    """

    def __init__(
        self,
        encoder: LiveEncoder,
        plans: Sequence[OutputPlan],
        *,
        stop: threading.Event,
        on_event: Callable[[OutputEvent], None] | None = None,
    ) -> None:
        self._encoder, self._plans, self._stop, self._on_event = encoder, tuple(plans), stop, on_event
        for target, count in Counter(plan.target for plan in plans).items():
            if count > 1:
                raise OptionError(f"-o {masked(target)}: is given {count} times; give it once")
        self._lock = threading.Lock()
        self._order = _Order()
        self._outputs: list[Output] = []
        self._sinks: list[Sink] = []
        self._is_closed = False

    def __enter__(self) -> Self:
        for plan in self._plans:
            if plan.container is not None:
                try:
                    check_container(plan.container, self._encoder)
                except OutputError as error:
                    raise OutputError(f"{plan.name}: {error}") from None
        self._outputs = [self._made(plan, name) for plan, name in zip(self._plans, self._names(), strict=True)]
        try:
            for output in self._outputs:
                output.start()
            self._wait_open()
        except BaseException:
            self._abort()
            raise
        with self._lock:
            self._sinks += self._outputs
        self._encoder.ask_for_key()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def figures(self) -> tuple[OutputFigures, ...]:
        """Of each output, in the order of the plans."""
        return tuple(output.figures for output in self._outputs)

    @property
    def failed(self) -> list[str]:
        """What went wrong with outputs that did not end properly, in one line each; once it is closed."""
        return [
            f"{output.name}: {output.figures.error if output.join(0) else 'was not finished in time'}"
            for output in self._outputs
            if not output.is_finished
        ]

    @property
    def ended(self) -> str | None:
        """Why no output is left, in one line; None while there is one, or where there never was any."""
        if not self._outputs or not all(output.is_over for output in self._outputs):
            return None
        with self._lock:
            if len(self._sinks) > len(self._outputs):
                return None
        return "; ".join(f"{output.name}: {output.figures.error or 'has ended'}" for output in self._outputs)

    def add(self, sink: Sink) -> None:
        """Adds a taker of packets that is nobody's output, as the page is."""
        with self._lock:
            self._sinks.append(sink)
        self._encoder.ask_for_key()

    def send(self, packets: Sequence[LivePacket]) -> None:
        """Hands packets on. Never waits."""
        with self._lock:
            for packet in packets:
                self._hand_on(self._order.put(packet))

    def show(self, planes: Sequence[Tensor]) -> None:
        """Hands a picture to the outputs that take pictures. Never waits.

        Args:
            planes: as `LiveEncoder.encode` takes them; nobody may write into them any more.
        """
        for output in self._outputs:
            if isinstance(output, VirtualCamera):
                output.show(planes)

    def close(self) -> None:
        """Ends all outputs, within about two seconds; what cannot be ended by then is let go."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._hand_on(self._order.rest())
            sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()
        give_up = time.monotonic() + _CLOSE_SECONDS
        for output in self._outputs:
            output.join(max(0.0, give_up - time.monotonic()))
        self._abort()

    def _hand_on(self, packets: Sequence[LivePacket]) -> None:
        for packet in packets:
            for sink in self._sinks:
                sink.send(packet)

    def _abort(self) -> None:
        for output in self._outputs:
            output.abort()
        give_up = time.monotonic() + 0.4
        for output in self._outputs:
            output.join(max(0.0, give_up - time.monotonic()))

    def _wait_open(self) -> None:
        give_up = time.monotonic() + _OPEN_SECONDS
        waiting = list(self._outputs)
        while waiting:
            if self._stop.is_set():
                raise CancelledError("before the outputs were open")
            for output in [output for output in waiting if output.wait_open(0.02)]:
                if output.failure is not None:
                    raise output.failure
                waiting.remove(output)
            if waiting and time.monotonic() > give_up:
                raise OutputError(f"{waiting[0].name}: cannot be opened within {_OPEN_SECONDS:g} s")

    def _names(self) -> list[str]:
        """Each its own, also where the difference is masked."""
        seen: Counter[str] = Counter()
        names = []
        for plan in self._plans:
            seen[plan.name] += 1
            names.append(plan.name if seen[plan.name] == 1 else f"{plan.name} ({seen[plan.name]})")
        return names

    def _made(self, plan: OutputPlan, name: str) -> Output:
        encoder, ask, tell = self._encoder, self._encoder.ask_for_key, self._on_event
        if plan.kind == "network":
            return NetworkOutput(name, plan.target, encoder, ask_for_key=ask, on_event=tell)
        if plan.kind == "vcam":
            return VirtualCamera(name, plan.target, encoder.info, ask_for_key=ask, on_event=tell)
        if plan.kind == "hls":
            return HlsOutput(
                name, Path(plan.target), encoder, may_replace=plan.may_replace, ask_for_key=ask, on_event=tell
            )
        if plan.kind == "stdout":
            return StdoutOutput(name, plan.container or "nut", encoder, ask_for_key=ask, on_event=tell)
        return RecordingOutput(
            name,
            Path(plan.target),
            plan.container or "mp4",
            encoder,
            segment_seconds=plan.segment_seconds,
            keep_seconds=plan.keep_seconds,
            may_replace=plan.may_replace,
            ask_for_key=ask,
            on_event=tell,
        )
