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


def chunk(kind: bytes, content: bytes) -> bytes:
    return pack(">I", len(content)) + kind + content + pack(">I", zlib.crc32(kind + content))


def with_chunks(*chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with chunks before its pixels, or behind them."""
    png = encoded("PNG")
    at = len(png) - len(chunk(b"IEND", b"")) if behind else 33
    return png[:at] + b"".join(chunks) + png[at:]


DEFLATED = zlib.compress(bytes(1_000_000))
PROFILE, TEXT = chunk(b"iCCP", b"k\0\0" + DEFLATED), chunk(b"zTXt", b"k\0\0" + DEFLATED)
FOREIGN = chunk(b"iTXt", b"k\0\1\0\0\0" + DEFLATED)


@pytest.mark.parametrize(
    "data",
    [
        with_segments(b"Exif\0\0", 800_000, 16),
        with_segments(b"Exif\0\0", 250, 65_000),
        with_segments(b"http://ns.adobe.com/xap/1.0/\0", 400_000, 32),
        with_chunks(chunk(b"teSt", b"") * 1_300_000),
        with_chunks(PROFILE * 17),
        with_chunks(PROFILE * 6, TEXT * 6, FOREIGN * 5),
    ],
    ids=["small Exif", "large Exif", "XMP", "PNG", "PNG of profiles", "PNG that inflates"],
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
        with_chunks(PROFILE, FOREIGN * 15),
        with_chunks(*(chunk(b"iTXt", b"key %d\0\0\0\0\0short" % at) for at in range(40))),
        encoded("WEBP", exif=tag),
        encoded("GIF", comment=b"c" * 100_000),
        encoded("BMP"),
    ]
    for file in files:
        with open_image(file) as image:
            assert image.size == (400, 300)
            image.load()


def test_what_inflates_behind_the_pixels_is_counted_too():
    with open_image(with_chunks(TEXT * 9, behind=True)) as image:
        image.load()
    image = open_image(with_chunks(PROFILE * 17, behind=True))
    with pytest.raises(HeaderError, match="too many parts"):
        image.load()


def test_pixels_may_come_in_any_number_of_parts():
    png = encoded("PNG")
    start, length = png.index(b"IDAT") - 4, int.from_bytes(png[png.index(b"IDAT") - 4 :][:4])
    content = png[start + 8 : start + 8 + length]
    chunks = b"".join(chunk(b"IDAT", content[at : at + 4]) for at in range(0, length, 4))
    with open_image(png[:start] + chunks + png[start + 12 + length :]) as image:
        np.testing.assert_array_equal(np.asarray(image), NOISE)


def test_formats_may_be_named():
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(encoded("BMP"), ["JPEG", "PNG"])
