"""What `openvino_graph` computes before there is a graph: where windows lie, weights of folded layers, rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hat_video.errors import ModelError
from hat_video.inference.optimize import _Weights

__all__ = [
    "Array",
    "Index",
    "Layer",
    "Strip",
    "Windows",
    "array_of",
    "before_shuffle",
    "behind_norm",
    "one_after_the_other",
    "queries_for_no_keys",
    "rounded_to_bf16",
    "rounded_to_the_same_sum",
    "surrounds",
    "values_for_no_projection",
    "weights_of",
    "windows_of",
]

Array = NDArray[np.float64]
Index = NDArray[np.int32]
Layer = tuple[Array, Array]
"""Weight, (out, in) or (out, in, 3, 3), and bias, (out,)."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows of tokens, all across a frame, and whether the frame goes on beyond them; else the whole of one."""

    rows: int
    has_above: bool = False
    has_below: bool = False

    def with_halo(self, halo: int) -> int:
        """The rows that are looked at, where those are `halo` more wherever the frame goes on."""
        return self.rows + halo * (self.has_above + self.has_below)

    def above(self, rows: int) -> int:
        """How many of so many rows, halo included, come before its own."""
        return (rows - self.rows) * self.has_above // max(1, self.has_above + self.has_below)


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the windows of a strip lie, as runs of pixels."""

    run: int
    """Pixels that lie side by side in the map and in the windows."""
    index: Index
    """(windows, runs): which run of the map each one is."""
    places: Index
    """(runs of the strip,): which run of the windows each one is."""
    kinds: tuple[int, ...]
    """Windows of each kind, which follow one another: inner ones, last column, edge row, corner."""

    def parts(self, count: int) -> list[tuple[int, slice]]:
        """About `count` pieces of the windows, each with the number of its one kind."""
        step, start, end = -(-len(self.index) // count), 0, 0
        parts = []
        for kind, number in enumerate(self.kinds):
            end += number
            while start < end:
                parts.append((kind, slice(start, min(start + step, end))))
                start += step
            start = end
        return parts


def windows_of(strip: Strip, height: int, width: int, size: int, shift: int) -> Windows:
    """The windows that cover a strip, after the frame was rolled back by `shift` in both directions.

    Args:
        strip: of a multiple of `size` rows.
        height: of the map that they are cut from: the strip and its halo.
        width: likewise, a multiple of `size`.
        size: of the windows.
        shift: 0, or half of `size`.
    """
    run = math.gcd(size, shift)
    columns, across = width // size, width // run
    # At the frame's upper edge they begin at its lower end, or with rows of the halo, which are masked as those are.
    first = strip.above(height) - -shift % size
    rows = (strip.rows + (size if shift and strip.rows < height else 0)) // size
    y = np.arange(first, first + rows * size) % height
    x = (np.arange(0, width, run) + shift) % width // run
    runs = (y[:, None] * across + x).reshape(rows, size, columns, size // run)
    index = runs.swapaxes(1, 2).reshape(rows * columns, -1).astype(np.int32)
    kinds: tuple[int, ...] = (rows * columns,)
    if shift:
        # What lies at both ends of the frame shares windows.
        edge = -1 if strip.has_above and strip.has_below else rows - 1 if strip.has_above else 0
        kind = 2 * (np.arange(rows) == edge)[:, None] + (np.arange(columns) == columns - 1)
        index = index[np.argsort(kind, axis=None, kind="stable")]
        kinds = tuple(np.bincount(kind.reshape(-1), minlength=4).tolist())
    places = np.zeros(height * across, np.int32)
    places[index.reshape(-1)] = np.arange(index.size)
    top = strip.above(height)
    return Windows(run, index, places[top * across : (top + strip.rows) * across], kinds)


def surrounds(height: int, width: int, size: int, wide: int) -> tuple[Index, int]:
    """The squares of `wide` around the windows of `size`, in a map that was padded by what they reach beyond it.

    Returns:
        (windows, runs): which run of the padded map each one is; and the pixels of a run.
    """
    padded = width + wide - size
    run = math.gcd(size, wide, padded)
    y = np.arange(0, height, size)[:, None] + np.arange(wide)
    x = (np.arange(0, width, size)[:, None] + np.arange(0, wide, run)) // run
    index = y[:, None, :, None] * (padded // run) + x[None, :, None, :]
    return index.reshape(len(y) * len(x), -1).astype(np.int32), run


def behind_norm(layer: Layer, gain: Array, offset: Array) -> Layer:
    """A linear layer with a LayerNorm's gain and offset before it."""
    weight, bias = layer
    return weight * gain, bias + weight @ offset


