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

from collections.abc import Iterator
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
    Windows,
    before_shuffle,
    behind_norm,
    one_after_the_other,
    queries_for_no_keys,
    rounded_to_bf16,
    rounded_to_the_same_sum,
    surrounds,
    values_for_no_projection,
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
    shuffle_pixels,
    to_tokens,
)
from hat_video.inference.optimize import (
    FastHAT,
    _FastHAB,
    _FastMlp,
    _FastOCAB,
    _FastWindowAttention,
    _Norm,
    _Weights,
    optimize,
)
from hat_video.model.hat import HAT

__all__ = ["GRAPH_VERSION", "Precision", "build_graph"]

Precision = Literal["fp32", "bf16"]

GRAPH_VERSION = 2
"""Counts up whenever the graph of the same network changes."""

# A band of tokens of about this size, and what an MLP makes of it, stay in a core's cache (measured).
_BAND_BYTES = 1_400_000
# More bands gain a few per cent more in large frames, but each is a node more to compile for every layer.
_MOST_BANDS = 24
_MOST_BANDS_OF_ALL_BLOCKS = 160


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
    multiple = network.config.multiple
    if min(height, width) <= 0 or height % multiple or width % multiple:
        raise ModelError(f"OpenVINO: {width}x{height}: both sides must be multiples of {multiple}")
    try:
        fast = optimize(network, dtype=torch.float64, device=torch.device("cpu"))
        return _Graph(fast, height, width, precision).build()
    except (AttributeError, RuntimeError, TypeError) as error:
        # A network that was taken apart, as for an ablation; or an operation that this OpenVINO does not have.
        raise ModelError(f"OpenVINO: this network cannot be written as a graph: {error}") from error


