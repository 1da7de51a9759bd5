"""A plain convolutional network, for where a HAT of its quality would take more time; see docs/shape.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CNN", "CNNConfig", "nearest"]


@dataclass(frozen=True, slots=True)
class CNNConfig:
    """The hyperparameters of a `CNN`."""

    embed_dim: int = 32
    """Channels."""
    layers: int = 10
    """3x3 convolutions between the first and the last one."""
    upscale: int = 2
    """1, 2, 3 or 4."""
    in_chans: int = 3

    @property
    def multiple(self) -> int:
        """Input height and width are multiples of this: of any size."""
        return 1

    @property
    def reach(self) -> int:
        """Source pixels that a pixel of the output depends on, on each side of its own."""
        return self.layers + 2


class CNN(nn.Module):
    """3x3 convolutions and PReLUs, with a way around the body, and the source's pixels added at the end.

    Source: ECBSR (ACM MM 2021), in the form that it has after training.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.embed_dim
        self.head = nn.Conv2d(config.in_chans, channels, 3, 1, 1)
        self.body = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(config.layers))
        self.act = nn.ModuleList(nn.PReLU(channels) for _ in range(config.layers + 1))
        self.tail = nn.Conv2d(channels, config.in_chans * config.upscale**2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in [0, 1] to (B, 3, sH, sW), not clamped."""
        shallow = self.shallow_features(x)
        return self.reconstruct(self.deep_features(shallow) + shallow, x)

    def shallow_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H, W)."""
        out: Tensor = self.act[0](self.head(x - 0.5))
        return out

    def deep_features(self, y: Tensor) -> Tensor:
        """The body: (B, C, H, W) to the same shape."""
        for number, act in enumerate(list(self.act)[1:]):
            y = act(self.layer(number, y))
        return y

    def reconstruct(self, features: Tensor, x: Tensor) -> Tensor:
        """Features and the source to the large picture, (B, 3, sH, sW)."""
        scale = self.config.upscale
        return F.pixel_shuffle(self.tail(features), scale) + nearest(x, scale)

    def layer(self, number: int, x: Tensor) -> Tensor:
        """One convolution of the body."""
        out: Tensor = self.body[number](x)
        return out

    @staticmethod
    def config_of(state: Mapping[str, Tensor]) -> CNNConfig | None:
        """The hyperparameters of a state dict; None if it is of another network."""
        layers = sum(name.startswith("body.") and name.endswith(".weight") for name in state)
        wanted = {f"{place}.{kind}" for place in ("head", "tail") for kind in ("weight", "bias")}
        wanted |= {f"body.{number}.{kind}" for number in range(layers) for kind in ("weight", "bias")}
        wanted |= {f"act.{number}.weight" for number in range(layers + 1)}
        if not layers or set(state) != wanted:
            return None
        channels, in_chans = state["head.weight"].shape[:2]
        upscale = round((state["tail.weight"].shape[0] / in_chans) ** 0.5)
        return CNNConfig(channels, layers, upscale, in_chans)


def nearest(x: Tensor, scale: int) -> Tensor:
    """(B, 3, H, W) to (B, 3, sH, sW), each pixel s x s times."""
    return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
