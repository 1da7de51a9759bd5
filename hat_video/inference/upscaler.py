"""The upscaler: RGB in, larger RGB out, whatever the size of the frame and whatever the device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hat_video.errors import OptionError, OutOfMemoryError, WorkError
from hat_video.inference.backends import Backend, Network, as_compiler_error, build, choose_backend
from hat_video.inference.memory import keep_freed_memory
from hat_video.inference.precision import DTYPES, SAFER, calibration_frame, choose, trunk_exponent
from hat_video.inference.regions import Reach, Rectangle, reach_of, tiled_exactly
from hat_video.inference.tiling import pad_to_multiple, tiled
from hat_video.model.resample import enlarge
from hat_video.model.zoo import Model

__all__ = ["Upscaler", "choose_device", "choose_devices"]


class Upscaler:
    """A model made ready for a device.

    Calls from several threads at once are allowed; each computes on its own thread. On a CPU the process keeps freed
    memory from then on: see `hat_video.inference.memory`.

    Args:
        model: from `load_model`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; auto is the GPU where torch has one.
        precision: `auto`, `fp32`, `bf16` or `fp16`. auto on a CPU is bf16 where the processor has it; on a GPU it is
            fp16, made safe by an exact scale of the residual trunk, where that agrees with fp32 on a calibration frame.
        tile: side of a tile in source pixels, 16 or more; whole frames if None. Where the model's channel attention
            pools over boxes, tiles give what whole frames do, to the bit; else see `hat_video.inference.tiling`.
        backend: who computes the network: `torch`, `torch-compiled`, `openvino`, or `auto`, which on a CPU is OpenVINO
            where it is installed; see `hat_video.inference.backends`.
        in_flight: frames that will be computed at once, for OpenVINO; as many as there are CPUs if 0.
        trunk_exponent: as another upscaler of the same model has found it, for fp16; found here if None.

    Raises:
        OptionError: a value that is not allowed, or a device that is not there.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str = "auto",
        precision: str = "auto",
        tile: int | None = None,
        backend: Backend | Literal["auto"] = "auto",
        in_flight: int = 0,
        trunk_exponent: int | None = None,
    ) -> None:
        if precision not in ("auto", *DTYPES):
            raise OptionError(f"--precision {precision}: must be auto, fp32, bf16 or fp16")
        if tile is not None and tile < 16:
            raise OptionError(f"--tile {tile}: must be 16 or more")
        self.model = model
        self.scale = model.scale
        self.device = choose_device(device)
        self.tile = tile
        self.backend: Backend = "torch"
        self.notes: list[str] = []
        """Why it is not the backend that one would expect."""
        self._in_flight = in_flight
        self.trunk_exponent = 0
        self.redone = 0
        """Batches that came out non-finite and were computed again one precision safer."""
        self._lock = threading.Lock()
        self._networks: dict[tuple[str, int], Network] = {}
        self.precision = "fp32"
        if model.network is not None:
            if self.device.type == "cpu":
                keep_freed_memory()
            self._settle(precision, trunk_exponent)
            self.backend, note = choose_backend(model.network, backend, self.precision, self.device)
            self.notes += [note] if note else []
            self._networks = {}
            self._network(self.precision, self.trunk_exponent)

    def _settle(self, precision: str, exponent: int | None) -> None:
        network = self.model.network
        if network is None:
            return
        frame = calibration_frame(network.config.multiple)
        if exponent is not None and precision != "auto":
            self.precision, self.trunk_exponent = precision, exponent
        elif precision == "auto":
            self.precision, self.trunk_exponent = choose(network, self.device, frame, self._network)
        else:
            self.precision = precision
            self.trunk_exponent = trunk_exponent(network, frame) if precision == "fp16" else 0

    def calibrate(self, rgb: Tensor) -> None:
        """Chooses the trunk's scale anew, from a frame of the material; fp16 only.

        Args:
            rgb: (N, 3, H, W) in [0, 1].
        """
        if self.precision == "fp16" and self.model.network is not None:
            padded = pad_to_multiple(rgb.float().cpu(), self.model.network.config.multiple)
            self.trunk_exponent = max(self.trunk_exponent, trunk_exponent(self.model.network, padded))

    def __call__(self, rgb: Tensor) -> Tensor:
        """Enlarges a batch.

        Args:
            rgb: (N, 3, H, W) R'G'B', any floating dtype, in [0, 1], of any size.

        Returns:
            (N, 3, scale * H, scale * W) float32, clamped to [0, 1], on this upscaler's device.

        Raises:
            ValueError: `rgb` is no such tensor.
            OutOfMemoryError: a single frame does not fit.
            WorkError: the network gives non-finite values even in fp32.
        """
        return self._enlarged(rgb, self._guarded)

    def unchecked(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """The same without waiting for the device.

        Returns:
            What `__call__` returns, and a bool () on the device: False where it must be computed again by `__call__`,
            which then goes one precision safer.
        """
        with torch.inference_mode():
            out = self._enlarged(rgb, self._raw)
            is_finite = _is_finite(out)
            return out.clamp_(0, 1), is_finite

    @property
    def reach(self) -> Reach | None:
        """What a part of the output depends on; None where that is the whole picture, or there is no network."""
        return None if self.model.config is None else reach_of(self.model.config)

    def unchecked_part(self, region: Tensor, part: Rectangle) -> tuple[Tensor, Tensor]:
        """A part of the output, to the bit what it is when the whole picture is computed.

        Args:
            region: (N, 3, h, w), what `reach.region` says of the padded picture.
            part: the part, counted from the region's corner.

        Returns:
            As `unchecked`: (N, 3, scale * part.height, scale * part.width), and whether it is finite.
        """
        with torch.inference_mode():
            network = self._network(self.precision, self.trunk_exponent)
            region = region.to(self.device, torch.float32)
            out = part.cut(self._fitting(region, network), self.scale).contiguous()
            return out.clamp_(0, 1), _is_finite(out)

    def fits(self, rgb: Tensor) -> bool:
        """Whether a batch goes through in one piece, with the memory that there is; it is computed for that."""
        try:
            self._enlarged(rgb, self._raw, is_trial=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _free(self.device)
            return False
        return True

    def _enlarged(self, rgb: Tensor, run: Callable[[Tensor], Tensor], *, is_trial: bool = False) -> Tensor:
        if rgb.ndim != 4 or rgb.shape[1] != 3 or not rgb.is_floating_point() or 0 in rgb.shape:
            raise ValueError(f"rgb is {tuple(rgb.shape)} {rgb.dtype}; must be (N, 3, H, W) of a floating dtype")
        with torch.inference_mode():
            rgb = rgb.to(self.device, torch.float32)
            if self.model.kernel is not None:
                return enlarge(rgb, self.scale, self.model.kernel).clamp_(0, 1)
            return run(rgb) if is_trial else self._fitting(rgb, run)

    def _fitting(self, rgb: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """In one go, or in halves where memory runs out."""
        try:
            return run(rgb)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise as_compiler_error(error) or error from error.__cause__
        _free(self.device)
        half = rgb.shape[0] // 2
        if half:
            return torch.cat([self._fitting(rgb[:half], run), self._fitting(rgb[half:], run)])
        try:
            return run(rgb)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        size = f"{rgb.shape[3]}x{rgb.shape[2]}"
        what = f"a tile of {self.tile}" if self.tile else "the whole frame"
        raise OutOfMemoryError(
            f"{self.model.name} x{self.scale}: {what} of {size} does not fit in the memory of {self.device};"
            f" use --tile {max(64, (self.tile or min(rgb.shape[2:])) // 2)}"
        )

    def _raw(self, rgb: Tensor) -> Tensor:
        return self._run(self._network(self.precision, self.trunk_exponent), rgb)

    def _guarded(self, rgb: Tensor) -> Tensor:
        """Never lets a NaN or an infinity out: such a batch is computed again, one precision safer."""
        precision, exponent = self.precision, self.trunk_exponent
        while True:
            out = self._run(self._network(precision, exponent), rgb)
            if bool(_is_finite(out)):
                return out.clamp_(0, 1)
            if precision not in SAFER:
                raise WorkError(
                    f"{self.model.name}: gives NaN or infinite pixels even in fp32; its weights are unusable"
                )
            precision, exponent = SAFER[precision], 0
            with self._lock:
                self.redone += 1

    def _run(self, network: Network, rgb: Tensor) -> Tensor:
        multiple = network.config.multiple

        def whole(piece: Tensor) -> Tensor:
            height, width = piece.shape[2] * self.scale, piece.shape[3] * self.scale
            large = network(pad_to_multiple(piece, multiple))
            return large[:, :, :height, :width]

        height, width = rgb.shape[2:]
        if self.tile is None or max(height, width) <= self.tile:
            return whole(rgb)
        reach = self.reach
        if reach is None:
            return tiled(whole, rgb, self.scale, self.tile)
        large = tiled_exactly(network, pad_to_multiple(rgb, multiple), self.tile, reach, self.scale)
        return large[:, :, : height * self.scale, : width * self.scale]

    def _network(self, precision: str, exponent: int) -> Network:
        with self._lock:
            key = (precision, exponent)
            if key not in self._networks and self.model.network is not None:
                self._networks[key] = build(
                    self.model.network,
                    self.backend,
                    precision=precision,
                    device=self.device,
                    trunk_exponent=exponent,
                    in_flight=self._in_flight,
                )
            return self._networks[key]


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU that torch can use, else the CPU.

    Raises:
        OptionError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return device


def choose_devices(names: str) -> list[torch.device]:
    """One device, or several with commas, each of which gets a process; `all` is every GPU, or the CPU without one.

    Raises:
        OptionError: no such device.
    """
    if names == "all":
        return [torch.device("cuda", n) for n in range(torch.cuda.device_count())] or [torch.device("cpu")]
    return [choose_device(name.strip()) for name in names.split(",")]


def _is_finite(out: Tensor) -> Tensor:
    """A bool (): one NaN or infinity makes the sum one, and pixels near [0, 1] never sum up to infinity."""
    return torch.isfinite(out.sum())


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "not enough memory" in text
        or "bad_alloc" in text
    )


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
