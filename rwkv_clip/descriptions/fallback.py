"""A description without a language model, for rows whose answers were refused.

Choices:
- The caption is a sentence already; tags that add something to it follow after "with".
- The web text speaks only where there is nothing else, and only if it is no boilerplate.
- What is returned passes the guard, so a fallback is held to the rule that the model is held to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rwkv_clip.descriptions import guard, words
from rwkv_clip.descriptions.answer import MAX_DESCRIPTION
from rwkv_clip.descriptions.sources import Sources, cut

MAX_NEW_TAGS = 5
_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
_ROOM = len("a picture of .")
_EDGES = " ,;:-_./|'"


def fallback_description(sources: Sources) -> str | None:
    """One sentence from caption and tags, or from the web text where they give none.

    None if the sources give no sentence that the guard keeps.
    """
    for candidate in _candidates(sources):
        if candidate and guard.check(candidate, sources).kept:
            return candidate
    return None


def _candidates(sources: Sources) -> Iterator[str]:
    """Sentences from best to plainest."""
    caption = sources.caption or ""
    new = _new_tags(sources.tags, caption)
    if caption:
        link = ", along with " if "with" in words.tokens(caption) else ", with "
        yield _sentence(_body(caption) + link + _listed(new)) if new else ""
        yield _sentence(_body(caption))
        yield _sentence(f"a picture of {_body(caption)}")  # a caption of one word
    if new:
        yield _sentence(f"a picture of {_listed(new)}")
    if sources.web_text:
        yield _sentence(_body(sources.web_text))
        yield _sentence(f"a picture of {_body(sources.web_text)}")


def _new_tags(tags: Sequence[str], caption: str) -> list[str]:
    """Tags that say something that neither the caption nor a tag before them says."""
    known = _supplied(caption)
    new: list[str] = []
    for tag in tags:
        asked = [keys for keys in map(words.asked, words.tokens(tag)) if keys]
        if not asked or all(not known.isdisjoint(keys) for keys in asked):
            continue
        new.append(tag)
        known |= _supplied(tag)
    return new[:MAX_NEW_TAGS]


def _supplied(text: str) -> set[str]:
    return set().union(*map(words.supplied, words.tokens(text)))


def _listed(items: Sequence[str]) -> str:
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last


def _body(text: str) -> str:
    """A sentence's words, without what separates or ends it."""
    return cut(text, MAX_DESCRIPTION - _ROOM).strip(_EDGES + "…。")


def _sentence(text: str) -> str:
    if len(text) >= MAX_DESCRIPTION:
        text = cut(text, MAX_DESCRIPTION - 1).rstrip(_EDGES)
    text = text[:1].upper() + text[1:]
    return text if text.endswith(_ENDS) else f"{text}."
