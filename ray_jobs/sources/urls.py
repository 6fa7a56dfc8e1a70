"""Lists of URLs with texts: the images are downloaded while a unit is read.

Choices:
- A unit downloads many URLs at a time, on an event loop of its own thread, and yields them in the
  list's order; so decoding and downloading overlap. A host that says nothing holds up no other:
  what may wait for it is the rest of the unit, as far as that is not too many bytes.
- What a list of the web may do to a cluster is bounded: only http and https, only public addresses
  (checked where a name is resolved, so also after redirects and for names that change their
  mind), and limits of size, time, redirects and attempts.
- Hosts are treated with respect: few connections at a time to each, Retry-After honoured, pages
  that ask not to be used for training (X-Robots-Tag: noai, noimageai) skipped. A host that does
  not answer ten times in a row is left alone for the rest of the unit. Where a redirect leads to
  is a host like any other.
- Many hosts without a connection are an outage if others of the list, and the last that answered,
  have none either.
- Whether it is an image is said by its first bytes, not by what the server calls it.
"""

import asyncio
import concurrent.futures
import email.utils
import math
import random
import socket
import threading
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from yarl import URL

from ray_jobs.sources.base import ColumnsConfig, FilesConfig, Raw, Rejected, Unit, digest_of
from ray_jobs.sources.lists import list_units, name_text, present_columns, read_list
from ray_jobs.sources.parquet import id_text
from rwkv_clip import addresses

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 1 << 16
_HOST_FAILURES = 10  # in a row
# No connection: refused, without an address, or without an answer.
_UNCONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_SILENT_HOSTS = 50  # one after the other, before it is asked whether the network is down
_PROBED_HOSTS = 100  # then, of
_PROBED_UNITS = 10  # others
_WAITING_BYTES = 256_000_000  # of rows with their images, that wait for those before them
_BLOCK_ROWS = 64  # of the list
# For each download, as a thread whose name server does not answer is busy for longer than anybody
# waits for it.
_NAME_THREADS = 4


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
        self._others: tuple[Unit, ...] = ()  # some of the units, here and there

    def units(self) -> list[Unit]:
        units = list_units(self.config, partial(self._present, warn=True))
        self._others = tuple(units[:: math.ceil(len(units) / _PROBED_UNITS) or 1])
        return units

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        yield from _from_thread(lambda: self._download_all(unit))

    def _present(self, unit: Unit, *, warn: bool = False) -> dict[str, str]:
        return present_columns(unit, self.config.columns, "url", self.config.s3, warn=warn)

    def _rows(self, unit: Unit) -> Iterator[dict[str, Any] | Rejected]:
        present = self._present(unit)
        for origin, row in read_list(unit, list(present.values()), self.config.s3):
            if isinstance(row, Rejected):
                yield row
                continue
            raw = {ours: row.get(theirs) for ours, theirs in present.items()}
            url = name_text(raw.pop("url")).strip()
            identity = id_text(raw["id"] if "id" in raw else digest_of(url, raw))
            yield {**raw, "url": url, "id": identity, "origin": origin}

    async def _download_all(self, unit: Unit) -> AsyncIterator[Raw | Rejected]:
        """The rows with their images, in order, the next ones being downloaded."""
        rows: Iterator[dict[str, Any] | Rejected] | None = self._rows(unit)
        waiting: deque[asyncio.Task[Raw | Rejected]] = deque()
        places = 0
        async with Downloader(self.config, lambda: self._some_urls(unit)) as downloader:
            try:
                while rows or waiting:
                    if rows and (downloader.room or not waiting):
                        # In a thread, as time that reading takes would count against downloads.
                        block = await asyncio.to_thread(_block_of, rows)
                        for place, row in enumerate(block, places):
                            work = _download_row(downloader, row, place)
                            waiting.append(asyncio.create_task(work))
                        places += len(block)
                        rows = rows if block else None
                        continue
                    done = await waiting.popleft()
                    downloader.leave()
                    yield done
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    def _some_urls(self, unit: Unit) -> list[str]:
        """URLs from here and there in a unit and others."""
        found: list[str] = []
        for one in (unit, *self._others):
            urls = [row["url"] for row in self._rows(one) if not isinstance(row, Rejected)]
            found += urls[:: math.ceil(len(urls) / _PROBED_HOSTS) or 1]
        return found


