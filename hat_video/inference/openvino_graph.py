"""HAT as an OpenVINO model for one size of frame, written for how OpenVINO's CPU plugin runs it.

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
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import openvino
import openvino.opset13 as ops
import torch
from torch import nn

from hat_video.errors import ModelError
from hat_video.inference.openvino_folds import (
    Array,
    Index,
    Layer,
    Strip,
    Windows,
    array_of,
    behind_norm,
    queries_for_no_keys,
    rounded_to_bf16,
    surrounds,
    values_for_no_projection,
    weights_of,
    windows_of,
)
from hat_video.inference.openvino_ops import (
    Bias,
    attend,
    cells,
    channels_first,
    constant,
    convolve,
    ints,
    join,
    linear,
    normalize,
    reshape,
    to_tokens,
)
from hat_video.inference.openvino_tail import Tail
from hat_video.inference.optimize import (
    _FastHAB,
    _FastMlp,
    _FastOCAB,
    _FastWindowAttention,
    _Norm,
    optimize,
)
from hat_video.model.hat import HAT

__all__ = ["GRAPH_VERSION", "Precision", "build_graph", "build_stage"]

Precision = Literal["fp32", "bf16"]

GRAPH_VERSION = 3
"""Counts up whenever the graph of the same network changes."""

# A band of tokens of about this size, and what an MLP makes of it, stay in a core's cache (measured).
_BAND_BYTES = 1_400_000
# More bands gain a few per cent more in large frames, but each is a node more to compile for every layer.
_MOST_BANDS = 24
_MOST_BANDS_OF_ALL_BLOCKS = 160

_CONVOLUTIONS_OF_A_HAB = 2


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
        network: one whose channel attention pools over boxes.
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
    """Builds models. Tokens are (1, tokens, C), pictures (1, C, H, W).

    The trunk is a list of bands of tokens. Where a strip has neighbours, the first or the last one is its halo there.
    """

    def __init__(self, network: HAT, strip: Strip, frame: tuple[int, int], precision: Precision) -> None:
        multiple = network.config.multiple
        height, width = frame
        if min(frame) <= 0 or height % multiple or width % multiple:
            raise ModelError(f"OpenVINO: {width}x{height}: both sides must be multiples of {multiple}")
        self.fast = optimize(network, dtype=torch.float64, device=torch.device("cpu"))
        self.config, self.is_half, self.strip = network.config, precision == "bf16", strip
        self.height, self.width = strip.rows, width // self.config.unshuffle
        self.channels = self.config.embed_dim
        rows = self.height // self.config.window_size
        self.bands = self._count_bands(rows)
        ends = [round(number * rows / self.bands) * self.config.window_size for number in range(self.bands + 1)]
        self.band_rows = [stop - start for start, stop in pairwise(ends)]
        self.tail = Tail(self.fast, strip, self.is_half)
        self._indices: dict[bytes, Any] = {}

    def _count_bands(self, rows: int) -> int:
        size = self.height * self.width * self.channels * (2 if self.is_half else 4)
        blocks = sum(self.config.depths) + len(self.config.depths)
        return max(1, min(rows, _MOST_BANDS, _MOST_BANDS_OF_ALL_BLOCKS // blocks, round(size / _BAND_BYTES)))

    def whole(self) -> openvino.Model:
        """All of it."""
        frame = self._frame(0)
        pixels = self._pixels(frame)
        bands = self._shallow(pixels)
        for group in self.fast.groups():
            before = bands
            for block in group.blocks:
                bands = self._block(bands, block)
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
        x, bands = self._trunk("x", self._halo(block))
        return self._stage(self._block(bands, block), x)

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
        x = ops.parameter([1, tokens, self.channels], self._trunk_type, name=name)
        return x, self._split(ops.convert(x, openvino.Type.f32))

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
        bands = self._split(to_tokens(self._convolve(pixels, *self._first())))
        if isinstance(self.fast.embed_norm, _Norm):
            bands = [self._normed(band, self.fast.embed_norm) for band in bands]
        if self.fast.position is not None:
            bands = [ops.add(band, position) for band, position in zip(bands, self._positions(), strict=True)]
        return bands

    def _closed(self, bands: list[Any], before: list[Any], conv: nn.Module) -> list[Any]:
        """What ends a group."""
        if isinstance(conv, nn.Identity):
            bands = self._core(bands)
        else:
            bands = self._split(to_tokens(self._convolve(self._picture(join(bands)), *weights_of(conv))))
        return [ops.add(band, residual) for band, residual in zip(bands, before, strict=True)]

    def _enlarged(self, bands: list[Any], pixels: Any) -> Any:
        deep = join([self._normed(band, self.fast.norm) for band in bands])
        first = self._first()
        if isinstance(self.fast.conv_after_body, nn.Identity):
            features = ops.add(self._picture(self._near(deep, self.tail.halo)), self._convolve(pixels, *first))
        else:
            # The way around the body as part of the same sums: nothing of it is rounded, nor kept all the while.
            last = weights_of(self.fast.conv_after_body)
            weight, bias = np.concatenate([last[0], first[0]], 1), last[1] + first[1]
            features = self._convolve(self._picture(ops.concat([deep, to_tokens(pixels)], 2)), weight, bias)
        return self.tail.enlarged(features)

    # Layout

    def _picture(self, tokens: Any) -> Any:
        return channels_first(reshape(tokens, 1, -1, self.width, tokens.shape[2]))

    def _convolve(self, picture: Any, weight: Array, bias: Array) -> Any:
        return convolve(picture, weight, bias, self.strip)

    def _rows(self, tokens: Any) -> int:
        return int(tokens.shape[1]) // self.width

    def _parts(self, tokens: Any, *rows: int) -> list[Any]:
        """So many rows each, one behind the other."""
        lengths = [count * self.width for count in rows if count]
        return list(ops.variadic_split(tokens, ints(1), ints(*lengths)).outputs()) if len(lengths) > 1 else [tokens]

    def _split(self, tokens: Any) -> list[Any]:
        """The bands of a strip, and its halo."""
        rows = self._rows(tokens)
        above = self.strip.above(rows)
        return self._parts(tokens, above, *self.band_rows, rows - self.height - above)

    def _core(self, bands: list[Any]) -> list[Any]:
        """Without the halo."""
        return bands[self.strip.has_above : len(bands) - self.strip.has_below]

    def _near(self, tokens: Any, halo: int) -> Any:
        """With no more halo than that."""
        rows, wanted = self._rows(tokens), self.strip.with_halo(halo)
        above = self.strip.above(rows) - self.strip.above(wanted)
        return self._parts(tokens, above, wanted, rows - wanted - above)[above > 0]

    def _gathered(self, rows: Any, index: Index, length: int, shape: tuple[int, ...]) -> Any:
        """Those rows of `length` values of a tensor, in another shape."""
        rows = reshape(rows, -1, length)
        key = index.tobytes()
        # Blocks share the constants; for large frames they are megabytes.
        if key not in self._indices:
            self._indices[key] = ops.constant(np.ascontiguousarray(index.reshape(-1)))
        return reshape(ops.gather(rows, self._indices[key], ints(0)), *shape)

    def _cut(self, tokens: Any, windows: Windows, part: slice) -> Any:
        """(W, n, C): some of the windows."""
        index = windows.index[part]
        shape = (len(index), self.config.window_size**2, self.channels)
        return self._gathered(tokens, index, windows.run * self.channels, shape)

    def _put_together(self, pieces: list[Any], windows: Windows) -> list[Any]:
        """From windows to bands."""
        whole = ops.concat(pieces, 0) if len(pieces) > 1 else pieces[0]
        parts = np.split(windows.places, np.cumsum(self.band_rows)[:-1] * self.width // windows.run)
        return [self._gathered(whole, part, windows.run * self.channels, (1, -1, self.channels)) for part in parts]

    # Layers

    def _normed(self, tokens: Any, norm: _Norm) -> Any:
        gain, offset = weights_of(norm)
        return ops.add(ops.multiply(normalize(tokens, norm.eps), constant(gain)), constant(offset))

    def _positions(self) -> list[Any]:
        side = self.config.ape_size
        if self.fast.position is None or (self.height, self.width) != (side, side):
            fitting = side * self.config.unshuffle
            raise ModelError(f"OpenVINO: the position embedding is for frames of {fitting}x{fitting}, no others")
        position = array_of(self.fast.position).reshape(1, side * side, -1)
        return [constant(part) for part in np.split(position, np.cumsum(self.band_rows)[:-1] * side, axis=1)]

    # Blocks

    def _block(self, bands: list[Any], block: nn.Module) -> list[Any]:
        if isinstance(block, _FastOCAB):
            return self._ocab(bands, block)
        if isinstance(block, _FastHAB):
            return self._hab(bands, block)
        raise ModelError(f"OpenVINO: {type(block).__name__} is no block of HAT")

    def _halo(self, block: nn.Module) -> int:
        """Rows around a strip that a block looks at."""
        if isinstance(block, _FastHAB):
            return max(_CONVOLUTIONS_OF_A_HAB, -block.attention.shift % self.config.window_size)
        return -(-(self.config.overlap_size - self.config.window_size) // 2)

    def _hab(self, bands: list[Any], block: _FastHAB) -> list[Any]:
        y = join([self._normed(band, block.norm1) for band in bands])
        near = self._near(y, _CONVOLUTIONS_OF_A_HAB)
        narrow = ops.gelu(self._convolve(self._picture(near), *weights_of(block.narrow)), "erf")
        convolved = self._convolve(narrow, *weights_of(block.widen))
        branches = zip(self._split(to_tokens(convolved)), self._gates(convolved, block), strict=True)
        gated = [ops.multiply(gate, branch) for branch, gate in branches]
        attended = self._window_attention(y, block.attention)
        return [
            self._mlp(ops.add(ops.add(x, a), term), block.norm2, block.mlp)
            for x, a, term in zip(self._core(bands), attended, gated, strict=True)
        ]

    def _gates(self, convolved: Any, block: _FastHAB) -> list[Any]:
        """For each band: (1, 1, C), or (1, tokens, C) where the channel attention pools over boxes."""
        box = self.config.attention_pool
        if box:
            # What reaches over the edge counts for nothing.
            sides, none = [min(box, self.height), min(box, self.width)], [0, 0]
            mean = ops.avg_pool(convolved, sides, none, none, sides, exclude_pad=True, rounding_type="ceil")
        else:
            mean = ops.reduce_mean(convolved, ints(2, 3), keep_dims=True)
        squeezed = ops.relu(convolve(mean, *_as_convolution(block.squeeze)))
        gate = ops.sigmoid(convolve(squeezed, *_as_convolution(block.excite)))
        gate = to_tokens(ops.multiply(gate, constant(block.gate_scale)))
        if not box:
            return [gate] * self.bands
        # A box's gate is repeated along the row first, while there is one row of boxes, then for each row of pixels.
        down, across = -(-self.height // box), -(-self.width // box)
        index = np.arange(down)[:, None] * across + np.arange(self.width) // box
        rows = self._gathered(gate, index.astype(np.int32), self.channels, (down, -1))
        parts = np.split((np.arange(self.height) // box).astype(np.int32), np.cumsum(self.band_rows)[:-1])
        return [self._gathered(rows, part, self.width * self.channels, (1, -1, self.channels)) for part in parts]

    def _window_attention(self, y: Any, attention: _FastWindowAttention) -> list[Any]:
        windows = windows_of(self.strip, self._rows(y), self.width, self.config.window_size, attention.shift)
        q, k, v, projection = _projections(attention)
        has_one_head = attention.heads == 1
        if has_one_head:
            q, v = queries_for_no_keys(q, k), values_for_no_projection(v, projection, with_bias=True)
        masks: list[Any] = [0.0]
        if attention.shift:
            row, column = array_of(attention.row_mask), array_of(attention.column_mask)
            masks += [column, row, np.minimum(row, column)]
        biases = [Bias(array_of(attention.bias) + mask) for mask in masks]
        pieces = []
        for kind, part in windows.parts(self.bands):
            z = self._cut(y, windows, part)
            keys = z if has_one_head else linear(z, *k)
            out = attend(linear(z, *q), keys, linear(z, *v), biases[kind])
            pieces.append(out if has_one_head else linear(out, *projection))
        return self._put_together(pieces, windows)

    def _ocab(self, bands: list[Any], block: _FastOCAB) -> list[Any]:
        y = join([normalize(band, block.norm1.eps) for band in bands])
        size = self.config.window_size
        windows = windows_of(self.strip, self._rows(y), self.width, size, 0)
        *qkv, projection = _projections(block)
        q, k, v = (behind_norm(layer, *weights_of(block.norm1)) for layer in qkv)
        has_one_head = block.heads == 1
        if has_one_head:
            # Those outside the picture are zeros, and take part: neither keys nor the projection's bias can go.
            v = values_for_no_projection(v, projection, with_bias=False)
        bias, pieces, top = Bias(array_of(block.bias)), [], 0
        for rows in self.band_rows:
            near_keys, near_values = self._surroundings(y, top, rows, k, v)
            start, stop = (edge // size * (self.width // size) for edge in (top, top + rows))
            z = linear(self._cut(y, windows, slice(start, stop)), *q)
            out = attend(z, near_keys, near_values, bias)
            pieces.append(out if has_one_head else linear(out, *projection))
            top += rows
        attended = self._put_together(pieces, windows)
        if has_one_head:
            attended = [ops.add(band, constant(projection[1])) for band in attended]
        core = self._core(bands)
        return [self._mlp(ops.add(x, a), block.norm2, block.mlp) for x, a in zip(core, attended, strict=True)]

    def _surroundings(self, y: Any, top: int, rows: int, *layers: Layer) -> Iterator[Any]:
        """What layers make of the tokens around each window of some rows, (W, m, C); zeros outside the frame."""
        size, wide = self.config.window_size, self.config.overlap_size
        before, behind = (wide - size) // 2, wide - size - (wide - size) // 2
        height = self._rows(y)
        top += self.strip.above(height)
        first, last = max(0, top - before), min(height, top + rows + behind)
        above, below = before - (top - first), behind - (last - top - rows)
        index, run = surrounds(rows, self.width, size, wide)
        tokens = cells(y, 1, first * self.width, last * self.width) if last - first < height else y
        for layer in layers:
            near = reshape(linear(tokens, *layer), 1, last - first, self.width, -1)
            begin, end = ints(0, above, before, 0), ints(0, below, behind, 0)
            padded = ops.pad(near, begin, end, "constant", constant(0))
            yield self._gathered(padded, index, run * len(layer[1]), (len(index), wide**2, -1))

    def _mlp(self, x: Any, norm: _Norm, mlp: _FastMlp) -> Any:
        """x, and what the MLP adds to it."""
        hidden = ops.gelu(linear(normalize(x, norm.eps), *behind_norm(weights_of(mlp.fc1), *weights_of(norm))), "erf")
        return ops.add(x, linear(hidden, *weights_of(mlp.fc2)))


def _as_convolution(layer: nn.Module) -> Layer:
    weight, bias = weights_of(layer)
    return weight[:, :, None, None], bias


def _projections(attention: _FastWindowAttention | _FastOCAB) -> tuple[Layer, Layer, Layer, Layer]:
    """Of the queries, the keys, the values and the output."""
    weight, bias = weights_of(attention.qkv)
    q, k, v = zip(np.split(weight, 3), np.split(bias, 3), strict=True)
    return q, k, v, weights_of(attention.proj)
