"""Words of a text and what each of them supports: tokens, stems, numbers, synonyms.

Choices:
- A word becomes keys: its stem, and the names of the meanings that it carries. A source's word
  also supplies the keys of what is more general: a dog is an animal, an animal is no dog. That
  follows as a noun, not as a verb of its stem: nobody need be drinking where there is a drink.
- The stemmer undoes English inflection (plurals, -ing, -ed, -ly) and no derivation. It need not
  give words, only the same key for forms of one word; on other languages it does little.
- Forms of different words that are spelled alike get keys of their own: a plan is no plane, so the
  last `e` stays behind one vowel and one consonant, and planing has it back. Nor do synonyms and
  general words follow from -ing and -ed, unless of a verb: nobody who is cooking need be a chef.
- English writes an apostrophe before an ending, French and Italian behind a short word that loses
  its vowel; both are split off. In O'Neill, and in Cyrillic and Hebrew, it is a part of the word.
- Pronouns say whether a person is male or female, so they must be supported like nouns.
- Scripts written without spaces (Han, Kana, Thai, ...) come as whole runs, for the guard to search.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from itertools import chain

from rwkv_clip.descriptions import lexicon
from rwkv_clip.descriptions.lexicon import MULTIPLES, NEGATIONS, PRONOUNS, STOP_WORDS, TENS

NEGATION = "#no"

# Characters of scripts that do not separate words, for a regular expression's brackets.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
# In the scripts of India, vowel signs are no letters to a regular expression.
_LETTER = rf"(?:[^\W\d_{UNSPACED}]|[\u0900-\u0963\u0970-\u0dff])"
_WITHIN = r"\u0400-\u052f\u05d0-\u05ea"  # Cyrillic and Hebrew have apostrophes inside of words
_NUMBER = r"\d+(?:st|nd|rd|th)\b|\d+(?:[.,]\d+)*"


def _token(letter: str, others: str = "") -> re.Pattern[str]:
    """Finds a word, a number, or one of the others; in its group, behind what was elided."""
    ending = rf"'(?:{'|'.join(lexicon.ENDINGS)})(?!{letter})"
    elided = rf"(?!\w{ending})(?:{'|'.join(lexicon.ELISIONS)})'(?={letter})"
    inside = rf"(?:(?<=[{_WITHIN}])'(?=[{_WITHIN}]){letter}+)*"
    head = rf"[a-z]'(?={letter})"  # O'Neill's
    word = rf"(?:{head})?{letter}+{inside}(?:{ending})?"
    return re.compile(rf"(?:{elided})*({word}|{_NUMBER}{others})")


_TOKEN = _token(_LETTER, rf"|[{UNSPACED}]+")
_ASCII_TOKEN = _token("[a-z]")
_PLAIN_TOKEN = re.compile(rf"[a-z]+|{_NUMBER}")
_RUN = re.compile(f"[{UNSPACED}]")
# Accents of Latin, Greek and Cyrillic, vowel points of Hebrew and Arabic, joiners and selectors.
_ACCENTS = re.compile(
    "[\u0300-\u036f\u0591-\u05c7\u0640\u064b-\u065f\u0670\u200b-\u200d\ufe00-\ufe0f]"
)
_LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe", "ı": "i", "’": "'", "ʼ": "'", "‘": "'"}
)

_JOINED = TENS.keys() | MULTIPLES.keys()

_VOWEL = re.compile("[aeiouy]")
# One syllable that a mute e would lengthen: hop and hope, pin and pine.
_SHORT = re.compile("[^aeiou]+[aeiouy][^aeiouwxy]")


def tokens(text: str) -> list[str]:
    """The words and numbers of a text, folded: no case, no accents, no possessives."""
    return split(fold(text))


def split(folded: str) -> list[str]:
    """The words and numbers of a folded text; twenty-five is the number 25, two hundred is 200."""
    found: list[str] = _pattern(folded).findall(folded)
    return found if _JOINED.isdisjoint(found) else _join_numbers(found)


def _pattern(folded: str) -> re.Pattern[str]:
    if not folded.isascii():
        return _TOKEN
    return _ASCII_TOKEN if "'" in folded else _PLAIN_TOKEN


def fold(text: str) -> str:
    """The text without differences of case, width and accent."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKD", text).casefold().translate(_LETTERS)
    return unicodedata.normalize("NFC", _ACCENTS.sub("", text))


def is_run(token: str) -> bool:
    """Whether a token is a run of a script that does not separate words."""
    return _RUN.match(token) is not None


def is_number(token: str) -> bool:
    """Whether a token states a number or a rank, in digits or as a word."""
    return token[0].isdigit() or token in lexicon.NUMBERS or token in lexicon.ORDINALS


@lru_cache(1 << 17)
def asked(token: str) -> tuple[str, ...]:
    """The keys of a description's token, any of which supports it; () if it needs no support."""
    if token in STOP_WORDS:
        return ()
    if token[0].isdigit():
        return (_digits(token),)
    word = _possessor(token)
    if token.endswith("n't") or word in NEGATIONS:
        return (NEGATION,)
    if word in STOP_WORDS:
        return ()
    said = PRONOUNS.get(word, word)
    keys = (*_meanings(said), _general(said))
    number = _number_key(word)
    if number is None:
        return keys
    return (number, *keys) if word in lexicon.ALSO_WORDS else (number,)


