"""The towers as the ingress sees them."""

import asyncio
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from serve.errors import ApiError
from serve.messages import ModelCard, ModelPlace
from serve.together import together
from serve.towers import Served, call


class Response:
    """A deployment's answer that does not come."""

    cancelled = False

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.Event().wait().__await__()

    def cancel(self) -> None:
        self.cancelled = True


def test_a_tower_s_work_ends_when_its_request_s_time_is_up():
    response = Response()
    handle: Any = SimpleNamespace(encode=SimpleNamespace(remote=lambda *_: response))

    async def ask() -> None:
        async with asyncio.timeout(0.01):
            await call(handle, "text", "encode")

    with pytest.raises(TimeoutError):
        asyncio.run(ask())
    assert response.cancelled


class Full:
    """A deployment that has no room."""

    def __await__(self) -> Generator[Any, None, None]:
        raise BackPressureError(num_queued_requests=1, max_queued_requests=1)
        yield


def test_a_tower_s_work_ends_when_the_other_one_refuses_the_request():
    text = Response()
    handles: Any = {
        tower: SimpleNamespace(encode=SimpleNamespace(remote=lambda *_, one=one: one))
        for tower, one in (("text", text), ("image", Full()))
    }
    place = ModelPlace("small", "1", "s3://models/1")
    served = Served(handles, place, ModelCard("small", "1", "", 4, 1.0))

    async def ask() -> None:
        with pytest.raises(ApiError) as refused:
            await together((served.encode("text", ["a"]), served.encode("image", [b"b"])))
        assert refused.value.status == 429
        await asyncio.sleep(0)  # as the event loop goes on
        assert text.cancelled

    asyncio.run(ask())
