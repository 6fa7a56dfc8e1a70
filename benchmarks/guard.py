"""How much the grounding guard lets through: kept descriptions, judged by a second rule.

    python benchmarks/guard.py [outputs/emoji]

Reads what `make demo` wrote, and is skipped where that has not been run. The rule shares no code
and no word list with the guard, and errs on the strict side: a word of four letters or more is
supported if it and a word of the web text, the caption or the tags begin with the same four
letters, or one holds the other; a number if it is in a source. What English needs to make a
sentence of them comes from scikit-learn's list of stop words, and a dozen words by which a text
says that it is a description. Everything else counts as unsupported, true synonyms too; the words
are printed, so that a reader can judge the rule.
"""

import argparse
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

from _common import verdict
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from ray_jobs.beside import DESCRIPTIONS, Beside
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.storage import Storage

LIMIT = 0.02
FEWEST = 300
_LETTERS = 4
_DESCRIBING = frozenset(
    "image picture photo photograph icon emoji symbol illustration drawing shows showing depicts "
    "depicting features featuring represents representing shown depicted".split()
)


def folded(text: str) -> str:
    """Lower case without accents."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(character for character in parts if not unicodedata.combining(character))


def words(text: str) -> list[str]:
    """Runs of letters, and runs of digits."""
    return re.findall(r"[^\W\d_]+|\d+", folded(text))


def unsupported(description: str, row: Mapping[str, Any]) -> list[str]:
    """The description's words that the row's sources do not have."""
    texts = [row["web_text"], row["caption"] or "", *(row["tags"] or [])]
    sources = {word for text in texts for word in words(text)}
    return [word for word in words(description) if not _supported(word, sources)]


def _supported(word: str, sources: set[str]) -> bool:
    if word in sources:
        return True
    if word.isdigit():
        return False
    if len(word) < _LETTERS or word in ENGLISH_STOP_WORDS or word in _DESCRIBING:
        return True
    return any(
        source[:_LETTERS] == word[:_LETTERS]
        or word in source
        or (len(source) > 2 and source in word)
        for source in sources
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge kept descriptions by a second rule.")
    parser.add_argument("storage", nargs="?", default="outputs/emoji", help="of a run that is done")
    parser.add_argument("--name", default="train", help="the data set's name")
    arguments = parser.parse_args()
    storage = Storage.at(arguments.storage)
    beside = Beside(DESCRIPTIONS, arguments.name)
    if not storage.exists(beside.manifest_file):
        print(f"SKIPPED: {storage.uri} holds no finished synthesis; run `make demo` first")
        return
    manifest = Manifest.from_storage(storage, arguments.name)
    kept, found = 0, Counter[str]()
    samples: list[str] = []
    for part in manifest.parts:
        rows = storage.read_table(part.path, columns=["web_text", "caption", "tags"]).to_pylist()
        written = storage.read_table(beside.part_file(part.name)).to_pylist()
        for row, one in zip(rows, written, strict=True):
            if one["description_source"] != "llm":
                continue
            kept += 1
            if bad := unsupported(one["description"], row):
                found.update(bad)
                samples.append(f"{one['description']}  [{', '.join(bad)}]")
    share = len(samples) / max(kept, 1)
    print(f"{kept:,} descriptions kept by the guard, of {manifest.rows:,} pairs")
    print(f"{len(samples):,} have a word that the second rule does not find: {100 * share:.2f} %")
    print("words:", ", ".join(f"{word} {count}" for word, count in found.most_common(15)))
    for sample in samples[:10]:
        print("  ", sample)
    if kept < FEWEST:
        print(f"SKIPPED: fewer than {FEWEST} descriptions are no measurement")
        return
    print(f"unsupported: {100 * share:.2f} %, under {100 * LIMIT:.0f} %: {verdict(share < LIMIT)}")


if __name__ == "__main__":
    main()
