"""An engine behind HTTP: any server of OpenAI's chat completions, asked for whole chunks.

Ray's own HTTP stage gives a batch up when one of its requests fails. Here a request that the server
refuses costs its row, and a server that is away or busy is asked again, with growing pauses, until
patience ends; then the job stops, and what is done is kept.

A row that the server fails at, or that a gateway blocks, looks like a server that is broken or
closed. What tells them apart is whether others are answered meanwhile: then the row is to blame.
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
_TOO_MANY = 429
_BROKEN = frozenset({500, 502, 504})  # where one input may be what breaks it
_MOST_FAILURES = 6  # of a request, with answers to others between them
_KEY = frozenset({401, 402})
_DENIED = frozenset({403, 404})  # the key or the model, or one text that a gateway blocks
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# What no server refuses that answers anything.
_PLAIN: Messages = ({"role": "user", "content": "Describe a grey square."},)


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
        self._url = f"{config.url}/chat/completions"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None
        self._free = asyncio.Semaphore(config.requests_in_flight)
        self._answered = -math.inf  # when a request last was

    async def complete(self, messages: Messages, seed: int) -> str:
        """The model's answer to a conversation.

        Raises:
            GenerationError: the server refuses this request, or answers it with nonsense.
            ServerError: it wants another key, has no such model, or is away for too long.
        """
        request = self._request(messages, seed)
        # Refusals, from which patience counts: before, the request may have waited for its turn.
        first = last = math.inf
        failures, pause = 1, _FIRST_PAUSE
        while True:
            try:
                async with self._free:
                    return await self._ask(request)
            except _DeniedError as error:
                if await self._answers_others(-math.inf, seed):
                    raise GenerationError(str(error)) from error
                raise self._closed(error) from error
            except _AskAgainError as error:
                now = time.monotonic()
                first = min(first, now)
                # Where no other was answered in between, the server may be on its way back.
                failures += error.status in _BROKEN and self._answered > last
                last = now
                # A limit of requests a minute takes its time, and passes over some for long.
                since = max(first, self._answered) if error.status == _TOO_MANY else first
                wait = error.after or pause * random.uniform(0.5, 1.5)  # noqa: S311
                if failures >= _MOST_FAILURES or now + wait > since + self.config.patience_seconds:
                    told = f"{self.config.url} {error}; gave up"
                    if await self._answers_others(first, seed):
                        raise GenerationError(told) from error
                    raise ServerError(told) from error
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _request(self, messages: Messages, seed: int) -> dict[str, Any]:
        """What is sent."""
        sampling = self.sampling
        schema = {"name": "answer", "schema": self.answers, "strict": True}
        return {
            "model": self.config.model,
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    async def _answers_others(self, since: float, seed: int) -> bool:
        """Whether the server has answered a request since then, or answers a plain one now.

        A row may be the only one that is left, or be refused before the first other is answered.
        """
        if self._answered > since:
            return True
        try:
            async with self._free:
                await self._ask(self._request(_PLAIN, seed))
        except (GenerationError, ServerError, _DeniedError, _AskAgainError):
            return self._answered > since  # another one's answer came
        return True

    def _closed(self, refusal: object) -> ServerError:
        return ServerError(
            f"{self._url} answers {refusal}; mend engine.url, engine.model, the account, or the "
            f"key in {self.config.api_key_env}"
        )

    async def _ask(self, request: Mapping[str, Any]) -> str:
        """One request; the model's words."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self.config.timeout_seconds)
            # As many connections as there are requests, which wait for none within their timeout.
            connector = aiohttp.TCPConnector(limit=self.config.requests_in_flight)
            self._session = aiohttp.ClientSession(
                timeout=timeout, headers=self._headers, connector=connector
            )
        try:
            async with self._session.post(self._url, json=request) as response:
                status = response.status
                if status in _BUSY:
                    raise _AskAgainError(f"answers {status}", status, _retry_after(response))
                if not response.ok:
                    told = f"{status}: {(await response.text(errors='replace'))[:300]}"
                    if status in _KEY:
                        raise self._closed(told)
                    raise (_DeniedError if status in _DENIED else GenerationError)(told)
                answer = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _AskAgainError(f"does not answer ({error or type(error).__name__})") from error
        except ValueError as error:
            raise GenerationError(f"the server's answer is not JSON: {error}") from error
        try:
            words = str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise GenerationError(f"the server's answer has no message: {answer!r:.300}") from error
        self._answered = time.monotonic()
        return words


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

    def __init__(self, reason: str, status: int | None = None, after: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.after = status, after


class _DeniedError(Exception):
    """The server does not let this request in, or none."""


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
