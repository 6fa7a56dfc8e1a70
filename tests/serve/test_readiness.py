"""Probes: what they are told, and what they cost."""

import asyncio
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from serve import readiness
from serve.config import ServeFile
from serve.errors import ApiError
from serve.ingress import Ingress
from serve.keys import VARIABLE
from serve.messages import ModelCard, ModelPlace, Standing
from serve.readiness import Readiness

CARD = ModelCard("small", "1", "", 4, 1.0)
FULL = ApiError(429, "overloaded", "too many requests wait")


class Towers:
    """Stand-ins that embed when they are let, or refuse: real ones do not hang when asked to."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.asked = 0
        self.refusal: ApiError | None = None

    async def through_one_model(self, _):
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal
        await self.free.wait()
        return type("Served", (), {"card": CARD})


@pytest.fixture
def quick(monkeypatch):
    """Nobody waits, and nothing that was found is kept."""
    monkeypatch.setattr(readiness, "_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(readiness, "_FRESH_SECONDS", 0.0)


def test_many_probes_are_one_try_out():
    async def work() -> None:
        towers = Towers()
        ready = Readiness(towers, 60)
        towers.free.set()
        assert await asyncio.gather(*(ready.card() for _ in range(20))) == [CARD] * 20
        assert await ready.card() == CARD
        assert towers.asked == 1

    asyncio.run(work())


def test_towers_that_never_embedded_are_not_ready(quick):
    async def work() -> None:
        towers = Towers()
        ready = Readiness(towers, 60)
        for _ in range(3):
            with pytest.raises(ApiError, match=r"no embedding within 0\.01 seconds"):
                await ready.card()
        assert towers.asked == 1  # they all wait for the same try-out

    asyncio.run(work())


def test_full_towers_that_never_embedded_are_not_ready(quick):
    async def work() -> None:
        towers = Towers()
        towers.refusal = FULL
        with pytest.raises(ApiError, match="too many"):
            await Readiness(towers, 60).card()

    asyncio.run(work())


def test_towers_with_a_backlog_are_busy_and_those_that_hang_are_not(quick):
    async def work() -> None:
        towers = Towers()
        towers.free.set()
        ready = Readiness(towers, 60)
        assert await ready.card() == CARD
        towers.refusal = FULL
        assert await ready.card() is None
        towers.refusal = None
        towers.free.clear()
        ready._limit = 0.0  # the try-out has had all the time that a request may take
        with pytest.raises(ApiError, match="no embedding within 0 seconds"):
            await ready.card()
        ready._limit = 60
        with pytest.raises(ApiError, match="no embedding within"):
            await ready.card()  # the next one waits, and the towers hang as before
        towers.free.set()
        await ready._trial
        assert await ready.card() == CARD
        towers.free.clear()
        assert await ready.card() is None

    asyncio.run(work())


def test_towers_are_busy_however_long_nobody_has_asked(quick, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(readiness, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def work() -> None:
        towers = Towers()
        towers.free.set()
        ready = Readiness(towers, 60)
        assert await ready.card() == CARD
        clock.now += 3600
        towers.free.clear()
        assert await ready.card() is None

    asyncio.run(work())


def test_reasons_are_told_to_whoever_has_a_key(ray_cluster, monkeypatch):
    monkeypatch.setenv(VARIABLE, "a-key")
    config = ServeFile.model_validate({"serve": {"model": "somewhere"}})
    ingress = Ingress.__bases__[0]  # its class without Serve's wrapping
    made = ingress(config, None, None, None, None, keyed=True)
    place = ModelPlace("small", "1", "s3://models/1")
    standing = Standing(place, refused=(("2", "s3://models/2 is empty"),), trouble="no host")

    async def card() -> ModelCard:
        return CARD

    async def stands() -> Standing:
        return standing

    monkeypatch.setattr(made.readiness, "card", card)
    monkeypatch.setattr(made.towers, "standing", stands)
    client = TestClient(made.__serve_build_asgi_app__())
    told = client.get("/readyz").json()
    assert told == {"status": "ready", "model": "small", "model_version": "1"}
    told = client.get("/readyz", headers={"authorization": "Bearer a-key"}).json()
    assert told["refused"] == [{"model_version": "2", "reason": "s3://models/2 is empty"}]
    assert told["trouble"] == "no host"
