"""The bodies of requests: each of bounded size, and all of them together too."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request

from rwkv_clip.memory import trim_freed_memory
from serve.errors import ApiError

_BUSY = 8 << 20  # bytes held at once, after which there is something to give back


@dataclass
class Body:
    """What is held of a request.

    Attributes:
        bodies: that count it.
        content: what came.
        counted: bytes that are counted for it.
    """

    bodies: "Bodies"
    content: bytes = b""
    counted: int = 0

    def count(self, size: int) -> None:
        """Count so many bytes more; raises ApiError where there is no room for them."""
        self.bodies.check(self.counted + size, size)
        self.bodies.take(size)
        self.counted += size


class Bodies:
    """What an ingress holds of requests that it reads and answers.

    Args:
        one: bytes of a body at most.
        together: bytes of all bodies at most.
    """

    def __init__(self, one: int, together: int) -> None:
        self.one, self.together = one, max(one, together)
        self.held = 0
        self._most = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Body]:
        """A body, counted for as long as the block goes on, with what else is counted for it.

        Raises:
            ApiError: it is of another type, too large, or there is no room for it; none of it is
                read if that is so from the start.
        """
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        if kind.lower() != "application/json":
            raise ApiError(415, "not_json", "send JSON, with Content-Type: application/json")
        header = request.headers.get("content-length", "")
        told = int(header) if header.isdecimal() and len(header) < 20 else 0
        self.check(told, told)
        body = Body(self)
        try:
            content = bytearray()
            async for block in request.stream():
                body.count(len(block))  # not what is told to come: it may never
                content += block
            body.content = bytes(content)
            yield body
        finally:
            self._leave(body)

    def take(self, size: int) -> None:
        """Hold so many bytes more, for which there is room."""
        self.held += size
        self._most = max(self._most, self.held)

    def _leave(self, body: Body) -> None:
        self.held -= body.counted
        if self.held == 0 and self._most >= _BUSY:
            self._most = 0
            # Beside the loop: at once tens of milliseconds of it.
            asyncio.get_running_loop().run_in_executor(None, trim_freed_memory)

    def check(self, size: int, more: int) -> None:
        """Raise ApiError where a request of a size, `more` of it new, is too much."""
        if size > self.one:
            raise ApiError(
                413,
                "body_too_large",
                f"the request has more than {self.one:,} bytes, images at addresses included; "
                "send several requests",
            )
        if self.held + more > self.together:
            raise ApiError(
                429, "overloaded", "too much is being read; send this request again later"
            )
