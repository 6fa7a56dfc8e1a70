"""An engine behind HTTP: any server of OpenAI's chat completions, asked for whole chunks.

Ray's own HTTP stage gives a batch up when one of its requests fails. Here a request that the server
refuses costs its row, and a server that is away or busy is asked again, with growing pauses, until
patience ends; then the job stops, and what is done is kept.
"""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
import ray.data

from ray_jobs.synthesis.config import HttpConfig
from ray_jobs.synthesis.task import GenerationError, Messages, SamplingConfig
from ray_jobs.synthesis.worker import ChunkWorker, Work

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED = frozenset({401, 402, 403, 404})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class ServerError(RuntimeError):
    """The server cannot be used; the message says why."""


class ChatClient:
    """Asks a server, and asks again while it may still answer.

    Args:
        config: of the server.
        key: its API key, if it wants one.
        sampling: how the model is asked.
        answers: the JSON schema that its answers are held to.
    """

    def __init__(
        self,
        config: HttpConfig,
        key: str | None,
        sampling: SamplingConfig,
        answers: Mapping[str, Any],
    ) -> None:
        self.config, self.sampling, self.answers = config, sampling, answers
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None
        self._free = asyncio.Semaphore(config.requests_in_flight)

    async def complete(self, messages: Messages, seed: int) -> str:
        """The model's answer to a conversation.

        Raises:
            GenerationError: the server refuses this request, or answers it with nonsense.
            ServerError: it wants another key, has no such model, or is away for too long.
        """
        sampling = self.sampling
        schema = {"name": "answer", "schema": self.answers, "strict": True}
        request = {
            "model": self.config.model,
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        # From the first refusal on: before, the request may have waited long for its own turn.
        until = math.inf
        pause = _FIRST_PAUSE
        while True:
            try:
                async with self._free:
                    return await self._ask(request)
            except _AskAgainError as error:
                wait = error.after or pause * random.uniform(0.5, 1.5)  # noqa: S311
                until = min(until, time.monotonic() + self.config.patience_seconds)
                if time.monotonic() + wait > until:
                    raise ServerError(f"{self.config.url} {error}; gave up") from error
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask(self, request: Mapping[str, Any]) -> str:
        """One request; the model's words."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self.config.timeout_seconds)
            self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        try:
            url = f"{self.config.url}/chat/completions"
            async with self._session.post(url, json=request) as response:
                if response.status in _BUSY:
                    raise _AskAgainError(f"answers {response.status}", _retry_after(response))
                if response.status in _DENIED:
                    raise ServerError(
                        f"{url} answers {response.status}: {(await response.text())[:300]}; "
                        "mend engine.url, engine.model, the account, or the key in "
                        f"{self.config.api_key_env}"
                    )
                if not response.ok:
                    raise GenerationError(f"{response.status}: {(await response.text())[:300]}")
                answer = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _AskAgainError(f"does not answer ({error or type(error).__name__})") from error
        except ValueError as error:
            raise GenerationError(f"the server's answer is not JSON: {error}") from error
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise GenerationError(f"the server's answer has no message: {answer!r:.300}") from error


class HttpChunks:
    """Does chunks by asking a server; one in each of Ray Data's actors.

    Args:
        config: of the server.
        key: its API key, if it wants one.
        work: what is to be done.
    """

    def __init__(self, *, config: HttpConfig, key: str | None, work: Work) -> None:
        # A server that is away is no hang of this process.
        patience = max(work.hang_seconds, 2 * (config.patience_seconds + config.timeout_seconds))
        self.worker = ChunkWorker(work, patience)
        self.client = ChatClient(config, key, work.task.sampling, work.task.answers)

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        """Do an item's chunks; gives their counts."""
        yield await self.worker.run(batch, self.client.complete)


class _AskAgainError(Exception):
    """The server may answer later."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds that the server asks to wait, where it gives them as a number."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), _LONGEST_PAUSE) if value.isdecimal() else None


@contextmanager
def http_stream(
    config: HttpConfig, key: str | None, items: ray.data.Dataset, work: Work
) -> Iterator[ray.data.Dataset]:
    """Counts of the chunks, as the server's answers for them are complete.

    Args:
        config: of the server.
        key: its API key, if it wants one.
        items: of work; see `ray_jobs.synthesis.chunks.work_of`.
        work: what is done with them.
    """
    at_a_time = 4  # chunks, so that a slow answer does not leave the server without work
    yield items.map_batches(
        HttpChunks,
        fn_constructor_kwargs={"config": config, "key": key, "work": work},
        batch_size=1,
        num_cpus=config.cpus,
        compute=ray.data.ActorPoolStrategy(
            size=config.clients, max_tasks_in_flight_per_actor=at_a_time
        ),
        max_concurrency=at_a_time,
    )