class _Graph:
    """Builds one model. Tokens are (1, tokens, C), pictures (1, C, H, W); the trunk is a list of bands of tokens."""

    def __init__(self, fast: FastHAT, height: int, width: int, precision: Precision) -> None:
        self.fast, self.config, self.is_half = fast, fast.config, precision == "bf16"
        self.frame = (height, width)
        self.height, self.width = height // self.config.unshuffle, width // self.config.unshuffle
        self.channels = self.config.embed_dim
        rows = self.height // self.config.window_size
        self.bands = self._count_bands(rows)
        ends = [round(number * rows / self.bands) * self.config.window_size for number in range(self.bands + 1)]
        self.band_rows = [stop - start for start, stop in pairwise(ends)]
        self._indices: dict[bytes, Any] = {}

    def _count_bands(self, rows: int) -> int:
        size = self.height * self.width * self.channels * (2 if self.is_half else 4)
        blocks = sum(self.config.depths) + len(self.config.depths)
        return max(1, min(rows, _MOST_BANDS, _MOST_BANDS_OF_ALL_BLOCKS // blocks, round(size / _BAND_BYTES)))

    def build(self) -> openvino.Model:
        fast = self.fast
        frame = ops.parameter([1, self.config.in_chans, *self.frame], openvino.Type.f32, name="frame")
        pixels, first = self._first(frame)
        shallow = convolve(pixels, *first)
        bands = self._split(to_tokens(shallow))
        if isinstance(fast.embed_norm, _Norm):
            bands = [self._normed(band, fast.embed_norm) for band in bands]
        if fast.position is not None:
            bands = [ops.add(band, position) for band, position in zip(bands, self._positions(), strict=True)]
        for group in fast.groups():
            before = bands
            for block in group.blocks:
                bands = self._ocab(bands, block) if isinstance(block, _FastOCAB) else self._hab(bands, block)
            if not isinstance(group.conv, nn.Identity):
                picture = self._picture(join(bands))
                bands = self._split(to_tokens(convolve(picture, *_weights(group.conv))))
            bands = [ops.add(band, residual) for band, residual in zip(bands, before, strict=True)]
        deep = join([self._normed(band, fast.norm) for band in bands])
        if isinstance(fast.conv_after_body, nn.Identity):
            features = ops.add(self._picture(deep), shallow)
        else:
            # The way around the body as part of the same sums: nothing of it is rounded, nor kept all the while.
            last = _weights(fast.conv_after_body)
            weight, bias = np.concatenate([last[0], first[0]], 1), last[1] + first[1]
            features = convolve(self._picture(ops.concat([deep, to_tokens(pixels)], 2)), weight, bias)
        return openvino.Model([ops.result(self._enlarged(features))], [frame], "hat")

    def _first(self, frame: Any) -> tuple[Any, Layer]:
        """What `conv_first` is applied to, and its weights."""
        x = ops.subtract(frame, constant(_array(self.fast.mean)))
        if self.config.unshuffle > 1:
            x = ops.space_to_depth(x, "depth_first", self.config.unshuffle)
        weight, bias = _weights(self.fast.conv_first)
        weight = weight * self.config.img_range
        if self.is_half:
            coarse = ops.multiply(ops.round(ops.multiply(x, constant(128)), "half_to_even"), constant(1 / 128))
            x = ops.concat([coarse, ops.subtract(x, coarse), coarse], 1)
            rounded = rounded_to_bf16(weight)
            weight = np.concatenate([rounded, rounded, weight - rounded], 1)
        return x, (weight, bias)

    # Layout

    def _picture(self, tokens: Any) -> Any:
        return channels_first(reshape(tokens, 1, self.height, self.width, -1))

    def _split(self, tokens: Any) -> list[Any]:
        if self.bands == 1:
            return [tokens]
        return list(
            ops.variadic_split(tokens, ints(1), ints(*(rows * self.width for rows in self.band_rows))).outputs()
        )

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
        parts = np.split(windows.places(), np.cumsum(self.band_rows)[:-1] * self.width // windows.run)
        return [self._gathered(whole, part, windows.run * self.channels, (1, -1, self.channels)) for part in parts]

    # Layers

    def _normed(self, tokens: Any, norm: _Norm) -> Any:
        gain, offset = _weights(norm)
        return ops.add(ops.multiply(normalize(tokens, norm.eps), constant(gain)), constant(offset))

    def _positions(self) -> list[Any]:
        side = self.config.ape_size
        if self.fast.position is None or (self.height, self.width) != (side, side):
            fitting = side * self.config.unshuffle
            raise ModelError(f"OpenVINO: the position embedding is for frames of {fitting}x{fitting}, no others")
        position = _array(self.fast.position).reshape(1, side * side, -1)
        return [constant(part) for part in np.split(position, np.cumsum(self.band_rows)[:-1] * side, axis=1)]

    # Blocks

    def _hab(self, bands: list[Any], block: nn.Module) -> list[Any]:
        if not isinstance(block, _FastHAB):
            raise ModelError(f"OpenVINO: {type(block).__name__} is no block of HAT")
        y = join([self._normed(band, block.norm1) for band in bands])
        narrow = ops.gelu(convolve(self._picture(y), *_weights(block.narrow)), "erf")
        convolved = convolve(narrow, *_weights(block.widen))
        branches = zip(self._split(to_tokens(convolved)), self._gates(convolved, block), strict=True)
        gated = [ops.multiply(gate, branch) for branch, gate in branches]
        out = []
        for x, attended, term in zip(bands, self._window_attention(y, block.attention), gated, strict=True):
            out.append(self._mlp(ops.add(ops.add(x, attended), term), block.norm2, block.mlp))
        return out

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
        windows = windows_of(self.height, self.width, self.config.window_size, attention.shift)
        q, k, v, projection = _projections(attention)
        has_one_head = attention.heads == 1
        if has_one_head:
            q, v = queries_for_no_keys(q, k), values_for_no_projection(v, projection, with_bias=True)
        masks: list[Any] = [0.0]
        if attention.shift:
            row, column = _array(attention.row_mask), _array(attention.column_mask)
            masks += [column, row, np.minimum(row, column)]
        biases = [Bias(_array(attention.bias) + mask) for mask in masks]
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
        windows = windows_of(self.height, self.width, size, 0)
        *qkv, projection = _projections(block)
        q, k, v = (behind_norm(layer, *_weights(block.norm1)) for layer in qkv)
        has_one_head = block.heads == 1
        if has_one_head:
            # Those outside the picture are zeros, and take part: neither keys nor the projection's bias can go.
            v = values_for_no_projection(v, projection, with_bias=False)
        bias, pieces, top = Bias(_array(block.bias)), [], 0
        for rows in self.band_rows:
            near_keys, near_values = self._surroundings(y, top, top + rows, k, v)
            start, stop = (edge // size * (self.width // size) for edge in (top, top + rows))
            z = linear(self._cut(y, windows, slice(start, stop)), *q)
            out = attend(z, near_keys, near_values, bias)
            pieces.append(out if has_one_head else linear(out, *projection))
            top += rows
        attended = self._put_together(pieces, windows)
        if has_one_head:
            attended = [ops.add(band, constant(projection[1])) for band in attended]
        return [self._mlp(ops.add(x, a), block.norm2, block.mlp) for x, a in zip(bands, attended, strict=True)]

    def _surroundings(self, y: Any, top: int, bottom: int, *layers: Layer) -> Iterator[Any]:
        """What layers make of the tokens around each window of some rows, (W, m, C); zeros outside the picture."""
        size, wide = self.config.window_size, self.config.overlap_size
        before, behind = (wide - size) // 2, wide - size - (wide - size) // 2
        first, last = max(0, top - before), min(self.height, bottom + behind)
        above, below = before - (top - first), behind - (last - bottom)
        index, run = surrounds(bottom - top, self.width, size, wide)
        tokens = cells(y, 1, first * self.width, last * self.width) if self.bands > 1 else y
        for layer in layers:
            rows = reshape(linear(tokens, *layer), 1, last - first, self.width, -1)
            begin, end = ints(0, above, before, 0), ints(0, below, behind, 0)
            padded = ops.pad(rows, begin, end, "constant", constant(0))
            yield self._gathered(padded, index, run * len(layer[1]), (len(index), wide**2, -1))

    def _mlp(self, x: Any, norm: _Norm, mlp: _FastMlp) -> Any:
        """x, and what the MLP adds to it."""
        hidden = ops.gelu(linear(normalize(x, norm.eps), *behind_norm(_weights(mlp.fc1), *_weights(norm))), "erf")
        return ops.add(x, linear(hidden, *_weights(mlp.fc2)))

    # Tail

    def _enlarged(self, features: Any) -> Any:
        """From the features to the large picture, (1, 3, sH, sW)."""
        weight, bias = _weights(self.fast.conv_before_upsample)
        # The sum is an operation of its own: the bias of a convolution would be rounded.
        y = ops.add(to_tokens(convolve(features, self._fitted(weight))), constant(bias))
        y = reshape(ops.prelu(y, constant([0.01])), 1, self.height, self.width, -1)
        stages = self._stages()
        last_stage = stages.pop() if stages else None
        # How far rounded biases have moved each channel so far.
        left = np.zeros_like(bias)
        for conv, factor in stages:
            weight, bias = _weights(conv)
            weight = self._fitted(weight)
            bias, left = self._handed_on(weight, bias, left)
            large = ops.depth_to_space(convolve(channels_first(y), weight, bias), "depth_first", factor)
            y, left = ops.transpose(large, ints(0, 2, 3, 1)), left.reshape(-1, factor**2).mean(1)
        last = tuple(array / self.config.img_range for array in _weights(self.fast.conv_last))
        mean = _array(self.fast.mean).reshape(-1)
        if last_stage is None:
            weight = self._fitted(last[0])
            bias, left = self._handed_on(weight, last[1], left)
            return shuffle_pixels(convolve(channels_first(y), weight, bias), 1, left + mean)
        conv, factor = last_stage
        both = _weights(conv), (before_shuffle(last[0], factor), last[1].repeat(factor**2))
        weight, bias = one_after_the_other(*both)
        weight = self._fitted(weight)
        bias, left = self._handed_on(weight, bias, left)
        picture = self._with_border(convolve(channels_first(y), weight, bias), y, *both)
        return shuffle_pixels(picture, factor, left.reshape(-1, factor**2).mean(1) + mean)

    def _with_border(self, inner: Any, y: Any, first: Layer, second: Layer) -> Any:
        """The picture with its outermost places, where the second layer meets zeros, and not what the first makes of
        zeros.

        Args:
            inner: what both layers as one make of y, (1, C', H - 2, W - 2).
            y: (1, H, W, C).
            first: 3x3.
            second: 3x3.
        """
        _, height, width, _ = y.get_output_shape(0)

        def edge(axis: int, start: int, place: int) -> Any:
            # Three rows or columns hold all that the outermost of them depends on.
            part = cells(y, axis, start, start + 3)
            part = convolve(convolve(channels_first(part), *first), *second)
            return cells(part, axis + 1, place, place + 1)

        def middle(column: Any) -> Any:
            return cells(column, 2, 1, height - 1)

        rows = ops.concat([middle(edge(2, 0, 0)), inner, middle(edge(2, width - 3, 2))], 3)
        return ops.concat([edge(1, 0, 0), rows, edge(1, height - 3, 2)], 2)

    def _stages(self) -> list[tuple[nn.Module, int]]:
        """The convolutions of the tail before the last, each with the factor of the pixel shuffle behind it."""
        layers = list(self.fast.upsample)
        shuffles = [layer.upscale_factor for layer in layers[1::2] if isinstance(layer, nn.PixelShuffle)]
        return list(zip(layers[::2], shuffles, strict=True))

    def _fitted(self, weight: Array) -> Array:
        return rounded_to_the_same_sum(weight) if self.is_half else weight

    def _handed_on(self, weight: Array, bias: Array, left: Array) -> tuple[Array, Array]:
        """The bias of a layer, and what rounding leaves out of it; `left` was left out before the layer."""
        exact = bias + weight.sum((2, 3)) @ left
        used = rounded_to_bf16(exact) if self.is_half else exact
        return used, exact - used


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().cpu().double().numpy()
    return array


def _weights(layer: nn.Module) -> Layer:
    """A bias of zeros where there is none."""
    if not isinstance(layer, _Weights):
        raise ModelError(f"OpenVINO: {type(layer).__name__} is no layer of HAT")
    weight = _array(layer.weight)
    return weight, np.zeros(len(weight)) if layer.bias is None else _array(layer.bias)


def _as_convolution(layer: nn.Module) -> Layer:
    weight, bias = _weights(layer)
    return weight[:, :, None, None], bias


def _projections(attention: _FastWindowAttention | _FastOCAB) -> tuple[Layer, Layer, Layer, Layer]:
    """Of the queries, the keys, the values and the output."""
    weight, bias = _weights(attention.qkv)
    q, k, v = zip(np.split(weight, 3), np.split(bias, 3), strict=True)
    return q, k, v, _weights(attention.proj)
