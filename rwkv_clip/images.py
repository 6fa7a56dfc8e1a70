"""Encoded images opened by Pillow, with a bound on the work that their headers make; no PyTorch."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Encoded = bytes | bytearray | memoryview

# Modes that Pillow resizes with every filter and whose conversion to RGB keeps eight bits.
_RESIZABLE = frozenset({"RGB", "L", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})

_MOST_READS = 20_000  # of a header; whole files of cameras and editors take some hundreds
_MOST_EXIF = 16
_EXIF = b"Exif\0\0"
# Bytes of a PNG's parts that may be inflated. DEFLATE makes at most some 1,032 bytes of one, and
# Pillow stops at a megabyte of a part: so of a part the first kilobyte counts.
_MOST_INFLATED = 16 * 1024
_MOST_OF_PART = 1024
_INFLATED = frozenset({b"iCCP", b"zTXt", b"iTXt"})


class HeaderError(OSError):
    """A header has more parts than any honest file."""


class _Header(io.BytesIO):
    """A file that counts what is read of it while `bounded`.

    Pillow walks a header part by part, copies what it has of a JPEG's Exif for each further part
    of it, and inflates parts of a PNG, those behind its pixels included: sixteen megabytes of small
    parts would keep a process for minutes.
    """

    def __init__(self, data: Encoded) -> None:
        super().__init__(data)
        self.bounded = True
        self._reads = self._exif = self._inflated = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As BytesIO's; raises HeaderError."""
        got = super().read(size)
        if size == 8:  # the head of a part of a PNG: its length, and its kind
            if got[4:] in _INFLATED:
                self._inflated += min(int.from_bytes(got[:4]), _MOST_OF_PART)
            if self._inflated > _MOST_INFLATED:
                raise HeaderError("its header has too many parts")
        if self.bounded:
            self._reads += 1
            self._exif += got.startswith(_EXIF)
            if self._reads > _MOST_READS or self._exif > _MOST_EXIF:
                raise HeaderError("its header has too many parts")
        return got


def open_image(data: Encoded, formats: Sequence[str] | None = None) -> Image.Image:
    """Read an image's header; its pixels are decoded when they are asked for.

    Args:
        data: the encoded image.
        formats: Pillow's names of those that are tried; all if None.

    Raises:
        UnidentifiedImageError: it is of none of the formats.
        Exception: whatever a broken header leads Pillow to.
    """
    file = _Header(data)
    image = Image.open(file, formats=list(formats) if formats is not None else None)
    file.bounded = False
    return image


class ImageDecodeError(ValueError):
    """An input that is no usable image.

    Attributes:
        reason: what is wrong with it.
        name: which input it is (its index in a batch, or the id the caller gave), or None.
    """

    def __init__(self, reason: str, name: object = None) -> None:
        super().__init__(reason if name is None else f"image {name!r}: {reason}")
        self.reason = reason
        self.name = name

    def __reduce__(self) -> tuple[type[ImageDecodeError], tuple[str, object]]:
        return type(self), (self.reason, self.name)


def open_named(data: Encoded, name: object = None) -> Image.Image:
    """As `open_image`, of any format.

    Raises:
        ImageDecodeError: its header cannot be read; says `name`.
    """
    if len(data) == 0:
        raise ImageDecodeError("is empty (0 bytes)", name)
    try:
        return open_image(data)
    except UnidentifiedImageError:
        start = bytes(data[:12])
        raise ImageDecodeError(f"is not a known image format (starts {start!r})", name) from None
    except Exception as error:  # Pillow's parsers raise whatever a broken header leads them to
        raise ImageDecodeError(f"cannot be opened ({error})", name) from error


def eight_bits(image: Image.Image) -> Image.Image:
    """Decodes, into a mode that Pillow resizes with every filter and that has eight bits."""
    image.load()
    if image.mode.startswith("I"):  # I and I;16: in PNG, TIFF and PGM files these hold 16 bits
        grey = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode in _RESIZABLE:
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, and no warning about what is dropped
    return image.convert("RGB")


def small_picture(image: bytes, side: int, name: object = None) -> Image.Image:
    """An encoded image as RGB, on white where it is transparent, no side longer than `side`.

    Raises:
        ImageDecodeError: it is no image, or a broken one; says `name`.
    """
    opened = open_named(image, name)
    try:
        if opened.format == "JPEG":
            opened.draft(None, (side, side))
        opened = eight_bits(ImageOps.exif_transpose(opened))
        opened.thumbnail((side, side), Image.Resampling.BICUBIC)
        if opened.mode in ("RGBA", "LA"):
            opened = opened.convert("RGBA")
            white = Image.new("RGBA", opened.size, "white")
            opened = Image.alpha_composite(white, opened)
        return opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        raise ImageDecodeError(f"cannot be decoded ({error})", name) from error
