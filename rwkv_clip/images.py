"""Encoded images opened by Pillow, with a bound on the work that their headers make."""

import io
from collections.abc import Sequence

from PIL import Image

_MOST_READS = 20_000  # of a header; whole files of cameras and editors take some hundreds
_MOST_EXIF = 16
_EXIF = b"Exif\0\0"


class HeaderError(OSError):
    """A header has more parts than any honest file."""


class _Header(io.BytesIO):
    """A file that counts what is read of it while `bounded`.

    Pillow walks a header part by part, and copies what it has of a JPEG's Exif for each further
    part of it: sixteen megabytes of small parts would keep a process for minutes.
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        super().__init__(data)
        self.bounded = True
        self._reads = self._exif = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As BytesIO's; raises HeaderError."""
        got = super().read(size)
        if self.bounded:
            self._reads += 1
            self._exif += got.startswith(_EXIF)
            if self._reads > _MOST_READS or self._exif > _MOST_EXIF:
                raise HeaderError("its header has too many parts")
        return got


def open_image(
    data: bytes | bytearray | memoryview, formats: Sequence[str] | None = None
) -> Image.Image:
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
