"""CLIP's byte-pair tokenizer: the published ids, at the speed of a compiled encoder.

The published recipe cleans a text (ftfy, html.unescape twice, whitespace collapsed, lower case) and
then merges bytes. The merging is done by instant-clip-tokenizer, a Rust library that carries the
vocabulary. Cleaning would cost fifty times as much as the merging, so this module first asks
whether it could change anything: ftfy is called only for texts that one of its fixers touches.

Three known limits. Letters and digits are those of Unicode 15.0, which the Rust library knows; the
published code takes them from whichever `regex` is installed. A combining ypogegrammeni (U+0345)
that does not compose with its base splits a word here and does not there. A text of more than 1,024
characters with references nested more than 64 deep ("&amp;amp;amp;…") gets other ids than there,
where they are resolved however deep they are.
"""

from __future__ import annotations

import functools
import html
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import cast

import ftfy
import numpy as np
import torch
from ftfy import chardata, fixes
from ftfy.badness import is_bad
from instant_clip_tokenizer import Tokenizer
from torch import Tensor

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49408
START_ID = 49406
END_ID = 49407
PAD_ID = 0

# Characters of a token. Merging takes the square of a word's length, so what of a very long one no
# token of the row can come from is cut off.
_LONGEST_TOKEN = 24

_QUOTES = dict.fromkeys((700, *range(8216, 8220)), "'")
_QUOTES |= dict.fromkeys(range(8220, 8224), '"')
_QUOTE = re.compile("[" + "".join(map(chr, _QUOTES)) + "]")


def _character_class(codes: Iterable[int]) -> str:
    return "[" + "".join(re.escape(chr(code)) for code in sorted(codes)) + "]"


# An ampersand that html.unescape cannot read as a reference: at the end, or before one of these.
_REFERENCE = r"&[^\t\n\f <&;]"
_CONTROL = _character_class(chardata.CONTROL_CHARS)
_ASCII_UNCLEAN = re.compile(f"{_CONTROL}|{_REFERENCE}")
_ASCII_FIXABLE = re.compile(f"{_CONTROL}|{chardata.HTML_ENTITY_RE.pattern}")
# ftfy works line by line and one of its tests looks at a line's start, hence \r and \n.
_FIXABLE = re.compile(
    _character_class(
        {*chardata.CONTROL_CHARS, *chardata.LIGATURES, *chardata.WIDTH_MAP, *_QUOTES}
        | {*range(0x80, 0xA0), 0x0A, 0x0D, 0x2028, 0x2029, *range(0xD800, 0xE000)}
    )
    + f"|{chardata.HTML_ENTITY_RE.pattern}"
)

# html.unescape reads a reference's number by int(), which refuses more than 4,300 digits. Of eight
# digits the first of which is no zero it makes U+FFFD, as of any more.
_LONG_NUMBER = re.compile("&#0*([0-9]{8})[0-9]*")

# Normalizing takes the square of a run of combining characters that are out of order. In a text of
# up to so many characters that is no more than the rest of cleaning takes.
_SHORT_TEXT = 1024
_LONG_RUN = 32
# A round of ftfy resolves one level of nested references, and a step of it one of mojibake within
# mojibake; there may be as many levels as characters.
_MOST_ROUNDS = 64

# What ftfy.fix_text does in each round between mending the encoding and normalizing.
_FIXERS = (
    fixes.fix_c1_controls,
    fixes.fix_latin_ligatures,
    fixes.fix_character_width,
    fixes.uncurl_quotes,
    fixes.fix_line_breaks,
    fixes.fix_surrogates,
    fixes.remove_terminal_escapes,
    fixes.remove_control_chars,
)
_EXPLAIN_NOTHING = ftfy.TextFixerConfig(explain=False)
_SEGMENT = re.compile("[^\\n]{0,999999}\\n|[^\\n]{1,1000000}")

# The published pattern ignores case, so a long s counts as an s in its literal alternatives, and
# the match is then merged as the bytes it has. The Rust pattern knows no such rule.
_LONG_S = re.compile("'ſ|<ſtart_of_text>")
_LONG_S_IDS = {
    "'ſ": [6, 129, 379],
    "<ſtart_of_text>": [27, 129, 123, 16707, 62, 684, 62, 18169, 285],
}


