"""One pair's description: ask, read the answer, hold it to its sources, ask again, fall back.

Nothing here knows what the model runs on: whoever calls gives a function that completes a
conversation.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

from pydantic import Field, PositiveFloat, PositiveInt

from rwkv_clip.config import BaseConfig
from rwkv_clip.descriptions import (
    AnswerError,
    Sources,
    check,
    describe_messages,
    fallback_description,
    parse_description,
)

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
Complete = Callable[[Messages, int], Awaitable[str]]
Row = dict[str, Any]

GIVEN = "given"
LLM = "llm"
ENGINE_FAILED = "engine_failed"


class SamplingConfig(BaseConfig):
    """How the model is asked."""

    seed: int = Field(0, ge=0, description="of all sampling")
    attempts: PositiveInt = Field(
        2, le=8, description="seeds that are tried before the fallback serves"
    )
    temperature: float = Field(0.3, ge=0, le=2, description="of the sampling")
    top_p: PositiveFloat = Field(1.0, le=1, description="share of probability sampled from")
    max_tokens: PositiveInt = Field(96, description="of an answer")


class GenerationError(RuntimeError):
    """The model refuses this one request; others are not concerned."""


async def describe_rows(
    rows: Sequence[Mapping[str, Any]], complete: Complete, config: SamplingConfig
) -> list[Row]:
    """Rows of DESCRIPTION_SCHEMA for rows of pairs, all asked for at once."""
    return list(await asyncio.gather(*(describe(row, complete, config) for row in rows)))


async def describe(row: Mapping[str, Any], complete: Complete, config: SamplingConfig) -> Row:
    """The description of one pair, and how it came about.

    A description that is there already is kept.

    Args:
        row: with id and the texts of a pair.
        complete: gives the model's answer to a conversation and a seed; raises GenerationError.
        config: how the model is asked.
    """
    if row.get("description"):
        return _result(row, row["description"], row.get("description_source") or GIVEN, 0)
    sources = Sources.from_row(row)
    messages = describe_messages(sources)
    refusal: dict[str, Any] = {}
    for attempt in range(config.attempts):
        seed = attempt_seed(config.seed, row["id"], attempt)
        refusal = {}
        answer = ""
        try:
            answer = await complete(messages, seed)
            description = parse_description(answer)
        except GenerationError as error:
            logger.warning("%s: %s", row["id"], error)
            refusal = {"guard_reason": "generation_error", "refused_text": str(error)}
            continue
        except AnswerError as error:
            refusal = {"guard_reason": f"answer_{error.reason}", "refused_text": answer}
            continue
        verdict = check(description, sources)
        if verdict.kept:
            return _result(row, description, LLM, attempt + 1, seed=seed)
        refusal = {
            "guard_reason": verdict.reason,
            "guard_unsupported": list(verdict.unsupported),
            "refused_text": description,
        }
    return fall_back(row, sources, config.attempts, **refusal)


def fall_back(
    row: Mapping[str, Any], sources: Sources, attempts: int, guard_reason: str, **refusal: Any
) -> Row:
    """The row with a sentence made from its caption and tags, marked as such."""
    description = fallback_description(sources)
    kind = "fallback" if description else "none"
    source = f"{kind}: {guard_reason}"
    return _result(row, description, source, attempts, guard_reason=guard_reason, **refusal)


def attempt_seed(seed: int, identity: str, attempt: int) -> int:
    """The sampling seed of an attempt at a pair."""
    return crc32(f"{seed} {attempt} {identity}".encode())


def _result(
    row: Mapping[str, Any], description: str | None, source: str, attempts: int, **more: Any
) -> Row:
    return {
        "id": row["id"],
        "description": description,
        "description_source": source,
        "attempts": attempts,
        "seed": None,
        "guard_reason": None,
        "guard_unsupported": None,
        "refused_text": None,
        **more,
    }