def _block_of(rows: Iterator[dict[str, Any] | Rejected]) -> list[dict[str, Any] | Rejected]:
    return list(islice(rows, _BLOCK_ROWS))


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


@dataclass(order=True)
class _Turn:
    """Of a row to ask a host."""

    place: int
    host: str = field(compare=False)
    given: asyncio.Future[None] = field(compare=False)


class _Turns:
    """Who may ask which host: only so many at a time, and the first in the list first.

    Attributes:
        held: bytes that wait for rows before them. While they are too many, only the first of the
            rows that are left, for which they wait, has a turn.
        first: its place.
    """

    def __init__(self, most: int, most_of_host: int) -> None:
        self.held = self.first = 0
        self._left, self._most_of_host = most, most_of_host
        self._asked: Counter[str] = Counter()
        self._waiting: list[_Turn] = []  # sorted

    @property
    def room(self) -> bool:
        return self.held < _WAITING_BYTES

    @asynccontextmanager
    async def turn(self, place: int, host: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it."""
        mine = _Turn(place, host, asyncio.get_running_loop().create_future())
        insort(self._waiting, mine)
        self.give()
        try:
            await mine.given
            yield
        finally:
            if mine.given.done() and not mine.given.cancelled():
                self._left += 1
                self._asked[host] -= 1
            else:
                self._waiting.remove(mine)
            self.give()

    def give(self) -> None:
        """Give turns to whoever may have one; to be called whenever somebody else may."""
        for one in [one for one in self._waiting if not one.given.done()]:
            if not self._left or not (self.room or one.place == self.first):
                return
            if self._asked[one.host] < self._most_of_host:
                self._waiting.remove(one)
                self._left -= 1
                self._asked[one.host] += 1
                one.given.set_result(None)


class Downloader:
    """Downloads images, politely. An asynchronous context manager.

    Args:
        config: how politely.
        some_urls: gives others that might be asked, to see whether the network is down.
    """

    _answering: ClassVar[URL | None] = None  # the last one, of whichever unit of this process

    def __init__(self, config: UrlsConfig, some_urls: Callable[[], Iterable[str]]) -> None:
        self.config = config
        self._some_urls = some_urls
        # Waiting for a turn comes before the request's own clock starts.
        self._turns = _Turns(config.concurrency, config.connections_per_host)
        self._sizes: Counter[int] = Counter()  # what is held of a row, by place
        self._resolver = _PublicResolver(config)
        self._failures: Counter[str] = Counter()  # of a host, in a row
        self._silent: set[str] = set()  # hosts without a connection since the last answer

    async def __aenter__(self) -> "Downloader":
        threads = concurrent.futures.ThreadPoolExecutor(_NAME_THREADS * self.config.concurrency + 1)
        asyncio.get_running_loop().set_default_executor(threads)
        # A limit of the connector would count waiting for a connection against the request's time.
        connector = aiohttp.TCPConnector(limit=0, resolver=self._resolver, ttl_dns_cache=300)
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

    @property
    def room(self) -> bool:
        """Whether more rows may come."""
        return self._turns.room

    def hold(self, place: int, size: int) -> None:
        """So many more bytes of a row wait from now on."""
        self._sizes[place] += size
        self._turns.held += size

    def leave(self) -> None:
        """The first of the rows waits no more."""
        self._turns.held -= self._sizes.pop(self._turns.first, 0)
        self._turns.first += 1
        self._turns.give()

    async def download(self, url: str, place: int) -> bytes:
        """An image's bytes; raises DownloadError. `place` is that of its row, from 0 on."""
        first = self._checked(url)
        for attempt in range(self.config.retries + 1):
            try:
                return await self._attempt(first, place)
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

    async def _attempt(self, url: URL, place: int) -> bytes:
        """Ask once, and where the answers lead to."""
        for _ in range(self.config.max_redirects + 1):
            # Its turn ends with the answer: two hosts that lead to each other shall not wait so.
            async with self._turns.turn(place, url.host or ""):
                answer = await self._ask(url)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise DownloadError(
            "download_failed", f"more than {self.config.max_redirects} redirects, the last to {url}"
        )

    async def _ask(self, url: URL) -> bytes | URL:
        """The content of a URL, or where it leads to."""
        host = url.host or ""
        if self._failures[host] >= _HOST_FAILURES:
            told = f"{host} was given up on after {_HOST_FAILURES} failures in a row"
            raise DownloadError("download_failed", told)
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                answer = await self._answer(url, response)
        except (TimeoutError, aiohttp.ClientError) as error:
            self._failures[host] += 1
            if isinstance(error, _UNCONNECTED):
                await self._note_silence(host, error)
            raise
        except (_RetryError, DownloadError):
            self._note_answer(url)
            raise
        self._note_answer(url)
        return answer

    async def _answer(self, url: URL, response: aiohttp.ClientResponse) -> bytes | URL:
        if response.status not in _REDIRECTS:
            return await self._content(response)
        target = response.headers.get("Location", "")
        if not target:
            told = f"HTTP {response.status} without a Location"
            raise DownloadError("download_failed", told)
        try:
            return self._checked(str(url.join(URL(target))))
        except ValueError as error:
            raise DownloadError("download_failed", f"redirect to {target[:80]!r}") from error

    def _note_answer(self, url: URL) -> None:
        self._failures[url.host or ""] = 0
        Downloader._answering = url
        self._silent.clear()

    async def _note_silence(self, host: str, error: Exception) -> None:
        """Raise OutageError if it is not the hosts that are gone."""
        self._silent.add(host)
        if len(self._silent) < _SILENT_HOSTS:
            return
        self._silent.clear()
        if not await self._is_connected():
            raise OutageError(
                f"{_SILENT_HOSTS} hosts one after the other could not be connected to, the last "
                f"with: {error}. Either the network is down here, or the list names none that "
                "still exist"
            ) from error

    async def _is_connected(self) -> bool:
        """Whether any host at all can be connected to."""
        if self._answering is not None and await self._connects(self._answering):
            return True
        hosts: dict[tuple[str | None, int | None], URL] = {}
        for text in await asyncio.to_thread(self._some_urls):
            with suppress(DownloadError):
                url = self._checked(text)
                hosts.setdefault((url.host, url.port), url)
        urls = list(hosts.values())
        return await self._any_connects(urls[:: math.ceil(len(urls) / _PROBED_HOSTS) or 1])

    async def _any_connects(self, urls: Sequence[URL]) -> bool:
        tasks = [asyncio.create_task(self._connects(url)) for url in urls]
        try:
            for done in asyncio.as_completed(tasks):
                if await done:
                    return True
            return False
        finally:
            for task in tasks:
                task.cancel()

    async def _connects(self, url: URL) -> bool:
        """Whether a host can be connected to now."""
        try:
            async with asyncio.timeout(self.config.connect_seconds):
                self._checked(str(url))
                for found in await self._resolver.resolve(url.host or "", url.port or 0):
                    with suppress(ConnectionError):
                        _, writer = await asyncio.open_connection(found["host"], url.port)
                        writer.close()
                        return True
        except (OSError, DownloadError):  # a TimeoutError is one
            pass
        return False

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
            raise DownloadError(
                "download_refused", f"{host} is a private address (source.allow_private)"
            )
        return url.with_user(None)


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses only; what is resolved here is what is connected to."""

    def __init__(self, config: UrlsConfig) -> None:
        self._inner = aiohttp.ThreadedResolver()
        self._config = config

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        seconds = self._config.connect_seconds
        try:
            async with asyncio.timeout(seconds):
                found = await self._inner.resolve(host, port, family)
        except TimeoutError as error:
            # As a name that nobody knows.
            raise socket.gaierror(socket.EAI_AGAIN, f"no address in {seconds:g} s") from error
        if self._config.allow_private:
            return found
        public = [result for result in found if addresses.is_public(result["host"])]
        if not public:
            told = f"{host} has private addresses only (source.allow_private)"
            raise DownloadError("download_refused", told)
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
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)  # HTTP has no other, and its oldest form does not say so
    return max(0.0, date.timestamp() - (time.time() if now is None else now))


_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*",
)  # fmt: skip


def _asks_not_to(headers: list[str]) -> bool:
    words = {word.strip().lower() for header in headers for word in header.split(",")}
    return bool(words & {"noai", "noimageai"})


def _size_of(row: Raw) -> int:
    """Of a row without its image, in bytes, about."""
    return sum(len(value) for value in row.values() if isinstance(value, str | bytes))


async def _download_row(
    downloader: Downloader, row: dict[str, Any] | Rejected, place: int
) -> Raw | Rejected:
    if isinstance(row, Rejected):
        return row
    downloader.hold(place, _size_of(row))
    try:
        image = await downloader.download(row["url"], place)
        downloader.hold(place, len(image))
        return {**row, "image": image}
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
