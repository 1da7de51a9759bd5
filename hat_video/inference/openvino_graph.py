"""HAT as an OpenVINO model for one size of frame, or as several, of which each computes a strip of one; written for how
OpenVINO's CPU plugin runs it.

The weights are `FastHAT`'s, so what `optimize` folds is folded here too. What this adds, exactly:

- Cutting a map into windows, shifted or not, is one `Gather` of runs of pixels that lie side by side in both; so is
  putting it together. Windows are sorted by how the shift splits them: each kind is one piece with a bias of its own,
  and no mask is added.
- A single head needs no keys and no projection: both move into the weights of the queries and the values.
- Gain and offset of a LayerNorm move into the linear layers behind it. Before a convolution they stay, since its border
  is padded with zeros, not with offsets.
- `conv_last` moves before the last pixel shuffle and becomes one 5x5 convolution with the layer there, but for the
  outermost places, which see the zeros between the two.
- The way around the body is `conv_first` once more, in the same sums as `conv_after_body`.
- Attention and MLP run band by band, so that what they hand on stays in a core's cache.

In bf16 a tint is kept out, which would cost more than all noise: the frame and `conv_first` go in as a rounded part and
a rest; the taps of the tail's kernels are rounded such that their sums stay; what rounding a bias of the tail leaves
out is handed on to the next layer, and by the last one to a sum in fp32.

The plugin runs this without copies: a split or concatenation along the first axis that is not 1 is a view, and so is a
transposition between a convolution and tokens; product, bias, softmax and product are one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import openvino
import openvino.opset13 as ops
import torch
from torch import nn

from hat_video.errors import ModelError
from hat_video.inference.openvino_blocks import Blocks
from hat_video.inference.openvino_folds import Layer, Strip, array_of, rounded_to_bf16, weights_of
from hat_video.inference.openvino_ops import constant, join, to_tokens
from hat_video.inference.openvino_tail import Tail
from hat_video.inference.optimize import _Norm, optimize
from hat_video.model.hat import HAT

__all__ = ["GRAPH_VERSION", "Precision", "build_graph", "build_stage"]

Precision = Literal["fp32", "bf16"]

GRAPH_VERSION = 3
"""Counts up whenever the graph of the same network changes."""


def build_graph(network: HAT, height: int, width: int, precision: Precision) -> openvino.Model:
    """The network for frames of one size.

    Args:
        network: in fp32 or fp64; is not changed.
        height: of the frame, a multiple of `network.config.multiple`.
        width: likewise.
        precision: in which the plugin will be told to compute. The graph itself is fp32 in any case.

    Returns:
        A model of one input, RGB (1, 3, height, width) fp32 in [0, 1], and one output, RGB (1, 3, s height, s width)
        fp32, not clamped.

    Raises:
        ModelError: the network cannot be written that way, or not at this size; the message says why.
    """
    with _model_errors():
        strip = Strip(height // network.config.unshuffle)
        return _Graph(network, strip, (height, width), precision).whole()


def build_stage(network: HAT, strip: Strip, stage: int, width: int, precision: Precision) -> openvino.Model:
    """A part of the network for a strip of a frame: see `openvino_strips`.

    Args:
        network: one that `strips_of` cuts frames for.
        strip: of a multiple of windows and boxes, but for the last one of a frame.
        stage: 0 is `conv_first`; then come the blocks of each group, and what closes it; then the tail.
        width: of the frame.
        precision: also of the trunk between two stages.

    Returns:
        A model of one or two inputs: `frame`, RGB as above; `x`, the trunk behind the stage before; `before`, the trunk
        before the group. Each has the rows of the strip and as many around it as are looked at. The output is the
        trunk, (1, tokens, C), or the large picture, for the strip alone.

    Raises:
        ModelError: the network cannot be written that way.
    """
    with _model_errors():
        height = strip.rows * network.config.unshuffle
        return _Graph(network, strip, (height, width), precision).stages()[stage]()


@contextmanager
def _model_errors() -> Iterator[None]:
    try:
        yield
    except (AttributeError, RuntimeError, TypeError) as error:
        # A network that was taken apart, as for an ablation; or an operation that this OpenVINO does not have.
        raise ModelError(f"OpenVINO: this network cannot be written as a graph: {error}") from error


class _Graph:
    """Builds models of a frame, or of a strip of one. Tokens, pictures and the trunk are as in `Blocks`."""

    def __init__(self, network: HAT, strip: Strip, frame: tuple[int, int], precision: Precision) -> None:
        multiple = network.config.multiple
        height, width = frame
        if min(frame) <= 0 or height % multiple or width % multiple:
            raise ModelError(f"OpenVINO: {width}x{height}: both sides must be multiples of {multiple}")
        self.fast = optimize(network, dtype=torch.float64, device=torch.device("cpu"))
        self.config, self.is_half, self.strip = network.config, precision == "bf16", strip
        self.width = width // self.config.unshuffle
        self.blocks = Blocks(self.config, strip, self.width, self.is_half)
        self.tail = Tail(self.fast, strip, self.is_half)

    def whole(self) -> openvino.Model:
        """All of it."""
        frame = self._frame(0)
        pixels = self._pixels(frame)
        bands = self._shallow(pixels)
        for group in self.fast.groups():
            before = bands
            for block in group.blocks:
                bands = self.blocks.block(bands, block)
            bands = self._closed(bands, before, group.conv)
        return openvino.Model([ops.result(self._enlarged(bands, pixels))], [frame], "hat")

    def stages(self) -> list[Callable[[], openvino.Model]]:
        """What builds each of them."""
        stages: list[Callable[[], openvino.Model]] = [self._head_stage]
        for group in self.fast.groups():
            stages += [partial(self._block_stage, block) for block in group.blocks]
            stages.append(partial(self._closing_stage, group.conv))
        return [*stages, self._tail_stage]

    def _head_stage(self) -> openvino.Model:
        frame = self._frame(1)
        return self._stage(self._shallow(self._pixels(frame)), frame)

    def _block_stage(self, block: nn.Module) -> openvino.Model:
        x, bands = self._trunk("x", self.blocks.halo(block))
        return self._stage(self.blocks.block(bands, block), x)

    def _closing_stage(self, conv: nn.Module) -> openvino.Model:
        (x, bands), (before, residual) = self._trunk("x", 1), self._trunk("before", 0)
        return self._stage(self._closed(bands, residual, conv), x, before)

    def _tail_stage(self) -> openvino.Model:
        halo = self.tail.halo + 1
        frame, (x, bands) = self._frame(halo), self._trunk("x", halo)
        return openvino.Model([ops.result(self._enlarged(bands, self._pixels(frame)))], [frame, x], "hat")

    def _frame(self, halo: int) -> Any:
        rows, columns = (side * self.config.unshuffle for side in (self.strip.with_halo(halo), self.width))
        return ops.parameter([1, self.config.in_chans, rows, columns], openvino.Type.f32, name="frame")

    def _trunk(self, name: str, halo: int) -> tuple[Any, list[Any]]:
        """An input, and its bands."""
        tokens = self.strip.with_halo(halo) * self.width
        x = ops.parameter([1, tokens, self.config.embed_dim], self._trunk_type, name=name)
        return x, self.blocks.split(ops.convert(x, openvino.Type.f32))

    def _stage(self, bands: list[Any], *inputs: Any) -> openvino.Model:
        return openvino.Model([ops.result(ops.convert(join(bands), self._trunk_type))], list(inputs), "hat")

    @property
    def _trunk_type(self) -> Any:
        return openvino.Type.bf16 if self.is_half else openvino.Type.f32

    def _pixels(self, frame: Any) -> Any:
        """What `conv_first` is applied to."""
        x = ops.subtract(frame, constant(array_of(self.fast.mean)))
        if self.config.unshuffle > 1:
            x = ops.space_to_depth(x, "depth_first", self.config.unshuffle)
        if self.is_half:
            coarse = ops.multiply(ops.round(ops.multiply(x, constant(128)), "half_to_even"), constant(1 / 128))
            x = ops.concat([coarse, ops.subtract(x, coarse), coarse], 1)
        return x

    def _first(self) -> Layer:
        """`conv_first`."""
        weight, bias = weights_of(self.fast.conv_first)
        weight = weight * self.config.img_range
        if self.is_half:
            rounded = rounded_to_bf16(weight)
            weight = np.concatenate([rounded, rounded, weight - rounded], 1)
        return weight, bias

    def _shallow(self, pixels: Any) -> list[Any]:
        bands = self.blocks.split(to_tokens(self.blocks.convolve(pixels, *self._first())))
        if isinstance(self.fast.embed_norm, _Norm):
            bands = [self.blocks.normed(band, self.fast.embed_norm) for band in bands]
        if self.fast.position is not None:
            bands = [ops.add(band, position) for band, position in zip(bands, self._positions(), strict=True)]
        return bands

    def _closed(self, bands: list[Any], before: list[Any], conv: nn.Module) -> list[Any]:
        """What ends a group."""
        if not isinstance(conv, nn.Identity):
            convolved = self.blocks.convolve(self.blocks.picture(join(bands)), *weights_of(conv))
            bands = self.blocks.split(to_tokens(convolved))
        return [ops.add(band, residual) for band, residual in zip(bands, before, strict=True)]

    def _enlarged(self, bands: list[Any], pixels: Any) -> Any:
        deep = join([self.blocks.normed(band, self.fast.norm) for band in bands])
        first = self._first()
        if isinstance(self.fast.conv_after_body, nn.Identity):
            features = ops.add(self.blocks.picture(deep), self.blocks.convolve(pixels, *first))
        else:
            # The way around the body as part of the same sums: nothing of it is rounded, nor kept all the while.
            last = weights_of(self.fast.conv_after_body)
            weight, bias = np.concatenate([last[0], first[0]], 1), last[1] + first[1]
            both = self.blocks.picture(ops.concat([deep, to_tokens(pixels)], 2))
            features = self.blocks.convolve(both, weight, bias)
        return self.tail.enlarged(features)

    def _positions(self) -> list[Any]:
        side = self.config.ape_size
        if self.fast.position is None or (self.strip.rows, self.width) != (side, side):
            fitting = side * self.config.unshuffle
            raise ModelError(f"OpenVINO: the position embedding is for frames of {fitting}x{fitting}, no others")
        position = array_of(self.fast.position).reshape(1, side * side, -1)
        return [constant(part) for part in np.split(position, np.cumsum(self.blocks.band_rows)[:-1] * side, axis=1)]
