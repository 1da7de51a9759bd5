"""The tail of `openvino_graph`: from the features to the large picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino.opset13 as ops
from torch import nn

from hat_video.inference.openvino_folds import (
    Array,
    Layer,
    Strip,
    array_of,
    before_shuffle,
    one_after_the_other,
    rounded_to_bf16,
    rounded_to_the_same_sum,
    weights_of,
)
from hat_video.inference.openvino_ops import (
    cells,
    channels_first,
    constant,
    convolve,
    ints,
    reshape,
    shuffle_pixels,
    to_tokens,
)
from hat_video.inference.optimize import FastHAT

__all__ = ["Tail"]


class Tail:
    """Convolutions and pixel shuffles.

    Args:
        fast: the network.
        strip: of the frame.
        is_half: whether it will be computed in bf16.
    """

    def __init__(self, fast: FastHAT, strip: Strip, is_half: bool) -> None:
        self.fast, self.strip, self.is_half = fast, strip, is_half

    @property
    def halo(self) -> int:
        """Rows of the features that it looks at, beside the strip: a half of it for the second stage, and so on."""
        return 3 if self._stages() else 2

    def enlarged(self, features: Any) -> Any:
        """From the features to the large picture, (1, 3, sH, sW)."""
        weight, bias = weights_of(self.fast.conv_before_upsample)
        # The sum is an operation of its own: the bias of a convolution would be rounded.
        y = convolve(features, self._fitted(weight), strip=self.strip)
        _, channels, height, width = y.get_output_shape(0)
        y = reshape(ops.prelu(ops.add(to_tokens(y), constant(bias)), constant([0.01])), 1, height, width, channels)
        stages = self._stages()
        last_stage = stages.pop() if stages else None
        # How far rounded biases have moved each channel so far.
        left = np.zeros_like(bias)
        for conv, factor in stages:
            weight, bias = weights_of(conv)
            weight = self._fitted(weight)
            bias, left = self._handed_on(weight, bias, left)
            large = ops.depth_to_space(convolve(channels_first(y), weight, bias, self.strip), "depth_first", factor)
            y, left = ops.transpose(large, ints(0, 2, 3, 1)), left.reshape(-1, factor**2).mean(1)
        last = tuple(array / self.fast.config.img_range for array in weights_of(self.fast.conv_last))
        mean = array_of(self.fast.mean).reshape(-1)
        if last_stage is None:
            weight = self._fitted(last[0])
            bias, left = self._handed_on(weight, last[1], left)
            return shuffle_pixels(convolve(channels_first(y), weight, bias, self.strip), 1, left + mean)
        conv, factor = last_stage
        both = weights_of(conv), (before_shuffle(last[0], factor), last[1].repeat(factor**2))
        weight, bias = one_after_the_other(*both)
        weight = self._fitted(weight)
        bias, left = self._handed_on(weight, bias, left)
        picture = self._with_border(convolve(channels_first(y), weight, bias, self.strip), y, *both)
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
        has_top, has_bottom = not self.strip.has_above, not self.strip.has_below

        # Three rows or columns hold all that the outermost of them depends on.
        def column(start: int, place: int) -> Any:
            part = channels_first(cells(y, 2, start, start + 3))
            part = cells(convolve(convolve(part, *first, self.strip), *second, self.strip), 3, place, place + 1)
            return cells(part, 2, has_top, part.get_output_shape(0)[2] - has_bottom)

        def row(start: int, place: int) -> Any:
            part = channels_first(cells(y, 1, start, start + 3))
            return cells(convolve(convolve(part, *first), *second), 2, place, place + 1)

        above, below = [row(0, 0)] if has_top else [], [row(height - 3, 2)] if has_bottom else []
        rows = [*above, ops.concat([column(0, 0), inner, column(width - 3, 2)], 3), *below]
        return ops.concat(rows, 2) if len(rows) > 1 else rows[0]

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
