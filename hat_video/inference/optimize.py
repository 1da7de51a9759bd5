"""Exact rewrites: a loaded HAT becomes a network that computes the same function with far fewer bytes moved.

- Position biases are looked up once and kept as (heads, n, m); so are the queries' 1/sqrt(d), inside q's weights.
- Heads of a width that kernels dislike (30) are padded with zeros (to 32) in the weights.
- The shift mask is no tensor of its own per window: after the roll only the last row and column of windows are split,
  so there are four kinds of window, and two small masks.
- `conv_scale` sits in the channel gate, so the convolutions' output is touched once.
- The residual trunk, the only place where fp16 overflows, is scaled by 2^-k: folded into the weights of what writes to
  it and into the eps of the LayerNorms that read from it. In fp32 the result is the same to the bit.
- Activations stay (B, H, W, C); permuting them *is* channels_last, so convolutions copy nothing.
- On a CPU the fp32 products go to oneDNN, not to MKL.

The module is built once and never changes, so several threads may call it at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hat_video.model.hat import HAB, HAT, OCAB, RHAG, ChannelAttention, WindowAttention

__all__ = ["FastHAT", "optimize"]

# Logits of this many elements stay in a core's cache between the two products around the softmax (measured).
_CHUNK_ELEMENTS = 1 << 19

# What stands between the layers of an attention or an MLP is several times its input. On a CPU it is made for some rows
# at a time: of this many elements of the input, which is a whole frame where frames are small.
_BAND_ELEMENTS = 1 << 22

_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def optimize(network: HAT, *, dtype: torch.dtype, device: torch.device, trunk_exponent: int = 0) -> FastHAT:
    """The inference form of a network.

    Args:
        network: in fp32 or fp64; is not changed.
        dtype: of the arithmetic: float32, bfloat16, float16, or float64 for tests.
        device: where it will run.
        trunk_exponent: k, the residual trunk is carried as 2^-k of itself.
    """
    return FastHAT(network, dtype, 2.0**-trunk_exponent).to(device).eval().requires_grad_(False)


class _Weights(nn.Module):
    """A weight and a bias in the dtype of the arithmetic; prepared in fp64."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight.detach().to(dtype)
        if weight.ndim == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))


