"""Reading pictures from files. Pillow is needed for it and for nothing else of the package's daily work."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hat_video.errors import SourceError, UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["deeper_than_8_bits", "pillow", "read_picture"]


def pillow() -> ModuleType:
    """The package PIL with its modules.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError:
        raise UsageError("pictures are read and written by Pillow: pip install 'hat-video[train]'") from None
    return PIL


def deeper_than_8_bits(picture: Image.Image) -> str:
    """What a picture that has not been decoded is of, where that is more than 8 bits a channel; else nothing.

    Pillow opens colour of 16 bits as 8, and tells only in the form in which the file has it.
    """
    forms = [picture.mode, *(str(tile[3]) for tile in getattr(picture, "tile", []))]
    return next((form for form in forms if form.startswith(("I", "F")) or re.search(r";16[BLN]", form)), "")


def read_picture(path: Path) -> Tensor:
    """A picture as RGB; a gray one is read as three equal channels, as BasicSR does.

    Returns:
        (1, 3, H, W) float32 in [0, 1], in steps of 1/255.

    Raises:
        SourceError: no such file, or no picture that Pillow knows.
        UsageError: Pillow is not installed.
    """
    image = pillow().Image
    try:
        with image.open(path) as file:
            depth = deeper_than_8_bits(file)
            rgb = np.array(file.convert("RGB"))
    except image.UnidentifiedImageError:
        raise SourceError(f"{path}: not a picture that can be read: unknown format") from None
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise SourceError(f"{path}: not a picture that can be read: {error}") from None
    if depth:
        raise SourceError(f"{path}: is of {depth}; the protocol is for 8 bits a channel, convert it first")
    return torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
