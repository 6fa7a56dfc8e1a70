"""Bicubic resizing of eight-bit RGB, equal to the published transform's to the last bit.

Pillow resizes in two passes with eight bits between them, rows first when the paper's models were
trained; later releases order the passes by their cost, and so give tall images other pixels. Here
rows are always first. The kernel takes a quarter of Pillow's time, and makes only what is kept.
Pillow, which stands in for it, makes all that is resized, so very long images are cropped first: a
file of a hundred bytes would take gigabytes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from rwkv_clip.ops import _library

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

MAX_FULL_ASPECT = 4


def resize_bicubic(
    pixels: Pixels, box: Box, size: tuple[int, int], offset: tuple[int, int], side: int
) -> Pixels:
    """Resize a box with antialias, and cut a square out of it.

    Args:
        pixels: uint8 [H, W, 3].
        box: left, upper, right, lower; in pixels of the source, fractions allowed.
        size: width and height that the box is resized to.
        offset: left and upper of the square in it.
        side: S, of the square.

    Returns:
        uint8 [3, S, S].
    """
    if not _library.is_loaded():
        return planes_of(resize_by_pillow(Image.fromarray(pixels), box, size, offset, side))
    source = torch.from_numpy(np.ascontiguousarray(pixels))
    planes = torch.ops.rwkv_clip.resize_bicubic(source, *map(float, box), *size, *offset, side)
    resized: Pixels = planes.numpy()
    return resized


def resize_bicubic_statement(
    pixels: Pixels, box: Box, size: tuple[int, int], offset: tuple[int, int], side: int
) -> Pixels:
    """What `resize_bicubic` computes, by Pillow."""
    return planes_of(_rows_first(Image.fromarray(pixels), box, size, offset, side))


def resize_by_pillow(
    image: Image.Image, box: Box, size: tuple[int, int], offset: tuple[int, int], side: int
) -> Image.Image:
    """The same of an image of any mode; to a level or two where MAX_FULL_ASPECT is exceeded.

    There a transparent image's colours, which opacity divides in the end, are as much farther off
    as it is low: by 255 / opacity of those levels, and by any number where it is near zero.
    """
    if max(size) <= MAX_FULL_ASPECT * min(size):
        return _rows_first(image, box, size, offset, side)
    left, upper, right, lower = _kept(box, size, offset, side)
    # The first pass makes every row that it is given: what the second does not read goes before.
    reach = 2 * max((lower - upper) / side, 1) + 1
    top = max(math.floor(upper - reach), 0)
    bottom = min(math.ceil(lower + reach), image.height)
    rows = image.crop((0, top, image.width, bottom))
    return _rows_first(rows, (left, upper - top, right, lower - top), (side, side), (0, 0), side)


def _kept(box: Box, size: tuple[int, int], offset: tuple[int, int], side: int) -> Box:
    """The part of the box that the square shows."""
    left, upper, right, lower = box
    across, down = (right - left) / size[0], (lower - upper) / size[1]
    x, y = offset
    start = (left + x * across, upper + y * down)
    return (*start, left + (x + side) * across, upper + (y + side) * down)


def planes_of(image: Image.Image) -> Pixels:
    """An image's red, green and blue: a view of [3, H, W], of memory that may be written."""
    colours = image if image.mode == "RGB" else image.convert("RGB")
    return np.array(colours).transpose(2, 0, 1)


def _rows_first(
    image: Image.Image, box: Box, size: tuple[int, int], offset: tuple[int, int], side: int
) -> Image.Image:
    """Resizes all of the box, in a call for each pass."""
    left, upper, right, lower = box
    # Colours count by their opacity: Pillow's own resize does the same around its two passes.
    opaque = {"RGBA": "RGBa", "LA": "La"}.get(image.mode, image.mode)
    across = image.convert(opaque).resize(
        (size[0], image.height), Image.Resampling.BICUBIC, (left, 0, right, image.height)
    )
    whole = across.resize(size, Image.Resampling.BICUBIC, (0, upper, size[0], lower))
    x, y = offset
    return whole.convert(image.mode).crop((x, y, x + side, y + side))
