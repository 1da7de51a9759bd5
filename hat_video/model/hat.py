"""HAT, the Hybrid Attention Transformer, as the paper draws it. Activations are (B, H, W, C) throughout.

Names of parameters are upstream's, so that any HAT checkpoint loads strictly. This is the readable form, for training
and for reference; `hat_video.inference.optimize` makes the fast one out of it.

Source: "Activating More Pixels in Image Super-Resolution Transformer", CVPR 2023; hat_arch.py of XPixelGroup/HAT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hat_video.model.windows import (
    overlapping_position_index,
    overlapping_windows,
    relative_position_index,
    shift_regions,
    window_partition,
    window_reverse,
)

__all__ = ["CAB", "HAB", "HAT", "OCAB", "RHAG", "HATConfig"]

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Subtracted from the input and added to the output, where there are three channels. It is in no checkpoint."""


@dataclass(frozen=True, slots=True)
class HATConfig:
    """The hyperparameters, as upstream spells them. The defaults are HAT's own at x4."""

    in_chans: int = 3
    embed_dim: int = 180
    depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    num_heads: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    window_size: int = 16
    compress_ratio: int = 3
    squeeze_factor: int = 30
    conv_scale: float = 0.01
    overlap_ratio: float = 0.5
    mlp_ratio: float = 2.0
    qkv_bias: bool = True
    patch_norm: bool = True
    ape_size: int = 0
    """Side of the absolute position embedding; 0 for none. No released checkpoint has one."""
    upscale: int = 4
    """1, 2, 3 or 4."""
    img_range: float = 1.0
    resi_connection: str = "1conv"
    """What closes an RHAG: `1conv` or `identity`."""
    num_feat: int = 64
    unshuffle: int = 1
    """Ours: 2 folds 2x2 pixels into channels before conv_first and adds one x2 stage to the tail."""
    attention_pool: int = 0
    """Ours: the channel attention's means are those of boxes of so many tokens a side, laid out from the top left, and
    no longer of the whole picture, which is 0. With boxes a pixel depends on a bounded part of the picture only."""

    @property
    def overlap_size(self) -> int:
        """Side of OCAB's key windows."""
        return self.window_size + int(self.window_size * self.overlap_ratio)

    @property
    def multiple(self) -> int:
        """Input height and width must be multiples of this."""
        return self.window_size * self.unshuffle

    @property
    def tail_scale(self) -> int:
        """How much the tail enlarges: `upscale`, times what unshuffling made smaller."""
        return self.upscale * self.unshuffle


