"""Real material: every emoji as an image with its names for caption, web text and tags."""

import random
from dataclasses import dataclass

import pytest

from rwkv_clip.descriptions import Sources


@dataclass(frozen=True)
class Emoji:
    """One emoji: its English name, and the sources made of what people call it."""

    name: str
    sources: Sources


@pytest.fixture(scope="session")
def emojis() -> list[Emoji]:
    emoji = pytest.importorskip("emoji")
    found = []
    for entry in emoji.EMOJI_DATA.values():
        if entry["status"] == emoji.STATUS["fully_qualified"]:
            name, *aliases = map(_spoken, (entry["en"], *entry.get("alias", ())))
            tags = tuple(word for word in name.split() if len(word) > 2)
            found.append(Emoji(name, Sources(" ".join(aliases), f"a {name}", tags)))
    assert len(found) > 3500
    return found


@pytest.fixture(scope="session")
def names_by_language() -> dict[str, list[str]]:
    emoji = pytest.importorskip("emoji")
    languages = ("ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
    emoji.config.load_language(list(languages))
    return {
        language: [
            _spoken(entry[language])
            for entry in emoji.EMOJI_DATA.values()
            if language in entry and entry["status"] == emoji.STATUS["fully_qualified"]
        ]
        for language in languages
    }


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


def _spoken(name: str) -> str:
    return name.strip(":").replace("_", " ")
