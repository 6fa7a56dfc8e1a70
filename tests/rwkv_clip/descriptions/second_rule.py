"""A second rule for whether a description's words come from its sources, to audit the guard by.

It shares no code and no table with the guard and knows no language: a content word is supported if
a source has a word of the same beginning, or one that shares most of its runs of four letters. It
knows no synonyms and no general words, so it accuses rather too often than too rarely.
"""

import unicodedata
from collections.abc import Iterable

IGNORED = frozenset(
    """about above across after against all along also among an and another any appear appears are
    around as at be been before behind being below beneath beside between but by can contains
    depicting depicts described did display displayed displaying displays does doing during each
    featured features featuring for from had has have having he her here hers him his how icon if
    image images in include includes including inside into is it its just kind like look looking
    looks near next of off on one only onto or other our out outside over part people person photo
    picture pictured piece represented representing represents same scene see seen she show showing
    shown shows so some such than that the their them then there these they thing things this those
    through to too toward towards type under upon used very via view visible was were what when
    where which while who whose will with within would you your""".split()
)
NUMERALS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()
    )
}
SHARED_RUNS = 0.5


def unsupported(description: str, sources: Iterable[str]) -> list[str]:
    """The content words and numbers of a description that no source seems to have."""
    known: set[str] = set()
    for source in sources:
        known.update(_words(source))
    content = [word for word in _words(description) if word not in IGNORED and _counts(word)]
    return [word for word in content if not any(_alike(word, other) for other in known)]


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text).lower()
    letters = (c if c.isalnum() else "" if unicodedata.combining(c) else " " for c in plain)
    return [NUMERALS.get(word, word) for word in "".join(letters).split()]


def _counts(word: str) -> bool:
    return len(word) > 2 or word.isdigit()


def _alike(word: str, other: str) -> bool:
    if word == other:
        return True
    if word.isdigit() or other.isdigit():
        return False
    shorter, longer = sorted((word, other), key=len)
    if len(shorter) >= 3 and longer.startswith(shorter[: max(3, len(shorter) - 2)]):
        return len(longer) - len(shorter) <= 4
    runs, other_runs = _runs(shorter), _runs(longer)
    return bool(runs) and len(runs & other_runs) >= SHARED_RUNS * len(runs)


def _runs(word: str) -> set[str]:
    return {word[i : i + 4] for i in range(len(word) - 3)}