class ChannelAttention(nn.Module):
    """A gate for each channel, from the channel's mean over the whole picture, or over each box of it."""

    def __init__(self, config: HATConfig) -> None:
        super().__init__()
        channels, squeezed = config.embed_dim, config.embed_dim // config.squeeze_factor
        self.pool = config.attention_pool
        self.attention = nn.Sequential(
            nn.Identity(),  # where upstream pools
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        box = self.pool
        if not box:
            gate: Tensor = self.attention(F.adaptive_avg_pool2d(x, 1))
            return x * gate
        # What reaches over the edge counts for nothing.
        gate = self.attention(F.avg_pool2d(x, box, ceil_mode=True, count_include_pad=False))
        gate = gate.repeat_interleave(box, 2).repeat_interleave(box, 3)
        return x * gate[:, :, : x.shape[2], : x.shape[3]]


class CAB(nn.Module):
    """Channel attention block: two convolutions through a narrower middle, then the channels' gate."""

    def __init__(self, config: HATConfig) -> None:
        super().__init__()
        channels, narrow = config.embed_dim, config.embed_dim // config.compress_ratio
        self.cab = nn.Sequential(
            nn.Conv2d(channels, narrow, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(narrow, channels, 3, 1, 1),
            ChannelAttention(config),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        y: Tensor = self.cab(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: HATConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class WindowAttention(nn.Module):
    """(S)W-MSA: every token of a window sees every other, with a learned bias for their relative position."""

    def __init__(self, config: HATConfig, num_heads: int) -> None:
        super().__init__()
        size, channels = config.window_size, config.embed_dim
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.index: Tensor
        self.register_buffer("index", relative_position_index(size), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels, bias=config.qkv_bias)
        self.proj = nn.Linear(channels, channels)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """(B * windows, n, C) to the same; `mask` (windows, n, n) is added to the logits."""
        q, k, v = rearrange(self.qkv(windows), "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + table_bias(
            self.relative_position_bias_table, self.index
        )
        if mask is not None:
            logits = rearrange(logits, "(b w) h n m -> b w h n m", w=mask.shape[0]) + mask[:, None]
            logits = logits.flatten(0, 1)
        y: Tensor = self.proj(rearrange(logits.softmax(-1) @ v, "b h n d -> b n (h d)"))
        return y


def table_bias(table: Tensor, index: Tensor) -> Tensor:
    """(rows, h) table and (n, m) index to the (h, n, m) bias."""
    return table[index].permute(2, 0, 1)


class HAB(nn.Module):
    """Hybrid attention block: (S)W-MSA beside CAB, then the MLP."""

    def __init__(self, config: HATConfig, num_heads: int, shift: int) -> None:
        super().__init__()
        self.size, self.shift, self.conv_scale = config.window_size, shift, config.conv_scale
        self.norm1 = nn.LayerNorm(config.embed_dim)
        self.attn = WindowAttention(config, num_heads)
        self.conv_block = CAB(config)
        self.norm2 = nn.LayerNorm(config.embed_dim)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        height, width = x.shape[1:3]
        y = self.norm1(x)
        # The convolutions see the map before it is rolled.
        convolved = self.conv_block(y)
        rolled = y.roll((-self.shift, -self.shift), (1, 2)) if self.shift else y
        mask = self._mask(height, width, x) if self.shift else None
        attended = window_reverse(self.attn(window_partition(rolled, self.size), mask), self.size, height, width)
        if self.shift:
            attended = attended.roll((self.shift, self.shift), (1, 2))
        x = x + attended + convolved * self.conv_scale
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _mask(self, height: int, width: int, like: Tensor) -> Tensor:
        """(windows, n, n): 0 where two tokens were neighbours before the roll, -100 where they were not."""
        # Made where it is wanted: a copy from the CPU would hold up all that is queued for a GPU.
        rows = shift_regions(height, self.size, self.shift, like.device)
        columns = shift_regions(width, self.size, self.shift, like.device)
        region = window_partition((3 * rows[:, None] + columns)[None, :, :, None], self.size)[..., 0]
        # Upstream's -100, not -inf: the weights were trained with what little it lets through.
        return (region[:, :, None] != region[:, None, :]).to(like) * -100.0


class OCAB(nn.Module):
    """Overlapping cross-attention block: each window's tokens see a larger window around it, then the MLP."""

    def __init__(self, config: HATConfig, num_heads: int) -> None:
        super().__init__()
        channels = config.embed_dim
        self.size, self.overlap_size, self.num_heads = config.window_size, config.overlap_size, num_heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=config.qkv_bias)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((self.size + self.overlap_size - 1) ** 2, num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.index: Tensor
        self.register_buffer("index", overlapping_position_index(self.size, self.overlap_size), persistent=False)
        self.proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        height, width, channels = x.shape[1:]
        qkv = self.qkv(self.norm1(x))
        q = rearrange(window_partition(qkv[..., :channels], self.size), "b n (h d) -> b h n d", h=self.num_heads)
        # Zeros *after* the linear layer, and unmasked: keys outside the picture take part in the softmax.
        around = overlapping_windows(qkv[..., channels:], self.size, self.overlap_size)
        k, v = rearrange(around, "b n (t h d) -> t b h n d", t=2, h=self.num_heads)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + table_bias(
            self.relative_position_bias_table, self.index
        )
        attended = rearrange(logits.softmax(-1) @ v, "b h n d -> b n (h d)")
        x = self.proj(window_reverse(attended, self.size, height, width)) + x
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class AttenBlocks(nn.Module):
    """The HABs of a group, every second one shifted, and the OCAB that closes them."""

    def __init__(self, config: HATConfig, depth: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            HAB(config, num_heads, shift=config.window_size // 2 if number % 2 else 0) for number in range(depth)
        )
        self.overlap_attn = OCAB(config, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.overlap_attn(x)
        return out


class RHAG(nn.Module):
    """Residual hybrid attention group: HABs, OCAB, a convolution, and the way around them."""

    def __init__(self, config: HATConfig, depth: int, num_heads: int) -> None:
        super().__init__()
        self.residual_group = AttenBlocks(config, depth, num_heads)
        is_conv = config.resi_connection == "1conv"
        self.conv: nn.Module = nn.Conv2d(config.embed_dim, config.embed_dim, 3, 1, 1) if is_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        y: Tensor = self.conv(self.residual_group(x).permute(0, 3, 1, 2))
        return x + y.permute(0, 2, 3, 1)


class _PatchEmbed(nn.Module):
    """Holds the norm that upstream keeps here."""

    def __init__(self, config: HATConfig) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(config.embed_dim) if config.patch_norm else nn.Identity()


class HAT(nn.Module):
    """The whole network.

    Args:
        config: the hyperparameters.

    Raises:
        ValueError: the hyperparameters do not go together.
    """

    def __init__(self, config: HATConfig) -> None:
        super().__init__()
        if config.upscale not in (1, 2, 3, 4) or config.unshuffle not in (1, 2):
            raise ValueError(
                f"upscale {config.upscale} and unshuffle {config.unshuffle}: must be 1, 2, 3 or 4, and 1 or 2"
            )
        if config.unshuffle == 2 and config.upscale == 3:
            raise ValueError("unshuffle 2 goes with upscale 1, 2 and 4")
        self.config = config
        channels, features = config.embed_dim, config.num_feat
        mean = torch.tensor(RGB_MEAN if config.in_chans == 3 else (0.0,) * config.in_chans)
        self.mean: Tensor
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(config.in_chans * config.unshuffle**2, channels, 3, 1, 1)
        if config.ape_size:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, config.ape_size**2, channels))
        self.patch_embed = _PatchEmbed(config)
        self.layers = nn.ModuleList(
            RHAG(config, depth, heads) for depth, heads in zip(config.depths, config.num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(channels)
        is_conv = config.resi_connection == "1conv"
        self.conv_after_body: nn.Module = nn.Conv2d(channels, channels, 3, 1, 1) if is_conv else nn.Identity()
        # Unshuffled, a token is several pixels, each of which needs its features.
        shuffled = features * config.unshuffle**2
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(channels, shuffled, 3, 1, 1), nn.LeakyReLU())
        self.upsample = _upsample(config.tail_scale, shuffled, features)
        self.conv_last = nn.Conv2d(features, config.in_chans, 3, 1, 1)
        self.pool_over(config.attention_pool)

    def pool_over(self, box: int) -> None:
        """Sets `HATConfig.attention_pool`, which no weight depends on.

        Raises:
            ValueError: not 0 and no multiple of the window.
        """
        if box < 0 or box % self.config.window_size:
            raise ValueError(
                f"attention_pool {box}: must be 0 (the whole picture) or a multiple of the window,"
                f" {self.config.window_size}"
            )
        self.config = replace(self.config, attention_pool=box)
        for module in self.modules():
            if isinstance(module, ChannelAttention):
                module.pool = box

    def forward(self, x: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in [0, 1] to (B, 3, sH, sW), not clamped; H and W are multiples of `config.multiple`."""
        shallow = self.shallow_features(x)
        return self.reconstruct(self.deep_features(shallow) + shallow)

    def shallow_features(self, x: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in [0, 1] to (B, C, H, W)."""
        x = (x - self.mean) * self.config.img_range
        if self.config.unshuffle > 1:
            x = F.pixel_unshuffle(x, self.config.unshuffle)
        out: Tensor = self.conv_first(x)
        return out

    def deep_features(self, shallow: Tensor) -> Tensor:
        """The body: (B, C, H, W) to the same."""
        x = self.patch_embed.norm(shallow.permute(0, 2, 3, 1))
        if self.config.ape_size:
            x = x + self.absolute_pos_embed.view(1, self.config.ape_size, self.config.ape_size, -1)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.conv_after_body(self.norm(x).permute(0, 3, 1, 2))
        return out

    def reconstruct(self, features: Tensor) -> Tensor:
        """The tail: (B, C, H, W) to RGB (B, 3, sH, sW)."""
        y: Tensor = self.conv_last(self.upsample(self.conv_before_upsample(features)))
        return y / self.config.img_range + self.mean


def _upsample(scale: int, before: int, features: int) -> nn.Sequential:
    """Convolutions and pixel shuffles that enlarge `scale` times."""
    if scale == 3:
        return nn.Sequential(nn.Conv2d(before, 9 * features, 3, 1, 1), nn.PixelShuffle(3))
    stages: list[nn.Module] = []
    while scale > 1:
        stages += [nn.Conv2d(before, 4 * features, 3, 1, 1), nn.PixelShuffle(2)]
        before = features
        scale //= 2
    return nn.Sequential(*stages)