def tokenize(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, *, truncate: bool = True
) -> Tensor:
    """Token ids of one text or of a batch of texts.

    Args:
        texts: a string (a batch of one), or a sequence of B strings. Lone surrogates are replaced
            by U+FFFD, as the published code does.
        context_length: T, at least 3.
        truncate: keep the first T - 1 tokens and the end token of a text that is too long. If
            False, such a text is an error.

    Returns:
        int64 [B, T]: start (49406), the text's tokens, end (49407), zeros.

    Raises:
        TypeError: texts are bytes, or an item is not a string; the message names its index.
        ValueError: context_length is below 3, or a text is too long and truncate is False.
        MemoryError: there is no room for as many ids.
    """
    if context_length < 3:
        raise ValueError(f"context_length is {context_length}; it must be at least 3")
    if isinstance(cast(object, texts), bytes | bytearray):  # a sequence, but of numbers
        raise TypeError(f"texts is of type {type(texts).__name__}; takes strings")
    batch = [texts] if isinstance(texts, str) else list(texts)
    prepared = _prepare(batch, context_length)
    width = context_length if truncate else context_length + 1
    # Made first, because without memory the Rust library ends the process.
    ids = np.empty((len(prepared), width), np.int64)
    ids[:] = _tokenizer().tokenize_batch(prepared, width)
    for index, text in enumerate(prepared) if _any_long_s(prepared) else ():
        if _LONG_S.search(text):
            ids[index] = _row(_encode_long_s(text, width), width)
    if not truncate:
        _refuse_long(ids[:, context_length])
        ids = np.ascontiguousarray(ids[:, :context_length])
    return torch.from_numpy(ids)


def decode(ids: Tensor | Sequence[int]) -> str:
    """The text of one row of token ids, without start, end and padding.

    The inverse of `tokenize` up to what cleaning and truncation lose and the spaces that separate
    tokens; bytes that are no UTF-8 become U+FFFD.

    Args:
        ids: [T] integers; everything from the first end token on is ignored.

    Raises:
        ValueError: ids has more than one dimension, or an id is outside the vocabulary.
    """
    if isinstance(ids, Tensor):
        if ids.dim() != 1:
            raise ValueError(f"decode takes one row of ids [T], got shape {tuple(ids.shape)}")
        ids = ids.tolist()
    row = [int(i) for i in ids]
    for position, token in enumerate(row):
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"token {token} at position {position} is outside 0..{VOCAB_SIZE - 1}")
    if END_ID in row:
        row = row[: row.index(END_ID)]
    return str(_tokenizer().decode([token for token in row if token != START_ID])).strip()


def clean_text(text: str) -> str:
    """What the published tokenizer makes of a text before it merges bytes.

    Encoding errors, widths, quotes and control characters mended (ftfy), character references
    resolved twice, whitespace collapsed, lower case.
    """
    fixed = _fix_text(text)
    if "&" in fixed:
        fixed = _unescape(_unescape(fixed))
    return " ".join(fixed.split()).lower()


def _unescape(text: str) -> str:
    """html.unescape(text), of references to numbers of any length."""
    return html.unescape(_LONG_NUMBER.sub(r"&#\1", text))


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer()


def _prepare(batch: list[str], context_length: int) -> list[str]:
    """Texts as the encoder needs them. It lower-cases ASCII and splits at whitespace by itself."""
    try:
        joined = "".join(batch)
    except TypeError:
        index, item = next((i, t) for i, t in enumerate(batch) if not isinstance(t, str))
        raise TypeError(
            f"texts[{index}] is of type {type(item).__name__}; tokenize takes strings"
        ) from None
    # Twice as long as what is seen: how its end is merged does not reach back that far.
    longest = 2 * _LONGEST_TOKEN * context_length
    if joined.isascii() and not _ASCII_UNCLEAN.search(joined):
        if len(joined) <= longest:
            return batch
        return [_seen(text, context_length, longest) for text in batch]
    return [
        _seen(
            text if text.isascii() and not _ASCII_UNCLEAN.search(text) else clean_text(text),
            context_length,
            longest,
        )
        for text in batch
    ]


def _seen(text: str, context_length: int, longest: int) -> str:
    """What a row of tokens can show of a text, which is not cut within a word's first `longest`."""
    if len(text) <= longest:
        return text
    # Every word gives at least one token, so those past the limit cannot be seen.
    words = text.split(maxsplit=context_length)[:context_length]
    return " ".join(word[:longest] for word in words)


