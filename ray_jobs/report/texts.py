"""Statistics of texts: how long they are and how many words they use."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"\w+(?:['’]\w+)?")


@dataclass(frozen=True)
class TextStatistics:
    """Of all texts of one kind.

    Attributes:
        kind: the column's name.
        texts: how many there are; absent and empty ones do not count.
        words: of one text: the mean, and the percentiles 10, 50 and 90.
        vocabulary: different words, regardless of case.
        distinct_per_thousand: different words in a thousand running ones, the mean over all
            stretches of a thousand, so that kinds of different length can be compared.
        repeated: the share of texts that another pair has too.
    """

    kind: str
    texts: int
    words: tuple[float, float, float, float]
    vocabulary: int
    distinct_per_thousand: float
    repeated: float


def text_statistics(kind: str, texts: Iterable[str | None]) -> TextStatistics | None:
    """The statistics of some texts; None if there are none."""
    lengths, running = [], list[str]()
    seen: Counter[str] = Counter()
    for text in texts:
        if not text:
            continue
        words = _WORD.findall(text.lower())
        lengths.append(len(words))
        running += words
        seen[" ".join(words)] += 1
    if not lengths:
        return None
    low, middle, high = np.percentile(lengths, (10, 50, 90))
    return TextStatistics(
        kind=kind,
        texts=len(lengths),
        words=(float(np.mean(lengths)), float(low), float(middle), float(high)),
        vocabulary=len(set(running)),
        distinct_per_thousand=_distinct(running, 1000),
        repeated=sum(count for count in seen.values() if count > 1) / len(lengths),
    )


def _distinct(words: list[str], stretch: int) -> float:
    """Different words in stretches of this many; scaled up where there are fewer."""
    if len(words) <= stretch:
        return len(set(words)) * stretch / max(len(words), 1)
    starts = range(0, len(words) - stretch + 1, stretch)
    return float(np.mean([len(set(words[start : start + stretch])) for start in starts]))
