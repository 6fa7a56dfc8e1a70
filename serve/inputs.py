"""Requests in OpenAI's shape, and the texts and images in them."""

import asyncio
import base64
import binascii
import codecs
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image, UnidentifiedImageError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)

from rwkv_clip.images import CodingError, HeaderError, open_image, scans_at_least
from serve.config import LimitsConfig
from serve.errors import ApiError
from serve.remote import Fetcher

Request = TypeVar("Request", bound="Shape")

_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?P<parameters>(?:;[^;,]*)*),", re.IGNORECASE)
_LIKE_DATA_URI = re.compile(r"data:(?:[^\s;,/]*/[^\s;,]*[;,]|[^\s,]*;base64,)", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
_AS_TEXT = 'a text that begins so is sent as {"type": "text", "text": …}'

_MOST_PIECES = 100_000  # of a request; a few bytes of JSON become hundreds of memory
_LONGEST_SIDE = 65_535  # which is JPEG's and GIF's; of a pixel a row, others take seconds
_BREAKS = 16  # characters of base64 to one of its line breaks at least, with a few to spare

# What a pixel costs to decode, in sixteenths of a PNG's. A file of 40 megapixels took so many
# seconds of a core, from one of a single colour to one of noise:
#
#     PNG 0.7 to 1.9, RGBA 0.9 to 2.5, 16 bits 2.4      GIF 0.3 to 0.6      BMP 0.2 to 0.3
#     WEBP 0.9 to 1.7                                   TIFF 0.2 to 0.9
#     JPEG 0.03 to 0.2, in CMYK 0.1 to 0.4, with a second image behind it (MPO) 0.3
#     progressive JPEG, in ten scans 0.2 to 0.9, in 18 and CMYK 0.5 to 1.4, in 25 1.0
#
# So 640 million, which a request may have, take some twenty seconds, whatever they are of; noise
# of more does not fit into one.
_UNIT, _DEEP, _WEBP = 16, 32, 24
_JPEG = 4  # at least; one for each of its scans, which go over all pixels


class Shape(BaseModel):
    """A JSON object; keys that are not known are let pass, as OpenAI's clients send more."""

    model_config = ConfigDict(extra="ignore")


class ImageUrl(Shape):
    """Where an image is."""

    url: str = Field(
        description="data:image/…;base64,…, the base64 alone, or an https address if this server "
        "fetches any"
    )


class TextPart(Shape):
    """A text."""

    type: Literal["text"]
    text: str


class ImagePart(Shape):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _unread(value: object, _: object) -> object:
    """What is read of items later: one by one, so that a bad one costs no other.

    What is never read goes here, since a request is held until its answer.
    """
    return [_known(item) for item in value] if isinstance(value, list) else _known(value)


def _known(item: object) -> object:
    if isinstance(item, list):
        return []
    if not isinstance(item, dict):
        return item
    known: dict[str, object] = {key: _string(item[key]) for key in ("type", "text") if key in item}
    if "image_url" in item:
        image = item["image_url"]
        known["image_url"] = {"url": _string(image.get("url"))} if isinstance(image, dict) else None
    return known


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Item = str | Part
Unread = WrapValidator(_unread)

_PART: TypeAdapter[Part] = TypeAdapter(Part)


class EmbeddingsRequest(Shape):
    """What `/v1/embeddings` takes."""

    input: Annotated[Item | list[Item], Unread] = Field(
        description="a text, an image as data:image/…, a content part, or a list of these"
    )
    model: str | None = Field(None, description="the served model's name, or nothing")
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: PositiveInt | None = Field(
        None, description="the first so many of a vector, made length one again"
    )
    on_error: Literal["request", "item"] | None = Field(
        "request", description="whether a bad item fails the request, or itself alone"
    )
    user: str | None = None


@dataclass(frozen=True)
class Text:
    """An item that the text tower embeds."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An item that the image tower embeds: an encoded file whose header has been read."""

    data: bytes


@dataclass(frozen=True)
class Placed:
    """An item that is yet to be read, and its place in the request."""

    at: int
    item: object


@dataclass(frozen=True)
class Header:
    """What an encoded image says of itself.

    Attributes:
        format: Pillow's name of it.
        width, height: of the image.
        weight: of a pixel, when it is decoded.
    """

    format: str | None
    width: int
    height: int
    weight: int

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def cost(self) -> int:
        """Of decoding it, in pixels of a PNG."""
        return self.pixels * self.weight // _UNIT


def parse_request(shape: type[Request], body: bytes) -> Request:
    """A request from JSON; raises ApiError that names the key."""
    _check_pieces(body)
    try:
        return shape.model_validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise invalid(error) from None


def _check_pieces(body: bytes) -> None:
    """Raise ApiError for JSON that is made of too many pieces to be read."""
    if _pieces(body) <= _MOST_PIECES:
        return  # whatever of these is in texts
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = body.count(b'"')
    if quotes <= 2 * _MOST_PIECES:
        outside = b"".join(body.split(b'"')[::2])
        if quotes // 2 + _pieces(outside) <= _MOST_PIECES:
            return
    raise ApiError(
        413,
        "too_many_pieces",
        f"the body has more than {_MOST_PIECES:,} lists, objects, commas and strings; "
        "send several requests",
    )


def _pieces(content: bytes) -> int:
    return sum(map(content.count, (b"[", b"{", b",", b'"')))


def invalid(error: ValidationError) -> ApiError:
    """What is wrong with a request, without what it holds."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is no JSON in UTF-8: {first['msg']}")
    param = ".".join(map(str, first["loc"]))
    return ApiError(400, "invalid_request", f"{param or 'the body'}: {first['msg']}", param)


def request_items(request: EmbeddingsRequest, limits: LimitsConfig) -> list[Placed]:
    """The items of a request, in order; raises ApiError if there are none or too many."""
    items: list[object] = [*request.input] if isinstance(request.input, list) else [request.input]
    if not items:
        raise ApiError(400, "empty_input", "input: is empty; give at least one item", "input")
    if len(items) > limits.items:
        raise ApiError(
            413,
            "too_many_items",
            f"input: has {len(items)} items, more than {limits.items}; send several requests",
            "input",
        )
    return [Placed(at, item) for at, item in enumerate(items)]


class _Fetch:
    """A fetch that items wait for together; it is cancelled when none waits any longer."""

    def __init__(self, work: Coroutine[Any, Any, bytes]) -> None:
        self._task = asyncio.create_task(work)
        self._waiting = 0

    @property
    def failed(self) -> bool:
        """Whether it gives nothing to an item that comes now."""
        task = self._task
        if task.cancelling() or task.cancelled():
            return True
        return task.done() and task.exception() is not None

    async def content(self) -> bytes:
        """What was fetched; raises an ApiError of the caller's own."""
        self._waiting += 1
        try:
            return await asyncio.shield(self._task)  # one item's end is not the others'
        except ApiError as error:
            raise ApiError(error.status, error.code, error.message) from None
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._task.cancel()  # does nothing to one that is done


class Reader:
    """Reads the texts and images of a request, which may be done again.

    No image that came is fetched twice, and items at one address wait for one fetch. Images are
    counted by their places, so that what is read again is not counted again.

    Args:
        limits: of what is read.
        fetcher: of images that are named by address; None if there are to be none.
        count: called with the bytes of each that was fetched; raises ApiError if they are too many.
    """

    def __init__(
        self, limits: LimitsConfig, fetcher: Fetcher | None, count: Callable[[int], None]
    ) -> None:
        self.limits, self.fetcher, self._count = limits, fetcher, count
        self._fetches: dict[str, _Fetch] = {}
        self._in_turn = asyncio.Lock()  # so that it is the last images that are too many
        self._costs: dict[int, int] = {}

    async def item(self, item: object) -> Text | Picture:
        """The text or image of an item; raises ApiError if it cannot be embedded."""
        at, item = (item.at, item.item) if isinstance(item, Placed) else (0, item)
        if isinstance(item, str):
            begun = item.lstrip()  # as files and copies have it; a URI has no space before it
            like_uri = _LIKE_DATA_URI.match(begun[:256])
            return await self.picture(begun, at) if like_uri else self.text(item)
        if not isinstance(item, dict) or item.get("type") not in ("text", "image_url"):
            raise ApiError(
                400,
                "invalid_item",
                "is neither a text nor a part of type text or image_url; the model has a tokenizer "
                "of its own, so send a text for token ids",
            )
        try:
            part = _PART.validate_python(item)
        except ValidationError as error:
            told = invalid(error)
            raise ApiError(400, "invalid_item", f"is no content part: {told.message}") from None
        if isinstance(part, TextPart):
            return self.text(part.text)
        return await self.picture(part.image_url.url, at)

    def text(self, text: str) -> Text:
        """A text; raises ApiError if it is empty or too long."""
        if not text.strip():
            raise ApiError(400, "empty_text", "is an empty text")
        self.check_length(len(text))
        return Text(text)

    def check_length(self, characters: int) -> None:
        """Raise ApiError for a text of too many characters."""
        most = self.limits.text_characters
        if characters > most:
            raise ApiError(
                413, "text_too_long", f"has {characters:,} characters, more than {most:,}"
            )

    async def picture(self, url: str, at: int = 0) -> Picture:
        """An image from base64, a data URI or an address; raises ApiError if there is none.

        Args:
            url: the image.
            at: its place in the request.
        """
        url = url.lstrip()
        image = await self._at(url) if _ADDRESS.match(url[:32]) else url
        async with self._in_turn:
            data, header = await asyncio.to_thread(self._checked, image)
            self._count_cost(at, header.cost)
        return Picture(data)

    def _count_cost(self, at: int, cost: int) -> None:
        """Raise ApiError where an image makes the request's too many to be decoded."""
        most = self.limits.request_pixels
        if cost + sum(other for place, other in self._costs.items() if place != at) > most:
            raise ApiError(
                413,
                "too_many_pixels",
                f"is an image with which the request has more than {most:,} pixels, where those "
                "that take longer to decode count more; send several requests, or smaller images",
            )
        self._costs[at] = cost

    async def _at(self, address: str) -> bytes:
        """What is at an address."""
        if self.fetcher is None:
            raise ApiError(
                400,
                "remote_image",
                "is an address; this server fetches none, so send the image as "
                "data:image/…;base64,…",
            )
        fetch = self._fetches.get(address)
        if fetch is None or fetch.failed:
            fetch = self._fetches[address] = _Fetch(self._counted(self.fetcher, address))
        return await fetch.content()

    async def _counted(self, fetcher: Fetcher, address: str) -> bytes:
        data = await fetcher.fetch(address)
        self._count(len(data))
        return data

    def _checked(self, image: str | bytes) -> tuple[bytes, Header]:
        """An image that is in base64, in a data URI or as it was fetched; takes a while."""
        data = self._bytes(image) if isinstance(image, str) else image
        header = read_header(data, self.limits)
        check_picture(header, self.limits)
        return data, header

    def _bytes(self, url: str) -> bytes:
        """What base64 or a data URI holds."""
        if url[:5].lower() == "data:":
            found = _DATA_URI.match(url[:256])
            if found is None or not found["parameters"].lower().endswith(";base64"):
                raise ApiError(
                    400, "invalid_data_uri", f"is no data:image/…;base64,… URI; {_AS_TEXT}"
                )
            if not found["type"].lower().startswith("image/"):
                raise ApiError(
                    415,
                    "not_an_image",
                    f"is a data URI of something else than an image; {_AS_TEXT}",
                )
            url = url[found.end() :]
        most = self.limits.image_bytes
        too_large = ApiError(413, "image_too_large", f"is an image of more than {most:,} bytes")
        if len(url) * 3 // 4 > most + most // _BREAKS + 3:
            raise too_large
        try:
            data = _from_base64(url)
        except (binascii.Error, ValueError):
            raise ApiError(
                400,
                "invalid_base64",
                "is an image whose base64 is broken; that is of A-Z, a-z, 0-9, + and /, with = at "
                "the end where its length asks for it",
            ) from None
        if len(data) > most:
            raise too_large
        return data


def _from_base64(text: str) -> bytes:
    """What base64 holds, whatever space is in it; raises ValueError or its binascii.Error."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        # To look for space takes ten times as long as to decode, and hardly any has some.
        return base64.b64decode(_SPACE.sub("", text), validate=True)


def read_header(data: bytes, limits: LimitsConfig) -> Header:
    """The header of an encoded image; raises ApiError if it is none that may be decoded."""
    if not data:
        raise ApiError(400, "empty_image", "is an image of no bytes")
    try:
        # Only the header is read; a bomb's pixels never come to be.
        with open_image(data, limits.formats) as image:
            return Header(image.format, *image.size, _weight(image, data))
    except UnidentifiedImageError:
        raise ApiError(
            415,
            "unsupported_image",
            f"is no image of a supported format; those are {', '.join(limits.formats)}",
        ) from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(limits) from None
    except CodingError as error:
        raise ApiError(
            415,
            "unsupported_image",
            f"is an image that {error}; supported formats are {', '.join(limits.formats)}",
        ) from None
    except HeaderError as error:
        raise ApiError(400, "broken_image", f"is an image that {error}") from None
    except Exception:  # Pillow raises whatever a broken header leads it to
        raise ApiError(400, "broken_image", "is an image whose header is broken") from None


def _weight(image: Image.Image, data: bytes) -> int:
    """What a pixel of an image, opened from `data`, costs to decode; see `_UNIT`."""
    if image.format in ("JPEG", "MPO"):
        return scans_at_least(data, _JPEG)
    if image.format == "PNG" and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return _DEEP  # as Pillow writes what lies in the file
    return _WEBP if image.format == "WEBP" else _UNIT


def check_picture(header: Header, limits: LimitsConfig) -> None:
    """Raise ApiError for an image that is too large to be decoded."""
    if header.pixels > limits.image_pixels:
        raise _too_many_pixels(limits)
    if max(header.width, header.height) > _LONGEST_SIDE:
        raise ApiError(
            413, "image_too_large", f"is an image of more than {_LONGEST_SIDE:,} pixels on a side"
        )


def _too_many_pixels(limits: LimitsConfig) -> ApiError:
    return ApiError(
        413, "image_too_large", f"is an image of more than {limits.image_pixels:,} pixels"
    )


def encoded_vector(vector: Any, encoding_format: str | None) -> list[float] | str:
    """A float32 vector as OpenAI's clients take it."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