@lru_cache(1 << 17)
def supplied(token: str) -> frozenset[str]:
    """The keys that a source's token supports."""
    if token[0].isdigit():
        return frozenset({_digits(token)})
    word = _possessor(token)
    said = {word, PRONOUNS.get(word, word)}
    keys = set(chain.from_iterable(map(_meanings, said)))
    for name in chain.from_iterable(map(_names, said)):
        keys |= _ABOVE.get(name, frozenset())
    if token.endswith("n't") or word in NEGATIONS:
        keys.add(NEGATION)
    number = _number_key(word)
    if number is not None:
        keys.add(number)
    return frozenset(keys)


@lru_cache(1 << 17)
def stem(word: str) -> str:
    """The same key for the inflected forms of an English word."""
    return _ended(_without_ending(_without_ly(_singular(word))))


@lru_cache(1 << 17)
def _name(word: str) -> str:
    """As `stem`, but -ing and -ed stay: the key of what nouns and adjectives mean."""
    return _ended(_without_ly(_singular(word)))


def _singular(word: str) -> str:
    """Without a plural, and with what is irregular undone."""
    word = _IRREGULAR.get(word, word)
    if len(word) <= 3:
        return word
    word = _without_s(word)
    return _IRREGULAR.get(word, word)


def _ended(word: str) -> str:
    """Without a last letter that comes and goes."""
    if len(word) > 3 and word.endswith("e") and not _SHORT.fullmatch(word[:-1]):
        word = word[:-1]
    # Cookie and puppy end alike, as cookies and puppies do.
    return word[:-1] + "i" if len(word) > 3 and word.endswith("y") else word


def _without_s(word: str) -> str:
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    return word[:-1]


def _without_ly(word: str) -> str:
    return word[:-2] if word.endswith("ly") and len(word) > 5 else word


def _without_ending(word: str) -> str:
    if word.endswith("ied"):
        return word[:-3] + "y" if len(word) > 4 else word[:-1]
    for ending in ("ing", "ed"):
        base = word.removesuffix(ending)
        if base == word or len(base) < 2 or base.endswith("e") or not _VOWEL.search(base):
            continue
        if len(base) > 2 and base[-1] == base[-2] and base[-1] not in "lsz":
            base = base[:-1]
        elif _SHORT.fullmatch(base):
            base += "e"
        return base + "ing" if _ended(base) in _THINGS else base
    return word


def _join_numbers(found: list[str]) -> list[str]:
    joined: list[str] = []
    for token in found:
        whole = _joint(joined[-1], token) if joined else None
        if whole is None:
            joined.append(token)
        else:
            joined[-1] = whole
    return joined


def _joint(first: str, second: str) -> str | None:
    """The number that two words say together, in digits; None if they say none."""
    if first in TENS and 0 < lexicon.SIMPLE.get(second, 0) < 10:
        return str(TENS[first] + lexicon.SIMPLE[second])
    if first in TENS and 0 < lexicon.ORDINALS.get(second, 0) < 10:
        return f"{TENS[first] + lexicon.ORDINALS[second]}th"
    if second not in MULTIPLES:
        return None
    count = int(first) if first.isdecimal() else lexicon.SIMPLE.get(first, 0)
    return str(count * MULTIPLES[second]) if count else None


def _possessor(token: str) -> str:
    head, _, ending = token.rpartition("'")
    return head if ending in lexicon.ENDINGS and head else token


def _digits(token: str) -> str:
    rank = token[-1].isalpha()
    number = token[:-2] if rank else token
    # 1,000 is a thousand; 1,5 is one and a half.
    number = re.sub(r",(?=\d{3}(?!\d))", "", number).replace(",", ".")
    whole, point, fraction = number.partition(".")
    whole = "".join(str(unicodedata.digit(digit, digit)) for digit in whole).lstrip("0") or "0"
    return f"#{whole}{point}{fraction}{'th' if rank else ''}"


def _number_key(word: str) -> str | None:
    if word in lexicon.ORDINALS:
        return f"#{lexicon.ORDINALS[word]}th"
    number = lexicon.NUMBERS.get(word)
    if number is None:
        number = lexicon.NUMBERS.get(word.removesuffix("s"))
    return None if number is None else f"#{number}"


def _meanings(word: str) -> tuple[str, ...]:
    base = stem(word)
    return (base, *_GROUPS.get(_name(word), ()), *_VERBS.get(base, ()))


def _groups(table: str, key: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """Key of a word -> the names of its meanings."""
    groups: dict[str, tuple[str, ...]] = {}
    for synonyms in lexicon.entries(table):
        for base in map(key, synonyms):
            groups[base] = (*groups.get(base, ()), f"={synonyms[0]}")
    return groups


def _above() -> dict[str, frozenset[str]]:
    """Name of a word or a meaning -> the keys of everything more general."""
    direct: dict[str, set[str]] = {}
    for general, *special in lexicon.entries(lexicon.GENERAL):
        for word in special:
            for name in _names(word):
                direct.setdefault(name, set()).add(general)
    return {name: frozenset(_reachable(name, direct)) for name in direct}


def _names(word: str) -> tuple[str, ...]:
    name = _name(word)
    return (name, *_GROUPS.get(name, ()), *_VERBS.get(stem(word), ()))


def _general(word: str) -> str:
    """The key of a word where it follows from a more special one."""
    return f"^{_name(word)}"


def _reachable(start: str, direct: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        for general in direct.get(todo.pop(), set()):
            name, *meanings = _names(general)
            if not found.issuperset(keys := {_general(general), *meanings}):
                found |= keys
                todo += [name, *meanings]
    return found


_IRREGULAR = {form: base for base, *forms in lexicon.entries(lexicon.IRREGULAR) for form in forms}
_THINGS = frozenset(map(_ended, lexicon.THINGS))
_GROUPS = _groups(lexicon.SYNONYMS, _name)
_VERBS = _groups(lexicon.VERBS, stem)
_ABOVE = _above()
