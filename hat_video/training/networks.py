"""The network of a recipe: a HAT that starts out as interpolation, or a convolutional one to compare with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hat_video.model.cnn import CNN, CNNConfig
from hat_video.model.hat import HAB, HAT, RHAG
from hat_video.model.resample import enlarge
from hat_video.training.recipe import NetworkShape

__all__ = ["RCAN", "BranchedCNN", "Compact", "build_network", "deepened", "start_as_interpolation"]


def build_network(shape: NetworkShape, scale: int) -> nn.Module:
    """A network of (B, 3, H, W) in [0, 1] to (B, 3, sH, sW), with fresh weights from torch's generator."""
    layers = sum(shape.depths)
    if shape.kind == "cnn":
        return BranchedCNN(CNNConfig(shape.embed_dim, layers, scale))
    if shape.kind == "compact":
        return Compact(scale, shape.embed_dim, layers)
    if shape.kind == "rcan":
        return RCAN(scale, shape.embed_dim, layers, shape.squeeze_factor)
    network = HAT(shape.hat_config(scale))
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    start_as_interpolation(network)
    _anchor_norms(network)
    _take_out(network, shape.without)
    return network


@torch.no_grad()
def start_as_interpolation(network: HAT) -> None:
    """Sets HAT's own parameters so that the untrained network is bilinear interpolation.

    The first channels carry the colours from conv_first over the long skip through the tail; the body adds nothing yet.
    Saves the first thousand steps of a training.
    """
    config = network.config
    colours = config.in_chans
    carried = colours * config.unshuffle**2
    if carried > min(config.embed_dim, config.num_feat * config.unshuffle**2):
        return
    _pass_through(network.conv_first, carried)
    for module in network.conv_after_body.parameters():
        nn.init.zeros_(module)
    before = network.conv_before_upsample[0]
    if not isinstance(before, nn.Conv2d):
        raise TypeError("conv_before_upsample is not a convolution")
    # Lifted over zero, where the LeakyReLU lets everything through.
    _pass_through(before, carried)
    before.bias[:carried] = 0.5  # type: ignore[index]
    for stage, factor in _stages(network):
        if stage is network.upsample[0] and config.unshuffle == 2:
            # Only puts the pixels back where they were.
            _pass_through(stage, carried)
        else:
            _interpolate(stage, colours, factor)
    last = network.conv_last
    nn.init.zeros_(last.weight)
    for channel in range(colours):
        last.weight[channel, channel, 1, 1] = 1
    nn.init.constant_(last.bias, -0.5)  # type: ignore[arg-type]


def deepened(state: Mapping[str, Tensor], groups: int) -> dict[str, Tensor]:
    """The weights of a HAT with more RHAGs that computes the same: copies of the last one, whose convolutions are 0.

    Args:
        state: names to tensors, as upstream has them.
        groups: how many RHAGs there are to be; `state` may have as many or more, and stays as it is.
    """
    grown = dict(state)
    there = [int(name.split(".")[1]) for name in state if name.startswith("layers.")]
    last = max(there, default=groups)
    for name, tensor in state.items():
        if not name.startswith(f"layers.{last}."):
            continue
        rest = name.removeprefix(f"layers.{last}.")
        for number in range(last + 1, groups):
            grown[f"layers.{number}.{rest}"] = torch.zeros_like(tensor) if rest.startswith("conv.") else tensor.clone()
    return grown


@torch.no_grad()
def _anchor_norms(network: HAT) -> None:
    """Two channels of the trunk start out as large constants, which the branches do not see.

    They hold the variance that every LayerNorm divides by nearly the same everywhere. Without them a narrow trunk is
    divided by how far a pixel's colour is from the mean, and contrast is lost: 0.3 to 0.8 dB less in the first
    thousand iterations.
    """
    if network.config.embed_dim < 3 * network.config.unshuffle**2 + 4:
        return
    first = network.conv_first
    first.weight[-2:] = 0
    first.bias[-2], first.bias[-1] = 2.0, -2.0  # type: ignore[index]
    for name, module in network.named_modules():
        if isinstance(module, nn.LayerNorm) and not name.startswith("patch_embed"):
            module.weight[-2:] = 0


def _stages(network: HAT) -> list[tuple[nn.Conv2d, int]]:
    """The convolutions of the tail, each with the factor of the pixel shuffle behind it."""
    layers = list(network.upsample)
    return [
        (conv, shuffle.upscale_factor)
        for conv, shuffle in zip(layers[::2], layers[1::2], strict=True)
        if isinstance(conv, nn.Conv2d) and isinstance(shuffle, nn.PixelShuffle)
    ]


def _pass_through(conv: nn.Conv2d, channels: int) -> None:
    conv.weight[:channels] = 0
    conv.bias[:channels] = 0  # type: ignore[index]
    for channel in range(channels):
        conv.weight[channel, channel, 1, 1] = 1


