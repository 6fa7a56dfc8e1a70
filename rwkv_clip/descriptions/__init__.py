"""Diverse descriptions: web text, caption and tags of one image, merged by a language model.

Pure functions on one row. `describe_messages` asks, `parse_description` reads the answer, `check`
holds it to its sources, and `fallback_description` serves where no answer passes.
"""

from rwkv_clip.descriptions.answer import (
    CAPTION_SCHEMA,
    DESCRIPTION_SCHEMA,
    MAX_DESCRIPTION,
    AnswerError,
    AnswerReason,
    Caption,
    parse_caption,
    parse_description,
)
from rwkv_clip.descriptions.fallback import fallback_description
from rwkv_clip.descriptions.guard import REASONS, Reason, Verdict, check
from rwkv_clip.descriptions.prompt import (
    CAPTION_PROMPT_VERSION,
    PROMPT_VERSION,
    SOURCE_TOKENS,
    caption_messages,
    describe_messages,
    estimate_tokens,
)
from rwkv_clip.descriptions.sources import Sources

__all__ = [
    "CAPTION_PROMPT_VERSION",
    "CAPTION_SCHEMA",
    "DESCRIPTION_SCHEMA",
    "MAX_DESCRIPTION",
    "PROMPT_VERSION",
    "REASONS",
    "SOURCE_TOKENS",
    "AnswerError",
    "AnswerReason",
    "Caption",
    "Reason",
    "Sources",
    "Verdict",
    "caption_messages",
    "check",
    "describe_messages",
    "estimate_tokens",
    "fallback_description",
    "parse_caption",
    "parse_description",
]
