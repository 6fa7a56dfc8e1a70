"""The pair: one image and its texts, as a row. The one place where its columns are defined.

Choices:
- A row's image stays an encoded file (JPEG, PNG, WebP) until training decodes it.
- What a stage adds is a table of its own, aligned row by row with the pairs it describes: filling
  in 400 million descriptions rewrites no image.
- A row that cannot be used is no error: it becomes a row of the rejected table, with its reason.
- Where a list is found in place of a text, also one written as JSON, its first text is taken.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from rwkv_clip.images import open_image

TextColumn = Literal["web_text", "caption", "description"]

PAIR_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("web_text", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("description", pa.string()),
        pa.field("description_source", pa.string()),
    ]
)
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
# MPO is what Pillow calls the JPEG files of phones that hold a second picture.
IMAGE_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF"})
_MAX_ID = 512
_ID_DIGITS = 32  # of the digest that ends a longer one
_MAX_DETAIL = 200
# What steers a terminal, or turns a line around. Joiners, which emoji are made of, do neither.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# What is in no text: control characters, but for blanks, and what stands for what is not UTF-8.
_UNTOLD = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]")


@dataclass(frozen=True)
class RowLimits:
    """What a row may be at most.

    Attributes:
        image_bytes: of the encoded file.
        image_pixels: width times height.
        text_characters: of one text; a longer one is cut, which loses no pair.
        min_side: shorter side of the image, in pixels.
        decode: decode each image in full, which finds truncated files; else read headers only.
    """

    image_bytes: int = 20_000_000
    image_pixels: int = 64_000_000
    text_characters: int = 10_000
    min_side: int = 1
    decode: bool = True


class RejectedRowError(ValueError):
    """A row that cannot be used.

    Attributes:
        reason: one of a few fixed words, which are counted: `no_id`, `no_image`,
            `image_too_large`, `image_undecodable`, `image_too_small`, `image_format`, `no_text`,
            `duplicate_id`, and what a source adds, such as `download_failed`.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail[:_MAX_DETAIL]


def make_pair(raw: Mapping[str, Any], limits: RowLimits) -> dict[str, Any]:
    """A row of PAIR_SCHEMA from what a source read.

    Args:
        raw: the columns by name, any of them absent, None, or of a wrong type. Texts may be bytes.
        limits: what a row may be at most.

    Raises:
        RejectedRowError: it cannot be used.
    """
    identity = clean_id(raw.get("id"))
    if not identity:
        raise RejectedRowError("no_id", f"got {raw.get('id')!r}")
    check_image(raw.get("image"), limits)
    texts = {
        name: one_text(raw.get(name), limits.text_characters)
        for name in ("web_text", "caption", "description")
    }
    tags = clean_tags(raw.get("tags"))
    if not (any(texts.values()) or tags):
        raise RejectedRowError("no_text", _no_text_in(raw))
    source = clean_text(raw.get("description_source"), _MAX_DETAIL)
    return {
        "id": identity,
        "image": bytes(raw["image"]),
        "web_text": texts["web_text"],
        "caption": texts["caption"] or None,
        "tags": tags or None,
        "description": texts["description"] or None,
        "description_source": (source if texts["description"] else None) or None,
    }


def _no_text_in(raw: Mapping[str, Any]) -> str:
    """What there is where texts should be, for a person."""
    names = ("web_text", "caption", "tags", "description")
    kinds = {name: type(raw.get(name)) for name in names}
    wrong = [f"{name} is a {kind.__name__}" for name, kind in kinds.items() if kind in (bool, dict)]
    return ", ".join(wrong) or "web_text, caption, tags and description are all empty"


def clean_id(identity: object) -> str:
    """An id as one printable line of at most 512 characters.

    The end of a longer one becomes a digest of all of it: what tells ids apart is often there. So
    one ends that holds what is in no text, and may be all that tells it from others.
    """
    if isinstance(identity, str):
        identity = identity.encode("utf-8", "surrogatepass")  # no two strings give the same bytes
    if not isinstance(identity, bytes | bytearray | memoryview):
        return ""
    raw = bytes(identity)
    whole = printable(clean_text(raw, len(raw)))
    told = is_text(raw)
    if told and len(whole) <= _MAX_ID:
        return whole
    digest = hashlib.sha256(whole.encode() if told else raw).hexdigest()[:_ID_DIGITS]
    return f"{whole[: _MAX_ID - _ID_DIGITS - 1]}:{digest}"