def queries_for_no_keys(queries: Layer, keys: Layer) -> Layer:
    """The queries whose keys are the tokens themselves, of a single head.

    (Wq y + bq) (Wk z + bk) is z Wk^T (Wq y + bq) and what depends on the query alone, which softmax ignores.
    """
    return keys[0].T @ queries[0], keys[0].T @ queries[1]


def values_for_no_projection(values: Layer, projection: Layer, *, with_bias: bool) -> Layer:
    """The values that are projected already, of a single head.

    Args:
        values: the layer of the values.
        projection: the layer behind the attention.
        with_bias: whether the projection's bias goes in too: right where each value that takes part has it, since the
            weights of attention sum to one.
    """
    bias = projection[0] @ values[1]
    return projection[0] @ values[0], bias + projection[1] if with_bias else bias


def before_shuffle(weight: Array, factor: int) -> Array:
    """A 3x3 convolution behind a pixel shuffle, as one before it: (out, in, 3, 3) to (f^2 out, f^2 in, 3, 3)."""
    out, features = weight.shape[:2]
    folded = np.zeros((out, factor, factor, features, factor, factor, 3, 3))
    for y, x, tap_y, tap_x in np.ndindex(factor, factor, 3, 3):
        # The large map's pixel (y, x) of a place sees one pixel of this place, or of a neighbour.
        (from_y, in_y), (from_x, in_x) = divmod(y + tap_y - 1, factor), divmod(x + tap_x - 1, factor)
        folded[:, y, x, :, in_y, in_x, from_y + 1, from_x + 1] = weight[:, :, tap_y, tap_x]
    return folded.reshape(factor**2 * out, factor**2 * features, 3, 3)


def one_after_the_other(first: Layer, second: Layer) -> Layer:
    """Two 3x3 convolutions as one of 5x5; the same where the second one meets no border."""
    weight = np.zeros((len(second[1]), first[0].shape[1], 5, 5))
    for y, x in np.ndindex(3, 3):
        weight[:, :, y : y + 3, x : x + 3] += np.einsum("om,mikl->oikl", second[0][:, :, y, x], first[0])
    return weight, second[0].sum((2, 3)) @ first[1] + second[1]


def rounded_to_bf16(array: Array) -> Array:
    """As the plugin rounds."""
    rounded: Array = torch.from_numpy(np.ascontiguousarray(array)).float().bfloat16().double().numpy()
    return rounded


def rounded_to_the_same_sum(weight: Array) -> Array:
    """To bf16, the largest tap of each 3x3 kernel first, and each tap with what the ones before it have left out."""
    taps = weight.reshape(*weight.shape[:2], -1)
    order = np.argsort(-np.abs(taps), axis=-1, kind="stable")
    rounded, left = np.zeros_like(taps), np.zeros((*taps.shape[:2], 1))
    for place in np.split(order, taps.shape[-1], axis=-1):
        wanted = np.take_along_axis(taps, place, -1) + left
        used = rounded_to_bf16(wanted)
        left = wanted - used
        np.put_along_axis(rounded, place, used, -1)
    return rounded.reshape(weight.shape)


def array_of(tensor: torch.Tensor) -> Array:
    """In fp64."""
    array: Array = tensor.detach().cpu().double().numpy()
    return array


def weights_of(layer: nn.Module) -> Layer:
    """A bias of zeros where there is none.

    Raises:
        ModelError: the layer has no weights.
    """
    if not isinstance(layer, _Weights):
        raise ModelError(f"OpenVINO: {type(layer).__name__} is no layer of HAT")
    weight = array_of(layer.weight)
    return weight, np.zeros(len(weight)) if layer.bias is None else array_of(layer.bias)
