"""What web pages put around the words of an image, and what is left without it.

Choices:
- Only web texts go through this: a caption or a tag that has a price or a page number tells of
  what is in the image. What is taken away is no source any more, so the guard refuses a
  description that says it.
- Phrases go only where nothing hangs on them: without "click here", the rest of such an advert
  would pass for a description.
- A hashtag is a word with a mark. It stays as words where the text does not say them already,
  unless it is a call for attention.
"""

from __future__ import annotations

import re

_SIGN = "[$€£¥₹₽₩₺₫]"
_AMOUNT = r"\d{1,12}(?:[.,]\d{1,3}){0,4}"
_AROUND = re.compile(
    rf"{_SIGN}\s?{_AMOUNT}"
    r"|[★☆]{2,}|#\d{4,}\b|\((?:pack|lot) of \d{1,5}\)"
    r"|^(?:buy\b(?! now)|(?:(?:re|fwd?): ?){1,9})"
    r"|\b(?:"  # few places to look at begin here
    r"\d{2,5}(?:\s?[x×]\s?\d{2,5}){1,2}(?:\s?(?:px|pixels?|[cm]?m|in|inch(?:es)?))?\b"
    r"|(?:480|720|1080|1440|2160)[pi]\b|(?:full |ultra )?hd\b|(?:png|jpe?g|svg|psd|eps)\b"
    r"|page \d{1,5}(?: of \d{1,5})?\b|untitled(?:[-_ ]?\d{1,5})?\b|(?:by )?user[-_ ]?\d{3,}\b"
    r"|(?:top )?\d{1,4}\+? best\b(?! friend)|top \d{1,4}\b|sale!"
    r"|free download\b|click to (?:enlarge|zoom|view)\b"
    r"|(?:royalty[- ]free )?stock (?:photo|image|vector|illustration)s?\b"
    r"|in stock\b(?! market)|ships (?:in|within) \d{1,3} ?(?:h|hours?|days?)\b"
    rf"|(?:usd|eur|gbp)\s?{_AMOUNT}|{_AMOUNT}\s?(?:{_SIGN}|(?:usd|eur|gbp)\b)"
    r")",
    re.IGNORECASE,
)
_HASHTAG = re.compile(r"(?<![\w&])#([^\W\d_]\w*)")
_CALL = re.compile(
    r"follow\w*|\w+follow\w*|like(?:s|\d\w*|for\w*)|[fl]4[fl]|insta\w*|\w+oftheday|repost\w*"
    r"|no_?filter|viral|trending|fyp|tbt|sponsored|ad|giveaway",
    re.IGNORECASE,
)
_HUMP = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])|_+")
_EMPTY = re.compile(r"\(\s*\)")
_EDGES = " -–—|,;:/"


def without_page(web_text: str) -> str:
    """A web text without offers, sizes in pixels, page and user numbers, and hashtags' marks."""
    said = _AROUND.sub(" ", web_text)
    if "#" in said:
        letters = _letters(_HASHTAG.sub(" ", said))
        said = _HASHTAG.sub(lambda tag: _as_words(tag[1], letters), said)
    if said == web_text:
        return web_text
    return " ".join(_EMPTY.sub(" ", said).split()).strip(_EDGES)


def _as_words(tag: str, said: str) -> str:
    """FlagOfBenin as "Flag Of Benin", or nothing where the text has said that already."""
    if _CALL.fullmatch(tag) or _letters(tag) in said:
        return " "
    return _HUMP.sub(" ", tag)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))
