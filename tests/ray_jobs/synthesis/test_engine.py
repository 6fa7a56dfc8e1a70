"""What the engine says of single requests, told apart from its end."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from ray_jobs.synthesis.engine import ChunkEngine
from ray_jobs.synthesis.task import GenerationError
from ray_jobs.synthesis.worker import EngineDiedError


def unexpected() -> Exception:
    """As vLLM raises what its processors do not expect, such as an image of 500 x 2 pixels."""
    error = EngineGenerateError()
    error.__cause__ = ValueError("aspect ratio must be smaller than 200")
    return error


@pytest.mark.parametrize(
    ("error", "errored", "kind", "told"),
    [
        (VLLMValidationError("prompt is too long"), False, GenerationError, "too long"),
        (unexpected(), False, GenerationError, "ValueError: aspect ratio"),
        (unexpected(), True, EngineDiedError, "aspect ratio"),
        (EngineDeadError(), True, EngineDiedError, "EngineCore"),
    ],
)
def test_a_request_that_is_refused_is_not_the_engines_end(error, errored, kind, told):
    async def generate(*_: Any, **__: Any) -> Any:
        raise error
        yield  # makes it a generator, as the engine's is

    engine = SimpleNamespace(
        llm=SimpleNamespace(engine=SimpleNamespace(generate=generate, errored=errored)),
        numbers=itertools.count(),
        _prompt=lambda messages: messages,
        _parameters=lambda seed: seed,
    )
    with pytest.raises(kind, match=told):
        asyncio.run(ChunkEngine._complete(engine, [], 0))