def _fix_text(text: str) -> str:
    """ftfy.fix_text(text), asked only where it could change the text."""
    long = len(text) > _SHORT_TEXT
    if long and _in_order(text) != text:
        return _fix_long(text)
    if _ftfy_keeps(text):
        return text
    if not text.isascii() and _QUOTE.search(text) and not is_bad(text):
        # Curly quotes are the most frequent reason; ftfy replaces them one for one and starts over.
        straight = text.translate(_QUOTES)
        if "\n" not in straight and _ftfy_keeps(straight):
            return straight
    bad = not text.isascii() and is_bad(text)
    return _fix_long(text) if long or bad else ftfy.fix_text(text)


def _fix_long(text: str) -> str:
    """ftfy.fix_text(text) in `_MOST_ROUNDS` rounds at most, each quick whatever marks it has.

    Its fixers may bring combining characters about, so order is made in each of its rounds.
    """
    escaped = True
    fixed = []
    for segment in _SEGMENT.findall(text):
        escaped = escaped and "<" not in segment
        fixed.append(_fix_segment(segment, escaped))
    return "".join(fixed)


def _fix_segment(segment: str, escaped: bool) -> str:
    steps = _MOST_ROUNDS
    for _ in range(_MOST_ROUNDS):
        before = segment
        if escaped:
            segment = fixes.unescape_html(segment)
        segment, steps = _fix_encoding(segment, steps)
        for fix in _FIXERS:
            segment = fix(segment)
        segment = unicodedata.normalize("NFC", _in_order(segment))
        if segment == before:
            break
    return segment


def _fix_encoding(text: str, steps: int) -> tuple[str, int]:
    """ftfy.fix_encoding(text) in at most so many steps, and how many are left after it."""
    while steps:
        mended = ftfy._fix_encoding_one_step_and_explain(text, _EXPLAIN_NOTHING).text
        if mended == text:
            break
        text = mended
        steps -= 1
    return text, steps


def _in_order(text: str) -> str:
    """An equivalent text (the same when normalized) whose long runs of marks are in order."""
    return text if text.isascii() else _marks().sub(_ordered, text)


def _ordered(run: re.Match[str]) -> str:
    marks = itertools.chain.from_iterable(unicodedata.normalize("NFD", mark) for mark in run[0])
    return "".join(sorted(marks, key=unicodedata.combining))


@functools.cache
def _marks() -> re.Pattern[str]:
    """A long run of characters that normalizing puts in order."""
    combining = (code for code in range(0x20000) if unicodedata.combining(chr(code)))
    # These count as bases, and are taken apart into combining characters.
    return re.compile(f"{_character_class({*combining, 0xF73, 0xF75, 0xF81})}{{{_LONG_RUN},}}")


def _ftfy_keeps(text: str) -> bool:
    """Whether every fixer of ftfy is certain to return the text unchanged (False: it may not)."""
    if text.isascii():
        return not _ASCII_FIXABLE.search(text)
    return not _FIXABLE.search(text) and not is_bad(text) and unicodedata.is_normalized("NFC", text)


def _any_long_s(texts: list[str]) -> bool:
    return any("ſ" in text for text in texts if not text.isascii())


def _encode_long_s(text: str, width: int) -> list[int]:
    """Ids of a cleaned text in which a long s may stand for the s of a literal alternative.

    Whether the pattern would match there is read off the encoder: with a plain s in its place, the
    last token is the alternative's own. If it is not, the first character ends a token of signs
    and the long s begins a word; either way the text before is done with. The first `width` ids
    are all that is wanted.
    """
    encode = _tokenizer().encode
    ids: list[int] = []
    start = 0
    for match in _LONG_S.finditer(text):
        plain = match[0].replace("ſ", "s")
        head = encode(text[start : match.start()] + plain)
        if head[-1:] == encode(plain):
            ids += head[:-1] + _LONG_S_IDS[match[0]]
            start = match.end()
        else:
            ids += encode(text[start : match.start() + 1])
            start = match.start() + 1
        if len(ids) >= width:
            return ids
    ids += encode(text[start:])
    return ids


def _row(ids: list[int], width: int) -> list[int]:
    kept = [START_ID, *ids[: width - 2], END_ID]
    return kept + [PAD_ID] * (width - len(kept))


def _refuse_long(overflow: np.ndarray) -> None:
    """Raises if a text reached the column behind the last one it may use."""
    long = np.flatnonzero(overflow)
    if long.size:
        raise ValueError(
            f"texts[{long[0]}] has too many tokens ({long.size} of {overflow.size} texts do); "
            "shorten it, raise context_length, or pass truncate=True"
        )