class _Norm(_Weights):
    """LayerNorm over the last axis. Where the trunk is scaled by a, eps is scaled by a^2 and nothing else changes."""

    def __init__(
        self, norm: nn.LayerNorm, dtype: torch.dtype, *, input_scale: float, output_scale: float = 1.0
    ) -> None:
        super().__init__(norm.weight.double() * output_scale, norm.bias.double() * output_scale, dtype)
        self.eps = norm.eps * input_scale**2

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class _Scale(nn.Module):
    """Where there is no norm to fold the trunk's scale into."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class _Linear(_Weights):
    """On the last axis of x."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if x.dtype == torch.float32 and x.device.type == "cpu" and x.ndim > 2 and rows % 16 == 0 and _HAS_ONEDNN:
            return self._as_convolution(x, rows)
        return F.linear(x, self.weight, self.bias)

    def _as_convolution(self, x: Tensor, rows: int) -> Tensor:
        """The same product by oneDNN: over twice as fast as MKL's on processors that are not Intel's.

        torch hands every fp32 product to MKL, and a 1x1 convolution too, unless it has 16 pictures or more.
        """
        pictures = x.reshape(16, rows // 16, 1, x.shape[-1]).permute(0, 3, 1, 2)
        y = F.conv2d(pictures, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class _FewRows(_Weights):
    """On the last axis of x; each row comes out the same to the bit, whatever rows are with it.

    Which kernel a matrix product takes depends on how many rows there are, and here there are few: one a box.
    """

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias


class _Conv(_Weights):
    """3x3 convolution of a (B, C, H, W) view."""

    def forward(self, x: Tensor) -> Tensor:
        is_open = not torch.compiler.is_compiling()
        if x.dtype == torch.float32 and x.device.type == "cpu" and _HAS_ONEDNN and is_open:
            # By name, because torch computes small pictures otherwise, and then a part is not as in the whole.
            # Its compiler cannot look into it.
            one = (1, 1)
            return torch.mkldnn_convolution(x, self.weight, self.bias, one, one, one, 1)
        return F.conv2d(x, self.weight, self.bias, padding=1)


def _conv(layer: nn.Module, dtype: torch.dtype, *, bias_scale: float = 1.0) -> _Conv:
    if not isinstance(layer, nn.Conv2d) or layer.bias is None:
        raise TypeError(f"{type(layer).__name__} is not a convolution with bias")
    return _Conv(layer.weight, layer.bias.double() * bias_scale, dtype)


def _padded_head(width: int) -> int:
    """Kernels want a multiple of 8."""
    return -(-width // 8) * 8


def _fold_qkv(qkv: nn.Linear, heads: int, dtype: torch.dtype) -> _Linear:
    """Rows (q | k | v, head, lane): q scaled by 1/sqrt(d), lanes padded with zeros."""
    channels = qkv.in_features
    width = channels // heads
    scale = torch.tensor([width**-0.5, 1.0, 1.0], dtype=torch.float64, device=qkv.weight.device)
    pad = _padded_head(width) - width
    weight = qkv.weight.double().view(3, heads, width, channels) * scale[:, None, None, None]
    weight = F.pad(weight, (0, 0, 0, pad)).flatten(0, 2)
    bias = None
    if qkv.bias is not None:
        bias = F.pad(qkv.bias.double().view(3, heads, width) * scale[:, None, None], (0, pad)).flatten()
    return _Linear(weight, bias, dtype)


def _fold_proj(proj: nn.Linear, heads: int, trunk: float, dtype: torch.dtype) -> _Linear:
    width = proj.in_features // heads
    weight = proj.weight.double().view(-1, heads, width)
    weight = F.pad(weight, (0, _padded_head(width) - width)).flatten(1)
    return _Linear(weight * trunk, proj.bias.double() * trunk, dtype)


def _fold_bias(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, heads, n, m)."""
    return table.detach()[index].permute(2, 0, 1)[None].contiguous().to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T + bias) v, per window and head.

    Args:
        q: (W, n, heads, d), already scaled.
        k: (W, m, heads, d).
        v: likewise.
        bias: (1, heads, n, m).

    Returns:
        (W, n, heads, d).
    """
    if q.dtype not in (torch.bfloat16, torch.float16) or q.is_cuda:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = bias.expand(q.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2)
    # On a CPU the fused kernel computes its products in fp32; the half-width ones are up to twice as fast.
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK_ELEMENTS // (q.shape[1] * k.shape[1]))
    for head in range(q.shape[2]):
        for start in range(0, q.shape[0], step):
            part = slice(start, start + step)
            logits = torch.baddbmm(bias[:, head], q[part, :, head], k[part, :, head].transpose(1, 2))
            # The half-width softmax is slow where its rows do not fill whole vectors of 32.
            wide = torch.float32 if k.shape[1] % 32 else None
            weights = logits.softmax(-1, dtype=wide).to(q.dtype)
            out[part, :, head] = torch.bmm(weights, v[part, :, head])
    return out


class _FastWindowAttention(nn.Module):
    """(S)W-MSA on (B, H, W, C)."""

    bias: Tensor
    row_mask: Tensor
    column_mask: Tensor

    def __init__(self, attention: WindowAttention, size: int, shift: int, trunk: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.shift, self.heads = size, shift, attention.num_heads
        self.qkv = _fold_qkv(attention.qkv, self.heads, dtype)
        self.proj = _fold_proj(attention.proj, self.heads, trunk, dtype)
        self.register_buffer("bias", _fold_bias(attention.relative_position_bias_table, attention.index, dtype))
        if shift:
            wrapped = torch.arange(size) >= size - shift
            rows, columns = wrapped.repeat_interleave(size), wrapped.repeat(size)
            self.register_buffer("row_mask", (rows[:, None] != rows[None]).to(dtype) * -100)
            self.register_buffer("column_mask", (columns[:, None] != columns[None]).to(dtype) * -100)

    def forward(self, y: Tensor) -> Tensor:
        height, out = y.shape[1], torch.empty_like(y)
        for rows in _bands(y, self.size):
            # Where these rows are once all have been rolled back by the shift.
            first, last = rows.start + self.shift, min(height, rows.stop + self.shift)
            around = rows.stop + self.shift - last
            part = torch.cat([y[:, first:last], y[:, :around]], 1) if around else y[:, first:last]
            z = self._rows(part.roll(-self.shift, 2) if self.shift else part, is_last=rows.stop == height)
            z = z.roll(self.shift, 2) if self.shift else z
            out[:, first:last] = z[:, : last - first]
            if around:
                out[:, :around] = z[:, last - first :]
        return out

    def _rows(self, y: Tensor, *, is_last: bool) -> Tensor:
        """Some rows of windows; `is_last`: what was at both ends of the picture meets in the last of them."""
        batch, height, width, channels = y.shape
        size, rows, columns = self.size, height // self.size, width // self.size
        windows = y.reshape(batch, rows, size, columns, size, channels).transpose(2, 3)
        windows = windows.reshape(-1, size * size, channels)
        qkv = self.qkv(windows).view(windows.shape[0], size * size, 3, self.heads, -1)
        if self.shift:
            out = self._attend_shifted(qkv, batch, rows, columns, rows - is_last)
        else:
            q, k, v = qkv.unbind(2)
            out = _attend(q, k, v, self.bias)
        z: Tensor = self.proj(out.flatten(2))
        return z.view(batch, rows, columns, size, size, channels).transpose(2, 3).reshape(y.shape)

    def _attend_shifted(self, qkv: Tensor, batch: int, rows: int, columns: int, inner: int) -> Tensor:
        """Four kinds of window: inner ones, those of the last column, of the last row, and the last corner."""
        grid_in = qkv.view(batch, rows, columns, *qkv.shape[1:])
        grid_out = torch.empty_like(grid_in[:, :, :, :, 0], memory_format=torch.contiguous_format)
        # Upstream masks a pair that is parted in both directions once, at -100.
        corner = torch.minimum(self.row_mask, self.column_mask)
        kinds = (
            (slice(0, inner), slice(0, columns - 1), None),
            (slice(0, inner), slice(columns - 1, columns), self.column_mask),
            (slice(inner, rows), slice(0, columns - 1), self.row_mask),
            (slice(inner, rows), slice(columns - 1, columns), corner),
        )
        for y, x, mask in kinds:
            part = grid_in[:, y, x]
            if part.shape[1] == 0 or part.shape[2] == 0:
                continue
            q, k, v = part.flatten(0, 2).unbind(2)
            result = _attend(q, k, v, self.bias if mask is None else self.bias + mask)
            grid_out[:, y, x] = result.reshape(part.shape[:4] + result.shape[2:])
        return grid_out.flatten(0, 2)


class _FastMlp(nn.Module):
    def __init__(self, fc1: nn.Linear, fc2: nn.Linear, trunk: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = _Linear(fc1.weight, fc1.bias, dtype)
        self.fc2 = _Linear(fc2.weight.double() * trunk, fc2.bias.double() * trunk, dtype)

    def forward(self, y: Tensor) -> Tensor:
        hidden: Tensor = self.fc1(y)
        out: Tensor = self.fc2(F.gelu(hidden))
        return out


def _channel_attention(block: HAB) -> ChannelAttention:
    gate = block.conv_block.cab[3]
    if not isinstance(gate, ChannelAttention):
        raise TypeError(f"{type(gate).__name__} is not a channel attention")
    return gate


def _gate_layers(block: HAB) -> tuple[nn.Conv2d, nn.Conv2d]:
    """The two 1x1 convolutions of the channel attention."""
    attention = _channel_attention(block).attention
    squeeze, excite = attention[1], attention[3]
    if not isinstance(squeeze, nn.Conv2d) or not isinstance(excite, nn.Conv2d):
        raise TypeError("the channel attention is not made of convolutions")
    return squeeze, excite


class _FastHAB(nn.Module):
    def __init__(self, block: HAB, trunk: float, dtype: torch.dtype) -> None:
        super().__init__()
        squeeze, excite = _gate_layers(block)
        self.norm1 = _Norm(block.norm1, dtype, input_scale=trunk)
        self.attention = _FastWindowAttention(block.attn, block.size, block.shift, trunk, dtype)
        self.narrow = _conv(block.conv_block.cab[0], dtype)
        self.widen = _conv(block.conv_block.cab[2], dtype)
        # A few numbers a picture: fp32 costs nothing, and 0.01 * 2^-k would be lost in fp16.
        gate = torch.float64 if dtype == torch.float64 else torch.float32
        self.squeeze = _FewRows(squeeze.weight[:, :, 0, 0], squeeze.bias, gate)
        self.excite = _FewRows(excite.weight[:, :, 0, 0], excite.bias, gate)
        self.gate_scale = block.conv_scale * trunk
        self.box = _channel_attention(block).pool
        self.norm2 = _Norm(block.norm2, dtype, input_scale=trunk)
        self.mlp = _FastMlp(block.mlp.fc1, block.mlp.fc2, trunk, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm1(x)
        convolved = self.widen(F.gelu(self.narrow(y.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        x = x + self.attention(y)
        for rows, columns, tall, wide in _boxes(x.shape[1], x.shape[2], self.box):
            # (B, boxes down, rows of a box, boxes across, columns of a box, C), without a copy.
            branch, part = (
                z[:, rows, columns].unflatten(1, (-1, tall)).unflatten(3, (-1, wide)) for z in (convolved, x)
            )
            mean = branch.mean((2, 4), keepdim=True, dtype=self.squeeze.weight.dtype)
            gate = _sigmoid(self.excite(F.relu(self.squeeze(mean)))) * self.gate_scale
            part.addcmul_(branch, gate.to(x.dtype))
        for rows in _bands(x, 1):
            x[:, rows] += self.mlp(self.norm2(x[:, rows]))
        return x


def _bands(x: Tensor, unit: int) -> Iterator[slice]:
    """The rows of (B, H, W, C), in turns: multiples of `unit`, and few enough to be made at once."""
    height = x.shape[1]
    fitting = height if x.is_cuda else _BAND_ELEMENTS // x[:, :1].numel() // unit * unit
    step = max(unit, fitting)
    for top in range(0, height, step):
        yield slice(top, min(height, top + step))


def _sigmoid(x: Tensor) -> Tensor:
    """The sigmoid, each element the same to the bit whatever is with it.

    The last ones of a tensor, where they fill no vector, would be computed by another formula.
    """
    flat = F.pad(x.flatten(), (0, -x.numel() % 64))
    return torch.sigmoid(flat)[: x.numel()].view_as(x)


def _boxes(height: int, width: int, box: int) -> Iterator[tuple[slice, slice, int, int]]:
    """Parts of a picture with boxes of one size each, and that size; the whole picture is one box if `box` is 0."""
    for rows, tall in _whole_and_rest(height, box):
        for columns, wide in _whole_and_rest(width, box):
            yield rows, columns, tall, wide


def _whole_and_rest(length: int, box: int) -> list[tuple[slice, int]]:
    if not box or length <= box:
        return [(slice(0, length), length)]
    rest = length % box
    parts = [(slice(0, length - rest), box)]
    return [*parts, (slice(length - rest, length), rest)] if rest else parts


class _FastOCAB(nn.Module):
    bias: Tensor

    def __init__(self, block: OCAB, trunk: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.overlap_size, self.heads = block.size, block.overlap_size, block.num_heads
        self.norm1 = _Norm(block.norm1, dtype, input_scale=trunk)
        self.qkv = _fold_qkv(block.qkv, self.heads, dtype)
        self.proj = _fold_proj(block.proj, self.heads, trunk, dtype)
        self.register_buffer("bias", _fold_bias(block.relative_position_bias_table, block.index, dtype))
        self.norm2 = _Norm(block.norm2, dtype, input_scale=trunk)
        self.mlp = _FastMlp(block.mlp.fc1, block.mlp.fc2, trunk, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for rows in _bands(x, self.size):
            part = x[:, rows] + self._attended(x, rows)
            out[:, rows] = part + self.mlp(self.norm2(part))
        return out

    def _attended(self, x: Tensor, rows: slice) -> Tensor:
        """What the attention adds to some rows."""
        batch, height, width, channels = x.shape
        size, wide, down, columns = (
            self.size,
            self.overlap_size,
            (rows.stop - rows.start) // self.size,
            width // self.size,
        )
        pad = (wide - size) // 2
        first, last = max(0, rows.start - pad), min(height, rows.stop + pad)
        qkv: Tensor = self.qkv(self.norm1(x[:, first:last]))
        lanes = qkv.shape[-1] // 3
        q = qkv[:, rows.start - first : rows.stop - first, :, :lanes]
        q = q.reshape(batch, down, size, columns, size, lanes).transpose(2, 3)
        q = q.reshape(-1, size * size, self.heads, lanes // self.heads)
        # Zeros after the linear layer, unmasked: keys outside the picture take part, as upstream has it.
        above, below = first - rows.start + pad, rows.stop + pad - last
        around = F.pad(qkv[..., lanes:], (0, 0, pad, pad, above, below))
        near = around.unfold(1, wide, size).unfold(2, wide, size).permute(0, 1, 2, 4, 5, 3)
        k, v = near.reshape(-1, wide * wide, 2, self.heads, lanes // self.heads).unbind(2)
        out = _attend(q, k, v, self.bias)
        z: Tensor = self.proj(out.flatten(2))
        z = z.view(batch, down, columns, size, size, channels).transpose(2, 3)
        return z.reshape(batch, rows.stop - rows.start, width, channels)


class _FastRHAG(nn.Module):
    def __init__(self, group: RHAG, trunk: float, dtype: torch.dtype) -> None:
        super().__init__()
        blocks = [_FastHAB(block, trunk, dtype) for block in group.residual_group.blocks if isinstance(block, HAB)]
        self.blocks = nn.Sequential(*blocks, _FastOCAB(group.residual_group.overlap_attn, trunk, dtype))
        self.conv: nn.Module = (
            nn.Identity() if isinstance(group.conv, nn.Identity) else _conv(group.conv, dtype, bias_scale=trunk)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.blocks(x).permute(0, 3, 1, 2))
        return x + y.permute(0, 2, 3, 1)


class FastHAT(nn.Module):
    """A HAT for inference; see `optimize`."""

    mean: Tensor
    position: Tensor | None

    def __init__(self, network: HAT, dtype: torch.dtype, trunk: float) -> None:
        super().__init__()
        config = network.config
        self.config, self.dtype = config, dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("mean", network.mean.to(wide))
        self.conv_first = _conv(network.conv_first, dtype)
        norm = network.patch_embed.norm
        self.embed_norm: nn.Module = (
            _Norm(norm, dtype, input_scale=1.0, output_scale=trunk) if isinstance(norm, nn.LayerNorm) else _Scale(trunk)
        )
        position = network.absolute_pos_embed if config.ape_size else None
        self.register_buffer("position", None if position is None else (position.detach() * trunk).to(dtype))
        self.layers = nn.Sequential(
            *(_FastRHAG(group, trunk, dtype) for group in network.layers if isinstance(group, RHAG))
        )
        self.norm = _Norm(network.norm, dtype, input_scale=trunk)
        after = network.conv_after_body
        self.conv_after_body: nn.Module = nn.Identity() if isinstance(after, nn.Identity) else _conv(after, dtype)
        self.conv_before_upsample = _conv(network.conv_before_upsample[0], dtype)
        self.upsample = nn.Sequential(
            *(_conv(layer, dtype) if isinstance(layer, nn.Conv2d) else layer for layer in network.upsample)
        )
        self.conv_last = _conv(network.conv_last, dtype)

    def groups(self) -> list[_FastRHAG]:
        """The RHAGs; their outputs, and those of their blocks, are the residual trunk."""
        return [group for group in self.layers if isinstance(group, _FastRHAG)]

    def blocks(self) -> list[nn.Module]:
        """Every HAB and OCAB."""
        return [block for group in self.groups() for block in group.blocks]

    def forward(self, x: Tensor) -> Tensor:
        """RGB (B, 3, H, W), fp32 in [0, 1], to (B, 3, sH, sW) of the same dtype; as `HAT.forward`."""
        config = self.config
        x = ((x - self.mean) * config.img_range).to(self.dtype)
        if config.unshuffle > 1:
            x = F.pixel_unshuffle(x, config.unshuffle)
        shallow = self.conv_first(x.contiguous(memory_format=torch.channels_last))
        body = self.embed_norm(shallow.permute(0, 2, 3, 1))
        if self.position is not None:
            body = body + self.position.view(1, config.ape_size, config.ape_size, -1)
        body = self.norm(self.layers(body))
        deep = self.conv_after_body(body.permute(0, 3, 1, 2)) + shallow
        y: Tensor = self.conv_last(self.upsample(F.leaky_relu(self.conv_before_upsample(deep), 0.01)))
        return y.to(self.mean.dtype).div_(config.img_range).add_(self.mean)
