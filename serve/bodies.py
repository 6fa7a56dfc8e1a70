"""The bodies of requests: each of bounded size, and all of them together too."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from serve.errors import ApiError


class Bodies:
    """What an ingress holds of requests that it reads and answers.

    Args:
        one: bytes of a body at most.
        together: bytes of all bodies at most.
    """

    def __init__(self, one: int, together: int) -> None:
        self.one, self.together = one, max(one, together)
        self.held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A body, counted for as long as the block goes on.

        Raises:
            ApiError: it is of another type, too large, or there is no room for it now; none of it
                is read if its header tells.
        """
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        if kind.lower() != "application/json":
            raise ApiError(415, "not_json", "send JSON, with Content-Type: application/json")
        header = request.headers.get("content-length", "")
        told = int(header) if header.isdecimal() and len(header) < 20 else 0
        self._check(told, told)
        body = bytearray()
        counted = told  # room is kept from the start for what is told to come
        self.held += counted
        try:
            async for block in request.stream():
                body += block
                more = max(0, len(body) - counted)
                self._check(len(body), more)
                self.held += more
                counted += more
            yield bytes(body)
        finally:
            self.held -= counted

    def _check(self, size: int, more: int) -> None:
        if size > self.one:
            raise ApiError(
                413,
                "body_too_large",
                f"the body has more than {self.one:,} bytes; send several requests",
            )
        if self.held + more > self.together:
            raise ApiError(
                429, "overloaded", "too much is being read; send this request again later"
            )