def _interpolate(conv: nn.Conv2d, channels: int, factor: int) -> None:
    """Bilinear, as three taps for each phase."""
    taps = torch.zeros(factor, 3)
    for phase in range(factor):
        place = (phase + 0.5) / factor - 0.5
        for tap in (-1, 0, 1):
            taps[phase, tap + 1] = max(0.0, 1 - abs(place - tap))
    count = channels * factor**2
    conv.weight[:count] = 0
    conv.bias[:count] = 0  # type: ignore[index]
    for channel in range(channels):
        for row in range(factor):
            for column in range(factor):
                kernel = torch.outer(taps[row], taps[column])
                conv.weight[channel * factor**2 + row * factor + column, channel] = kernel


class _Nothing(nn.Module):
    """Stands where an ablation has taken a branch out."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _take_out(network: HAT, without: tuple[str, ...]) -> None:
    for module in list(network.modules()):
        if isinstance(module, HAB) and "cab" in without:
            module.conv_block = _Nothing()  # type: ignore[assignment]
        if isinstance(module, RHAG) and "ocab" in without:
            module.residual_group.overlap_attn = nn.Identity()  # type: ignore[assignment]


class BranchedCNN(CNN):
    """A CNN whose convolutions have an identity and a 1x1 branch while they are trained; `folded` is without them.

    Source: after ECBSR (ACM MM 2021), with fewer branches.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__(config)
        channels = config.embed_dim
        self.side = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(config.layers))
        with torch.no_grad():
            for name, value in self.named_parameters():
                if name.startswith("body.") and name.endswith("weight"):
                    nn.init.kaiming_normal_(value, a=0.25).mul_(0.5)
                elif name.startswith(("side.", "tail.")):
                    value.zero_()

    def layer(self, number: int, x: Tensor) -> Tensor:
        """One convolution of the body, and its branches."""
        out: Tensor = self.body[number](x) + self.side[number](x) + x
        return out

    def with_branches(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a `folded` network of this shape, as this one has them: the same function."""
        branched = {name: value.clone() for name, value in state.items()}
        for number in range(self.config.layers):
            weight = branched.get(f"body.{number}.weight")
            if weight is not None and weight.shape[:2] == (self.config.embed_dim,) * 2:
                weight[:, :, 1, 1] -= torch.eye(self.config.embed_dim)
        return branched

    @torch.no_grad()
    def folded(self) -> CNN:
        """The same function in single convolutions."""
        network = CNN(self.config)
        state = {name: value.clone() for name, value in self.state_dict().items() if not name.startswith("side.")}
        for number in range(self.config.layers):
            side: Tensor = self.get_parameter(f"side.{number}.weight")
            one = torch.eye(self.config.embed_dim, device=side.device)
            state[f"body.{number}.weight"][:, :, 1, 1] += side[:, :, 0, 0] + one
        network.load_state_dict(state)
        return network


class Compact(nn.Module):
    """SRVGGNetCompact: convolutions and PReLUs over a nearest-neighbour skip.

    Source: Real-ESRGAN's srvgg_arch.py.
    """

    def __init__(self, scale: int, channels: int, layers: int) -> None:
        super().__init__()
        self.scale = scale
        body: list[nn.Module] = [nn.Conv2d(3, channels, 3, 1, 1), nn.PReLU(channels)]
        for _ in range(layers):
            body += [nn.Conv2d(channels, channels, 3, 1, 1), nn.PReLU(channels)]
        self.body = nn.Sequential(*body, nn.Conv2d(channels, 3 * scale**2, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, sH, sW)."""
        y: Tensor = F.pixel_shuffle(self.body(x), self.scale)
        return y + F.interpolate(x, scale_factor=self.scale, mode="nearest")


class _GatedBlock(nn.Module):
    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1)
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, max(1, channels // squeeze), 1),
            nn.ReLU(),
            nn.Conv2d(max(1, channels // squeeze), channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x)
        out: Tensor = x + y * self.gate(y)
        return out


class RCAN(nn.Module):
    """Residual blocks with channel attention; one group of them, over a bicubic skip.

    Source: after RCAN (ECCV 2018).
    """

    def __init__(self, scale: int, channels: int, blocks: int, squeeze: int) -> None:
        super().__init__()
        self.scale = scale
        self.head = nn.Conv2d(3, channels, 3, 1, 1)
        self.body = nn.Sequential(
            *(_GatedBlock(channels, squeeze) for _ in range(blocks)), nn.Conv2d(channels, channels, 3, 1, 1)
        )
        self.tail = nn.Conv2d(channels, 3 * scale**2, 3, 1, 1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, sH, sW)."""
        first = self.head(x - 0.5)
        y: Tensor = self.tail(self.body(first) + first)
        return enlarge(x, self.scale, "bicubic") + F.pixel_shuffle(y, self.scale)
