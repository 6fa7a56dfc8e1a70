"""Images that requests name by address: fetched from hosts that the operator named, and no others.

A request must not make this server ask its own network. So an address is https, its host is on the
list, what the name resolves to is the internet's and is what is connected to, and the same holds
for each redirect; size and time are bounded.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from rwkv_clip.addresses import is_public
from serve.config import RemoteConfig
from serve.errors import ApiError

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 1 << 16
_LONGEST_LABEL = 63  # of a host's name (RFC 1035)


class Fetcher:
    """Fetches images. Belongs to one event loop.

    Args:
        config: what may be asked.
        image_bytes: of an image at most.
        resolver: of names to addresses; the system's if None.
        allowed: whether an address may be connected to.
        context: whose certificates are trusted; the system's if None.
    """

    def __init__(
        self,
        config: RemoteConfig,
        image_bytes: int,
        resolver: AbstractResolver | None = None,
        allowed: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.config, self.image_bytes = config, image_bytes
        self._slots = asyncio.Semaphore(config.at_once)
        self._resolver, self._allowed = resolver, allowed
        self._context = context
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, address: str) -> bytes:
        """An image's bytes; raises ApiError."""
        try:
            async with self._slots, asyncio.timeout(self.config.seconds):
                return await self._fetch(address)
        except TimeoutError:
            raise ApiError(
                400, "remote_timeout", f"is not here within {self.config.seconds:g} seconds"
            ) from None
        except (aiohttp.ClientError, ssl.SSLError, OSError, UnicodeError) as error:
            # The last one is the codec's of hosts' names, whatever it finds wrong with one.
            raise ApiError(
                400, "remote_failed", f"cannot be fetched ({type(error).__name__})"
            ) from None

    async def close(self) -> None:
        """Close connections."""
        if self._session is not None:
            await self._session.close()

    async def _fetch(self, address: str) -> bytes:
        url = self._checked(address)
        for _ in range(self.config.redirects + 1):
            async with self._opened().get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._content(response)
                target = response.headers.get("Location", "")
            try:
                url = self._checked(str(url.join(URL(target))))
            except ValueError:
                raise ApiError(400, "remote_refused", "redirects to no address") from None
        raise ApiError(400, "remote_refused", f"redirects more than {self.config.redirects} times")

    async def _content(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            raise ApiError(400, "remote_failed", f"is answered with status {response.status}")
        too_large = ApiError(
            413, "image_too_large", f"is an image of more than {self.image_bytes:,} bytes"
        )
        if (response.content_length or 0) > self.image_bytes:
            raise too_large
        content = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            content += chunk
            if len(content) > self.image_bytes:
                raise too_large
        return bytes(content)

    def _checked(self, address: str) -> URL:
        """An address that may be asked; raises ApiError for any other."""
        try:
            url = URL(address)
            host = (url.raw_host or "").removesuffix(".").lower()
        except ValueError:
            raise ApiError(400, "remote_refused", "is no address") from None
        if url.scheme != "https" or url.user is not None:
            raise ApiError(400, "remote_refused", "is no https address without a user's name")
        if not all(0 < len(label) <= _LONGEST_LABEL for label in host.split(".")):
            raise ApiError(400, "remote_refused", "has a host that no name can be")
        if not any(_fits(host, pattern) for pattern in self.config.hosts):
            raise ApiError(400, "remote_refused", "has a host that this server may not ask")
        if _is_address(host) and not self._allowed(host):
            raise ApiError(400, "remote_refused", "is at an address that may not be asked")
        return url

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = _CheckedResolver(self._resolver or aiohttp.ThreadedResolver(), self._allowed)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=resolver, ssl=self._context or True, limit=self.config.at_once
                ),
                auto_decompress=False,  # what is small on the wire stays small
                headers={"Accept": "image/*", "Accept-Encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


class _CheckedResolver(AbstractResolver):
    """Gives addresses that may be connected to, and these alone are."""

    def __init__(self, inner: AbstractResolver, allowed: Callable[[str], bool]) -> None:
        self._inner, self._allowed = inner, allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        allowed = [result for result in found if self._allowed(result["host"])]
        if not allowed:
            raise ApiError(400, "remote_refused", "is at an address that may not be asked")
        return allowed

    async def close(self) -> None:
        await self._inner.close()


def _fits(host: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return host == pattern


def _is_address(host: str) -> bool:
    try:
        is_public(host)
    except ValueError:
        return False
    return True
