"""An engine behind HTTP: any server of OpenAI's chat completions, asked for whole chunks.

Ray's own HTTP stage gives a batch up when one of its requests fails. Here a request that the server
refuses costs its row, and a server that is away or busy is asked again, with growing pauses, until
patience ends; then the job stops, and what is done is kept.

A row that the server fails at, or that a gateway blocks, looks like a server that is broken or
closed. What tells them apart is a plain question: where that is answered each time, the row is to
blame.
"""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import ray.data

from ray_jobs.synthesis.config import HttpConfig
from ray_jobs.synthesis.task import GenerationError, Messages, SamplingConfig
from ray_jobs.synthesis.worker import ChunkWorker, Work

_LATER = frozenset({408, 425, 429})
_TOO_MANY = 429
# A server's own error, or that of a gateway before it (520 to 530), passes, unless it is that it
# cannot do what is asked. One input may be what causes it, where it has not too much to do.
_ERRORS = range(500, 600)
_CANNOT = 501
_OVERLOADED = frozenset({503, 529})
_MOST_FAILURES = 6  # of a request; of a plain one then none, so one broken replica is no proof
_KEY = frozenset({401, 402})
_DENIED = frozenset({403, 404})  # the key or the model, or one text that a gateway blocks
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_CHUNKS = 16  # that wait for their slowest answers, at most
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
        self._answered = -math.inf  # when a request last was, for limits of requests

    async def complete(self, messages: Messages, seed: int) -> str:
        """The model's answer to a conversation.

        Raises:
            GenerationError: the server refuses this request, or answers it with nonsense.
            ServerError: it wants another key, has no such model, or is away for too long.
        """
        request = self._request(messages, seed)
        # From the first refusal on: before, the request may have waited long for its own turn.
        first = math.inf
        failures, pause = 0, _FIRST_PAUSE
        while True:
            try:
                async with self._free:
                    return await self._ask(request)
            except _DeniedError as error:
                plain = await self._refusal_of_plain(seed, 1)
                if plain is None:
                    raise GenerationError(str(error)) from error
                if isinstance(plain, _DeniedError):
                    raise self._closed(error) from error
                again = plain
            except _AskAgainError as error:
                again = error
            now = time.monotonic()
            first = min(first, now)
            failures += again.status in _ERRORS and again.status not in _OVERLOADED
            # A limit of requests a minute takes its time, and passes over some for long.
            since = max(first, self._answered) if again.status == _TOO_MANY else first
            wait = again.after or pause * random.uniform(0.5, 1.5)  # noqa: S311
            over = now + wait > since + self.config.patience_seconds
            if over or failures >= _MOST_FAILURES:
                told = f"{self.config.url} {again}; gave up"
                if await self._refusal_of_plain(seed, _MOST_FAILURES) is None:
                    raise GenerationError(told)
                if over:
                    raise ServerError(told)
                failures = 0
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

    async def _refusal_of_plain(
        self, seed: int, times: int
    ) -> "_DeniedError | _AskAgainError | None":
        """The first refusal of a plain question that is asked so often; raises ServerError."""
        for _ in range(times):
            try:
                async with self._free:
                    await self._ask(self._request(_PLAIN, seed))
            except (_DeniedError, _AskAgainError) as error:
                return error
            except GenerationError:
                pass  # an answer, if no good one
        return None

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
                if status in _LATER or (status in _ERRORS and status != _CANNOT):
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
        silent = max(
            work.patience.hang_seconds, 2 * (config.patience_seconds + config.timeout_seconds)
        )
        self.worker = ChunkWorker(
            replace(work, patience=replace(work.patience, hang_seconds=silent))
        )
        self.worker.turns.at_a_time(config.requests_in_flight)
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
    at_a_time = min(_CHUNKS, work.share)
    yield items.map_batches(
        HttpChunks,
        fn_constructor_kwargs={"config": config, "key": key, "work": work},
        batch_size=1,
        num_cpus=config.cpus,
        compute=ray.data.ActorPoolStrategy(
            size=config.clients,
            max_tasks_in_flight_per_actor=at_a_time,
            max_concurrent_calls_per_actor=at_a_time,
        ),
    )
