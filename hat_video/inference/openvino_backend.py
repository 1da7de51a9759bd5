"""A network computed by OpenVINO: on CPUs, one thread a frame, and as many frames at once as asked for.

Needs the extra `openvino`; importing this file does not. A model is compiled for each size of frame, and kept in a
folder for the next process: see `OpenVINOCache`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from hat_video.errors import ModelError, OptionError
from hat_video.inference.openvino_folds import Strip
from hat_video.inference.openvino_quiet import import_openvino
from hat_video.inference.openvino_strips import StripwiseHAT, shared, strips_of
from hat_video.inference.processors import cpu_count
from hat_video.model.cnn import CNN
from hat_video.model.hat import HAT

if TYPE_CHECKING:
    from hat_video.inference.openvino_graph import Precision

__all__ = ["OpenVINOCache", "OpenVINONetwork", "cache_folder", "openvino_version"]

# Whole frames, or the tiles at a frame's edges. Each holds the memory of its activations.
_MOST_SHAPES = 8
# Shapes that are not in use keep the memory of this many pixels: a change from tile to tile needs it again at once.
_KEPT_PIXELS = 1 << 18
_HINTS = {"fp32": "f32", "bf16": "bf16"}


def openvino_version() -> str | None:
    """Of the OpenVINO that is installed; None without one. Does not import it."""
    try:
        return version("openvino")
    except PackageNotFoundError:
        return None


def cache_folder() -> Path:
    """Where things are kept that can be made again: $HAT_VIDEO_CACHE, or `hat-video` in the user's cache folder."""
    own = os.environ.get("HAT_VIDEO_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    # The standard has relative paths ignored.
    base = Path(shared) if shared and Path(shared).is_absolute() else Path("~/.cache").expanduser()
    return base / "hat-video"


class OpenVINONetwork:
    """A network ready to run, called as `FastHAT` is.

    Calls from several threads at once are allowed. Each frame is computed on exactly one thread, which the system may
    move between cores, so that processes do not meet on the same one. The result is the same to the bit whatever runs
    beside it.

    Args:
        network: in fp32 on the CPU; is not changed, and must not be from now on.
        precision: of the arithmetic. bf16 is bf16 only where the processor has it; elsewhere OpenVINO takes fp32.
        in_flight: frames at a time; further calls wait. As many as this process may use processors, if 0.
        folder: of the compiled models; `cache_folder() / "openvino"` if None.

    Raises:
        OptionError: OpenVINO is not installed, or does not have that precision.
    """

    def __init__(
        self, network: HAT | CNN, precision: Literal["fp32", "bf16"], *, in_flight: int = 0, folder: Path | None = None
    ) -> None:
        if precision not in _HINTS:
            raise OptionError(f"--precision {precision}: OpenVINO has fp32 and bf16 on a CPU")
        if openvino_version() is None:
            raise OptionError("OpenVINO is not installed; pip install 'hat-video[openvino]'")
        import_openvino()  # before the files that cannot do without
        self.config = network.config
        self.precision: Precision = precision
        self.in_flight = in_flight or cpu_count()
        self._network = network
        self._cache = OpenVINOCache(folder or cache_folder() / "openvino")
        self._identity = _identity(network, precision)
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._shapes: OrderedDict[tuple[int, int], _Requests] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        """Enlarges frames, one after the other.

        Args:
            x: RGB (B, 3, H, W), fp32 on the CPU, in [0, 1]; H and W are multiples of `config.multiple`.

        Returns:
            (B, 3, sH, sW), fp32, not clamped.

        Raises:
            ValueError: `x` is no such tensor.
            ModelError: OpenVINO cannot compute this network at this size; torch can.
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_chans or x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} on {x.device};"
                f" must be (B, {self.config.in_chans}, H, W) float32 on the CPU"
            )
        frames, channels, height, width = x.shape
        scale = self.config.upscale
        out = torch.empty(frames, channels, scale * height, scale * width)
        requests = self._requests(height, width)
        x = x.detach().contiguous()
        with self._in_use(requests):
            for number in range(frames):
                requests.run(x[number : number + 1], out[number : number + 1])
        return out

    def prepare(self, height: int, width: int) -> None:
        """Compiles the network for frames of one size, or loads what was compiled before; not yet for large frames.

        Raises:
            ModelError: OpenVINO cannot compute this network at this size.
        """
        self._requests(height, width)

    @contextmanager
    def _in_use(self, wanted: _Requests) -> Iterator[None]:
        """Keeps the memory of a shape while it is used, and of others no more than is worth it."""
        with self._lock:
            wanted.users += 1
            others = [one for one in self._shapes.values() if one is not wanted and one.has_memory]
            kept = sum(one.pixels for one in others)
            for one in others:
                if kept > _KEPT_PIXELS and not one.users:
                    one.release()
                    kept -= one.pixels
            wanted.has_memory = True
        try:
            yield
        finally:
            with self._lock:
                wanted.users -= 1

    def _requests(self, height: int, width: int) -> _Requests:
        size = (height, width)
        with self._lock:
            if size in self._shapes:
                self._shapes.move_to_end(size)
                return self._shapes[size]
        # Those who have what they need are not held up meanwhile.
        with self._building:
            if size not in self._shapes:
                requests = self._made_for(height, width)
                with self._lock:
                    self._shapes[size] = requests
                    while len(self._shapes) > _MOST_SHAPES:
                        self._shapes.popitem(last=False)
            return self._shapes[size]

    def _made_for(self, height: int, width: int) -> _Requests:
        from hat_video.inference.openvino_cnn import build_cnn_graph
        from hat_video.inference.openvino_graph import build_graph

        graph: Callable[[], Any]
        if isinstance(self._network, HAT):
            strips = strips_of(self._network.config, height, width)
            if len(strips) > 1:
                return self._stripwise(self._network, strips, width)
            graph = partial(build_graph, self._network, height, width, self.precision)
        else:
            graph = partial(build_cnn_graph, self._network, height, width)
        whole = self._compiled({"height": height, "width": width}, graph, self.in_flight)
        return _Requests(lambda: _Whole(whole), self.in_flight, height * width)

    def _stripwise(self, network: HAT, strips: list[Strip], width: int) -> _Requests:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        stage = partial(self._stage, network, width)
        return _Requests(lambda: StripwiseHAT(network.config, strips, width, dtype, stage), self.in_flight, 0)

    def _stage(self, network: HAT, width: int, strip: Strip, stage: int) -> Any:
        from hat_video.inference.openvino_graph import build_stage

        facts = {"width": width, "strip": asdict(strip), "stage": stage}
        # Two frames that get there at once do not compile it twice.
        with self._building:
            return self._compiled(facts, partial(build_stage, network, strip, stage, width, self.precision), 1)

    def _compiled(self, facts: dict[str, Any], graph: Callable[[], Any], streams: int) -> Any:
        """Compiles a graph, which the facts tell from others of this network, or loads what was compiled before."""
        settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            # Without any, what is fused would depend on the number of processors.
            "NUM_STREAMS": streams,
            # In all: one for each stream.
            "INFERENCE_NUM_THREADS": streams,
            # Pinned, the first streams of all processes share the first core.
            "ENABLE_CPU_PINNING": False,
        }
        key = json.dumps({**self._identity, **facts}, sort_keys=True).encode()
        kept = self._cache.read(key)
        if kept is not None:
            with suppress(RuntimeError):
                return _core().import_model(io.BytesIO(kept), "CPU", settings)
        model = graph()
        try:
            compiled = _core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"OpenVINO: cannot compile this network for {facts}: {reason}") from error
        with suppress(RuntimeError):
            blob = io.BytesIO()
            compiled.export_model(blob)
            self._cache.write(key, blob.getvalue())
        return compiled


class _Runner(Protocol):
    """Computes one frame at a time."""

    def run(self, frame: Tensor, large: Tensor, /) -> None:
        """Reads and writes the tensors' own memory."""

    def release(self) -> None:
        """Gives up what lies between the layers, until the next run."""


class _Whole:
    """A compiled model of the whole network, and a request of it."""

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._request = compiled, compiled.create_infer_request()

    def run(self, frame: Tensor, large: Tensor) -> None:
        for port, tensor in zip((*self._compiled.inputs, *self._compiled.outputs), (frame, large), strict=True):
            self._request.set_tensor(port, shared(tensor, port))
        self._request.infer()

    def release(self) -> None:
        """That of all its requests, of which none may be running."""
        self._compiled.release_memory()


class _Requests:
    """What computes frames of one size, as many of it as may run at once."""

    def __init__(self, make: Callable[[], _Runner], limit: int, pixels: int) -> None:
        self.pixels, self.users, self.has_memory = pixels, 0, False
        self._make = make
        self._free = threading.BoundedSemaphore(limit)
        self._idle: list[_Runner] = []

    def run(self, frame: Tensor, large: Tensor) -> None:
        """Reads and writes the tensors' own memory."""
        with self._free:
            # One that has failed is not used again.
            runner = self._idle.pop() if self._idle else self._make()
            runner.run(frame, large)
            self._idle.append(runner)

    def release(self) -> None:
        """Gives up what lies between the layers, until the next run. Nobody may be running."""
        for runner in self._idle:
            runner.release()
        self.has_memory = False


@cache
def _core() -> Any:
    return import_openvino().Core()


class OpenVINOCache:
    """Compiled models in a folder, of any number of processes.

    An entry is complete or not there, and is believed only if it is what was written for the very same key. What cannot
    be read is made again; what cannot be written is no error. The entries that were used last are kept.

    Args:
        folder: need not exist.
        limit: of the bytes of all entries together.
    """

    _MAGIC = b"hat-video compiled model 1\n"
    _STALE_SECONDS = 3600

    def __init__(self, folder: Path, limit: int = 1 << 30) -> None:
        self.folder, self.limit = folder, limit

    def read(self, key: bytes) -> bytes | None:
        """What was written for a key, if anything."""
        path = self._path(key)
        try:
            entry = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        head = self._MAGIC + hashlib.sha256(key).digest()
        digest = entry[len(head) : len(head) + 32]
        blob = entry[len(head) + 32 :]
        is_sound = entry.startswith(head) and digest == hashlib.sha256(blob).digest()
        return blob if is_sound else None

    def write(self, key: bytes, blob: bytes) -> None:
        """Keeps something for a key."""
        entry = b"".join([self._MAGIC, hashlib.sha256(key).digest(), hashlib.sha256(blob).digest(), blob])
        if len(entry) > self.limit:
            return
        with suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(suffix=".part", dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(entry)
                Path(name).replace(self._path(key))
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
            self._prune()

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{hashlib.sha256(key).hexdigest()}.blob"

    def _prune(self) -> None:
        for path in self.folder.glob("*.part"):
            # Of a process that was killed while it wrote.
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > self._STALE_SECONDS:
                    path.unlink()
        entries = []
        for path in self.folder.glob("*.blob"):
            # Another process may be pruning too.
            with suppress(OSError):
                facts = path.stat()
                entries.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries, key=lambda entry: entry[0]):
            if total <= self.limit:
                break
            with suppress(OSError):
                path.unlink()
            total -= size


def _identity(network: HAT | CNN, precision: str) -> dict[str, object]:
    """All that a compiled model depends on, but for the size of its frames."""
    from hat_video.inference.openvino_graph import GRAPH_VERSION

    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "config": asdict(network.config),
        "weights": digest.hexdigest(),
        "precision": precision,
        "graph": GRAPH_VERSION,
        "openvino": openvino_version(),
        "processor": _processor(),
    }


def _processor() -> str:
    """Machine, kind of processor and its instructions, as far as the system tells."""
    facts = [platform.machine(), platform.processor()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        names = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part")
        facts += [line for line in lines if line.partition(":")[0].strip() in names]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
