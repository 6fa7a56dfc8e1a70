"""The models' answers: the JSON schemas they are held to, and reading them.

Choices:
- The schemas use only what structured-output backends support (xgrammar in vLLM, OpenAI's strict
  mode apart from lengths): no pattern, no format, no uniqueItems.
- Reading is stricter than JSON where it matters (types, emptiness) and looser where endpoints
  differ: a code fence or words around the object, and further keys, do no harm.
- A description's maxLength is above what the guard keeps, so an answer that ran into the
  grammar's limit in mid-sentence is refused there.
"""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

from rwkv_clip.descriptions.sources import MAX_TAG, MAX_TAGS, clean_source

MAX_DESCRIPTION = 300

DESCRIPTION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "description": {"type": "string", "minLength": 3, "maxLength": MAX_DESCRIPTION + 20}
    },
    "required": ["description"],
    "additionalProperties": False,
}
CAPTION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "caption": {"type": "string", "minLength": 3, "maxLength": MAX_DESCRIPTION},
        "tags": {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_TAG},
            "maxItems": MAX_TAGS,
        },
    },
    "required": ["caption", "tags"],
    "additionalProperties": False,
}

AnswerReason = Literal["empty", "not_json", "truncated", "missing_field", "wrong_type"]

_MAX_ANSWER = 100_000
_DECODER = json.JSONDecoder()


class AnswerError(ValueError):
    """An answer that cannot be used.

    Attributes:
        reason: one of the words of AnswerReason, to be counted.
        detail: what was found, for a person.
    """

    def __init__(self, reason: AnswerReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[AnswerError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class Caption(NamedTuple):
    """What a vision-language model says of an image."""

    caption: str
    tags: tuple[str, ...]


def parse_description(text: str) -> str:
    """The description in a model's answer, in one line, not yet checked against its sources.

    Raises:
        AnswerError: there is no such answer in the text.
    """
    return _text(_object(text), "description")


def parse_caption(text: str) -> Caption:
    """Caption and tags in a vision-language model's answer, cleaned as sources are.

    Raises:
        AnswerError: there is no such answer in the text.
    """
    answer = _object(text)
    tags = _field(answer, "tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise AnswerError("wrong_type", "tags must be a list of strings")
    caption = clean_source(_text(answer, "caption"), MAX_DESCRIPTION)
    if not caption:
        raise AnswerError("empty", "caption has no words")
    cleaned = dict.fromkeys(clean_source(tag, MAX_TAG) for tag in tags[:MAX_TAGS])
    return Caption(caption, tuple(tag for tag in cleaned if tag))


def _object(text: str) -> dict[str, Any]:
    """The first JSON object in a text."""
    text = text[:_MAX_ANSWER].rstrip()
    if not text:
        raise AnswerError("empty", "the answer has no characters")
    start = text.find("{")
    if start < 0:
        raise AnswerError("not_json", f"no object in {text[:80]!r}")
    try:
        answer, _ = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text) or error.msg.startswith("Unterminated")
        reason: AnswerReason = "truncated" if cut_off else "not_json"
        raise AnswerError(reason, f"{error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:  # a huge number; a thousand brackets
        raise AnswerError("not_json", str(error)) from None
    if not isinstance(answer, dict):
        raise AnswerError("wrong_type", f"the answer is a {type(answer).__name__}")
    return answer


def _field(answer: dict[str, Any], name: str) -> Any:
    if name not in answer:
        raise AnswerError("missing_field", f"{name} is not among {sorted(answer)[:5]}")
    return answer[name]


def _text(answer: dict[str, Any], name: str) -> str:
    value = _field(answer, name)
    if not isinstance(value, str):
        raise AnswerError("wrong_type", f"{name} is a {type(value).__name__}, not a string")
    # Half of a character pair cannot be stored as UTF-8.
    line = " ".join(value.encode("utf-8", "ignore").decode("utf-8").split())
    if not line:
        raise AnswerError("empty", f"{name} has no words")
    return line
