"""A plain convolutional network made ready for torch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hat_video.model.cnn import CNN, nearest

__all__ = ["FastCNN"]


class FastCNN(nn.Module):
    """Computes a `CNN` in another precision; the source's own pixels, to which it adds, stay in fp32.

    It never changes, so several threads may call it at the same time.

    Args:
        network: in fp32 or fp64; is not changed.
        dtype: of the convolutions: float32, bfloat16, float16, or float64 for tests.
        device: where it will run.
    """

    def __init__(self, network: CNN, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, self._dtype = network.config, dtype
        self.convolutions = _Convolutions(copy.deepcopy(network).to(device, dtype))
        self.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval().requires_grad_(False)

    def blocks(self) -> list[nn.Module]:
        """What a compiler takes one by one."""
        return [self.convolutions]

    def forward(self, x: Tensor) -> Tensor:
        """RGB (B, 3, H, W), fp32 in [0, 1], to (B, 3, sH, sW) of the same dtype; as `CNN.forward`."""
        centred = (x - 0.5).to(self._dtype, memory_format=torch.channels_last)
        large = F.pixel_shuffle(self.convolutions(centred).to(x.dtype), self.config.upscale)
        return large + nearest(x, self.config.upscale)


class _Convolutions(nn.Module):
    def __init__(self, network: CNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, centred: Tensor) -> Tensor:
        first = self.network.act[0](self.network.head(centred))
        out: Tensor = self.network.tail(self.network.deep_features(first) + first)
        return out
