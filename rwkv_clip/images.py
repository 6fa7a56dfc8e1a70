"""Encoded images opened by Pillow, with a bound on the work that their headers make; no PyTorch."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Encoded = bytes | bytearray | memoryview

# Modes that Pillow resizes with every filter and whose conversion to RGB keeps eight bits.
_RESIZABLE = frozenset({"RGB", "L", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})

_MOST_READS = 20_000  # of a header; whole files of cameras and editors take some hundreds
_MOST_EXIF = 16
_TOO_MANY_PARTS = "has a header of too many parts"
_EXIF = b"Exif\0\0"
# Bytes of a PNG's parts that may be inflated. DEFLATE makes at most some 1,032 bytes of one, and
# Pillow stops at a megabyte of a part: so of a part the first kilobyte counts.
_MOST_INFLATED = 16 * 1024
_MOST_OF_PART = 1024
_INFLATED = frozenset({b"iCCP", b"zTXt", b"iTXt"})

# A scan of a JPEG may take no bytes and goes over all pixels. libjpeg makes ten of an image in
# colour and mozjpeg under twenty, however large it is; others may do as they like with a small one.
_MOST_SCANS, _MOST_SCANS_OF_LARGE = 100, 25
_MOST_SCANNED = 1_000_000_000  # scans times pixels, where they are more than those of a large one
_SCAN = 0xDAFF  # FF DA as a number, the first byte the lowest
# What follows FF otherwise is a part of the pixels to libjpeg, or has no content to pass over.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

_RUN_LENGTHS = (1, 2)  # how BMPs tell that they are compressed
_PILLOW_LACKS = "Unsupported BMP compression"  # as its error begins: of JPEG and PNG within
_COMPRESSED_BMP = "is a compressed BMP; save it as a PNG"


class HeaderError(OSError):
    """A header tells of more work than any honest file's; says what the image is or has."""


class CodingError(HeaderError):
    """An image whose format may hold it in another way, that is decoded soon enough."""


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
                raise HeaderError(_TOO_MANY_PARTS)
        if self.bounded:
            self._reads += 1
            self._exif += got.startswith(_EXIF)
            if self._reads > _MOST_READS or self._exif > _MOST_EXIF:
                raise HeaderError(_TOO_MANY_PARTS)
        return got


def open_image(data: Encoded, formats: Sequence[str] | None = None) -> Image.Image:
    """Read an image's header; its pixels are decoded when they are asked for.

    Args:
        data: the encoded image.
        formats: Pillow's names of those that are tried; all if None.

    Raises:
        UnidentifiedImageError: it is of none of the formats.
        HeaderError: to decode it would take out of all proportion to its size.
        Exception: whatever a broken header leads Pillow to.
    """
    file = _Header(data)
    try:
        image = Image.open(file, formats=list(formats) if formats is not None else None)
    except OSError as error:
        if str(error).startswith(_PILLOW_LACKS):
            raise CodingError(_COMPRESSED_BMP) from error
        raise
    file.bounded = False
    if image.format in ("JPEG", "MPO"):
        _check_scans(file.getvalue(), image.width * image.height)
    if image.format in ("BMP", "DIB") and image.info.get("compression") in _RUN_LENGTHS:
        # Pillow decodes these in Python, a pixel at a time.
        raise CodingError(_COMPRESSED_BMP)
    return image


def _check_scans(jpeg: bytes, pixels: int) -> None:
    """Raise HeaderError for a JPEG that goes over its pixels too often."""
    most = min(_MOST_SCANS, max(_MOST_SCANS_OF_LARGE, _MOST_SCANNED // max(pixels, 1)))
    scans = scans_at_least(jpeg, most)
    if scans > most:
        raise HeaderError(f"has {scans} scans, more than the {most} that are read of its size")


def scans_at_least(jpeg: bytes, least: int) -> int:
    """How many scans a JPEG has, or `least` where that is more.

    Raises:
        HeaderError: it is of too many parts to be gone through.
    """
    # Previews and whatever lies behind the image have such bytes too, so these are the most.
    if sum(_count_of_scan(jpeg, start) for start in (0, 1)) <= least:
        return least
    return max(least, _scans(jpeg))


def _count_of_scan(jpeg: bytes, start: int) -> int:
    """How often the two bytes that begin a scan are there, at every second byte from `start` on.

    A tenth of the time of bytes.count.
    """
    pairs = np.frombuffer(jpeg, "<u2", (len(jpeg) - start) // 2, start)
    return int(np.count_nonzero(pairs == _SCAN))


def _scans(jpeg: bytes) -> int:
    """Scans, as libjpeg finds them: it goes on from a part's end to any marker."""
    scans, at = 0, len(b"\xff\xd8")
    for _ in range(_MOST_READS):
        found = _MARKER.search(jpeg, at)
        if found is None or found[0][1] == _END_OF_IMAGE:
            return scans
        scans += found[0][1] == _START_OF_SCAN
        at = found.end()
        at += max(2, int.from_bytes(jpeg[at : at + 2]))  # the length counts its own two bytes
    raise HeaderError(_TOO_MANY_PARTS)


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
    except HeaderError as error:
        raise ImageDecodeError(str(error), name) from error
    except MemoryError:  # which is not the file's fault
        raise
    except Exception as error:  # Pillow's parsers raise whatever a broken header leads them to
        raise ImageDecodeError(f"cannot be opened ({error})", name) from error


def eight_bits(image: Image.Image) -> Image.Image:
    """Decodes, into a mode that Pillow resizes with every filter and that has eight bits.

    Of 16-bit greys it keeps the upper eight bits. Greys of 32 bits (I and F, as in TIFFs) do not
    say what is white, so their largest value tells: up to 1, fractions (F alone); up to 255, eight
    bits; above, sixteen. What is below or above is clipped, and what is no number is black.
    """
    image.load()
    if image.mode in ("I", "F"):
        return _eight_bits_of_32(image)
    if image.mode.startswith("I"):  # I;16
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in _RESIZABLE:
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, and no warning about what is dropped
    return image.convert("RGB")


def _eight_bits_of_32(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float32), copy=False)
    largest = values.max()
    if image.mode == "F" and largest <= 1:
        values = np.rint(values * 255)
    elif largest > 255:
        values /= 256
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


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
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        raise ImageDecodeError(f"cannot be decoded ({error})", name) from error
