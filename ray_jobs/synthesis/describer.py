"""One pair's description: ask, read the answer, hold it to its sources, ask again, fall back.

See `ray_jobs.synthesis.task` for what runs it.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from ray_jobs.beside import DESCRIPTIONS
from ray_jobs.synthesis.task import (
    GIVEN,
    Complete,
    GenerationError,
    Messages,
    Row,
    SamplingConfig,
    attempt_seed,
    storable,
)
from rwkv_clip.descriptions import (
    DESCRIPTION_SCHEMA,
    AnswerError,
    Sources,
    check,
    describe_messages,
    fallback_description,
    parse_description,
)

logger = logging.getLogger(__name__)

LLM = "llm"


@dataclass(frozen=True)
class Describing:
    """The task of describing pairs.

    Attributes:
        sampling: how the model is asked.
        variants: descriptions of each pair, from as many seeds.
    """

    sampling: SamplingConfig
    variants: int = 1
    kind: ClassVar[str] = DESCRIPTIONS
    columns: ClassVar[tuple[str, ...]] = (
        "web_text",
        "caption",
        "tags",
        "description",
        "description_source",
    )
    answers: ClassVar[dict[str, Any]] = DESCRIPTION_SCHEMA
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("description", pa.string()),
            pa.field("description_source", pa.string()),
            pa.field("alternatives", pa.list_(pa.string())),
            pa.field("attempts", pa.int32(), nullable=False),
            pa.field("seed", pa.int64()),
            pa.field("guard_reason", pa.string()),
            pa.field("guard_unsupported", pa.list_(pa.string())),
            pa.field("refused_text", pa.string()),
        ]
    )

    async def __call__(self, row: Mapping[str, Any], complete: Complete) -> Row:
        """A row of `schema`; a description that is there already is kept."""
        if row.get("description"):
            source = row.get("description_source") or GIVEN
            return _result(row, row["description"], source, 0)
        variants = range(self.variants)
        found = await asyncio.gather(*(self._describe(row, complete, one) for one in variants))
        kept = [one for one in found if one["description_source"] == LLM]
        first = kept[0] if kept else found[0]
        others = dict.fromkeys(one["description"] for one in kept)
        others.pop(first["description"], None)
        attempts = sum(one["attempts"] for one in found)
        return {**first, "alternatives": list(others) or None, "attempts": attempts}

    def give_up(self, row: Mapping[str, Any], reason: str) -> Row:
        """The row without having asked."""
        return _fall_back(row, Sources.from_row(row), 0, reason)

    async def _describe(self, row: Mapping[str, Any], complete: Complete, variant: int) -> Row:
        """Ask, read the answer, hold it to its sources; again with another seed; fall back."""
        sources = Sources.from_row(row)
        messages = describe_messages(sources)
        sampling = self.sampling
        refusal: dict[str, Any] = {}
        for attempt in range(sampling.attempts):
            turn = variant * sampling.attempts + attempt
            seed = attempt_seed(sampling.seed, row["id"], turn)
            description, refusal = await _ask(row, sources, messages, complete, seed)
            if description is not None:
                return _result(row, description, LLM, attempt + 1, seed=seed)
        return _fall_back(row, sources, sampling.attempts, **refusal)


async def _ask(
    row: Mapping[str, Any], sources: Sources, messages: Messages, complete: Complete, seed: int
) -> tuple[str | None, dict[str, Any]]:
    """One attempt: the description, or what is wrong with the answer."""
    answer = ""
    try:
        answer = await complete(messages, seed)
        description = parse_description(answer)
    except GenerationError as error:
        logger.warning("%s: %s", row["id"], storable(str(error)))
        return None, {"guard_reason": "generation_error", "refused_text": str(error)}
    except AnswerError as error:
        return None, {"guard_reason": f"answer_{error.reason}", "refused_text": answer}
    verdict = check(description, sources)
    if verdict.kept:
        return description, {}
    return None, {
        "guard_reason": verdict.reason,
        "guard_unsupported": list(verdict.unsupported),
        "refused_text": description,
    }


def _fall_back(
    row: Mapping[str, Any], sources: Sources, attempts: int, guard_reason: str, **refusal: Any
) -> Row:
    """The row with a sentence made from its caption and tags, marked as such."""
    description = fallback_description(sources)
    kind = "fallback" if description else "none"
    source = f"{kind}: {guard_reason}"
    return _result(row, description, source, attempts, guard_reason=guard_reason, **refusal)


def _result(
    row: Mapping[str, Any],
    description: str | None,
    source: str,
    attempts: int,
    *,
    refused_text: str | None = None,
    **more: Any,
) -> Row:
    return {
        "id": row["id"],
        "description": description,
        "description_source": source,
        "alternatives": None,
        "attempts": attempts,
        "seed": None,
        "guard_reason": None,
        "guard_unsupported": None,
        "refused_text": storable(refused_text),
        **more,
    }
