"""What is known about one image: three texts, cleaned once, at the border.

Choices:
- Cleaning happens on construction, so prompt, guard and fallback all see the same words and no
  uncleaned `Sources` exists.
- A text is cut before any pattern looks at it: the work is bounded, whatever the web serves.
- Characters that chat templates build their control tokens from (`< > [ ] { } |`) become spaces,
  so no source can open or close a turn, in any template.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rwkv_clip.descriptions.page import without_page

MAX_TEXT = 400
MAX_TAGS = 32
MAX_TAG = 60

# Markup and links are dropped after the cut, so leave room for them.
_SLACK = 8

_IMAGE_FILE = r"jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|psd|pdf|html?|php|aspx?"
_DOMAIN = r"com|net|org|info|biz|io|ru|jp|cn|uk|eu"
_NOISE = re.compile(
    r"<\|[^<>]{0,40}\|>"  # a chat template's control token
    r"|</?[a-z!][^<>]{0,300}>"
    r"|\b(?:https?|ftp|data):\S+|\bwww\.\S+"
    r"|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{1,64}"
    rf"|\b[\w%()+~-]{{1,80}}(?:\.[\w%()+~-]{{1,80}}){{0,4}}\.(?:{_IMAGE_FILE})\b"
    rf"|\b[a-z0-9-]{{2,63}}(?:\.[a-z0-9-]{{2,63}}){{0,3}}\.(?:{_DOMAIN})\b(?:/\S*)?"
    r"|\b(?:img|dsc[nf]?|pxl|mvc|pict|sam|p)[_-]?\d{4,}(?:[_-]\d+)*\b",
    re.IGNORECASE,
)
_MAYBE_NOISE = re.compile(r"[.@<:]|\d{4}")  # one of them is in every match of _NOISE
_DELIMITERS = str.maketrans(dict.fromkeys("<>[]{}|\\`", " ") | dict.fromkeys('"“”„«»', "'"))
_JOINERS = frozenset("\u200c\u200d")  # part of words in Persian and Hindi, and of emoji


@dataclass(frozen=True)
class Sources:
    """The three sources of a description, cleaned.

    Equal inputs give equal sources. A caption or tag that cleaning leaves nothing of is absent.

    Attributes:
        web_text: what the web said, at most MAX_TEXT characters; may be empty or noise.
        caption: the synthetic caption, at most MAX_TEXT characters, or None.
        tags: detection tags, at most MAX_TAGS of MAX_TAG characters each, without duplicates.

    Raises:
        TypeError: a text is no str, or the tags are no sequence of them; says which of the three.
    """

    web_text: str = ""
    caption: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        clean = object.__setattr__  # the dataclass is frozen
        web_text = clean_source(_text("web_text", self.web_text), MAX_TEXT)
        clean(self, "web_text", without_page(web_text))
        if self.caption is not None:
            caption = clean_source(_text("caption", self.caption), MAX_TEXT)
            clean(self, "caption", caption or None)
        clean(self, "tags", _clean_tags(self.tags))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sources:
        """The sources of a pair; columns may be absent, None or NaN, and tags a NumPy array."""
        columns = ("web_text", "caption", "tags")
        web_text, caption, tags = (_known(row.get(name)) for name in columns)
        return cls("" if web_text is None else web_text, caption, () if tags is None else tags)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every source that is there, as separate texts."""
        return tuple(text for text in (self.web_text, self.caption, *self.tags) if text)

    def __bool__(self) -> bool:
        return bool(self.texts)


def clean_source(text: str, limit: int) -> str:
    """The text's words, in one line of at most `limit` characters.

    Drops markup, links, mail addresses, file names, control and formatting characters; resolves
    character references; makes double quotes single; cuts between words where it must cut.
    """
    text = text[: _SLACK * limit]
    if "&" in text:
        text = html.unescape(text)
    if not text.isprintable():
        text = "".join(map(_printable, text))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if _MAYBE_NOISE.search(text):
        text = _NOISE.sub(" ", text)
    text = text.translate(_DELIMITERS)
    return cut(" ".join(text.split()), limit)


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of a text, ending with a whole word unless words are huge."""
    if len(text) <= limit:
        return text
    end = text.rfind(" ", limit // 2, limit + 1)
    return text[: end if end > 0 else limit].rstrip()


def _known(value: Any) -> Any:
    """A row's value; None for NaN, which is what pandas makes of it."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_short(value)}; it must be a str")
    return value


def _short(value: object) -> str:
    return f"{repr(value)[:40]} ({type(value).__name__})"


def _printable(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    # Line ends and tabs separate; marks of direction and other hidden characters do not.
    invisible = unicodedata.category(character) in {"Cf", "Co", "Cs", "Cn"}
    return "" if invisible else " "


def _clean_tags(tags: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise TypeError(f"tags are {_short(tags)}; they must be a sequence of str")
    cleaned: dict[str, str] = {}
    for tag, _ in zip(tags, range(MAX_TAGS), strict=False):
        text = clean_source(_text("one of the tags", tag), MAX_TAG).strip(" ,.;:_-'")
        if text:
            cleaned.setdefault(text.casefold(), text)
    return tuple(cleaned.values())
