"""The layers that `openvino_graph` is made of, in the forms that OpenVINO's CPU plugin computes without detours.

Nodes are OpenVINO's, which has no types of its own. Tokens are (1, n, C), rows (1, H, W, C), pictures (1, C, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino.opset13 as ops

from hat_video.inference.openvino_folds import Array, Strip

__all__ = [
    "Bias",
    "attend",
    "cells",
    "channels_first",
    "constant",
    "convolve",
    "ints",
    "join",
    "linear",
    "normalize",
    "reshape",
    "shuffle_pixels",
    "to_tokens",
]


def constant(values: object) -> Any:
    """In fp32, whatever the plugin will compute in."""
    return ops.constant(np.asarray(values, np.float32))


def ints(*values: int) -> Any:
    """A shape, an order, an axis."""
    return ops.constant(np.array(values, np.int64))


def reshape(x: Any, *shape: int) -> Any:
    """-1 for the side that follows from the others."""
    return ops.reshape(x, ints(*shape), special_zero=False)


def cells(x: Any, axis: int, start: int, stop: int) -> Any:
    """What lies in [start, stop) of one axis."""
    return ops.slice(x, ints(start), ints(stop), ints(1), ints(axis))


def to_tokens(picture: Any) -> Any:
    """(1, C, H, W) to (1, H * W, C); free behind a convolution."""
    _, channels, height, width = picture.get_output_shape(0)
    return reshape(ops.transpose(picture, ints(0, 2, 3, 1)), 1, height * width, channels)


def channels_first(rows: Any) -> Any:
    """(1, H, W, C) to (1, C, H, W); free before a convolution."""
    return ops.transpose(rows, ints(0, 3, 1, 2))


def join(bands: Sequence[Any]) -> Any:
    """(1, n, C) each, one behind the other; free."""
    return ops.concat(bands, 1) if len(bands) > 1 else bands[0]


def convolve(picture: Any, weight: Array, bias: Array | None = None, strip: Strip | None = None) -> Any:
    """With one row of zeros around the picture, whatever the kernel's size, but not where a strip's halo is; none for
    1x1.
    """
    pad = min(1, weight.shape[2] // 2)
    begin, end = [pad, pad], [pad, pad]
    if strip is not None:
        begin[0], end[0] = pad * (not strip.has_above), pad * (not strip.has_below)
    y = ops.convolution(picture, constant(weight), [1, 1], begin, end, [1, 1])
    return y if bias is None else ops.add(y, constant(bias.reshape(1, -1, 1, 1)))


def linear(tokens: Any, weight: Array, bias: Array) -> Any:
    """On the last axis."""
    return ops.add(ops.matmul(tokens, constant(weight), False, True), constant(bias))


def normalize(tokens: Any, eps: float) -> Any:
    """A LayerNorm without gain and offset."""
    return ops.mvn(tokens, ints(-1), normalize_variance=True, eps=eps, eps_mode="inside_sqrt")


class Bias:
    """What attention adds to its logits: (1, heads, n, m). One constant for all pieces: it may take megabytes."""

    def __init__(self, values: Array) -> None:
        self._values = values
        self._nodes: dict[int, Any] = {}
        self.heads = values.shape[1]

    def node(self, rank: int) -> Any:
        """As a constant of 4 axes, or of 3, which a single head can do without."""
        if rank not in self._nodes:
            self._nodes[rank] = constant(self._values if rank == 4 else self._values[0])
        return self._nodes[rank]


def attend(q: Any, k: Any, v: Any, bias: Bias) -> Any:
    """softmax(q k^T + bias) v, per window and head.

    Args:
        q: (W, n, heads * lanes), already scaled.
        k: (W, m, heads * lanes).
        v: likewise.
        bias: of all windows.

    Returns:
        (W, n, heads * lanes).
    """
    heads = bias.heads
    # A picture of a single window takes the other way: OpenVINO 2026.4 crashes while it compiles that one.
    if heads == 1 and q.get_output_shape(0)[0] > 1:
        logits = ops.add(ops.matmul(q, k, False, True), bias.node(3))
        return ops.matmul(ops.softmax(logits, -1), v, False, False)
    windows, queries, lanes = q.get_output_shape(0)
    q, k, v = (ops.transpose(reshape(x, windows, -1, heads, lanes // heads), ints(0, 2, 1, 3)) for x in (q, k, v))
    logits = ops.add(ops.matmul(q, k, False, True), bias.node(4))
    out = ops.transpose(ops.matmul(ops.softmax(logits, -1), v, False, False), ints(0, 2, 1, 3))
    return reshape(out, windows, queries, lanes)


def shuffle_pixels(picture: Any, factor: int, offset: Array) -> Any:
    """The pixel shuffle that ends the graph, with an offset, (channels,), added in fp32."""
    _, _, height, width = picture.get_output_shape(0)
    # Added to the picture, it would become a bias of the convolution, and be rounded.
    tokens = ops.add(to_tokens(picture), constant(offset.repeat(factor**2)))
    split = reshape(tokens, height, width, len(offset), factor, factor)
    planes = ops.transpose(split, ints(2, 0, 3, 1, 4))
    return reshape(planes, 1, len(offset), height * factor, width * factor)
