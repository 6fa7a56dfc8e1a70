"""Whether a written description says only what its sources say.

Choices:
- Every content word and number of the description must be supported by some source: the same
  stem, a synonym, or a more general word (`words`). Words of grammar and a few neutral words for
  pictures need no support; negations, numbers and pronouns of gender do.
- A description is refused as a whole. Editing it would need grammar; the model is asked again, and
  `fallback_description` serves after that.
- Words are compared, not what they are said of: a white cat and a black dog pass as a black cat
  and a white dog.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, dropwhile, pairwise
from typing import Any, Literal, get_args

from rwkv_clip.descriptions import lexicon, prompt, words
from rwkv_clip.descriptions.answer import MAX_DESCRIPTION
from rwkv_clip.descriptions.lexicon import STOP_WORDS
from rwkv_clip.descriptions.sources import Sources

Reason = Literal[
    "empty",
    "not_text",
    "too_short",
    "too_long",
    "boilerplate",
    "repetition",
    "unsupported_word",
    "unsupported_number",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

MAX_WORDS = 60
MIN_WORDS = 2
_MIN_LETTERS = 0.6  # of the characters that are not spaces
_SHINGLE = 5  # words
_PART = 3  # letters

_MARKUP = re.compile(r"[{}<>|\\`\x00-\x08\x0b-\x1f\x7f]|https?:|www\.|\S@\S")
_CLAUSE_END = re.compile(r"[,;:.!?]+\s")
# What joins words in Chinese and Japanese.
_PARTICLES = frozenset("的了是在和与与一个个有着上下中里はがをにのとでもへやですまる")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard found.

    Attributes:
        kept: whether the description may be used.
        reason: why not, one of REASONS; None if it may.
        unsupported: the words and numbers without support, folded, in their order.
    """

    kept: bool
    reason: Reason | None = None
    unsupported: tuple[str, ...] = ()


_KEPT = Verdict(True)


def check(description: str, sources: Sources) -> Verdict:
    """Judge a description by its sources. Never raises, and is done quickly with any text."""
    if len(description) > MAX_DESCRIPTION:
        return Verdict(False, "too_long")
    text = description.strip()
    if not text:
        return Verdict(False, "empty")
    folded = words.fold(text)
    found = words.split(folded)
    if not _is_text(folded, found):
        return Verdict(False, "not_text")
    if _says_little(found):
        return Verdict(False, "too_short")
    if len(found) > MAX_WORDS:
        return Verdict(False, "too_long")
    if _is_boilerplate(found, sources):
        return Verdict(False, "boilerplate")
    stems = _stems(found)
    if _comes_again(stems) and (_repeats(stems, sources) or _restates(folded, sources)):
        return Verdict(False, "repetition")
    unsupported = _unsupported(found, sources)
    if not unsupported:
        return _KEPT
    if _echoes_prompt(found):
        return Verdict(False, "boilerplate", unsupported)
    number = all(map(words.is_number, unsupported))
    return Verdict(False, "unsupported_number" if number else "unsupported_word", unsupported)


def _is_text(folded: str, found: list[str]) -> bool:
    enough = _MIN_LETTERS * (len(folded) - folded.count(" "))
    # A number in words is short in `found`; vowel signs of India's scripts are letters only there.
    if sum(map(len, found)) < enough and sum(map(str.isalnum, folded)) < enough:
        return False
    return not _MARKUP.search(folded)


def _says_little(found: list[str]) -> bool:
    """Whether it is a single word, or words of grammar alone."""
    if len(found) < MIN_WORDS and not any(map(words.is_run, found)):
        return True
    return not any(map(words.asked, found))


def _is_boilerplate(found: list[str], sources: Sources) -> bool:
    """Whether it says what web pages say around images, unless the image itself shows that."""
    phrases = _boilerplate(found)
    if not phrases:
        return False
    shown = (sources.caption or "", *sources.tags)
    return not phrases <= set().union(*(_boilerplate(words.tokens(text)) for text in shown))


def _boilerplate(found: list[str]) -> set[tuple[str, ...]]:
    starts = [i for i, token in enumerate(found) if token in _PHRASES]
    return _notice(found) | {
        phrase
        for i in starts
        for phrase in _PHRASES[found[i]]
        if tuple(found[i : i + len(phrase)]) == phrase
    }


def _notice(found: list[str]) -> set[tuple[str, ...]]:
    """What a text says that is a notice and no more: "Member sign in", "a picture of sign in"."""
    said = " ".join(dropwhile(STOP_WORDS.__contains__, found))
    notice = _NOTICE.fullmatch(said)
    return {tuple(notice[notice.lastindex or 0].split())} if notice else set()


def _notices() -> re.Pattern[str]:
    notices, around = (
        "|".join(chain.from_iterable(lexicon.entries(table)))
        for table in (lexicon.NOTICES, lexicon.AROUND_NOTICES)
    )
    wholly = rf"(?:(?:{around}) )*({notices})(?: (?:{notices}|{around}))*"
    return re.compile(rf"{wholly}|(powered by)(?: \S+){{0,2}}")


