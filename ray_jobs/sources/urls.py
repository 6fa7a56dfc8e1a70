"""Lists of URLs with texts: the images are downloaded while a unit is read.

Choices:
- A unit downloads many URLs at a time, on an event loop of its own thread, and yields them in the
  list's order; so decoding and downloading overlap, and at most `2 * concurrency` images wait.
- What a list of the web may do to a cluster is bounded: only http and https, only public addresses
  (checked where a name is resolved, so also after redirects and for names that change their
  mind), and limits of size, time, redirects and attempts.
- Hosts are treated with respect: few connections at a time to each, Retry-After honoured, pages
  that ask not to be used for training (X-Robots-Tag: noai, noimageai) skipped. A host that does
  not answer ten times in a row is left alone for the rest of the unit.
- Whether it is an image is said by its first bytes, not by what the server calls it.
"""

import asyncio
import concurrent.futures
import email.utils
import random
import socket
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, ClassVar, Literal

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from yarl import URL

from ray_jobs.sources.base import ColumnsConfig, FilesConfig, Raw, Rejected, Unit, digest_of
from ray_jobs.sources.lists import list_units, present_columns, read_list
from ray_jobs.sources.parquet import id_text
from rwkv_clip import addresses

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 1 << 16
_HOST_FAILURES = 10  # in a row
# No connection: refused, without an address, or without an answer.
_UNCONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_SILENT_HOSTS = 50  # one after the other, that nothing but a network that is down explains


class UrlColumnsConfig(ColumnsConfig):
    """Columns of the list of URLs."""

    id: str | None = Field(
        "id",
        description="column of unique ids; null, or a list without it, makes them of a digest of "
        "the URL and the texts",
    )
    url: str = Field("url", description="column of URLs")
    web_text: str | None = Field("text", description="column of what the web said")


class UrlsConfig(FilesConfig):
    """Lists of URLs of images, with texts."""

    runtime: ClassVar[frozenset[str]] = frozenset({"concurrency", "connections_per_host"})
    format: ClassVar[int] = 2  # from here on ids are of the texts too

    kind: Literal["urls"]
    columns: UrlColumnsConfig = UrlColumnsConfig()
    unit_rows: PositiveInt = Field(2048, description="rows a task downloads, about")
    concurrency: PositiveInt = Field(64, description="downloads at a time in each task")
    connections_per_host: PositiveInt = Field(4, description="at a time in each task")
    connect_seconds: PositiveFloat = Field(5.0, description="to be connected")
    total_seconds: PositiveFloat = Field(30.0, description="for one attempt")
    retries: NonNegativeInt = Field(2, description="attempts after the first")
    backoff_seconds: NonNegativeFloat = Field(
        0.5, description="before the first retry, doubled each time"
    )
    longest_wait_seconds: NonNegativeFloat = Field(
        30.0, description="a server that asks for more is given up on"
    )
    max_bytes: PositiveInt = Field(20_000_000, description="of an image")
    max_redirects: NonNegativeInt = Field(5, description="of one download")
    user_agent: str = Field("rwkv-clip", min_length=1, description="what servers are told we are")
    respect_noai: bool = Field(True, description="skip what asks not to be trained on")
    allow_private: bool = Field(False, description="download from private addresses too")


class UrlsSource:
    """See UrlsConfig."""

    def __init__(self, config: UrlsConfig) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        units = list_units(self.config)
        for unit in {unit.path: unit for unit in units}.values():
            self._present(unit, warn=True)
        return units

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        yield from _from_thread(lambda: self._download_all(self._rows(unit)))

    def _present(self, unit: Unit, *, warn: bool = False) -> dict[str, str]:
        return present_columns(unit, self.config.columns, "url", self.config.s3, warn=warn)

    def _rows(self, unit: Unit) -> Iterator[dict[str, Any] | Rejected]:
        present = self._present(unit)
        for origin, row in read_list(unit, list(present.values()), self.config.s3):
            if isinstance(row, Rejected):
                yield row
                continue
            raw = {ours: row.get(theirs) for ours, theirs in present.items()}
            url = str(raw.pop("url") or "").strip()
            identity = id_text(raw["id"] if "id" in raw else digest_of(url, raw))
            yield {**raw, "url": url, "id": identity, "origin": origin}

    async def _download_all(
        self, rows: Iterator[dict[str, Any] | Rejected]
    ) -> AsyncIterator[Raw | Rejected]:
        """The rows with their images, in order, a window of them being downloaded."""
        waiting: deque[asyncio.Task[Raw | Rejected]] = deque()
        async with Downloader(self.config) as downloader:
            try:
                for row in rows:
                    waiting.append(asyncio.create_task(_download_row(downloader, row)))
                    if len(waiting) >= 2 * self.config.concurrency:
                        yield await waiting.popleft()
                while waiting:
                    yield await waiting.popleft()
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)


