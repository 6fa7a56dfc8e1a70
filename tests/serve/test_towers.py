"""The towers as the ingress sees them."""

import asyncio
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from serve.towers import call


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
