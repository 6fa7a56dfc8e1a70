"""What a model is asked for each pair: the interface between the engines and the stages.

An engine knows how to complete a conversation, and nothing of captions or descriptions; a task
knows what to ask and what to make of the answers, and nothing of where the model runs.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol
from zlib import crc32

import pyarrow as pa
from pydantic import Field, PositiveFloat, PositiveInt

from rwkv_clip.config import BaseConfig

# OpenAI's messages; images are parts {"type": "image_url"} with a data URI.
Messages = Sequence[Mapping[str, Any]]
# The model's answer to a conversation, by a seed; raises GenerationError.
Complete = Callable[[Messages, int], Awaitable[str]]
Row = dict[str, Any]

GIVEN = "given"
ENGINE_FAILED = "engine_failed"
_MOST_REFUSED = 2000  # characters of a text that is kept for people to look at


class GenerationError(RuntimeError):
    """The model refuses this one request; others are not concerned."""


class SamplingConfig(BaseConfig):
    """How a model is asked."""

    seed: int = Field(0, ge=0, description="of all sampling")
    attempts: PositiveInt = Field(
        2, le=8, description="seeds that are tried before the fallback serves"
    )
    temperature: float = Field(0.3, ge=0, le=2, description="of the sampling")
    top_p: PositiveFloat = Field(1.0, le=1, description="share of probability sampled from")
    max_tokens: PositiveInt = Field(96, description="of an answer")


class Task(Protocol):
    """What is done for each pair. Safe to send to other processes."""

    @property
    def kind(self) -> str:
        """Of the tables that it fills; see `ray_jobs.beside`."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the pairs, that it reads besides the id."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Of the rows that it gives."""
        ...

    @property
    def answers(self) -> dict[str, Any]:
        """The JSON schema that the model's answers are held to."""
        ...

    @property
    def sampling(self) -> SamplingConfig:
        """How the model is asked."""
        ...

    async def __call__(self, row: Mapping[str, Any], complete: Complete) -> Row:
        """The row for a pair, whatever the model answers."""
        ...

    def give_up(self, row: Mapping[str, Any], reason: str) -> Row:
        """The row for a pair that the model cannot be asked about."""
        ...


def storable(text: str | None) -> str | None:
    """A text that was refused as tables can hold it: not half a character pair, and not endless."""
    return text and text[:_MOST_REFUSED].encode("utf-8", "replace").decode()


def attempt_seed(seed: int, identity: str, attempt: int) -> int:
    """The sampling seed of an attempt at a pair."""
    return crc32(f"{seed} {attempt} {identity}".encode())
