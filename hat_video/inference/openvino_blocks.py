"""HAB and OCAB for `openvino_graph`: of a whole frame, or of a strip of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import openvino.opset13 as ops
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
from hat_video.inference.optimize import _FastHAB, _FastMlp, _FastOCAB, _FastWindowAttention, _Norm
from hat_video.model.hat import HATConfig

__all__ = ["Blocks"]

# A band of tokens of about this size, and what an MLP makes of it, stay in a core's cache (measured).
_BAND_BYTES = 1_400_000
# More bands gain a few per cent more in large frames, but each is a node more to compile for every layer.
_MOST_BANDS = 24
_MOST_BANDS_OF_ALL_BLOCKS = 160

_CONVOLUTIONS_OF_A_HAB = 2


class Blocks:
    """The blocks, and how tokens are laid out for them.

    Tokens are (1, tokens, C), pictures (1, C, H, W). The trunk is a list of bands of tokens; where a strip has a
    neighbour, its halo there is one more.

    Args:
        config: of the network.
        strip: what they are for.
        width: of the frame, in tokens.
        is_half: whether they will be computed in bf16.
    """

    def __init__(self, config: HATConfig, strip: Strip, width: int, is_half: bool) -> None:
        self.config, self.strip, self.is_half = config, strip, is_half
        self.height, self.width, self.channels = strip.rows, width, config.embed_dim
        rows = self.height // config.window_size
        self.bands = self._count_bands(rows)
        ends = [round(number * rows / self.bands) * config.window_size for number in range(self.bands + 1)]
        self.band_rows = [stop - start for start, stop in pairwise(ends)]
        self._indices: dict[bytes, Any] = {}

    def _count_bands(self, rows: int) -> int:
        size = self.height * self.width * self.channels * (2 if self.is_half else 4)
        blocks = sum(self.config.depths) + len(self.config.depths)
        return max(1, min(rows, _MOST_BANDS, _MOST_BANDS_OF_ALL_BLOCKS // blocks, round(size / _BAND_BYTES)))

    def picture(self, tokens: Any) -> Any:
        return channels_first(reshape(tokens, 1, -1, self.width, tokens.shape[2]))

    def convolve(self, picture: Any, weight: Array, bias: Array) -> Any:
        return convolve(picture, weight, bias, self.strip)

    def _rows(self, tokens: Any) -> int:
        return int(tokens.shape[1]) // self.width

    def _parts(self, tokens: Any, *rows: int) -> list[Any]:
        """So many rows each, one behind the other."""
        lengths = [count * self.width for count in rows if count]
        return list(ops.variadic_split(tokens, ints(1), ints(*lengths)).outputs()) if len(lengths) > 1 else [tokens]

    def split(self, tokens: Any) -> list[Any]:
        """The bands of a strip, and its halo."""
        rows = self._rows(tokens)
        above = self.strip.above(rows)
        return self._parts(tokens, above, *self.band_rows, rows - self.height - above)

    def core(self, bands: list[Any]) -> list[Any]:
        """Without the halo."""
        return bands[self.strip.has_above : len(bands) - self.strip.has_below]

    def near(self, tokens: Any, halo: int) -> Any:
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

    def normed(self, tokens: Any, norm: _Norm) -> Any:
        gain, offset = weights_of(norm)
        return ops.add(ops.multiply(normalize(tokens, norm.eps), constant(gain)), constant(offset))

    def block(self, bands: list[Any], block: nn.Module) -> list[Any]:
        if isinstance(block, _FastOCAB):
            return self._ocab(bands, block)
        if isinstance(block, _FastHAB):
            return self._hab(bands, block)
        raise ModelError(f"OpenVINO: {type(block).__name__} is no block of HAT")

    def halo(self, block: nn.Module) -> int:
        """Rows around a strip that a block looks at."""
        if isinstance(block, _FastHAB):
            return max(_CONVOLUTIONS_OF_A_HAB, -block.attention.shift % self.config.window_size)
        return -(-(self.config.overlap_size - self.config.window_size) // 2)

    def _hab(self, bands: list[Any], block: _FastHAB) -> list[Any]:
        y = join([self.normed(band, block.norm1) for band in bands])
        near = self.near(y, _CONVOLUTIONS_OF_A_HAB)
        narrow = ops.gelu(self.convolve(self.picture(near), *weights_of(block.narrow)), "erf")
        convolved = self.convolve(narrow, *weights_of(block.widen))
        branches = zip(self.split(to_tokens(convolved)), self._gates(convolved, block), strict=True)
        gated = [ops.multiply(gate, branch) for branch, gate in branches]
        attended = self._window_attention(y, block.attention)
        return [
            self._mlp(ops.add(ops.add(x, a), term), block.norm2, block.mlp)
            for x, a, term in zip(self.core(bands), attended, gated, strict=True)
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
        core = self.core(bands)
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