def _phrases() -> dict[str, list[tuple[str, ...]]]:
    """First word -> the phrases that start with it."""
    phrases: dict[str, list[tuple[str, ...]]] = {}
    for (entry,) in lexicon.entries(lexicon.BOILERPLATE):
        phrase = tuple(entry.split())
        phrases.setdefault(phrase[0], []).append(phrase)
    return phrases


_PHRASES = _phrases()
_NOTICE = _notices()


def _echoes_prompt(found: list[str]) -> bool:
    """Whether a sequence of words comes from the request instead of the sources."""
    return not _prompt_shingles().isdisjoint(_shingles(found))


@cache
def _prompt_shingles() -> frozenset[tuple[str, ...]]:
    texts = [prompt.INSTRUCTION, *(description for _, description in prompt.EXAMPLES)]
    return frozenset(chain.from_iterable(_shingles(words.tokens(text)) for text in texts))


def _shingles(found: list[str]) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + _SHINGLE]) for i in range(len(found) - _SHINGLE + 1)]


def _comes_again(stems: list[str]) -> bool:
    """Whether a content word comes twice, or any word twice in a row: else nothing repeats."""
    content = _content(stems)
    return len(set(content)) < len(content) or any(a == b for a, b in pairwise(stems))


def _repeats(found: list[str], sources: Sources) -> bool:
    """Whether words come more often than in a sentence, and more often than in any source."""
    pairs = {pair for pair in pairwise(found) if pair[0] == pair[1]}
    if pairs and not any(pairs <= set(pairwise(text)) for text in _stemmed(sources)):
        return True
    return _more_often(found, sources, _content, 2) or _more_often(found, sources, _triples, 1)


def _restates(folded: str, sources: Sources) -> bool:
    """Whether a clause only says again what stands before it: "a red fox, a fox"."""
    parts = _CLAUSE_END.split(folded)
    if len(parts) == 1:
        return False
    said: list[str] = []
    for part in parts:
        clause = _content(_stems(words.split(part)))
        if clause and set(said).issuperset(clause):
            return _more_often([*said, *clause], sources, _content, 1)
        said += clause
    return False


def _more_often(
    found: list[str], sources: Sources, items: Callable[[list[str]], list[Any]], limit: int
) -> bool:
    """Whether an item comes more than `limit` times, and more often than in any one source."""
    listed = items(found)
    if len(listed) - len(set(listed)) < limit:
        return False
    often = {item: count for item, count in Counter(listed).items() if count > limit}
    if not often:
        return False
    counts = [Counter(items(text)) for text in _stemmed(sources)]
    return any(all(count > source[item] for source in counts) for item, count in often.items())


def _content(found: list[str]) -> list[str]:
    return [token for token in found if token not in STOP_WORDS]


def _triples(found: list[str]) -> list[tuple[str, ...]]:
    return list(zip(found, found[1:], found[2:], strict=False))


def _stems(found: list[str]) -> list[str]:
    return [words.stem(token) for token in found]


def _stemmed(sources: Sources) -> list[list[str]]:
    return [_stems(words.tokens(text)) for text in sources.texts]


def _unsupported(found: list[str], sources: Sources) -> tuple[str, ...]:
    """The tokens that no source supports, each once."""
    known = words.tokens("\n".join(sources.texts))
    supplied: set[str] = set()
    for token in known:
        supplied |= words.supplied(token)
    missing = []
    for token in dict.fromkeys(found):
        keys = words.asked(token)
        if keys and supplied.isdisjoint(keys):
            missing.append(token)
    if not missing:
        return ()
    excused = _compounds(found, known)
    return tuple(
        token
        for token in missing
        if token not in excused and not (words.is_run(token) and _is_covered(token, known))
    )


def _compounds(found: list[str], known: list[str]) -> set[str]:
    """Words that differ from a source's only by a space: firefighter, fire fighter."""
    whole = set(_stems(known))
    joined = {words.stem(first + second) for first, second in _neighbours(known)}
    excused = {token for token in found if words.stem(token) in joined}
    for first, second in _neighbours(found):
        if words.stem(first + second) in whole:
            excused |= {first, second}
    return {
        token for token in excused if token.isalpha() and words.NEGATION not in words.asked(token)
    }


def _neighbours(found: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of words that are long enough to be parts of a compound."""
    return (pair for pair in pairwise(found) if min(map(len, pair)) >= _PART)


def _is_covered(run: str, sources: list[str]) -> bool:
    """Whether a run without spaces is made of pieces of the sources' runs and of particles."""
    text = "\n".join(sources)
    start = 0
    while start < len(run):
        end = start + 1
        while end < len(run) and run[start : end + 1] in text:
            end += 1
        piece = run[start:end]
        if len(piece) == 1 and piece not in _PARTICLES and not _is_edge(piece, sources):
            return False
        start = end
    return True


def _is_edge(character: str, sources: list[str]) -> bool:
    """Whether a run starts or ends with it, where it may well be a word."""
    return any(character in {source[0], source[-1]} for source in sources)
