"""Random changes of a training image's colours, so that a model looks at shapes as well.

The paper's recipe has none: with millions of photographs colours vary by themselves. A few thousand
drawings of one artist are learnt by their colours, which another artist chooses differently.

Brightness, contrast, saturation and the loss of all colour are each a linear map of (red, green,
blue), so an image goes through their product, and is rounded and cut to 0..255 once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # who says how far colours change needs no PyTorch
    from rwkv_clip.resize import Pixels

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode L


@dataclass(frozen=True)
class ColourJitter:
    """How far colours are changed.

    Attributes:
        brightness: pixels are multiplied by a factor drawn from 1 - brightness to 1 + brightness.
        contrast: so are their distances from the image's mean grey.
        saturation: so are their distances from their own grey.
        grey: share of the images that lose their colour.

    Raises:
        ValueError: one of them is not from 0 to 1.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}, takes a number from 0 to 1")

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The image in other colours, uint8 [3, H, W]; always takes the same draws from rng."""
        reaches = (self.brightness, self.contrast, self.saturation)
        brightness, contrast, saturation = (rng.uniform(1 - one, 1 + one) for one in reaches)
        if rng.random() < self.grey:
            saturation = 0.0
        flat = pixels.reshape(3, -1)
        mean = _LUMA @ flat.mean(axis=1, dtype=np.float32)
        colours = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * _LUMA
        changed = (brightness * contrast * colours).astype(np.float32) @ flat.astype(np.float32)
        changed += brightness * (1 - contrast) * mean + 0.5  # a half, because the cast cuts off
        return changed.clip(0, 255, out=changed).astype(np.uint8).reshape(pixels.shape)
