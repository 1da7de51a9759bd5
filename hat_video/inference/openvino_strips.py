"""Large frames through OpenVINO in strips of rows: the same bits in a fraction of the memory.

One block of the network after the other, and each of them strip by strip. Between two blocks there is the trunk of the
whole frame; within one there is what a single strip needs: its rows, and the few around them that this block looks at.
So a halo does not grow from block to block, as it does around a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from hat_video.inference.memory import give_back_freed_memory
from hat_video.inference.openvino_folds import Strip
from hat_video.inference.openvino_quiet import import_openvino
from hat_video.model.hat import HATConfig

__all__ = ["StripwiseHAT", "shared", "strips_of"]

# Frames with fewer tokens are computed at once.
_LEAST_TOKENS = 1 << 19
# Of a strip; with fewer rows its halo weighs more, with more its tensors do (measured).
_ROWS = 64


def strips_of(config: HATConfig, height: int, width: int) -> list[Strip]:
    """How a frame is cut, from top to bottom; a single strip where it is small, or where the bits would be others.

    Pixels must not depend on all others. Without a convolution at the end of a group its sum goes into the last block,
    and is not rounded before.

    The first and the last strip are the smaller ones: each kind of strip has models of its own, and their memory.
    """
    rows, columns = height // config.unshuffle, width // config.unshuffle
    box = config.attention_pool
    is_apart = bool(box) and not config.ape_size and config.resi_connection == "1conv"
    if not is_apart or rows <= box or rows * columns < _LEAST_TOKENS:
        return [Strip(rows)]
    last, step = rows % box or box, -(-_ROWS // box) * box
    first = (rows - last - box) % step + box
    edges = [0, *range(first, rows, step), rows]
    return [Strip(bottom - top, top > 0, bottom < rows) for top, bottom in pairwise(edges)]


class StripwiseHAT:
    """A network for frames of one size, one frame at a time.

    Args:
        config: of the network.
        strips: of a frame.
        width: of a frame.
        dtype: of the trunk.
        compiled: makes a strip's model of one stage. It is asked when the first frame gets there: a model that has not
            run yet takes some memory for its tensors.
    """

    def __init__(
        self,
        config: HATConfig,
        strips: list[Strip],
        width: int,
        dtype: torch.dtype,
        compiled: Callable[[Strip, int], Any],
    ) -> None:
        self._config, self._width, self._dtype, self._compiled = config, width // config.unshuffle, dtype, compiled
        self._strips = strips
        self._tops = list(accumulate((strip.rows for strip in strips), initial=0))
        self._models: dict[tuple[Strip, int], Any] = {}

    def run(self, frame: Tensor, large: Tensor) -> None:
        """From (1, 3, H, W) fp32 to (1, 3, sH, sW) fp32."""
        # By so much the trunk moves in its memory with each stage, down and up in turns: what the next strip is made
        # from stays as it is.
        room = max(strip.rows for strip in self._strips) + self._config.window_size
        shape = (self._tops[-1] + room, self._width, self._config.embed_dim)
        memory, spare = torch.empty(shape, dtype=self._dtype), torch.empty(shape, dtype=self._dtype)
        x = before = memory[:-room]
        self._compute(0, {"frame": frame}, x)
        # A stage for each block of a group, and one that closes it.
        *starts, last = accumulate((depth + 2 for depth in self._config.depths), initial=1)
        for stage in range(1, last):
            if stage in starts:
                # What closes the group adds it.
                before, memory, spare = x, spare, memory
            goes_down = x.storage_offset() == 0
            moved = memory[room:] if goes_down else memory[:-room]
            self._compute(stage, {"x": x, "before": before}, moved, from_below=goes_down)
            x = moved
        self._compute(last, {"frame": frame, "x": x}, large)

    def release(self) -> None:
        """Between frames it keeps nothing but its models."""

    def _compute(self, stage: int, inputs: dict[str, Tensor], out: Tensor, *, from_below: bool = False) -> None:
        """One stage for all strips, to a trunk, or to the large picture."""
        numbers = sorted(range(len(self._strips)), reverse=from_below)
        for strip, alike in groupby(numbers, key=lambda number: self._strips[number]):
            if (strip, stage) not in self._models:
                self._models[strip, stage] = self._compiled(strip, stage)
            model = self._models[strip, stage]
            request = model.create_infer_request()
            for number in alike:
                parts = [self._part(inputs[port.any_name], port, number).contiguous() for port in model.inputs]
                part = self._part(out, model.outputs[0], number)
                made = part if part.is_contiguous() else torch.empty(part.shape)
                for port, tensor in zip((*model.inputs, *model.outputs), (*parts, made), strict=True):
                    request.set_tensor(port, shared(tensor, port))
                request.infer()
                if made is not part:
                    part.copy_(made)
            del request
            model.release_memory()
            # Other sizes come next: they would get pages beside these.
            give_back_freed_memory()

    def _part(self, whole: Tensor, port: Any, number: int) -> Tensor:
        """The rows of a trunk, (H, W, C), or of a picture, (1, 3, H', W'), that a model takes or makes for a strip."""
        total, axis = self._tops[-1], 0 if whole.ndim == 3 else 2
        rows = math.prod(port.shape) * total // whole.numel()
        scale = whole.shape[axis] // total
        first = self._tops[number] - self._strips[number].above(rows)
        return whole.narrow(axis, first * scale, rows * scale)


def shared(tensor: Tensor, port: Any) -> Any:
    """A tensor's own memory for OpenVINO, in a port's shape and type."""
    # numpy has no bfloat16.
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return import_openvino().Tensor(array, port.shape, port.element_type)
