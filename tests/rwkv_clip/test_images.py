"""Files that would keep a process for minutes, and honest ones."""

import zlib
from io import BytesIO
from struct import pack

import numpy as np
import pytest
from PIL import Image

from rwkv_clip.images import HeaderError, ImageDecodeError, open_image, open_named, scans_at_least

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


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + pack(">H", 2 + len(content)) + content


SCAN = segment(0xDA, b"\1\1\0\1\x3f\0") + bytes(8)
END = b"\xff\xd9"


def of_scans(
    scans: int, between: bytes = b"", side: int = 64, frame: int = 0xC2, channels: int = 1
) -> bytes:
    """A black JPEG that goes over its pixels so often."""
    channel = b"".join(bytes([one, 0x11, 0]) for one in range(1, channels + 1))
    first = bytes([channels]) + b"".join(bytes([one, 0]) for one in range(1, channels + 1))
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + b"\1" * 64)
        + segment(frame, b"\x08" + pack(">HHB", side, side, channels) + channel)
        + segment(0xC4, b"\0\1" + bytes(16))  # a bit that tells of no difference
        + segment(0xC4, b"\x10\1" + bytes(16))  # and one that tells of an empty block
        + segment(0xDA, first + b"\0\0\0")
        + bytes(8 * channels)
        + (between + SCAN) * (scans - 1)
        + END
    )


def of_two(jpeg: bytes) -> bytes:
    """A JPEG with an index of images in its header, of which another lies behind it."""
    entries = pack("<IIIHH", 0x030000, len(jpeg), 0, 0, 0) + pack("<IIIHH", 0, 9, 9, 0, 0)
    tags = pack("<HHI4s", 0xB000, 7, 4, b"0100") + pack("<HHII", 0xB001, 4, 1, 2)
    tags += pack("<HHII", 0xB002, 7, len(entries), 50)
    index = b"MPF\0II*\0" + pack("<IH", 8, 3) + tags + pack("<I", 0) + entries
    return jpeg[:2] + segment(0xE2, index) + jpeg[2:] + encoded("JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (of_scans(101), "has 101 scans, more than the 100 that are read of its size"),
        (of_scans(28, side=6000), "has 28 scans, more than the 27"),
        (of_scans(26, side=40_000), "has 26 scans, more than the 25"),
        (of_scans(101, frame=0xCA), "has 101 scans"),
        (of_scans(101, channels=3), "has 101 scans"),
        (of_scans(101, channels=4), "has 101 scans"),
        (of_two(of_scans(101)), "has 101 scans"),
        (of_scans(101, segment(0xE1, SCAN)), "has 101 scans"),
        (of_scans(101, b"\xff\xd0\xff\x02\xff\x01\xff\0\xff"), "has 101 scans"),
        (of_scans(101, segment(0xFE, b"") * 1000), "a header of too many parts"),
    ],
    ids=[
        "small", "large", "larger", "arithmetic", "colour", "CMYK", "two images", "previews",
        "markers without content", "parts between",
    ],
)  # fmt: skip
def test_a_jpeg_of_scans_without_end_is_refused(data, reason, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(HeaderError, match=reason):
        open_image(data)
    with pytest.raises(ImageDecodeError, match=f"^image 'a': .*{reason}"):
        open_named(data, "a")


def test_what_looks_like_scans_of_a_jpeg_is_none():
    progressive = encoded("JPEG", progressive=True)
    preview = segment(0xE1, SCAN * 300)
    files = [
        of_scans(100),
        of_two(of_scans(100)),
        encoded("JPEG") + b"\xff\xda" * 300,
        progressive[:2] + preview * 20 + progressive[2:],
        of_scans(50, preview),
    ]
    for file in files:
        with open_image(file) as image:
            image.load()
    assert open_image(files[1]).format == "MPO"


def test_scans_are_counted_from_a_number_on():
    preview = segment(0xE1, SCAN * 300)
    for data, scans in [
        (encoded("JPEG"), 1),
        (encoded("JPEG", progressive=True), 10),
        (of_scans(25), 25),
        (of_scans(7, preview), 7),
        (of_two(of_scans(7)), 7),
    ]:
        assert [scans_at_least(data, least) for least in (0, 4, 30)] == [
            scans, max(scans, 4), 30
        ]  # fmt: skip


def bmp(compression: int) -> bytes:
    header = pack("<IiiHHIIiiII", 40, 8, 1, 1, 8, compression, 8, 0, 0, 256, 0)
    palette = b"".join(bytes([grey, grey, grey, 0]) for grey in range(256))
    pixels = b"\x08\x07\0\1" if compression else b"\x07" * 8
    at = 14 + len(header) + len(palette)
    return b"BM" + pack("<IHHI", at + len(pixels), 0, 0, at) + header + palette + pixels


def test_a_bmp_that_python_would_decode_or_pillow_cannot_is_refused():
    with open_image(bmp(0)) as image:
        np.testing.assert_array_equal(np.asarray(image), np.full((1, 8), 7))
    for compression in (1, 2, 4, 5):
        with pytest.raises(HeaderError, match="is a compressed BMP; save it as a PNG"):
            open_image(bmp(compression))
