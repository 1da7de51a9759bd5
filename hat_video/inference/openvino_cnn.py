"""A plain convolutional network as an OpenVINO model for one size of frame."""

from __future__ import annotations

import openvino
import openvino.opset13 as ops

from hat_video.inference.openvino_folds import array_of
from hat_video.inference.openvino_ops import constant, convolve, ints, reshape, to_tokens
from hat_video.model.cnn import CNN

__all__ = ["build_cnn_graph"]


def build_cnn_graph(network: CNN, height: int, width: int) -> openvino.Model:
    """The network for frames of one size.

    Returns:
        A model of one input, RGB (1, 3, height, width) fp32 in [0, 1], and one output, RGB (1, 3, s height, s width)
        fp32, not clamped. The source's pixels, to which it adds, are never rounded, whatever the plugin computes in.
    """
    weights = {name: array_of(value) for name, value in network.state_dict().items()}
    channels, scale = network.config.in_chans, network.config.upscale
    frame = ops.parameter([1, channels, height, width], openvino.Type.f32, name="frame")

    def layer(name: str, x: object) -> object:
        return convolve(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def act(number: int, x: object) -> object:
        return ops.prelu(x, constant(weights[f"act.{number}.weight"]))

    y = first = act(0, layer("head", ops.subtract(frame, constant(0.5))))
    for number in range(network.config.layers):
        y = act(number + 1, layer(f"body.{number}", y))
    # As rows of pixels: added to the picture, the source would become a part of the convolution, and be rounded.
    added = reshape(to_tokens(layer("tail", ops.add(y, first))), height, width, channels, scale**2)
    pixels = ops.add(added, reshape(to_tokens(frame), height, width, channels, 1))
    planes = ops.transpose(reshape(pixels, height, width, channels, scale, scale), ints(2, 0, 3, 1, 4))
    large = reshape(planes, 1, channels, height * scale, width * scale)
    return openvino.Model([ops.result(large)], [frame], "cnn")