def is_text(value: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters, of which a text has blanks alone."""
    return _UNTOLD.search(value.decode("utf-8", "replace")) is None


def printable(text: str) -> str:
    """The text with escapes, as Python writes them, for what a terminal would obey."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def clean_text(text: object, limit: int) -> str:
    """The text without what Arrow or a tokenizer stumbles over, at most `limit` characters.

    Bytes are read as UTF-8; what is not UTF-8, lone surrogates and NULs become spaces.
    """
    if isinstance(text, str):
        text = text[: 4 * limit].encode("utf-8", "surrogatepass")
    if not isinstance(text, bytes | bytearray | memoryview):
        return ""
    read = bytes(text[: 16 * limit]).decode("utf-8", "replace")
    return read.replace("\ufffd", " ").replace("\x00", " ").strip()[:limit].rstrip()


def one_text(value: object, limit: int) -> str:
    """As `clean_text`; of a list, also one written as JSON, the first text. Numbers are texts."""
    if isinstance(value, list | tuple):
        return next(filter(None, (clean_text(one, limit) for one in value)), "")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    text = clean_text(value, limit)
    if text.startswith('["') and text.endswith('"]'):
        with suppress(ValueError, RecursionError):
            return one_text([one for one in json.loads(text) if isinstance(one, str)], limit)
    return text


def clean_tags(tags: object) -> list[str]:
    """The distinct, non-empty tags in their order; a text is split at commas and bars.

    Bytes are a text in UTF-8, as in `clean_text`. A text may be a list as JSON has it, or as Python
    writes it, whose brackets and quotes are no part of its tags.
    """
    if isinstance(tags, bytes | bytearray | memoryview):
        tags = bytes(tags).decode("utf-8", "replace")
    if isinstance(tags, str):
        whole = tags.strip()
        tags = whole.replace("|", ",").split(",")
        if whole.startswith("[") and whole.endswith("]"):
            tags = [tag.strip("[]'\" ") for tag in tags]
            with suppress(ValueError, RecursionError):
                tags = json.loads(whole)
    if not isinstance(tags, Sequence) and hasattr(tags, "tolist"):
        tags = tags.tolist()
    if not isinstance(tags, Sequence):
        return []
    cleaned = (one_text(tag, 100) for tag in tags[:200])
    return list(dict.fromkeys(tag for tag in cleaned if tag))


def check_image(image: object, limits: RowLimits) -> None:
    """Raises RejectedRowError unless the bytes are an image that training can decode."""
    if not isinstance(image, bytes | bytearray | memoryview) or len(image) == 0:
        found = "0 bytes" if isinstance(image, bytes | bytearray | memoryview) else repr(image)[:80]
        raise RejectedRowError("no_image", found)
    if len(image) > limits.image_bytes:
        raise RejectedRowError(
            "image_too_large", f"{len(image):,} bytes, over {limits.image_bytes:,}"
        )
    try:
        # Pillow's own alarm about many pixels is about what is checked here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = open_image(image)
            _check_header(opened, limits)
            if limits.decode:
                opened.load()
    except RejectedRowError:
        raise
    except Image.DecompressionBombError as error:
        raise RejectedRowError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        begins = f"no image begins with {bytes(image[:16])!r}"
        raise RejectedRowError("image_undecodable", begins) from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        raise RejectedRowError("image_undecodable", f"{type(error).__name__}: {error}") from error


def _check_header(image: Image.Image, limits: RowLimits) -> None:
    width, height = image.size
    if image.format not in IMAGE_FORMATS:
        raise RejectedRowError(
            "image_format", f"{image.format} is none of {', '.join(sorted(IMAGE_FORMATS))}"
        )
    if width * height > limits.image_pixels:
        raise RejectedRowError(
            "image_too_large", f"{width}x{height} pixels, over {limits.image_pixels:,}"
        )
    if min(width, height) < limits.min_side:
        raise RejectedRowError("image_too_small", f"{width}x{height} pixels")


def pair_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of PAIR_SCHEMA as a table."""
    return pa.Table.from_pylist(list(rows), schema=PAIR_SCHEMA)


def rejected_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of REJECTED_SCHEMA as a table."""
    return pa.Table.from_pylist(list(rows), schema=REJECTED_SCHEMA)
