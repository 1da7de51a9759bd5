"""One batch of planes, from the source's to the output's: colour, network, size, alpha."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hat_video.color import alpha_from_unit, alpha_to_unit, from_rgb, to_rgb
from hat_video.frames import VideoInfo
from hat_video.model.resample import resize

__all__ = ["upscale_planes"]


def upscale_planes(
    planes: Sequence[Tensor], small: VideoInfo, large: VideoInfo, network: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Enlarges pictures.

    Alpha goes the same way as a gray picture; it is taken to be straight, so colours are enlarged as they are, those
    under transparent pixels too. Where the network's size is not the output's, a Lanczos resample follows.

    Args:
        planes: (N, h, w), as `small` says.
        small: the facts of the source.
        large: the facts of the output.
        network: (N, 3, H, W) R'G'B' in [0, 1] to the same, enlarged.

    Returns:
        (N, h, w) planes, as `large` says.
    """

    def enlarged(rgb: Tensor) -> Tensor:
        made = network(rgb)
        size = (large.height, large.width)
        return made if made.shape[2:] == size else resize(made, size, kernel="lanczos").clamp_(0, 1)

    colours = from_rgb(enlarged(to_rgb(planes, small.pixel_format, small.color)), large.pixel_format, large.color)
    if not large.pixel_format.has_alpha:
        return colours
    alpha = alpha_to_unit(planes, small.pixel_format)
    opaque = colours[0].new_ones((), dtype=torch.float32).expand(colours[0].shape[0], 1, large.height, large.width)
    if alpha is None:
        return (*colours, alpha_from_unit(opaque, large.pixel_format))
    # An even alpha (most often: opaque) stays exactly that, and costs nothing.
    first = alpha[:, :, :1, :1]
    made = first * opaque if bool((alpha == first).all()) else enlarged(alpha.repeat(1, 3, 1, 1)).mean(1, keepdim=True)
    return (*colours, alpha_from_unit(made.to(colours[0].device), large.pixel_format))
