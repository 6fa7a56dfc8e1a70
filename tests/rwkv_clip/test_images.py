"""Headers that would keep a process for minutes, and those of honest files."""

import zlib
from io import BytesIO
from struct import pack

import numpy as np
import pytest
from PIL import Image

from rwkv_clip.images import HeaderError, open_image

NOISE = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


def encoded(kind: str, **options: object) -> bytes:
    out = BytesIO()
    Image.fromarray(NOISE).save(out, kind, **options)
    return out.getvalue()


def with_segments(name: bytes, count: int, size: int) -> bytes:
    """A JPEG with so many segments of a kind before its own."""
    segment = b"\xff\xe1" + pack(">H", 2 + size) + name.ljust(size, b"x")
    jpeg = encoded("JPEG")
    return jpeg[:2] + segment * count + jpeg[2:]


def with_chunks(count: int) -> bytes:
    """A PNG with so many empty chunks before its pixels."""
    chunk = pack(">I", 0) + b"teSt" + pack(">I", zlib.crc32(b"teSt"))
    png = encoded("PNG")
    return png[:33] + chunk * count + png[33:]


@pytest.mark.parametrize(
    "data",
    [
        with_segments(b"Exif\0\0", 800_000, 16),
        with_segments(b"Exif\0\0", 250, 65_000),
        with_segments(b"http://ns.adobe.com/xap/1.0/\0", 400_000, 32),
        with_chunks(1_300_000),
    ],
    ids=["small Exif", "large Exif", "XMP", "PNG"],
)
def test_a_header_without_end_is_refused(data):
    with pytest.raises(HeaderError, match="too many parts"):
        open_image(data)


def test_honest_files_open_as_ever():
    tag = Image.Exif()
    tag[0x010E] = "said of it " * 3000
    files = [
        encoded("JPEG", exif=tag, icc_profile=bytes(3_000_000), comment=b"a comment"),
        with_segments(b"http://ns.adobe.com/xmp/extension/\0", 80, 65_000),
        encoded("PNG", exif=tag),
        encoded("WEBP", exif=tag),
        encoded("GIF", comment=b"c" * 100_000),
        encoded("BMP"),
    ]
    for file in files:
        with open_image(file) as image:
            assert image.size == (400, 300)
            image.load()


def test_pixels_may_come_in_any_number_of_parts():
    png = encoded("PNG")
    start, length = png.index(b"IDAT") - 4, int.from_bytes(png[png.index(b"IDAT") - 4 :][:4])
    content = png[start + 8 : start + 8 + length]
    chunks = b"".join(
        pack(">I", len(part)) + b"IDAT" + part + pack(">I", zlib.crc32(b"IDAT" + part))
        for part in (content[at : at + 4] for at in range(0, length, 4))
    )
    with open_image(png[:start] + chunks + png[start + 12 + length :]) as image:
        np.testing.assert_array_equal(np.asarray(image), NOISE)


def test_formats_may_be_named():
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(encoded("BMP"), ["JPEG", "PNG"])