class DownloadError(Exception):
    """A download that failed for good; `reason` and `detail` as in REJECTED_SCHEMA."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class OutageError(OSError):
    """Nothing can be reached from here, which no row is to blame for."""


class _RetryError(Exception):
    """An attempt that failed, but another may not; `wait` is what the server asked for."""

    def __init__(self, detail: str, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.detail, self.wait = detail, wait


class Downloader:
    """Downloads images, politely. An asynchronous context manager."""

    def __init__(self, config: UrlsConfig) -> None:
        self.config = config
        self._slots = asyncio.Semaphore(config.concurrency)
        # Waiting for a host's turn comes before the request's own clock starts.
        self._hosts: defaultdict[str | None, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(config.connections_per_host)
        )
        self._failures: Counter[str | None] = Counter()  # of a host, in a row
        self._silent: set[str | None] = set()  # hosts without a connection since the last answer
        self._answering: URL | None = None  # the last one

    async def __aenter__(self) -> "Downloader":
        # A limit of the connector would count waiting for a connection against the request's time.
        connector = aiohttp.TCPConnector(
            limit=0, resolver=_PublicResolver(self.config.allow_private), ttl_dns_cache=300
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            # Nothing is unpacked on the way: what is small on the wire stays small.
            auto_decompress=False,
            headers={
                "User-Agent": self.config.user_agent,
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(
                total=self.config.total_seconds, sock_connect=self.config.connect_seconds
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def download(self, url: str) -> bytes:
        """An image's bytes; raises DownloadError."""
        first = self._checked(url)
        for attempt in range(self.config.retries + 1):
            try:
                async with self._slots, self._hosts[first.host]:
                    return await self._counted_attempt(first)
            except _RetryError as error:
                detail, asked = error.detail, error.wait
            except TimeoutError:
                detail, asked = f"no answer in {self.config.total_seconds:g} s", 0.0
            except aiohttp.InvalidURL as error:
                raise DownloadError("download_refused", f"no URL: {error}") from error
            except aiohttp.ClientError as error:
                detail, asked = f"{type(error).__name__}: {error}", 0.0
            if asked > self.config.longest_wait_seconds:
                raise DownloadError("download_failed", f"{detail}, Retry-After {asked:g} s")
            if attempt < self.config.retries:
                # Jitter, so that those who were refused together do not come back together.
                backoff = self.config.backoff_seconds * 2**attempt
                await asyncio.sleep(max(asked, backoff * random.uniform(0.5, 1.5)))  # noqa: S311
        raise DownloadError("download_failed", f"{detail} ({attempt + 1} attempts)")

    async def _counted_attempt(self, url: URL) -> bytes:
        if self._failures[url.host] >= _HOST_FAILURES:
            told = f"{url.host} was given up on after {_HOST_FAILURES} failures in a row"
            raise DownloadError("download_failed", told)
        try:
            content = await self._attempt(url)
        except (TimeoutError, aiohttp.ClientError) as error:
            self._failures[url.host] += 1
            if isinstance(error, _UNCONNECTED):
                await self._note_silence(url, error)
            raise
        except (_RetryError, DownloadError):
            self._note_answer(url)
            raise
        self._note_answer(url)
        return content

    def _note_answer(self, url: URL) -> None:
        self._failures[url.host] = 0
        self._answering = url
        self._silent.clear()

    async def _note_silence(self, url: URL, error: Exception) -> None:
        """Raise OutageError if it is not the hosts that are gone."""
        self._silent.add(url.host)
        if len(self._silent) < _SILENT_HOSTS:
            return
        self._silent.clear()
        if self._answering is None or not await self._connects(self._answering):
            raise OutageError(
                f"{_SILENT_HOSTS} hosts one after the other could not be connected to, the last "
                f"with: {error}. Either the network is down here, or the list names none that "
                "still exist"
            ) from error

    async def _connects(self, url: URL) -> bool:
        """Whether a host that answered before still can be connected to."""
        try:
            async with asyncio.timeout(self.config.connect_seconds):
                _, writer = await asyncio.open_connection(url.host, url.port)
        except OSError:  # a TimeoutError is one
            return False
        writer.close()
        return True

    async def _attempt(self, url: URL) -> bytes:
        for _ in range(self.config.max_redirects + 1):
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._content(response)
                target = response.headers.get("Location", "")
            try:
                url = self._checked(str(url.join(URL(target))))
            except ValueError as error:
                raise DownloadError("download_failed", f"redirect to {target[:80]!r}") from error
        raise DownloadError(
            "download_failed", f"more than {self.config.max_redirects} redirects, the last to {url}"
        )

    async def _content(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status in _RETRIED:
            wait = retry_after(response.headers.get("Retry-After"))
            raise _RetryError(f"HTTP {response.status} {response.reason}", wait)
        if response.status != 200:
            raise DownloadError("download_failed", f"HTTP {response.status} {response.reason}")
        if self.config.respect_noai and _asks_not_to(response.headers.getall("X-Robots-Tag", [])):
            raise DownloadError("download_disallowed", "X-Robots-Tag asks not to train on it")
        limit = self.config.max_bytes
        if (response.content_length or 0) > limit:
            told = f"Content-Length {response.content_length:,}, over {limit:,} bytes"
            raise DownloadError("download_too_large", told)
        content = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            content += chunk
            if len(content) > limit:
                raise DownloadError("download_too_large", f"over {limit:,} bytes")
        if not is_image(content):
            told = f"{response.content_type}, {len(content):,} bytes: {bytes(content[:20])!r}"
            raise DownloadError("download_not_image", told)
        return bytes(content)

    def _checked(self, text: str) -> URL:
        """The URL, if it is one that may be asked; raises DownloadError."""
        try:
            url = URL(text)
            host = url.host
        except ValueError as error:
            raise DownloadError("download_refused", f"{text[:80]!r} is no URL: {error}") from error
        if url.scheme not in ("http", "https") or not host:
            raise DownloadError("download_refused", f"{text[:80]!r} is no http or https URL")
        if not self.config.allow_private and not addresses.may_be_public(host):
            raise DownloadError("download_refused", f"{host} is a private address")
        return url.with_user(None)


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses only; what is resolved here is what is connected to."""

    def __init__(self, allow_private: bool) -> None:
        self._inner = aiohttp.ThreadedResolver()
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if self._allow_private:
            return found
        public = [result for result in found if addresses.is_public(result["host"])]
        if not public:
            raise DownloadError("download_refused", f"{host} has private addresses only")
        return public

    async def close(self) -> None:
        await self._inner.close()


def is_image(content: bytes | bytearray) -> bool:
    """Whether the bytes begin as those of an image format that a pair may have."""
    return content.startswith(_SIGNATURES) or (
        content.startswith(b"RIFF") and content[8:12] == b"WEBP"
    )


def retry_after(header: str | None, now: float | None = None) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 if it says nothing."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, date.timestamp() - (time.time() if now is None else now))


_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*",
)  # fmt: skip


def _asks_not_to(headers: list[str]) -> bool:
    words = {word.strip().lower() for header in headers for word in header.split(",")}
    return bool(words & {"noai", "noimageai"})


async def _download_row(downloader: Downloader, row: dict[str, Any] | Rejected) -> Raw | Rejected:
    if isinstance(row, Rejected):
        return row
    try:
        return {**row, "image": await downloader.download(row["url"])}
    except OutageError:
        raise
    except DownloadError as error:
        reason, detail = error.reason, error.detail
    except Exception as error:  # what a server may do to a client has no end
        reason, detail = "download_failed", f"{type(error).__name__}: {error}"
    return Rejected(str(row["id"] or ""), row["origin"], reason, f"{detail}: {row['url'][:100]}")


def _from_thread(make: Any) -> Iterator[Raw | Rejected]:
    """What an asynchronous generator yields, run in a thread of its own and a few items ahead.

    With the loop in the caller's thread, time that the caller spends on an item would count
    against the timeouts of the downloads.
    """
    loop = asyncio.new_event_loop()
    queue: asyncio.Queue[Mapping[str, Any] | Rejected | BaseException | None] = asyncio.Queue(8)

    async def produce() -> None:
        end: BaseException | None = None
        try:
            async with aclosing(make()) as items:
                async for item in items:
                    await queue.put(item)
        except Exception as error:
            end = error
        await queue.put(end)

    thread = threading.Thread(target=loop.run_forever, daemon=True, name="downloads")
    thread.start()
    producer = asyncio.run_coroutine_threadsafe(produce(), loop)
    try:
        while True:
            item = asyncio.run_coroutine_threadsafe(queue.get(), loop).result()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        producer.cancel()
        concurrent.futures.wait([producer])
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
