"""Images by address: from hosts that were named, on the internet, within bounds."""

import asyncio
import datetime
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from rwkv_clip.addresses import is_public
from serve.config import LimitsConfig, RemoteConfig
from serve.embeddings import embeddings
from serve.errors import ApiError
from serve.inputs import EmbeddingsRequest, Picture, Reader, parse_request
from serve.messages import Encoded, ModelCard
from serve.remote import Fetcher
from tests.serve.small import image_part, picture

HOST, INSIDE = "images.example", "inside.example"
IMAGE = picture(0)


class Site(BaseHTTPRequestHandler):
    """A site with an image, and with what a bad one may have."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        content = {"/image.png": IMAGE, "/large": b"x" * 300_000, "/text": b"hello"}.get(self.path)
        self.send_response(404 if content is None else 200)
        self.end_headers()
        if self.path == "/never":
            self.server.silent.wait(30)  # type: ignore[attr-defined]
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        pass


class Names(AbstractResolver):
    """Every name is this machine's, but for one that is a private network's."""

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET):
        address = "10.0.0.1" if host == INSIDE else "127.0.0.1"
        return [
            {"hostname": host, "host": address, "port": port, "family": socket.AF_INET,
             "proto": 0, "flags": 0}
        ]  # fmt: skip

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("certificate") / "site.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture(scope="module")
def port(certificate: Path) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.silent = threading.Event()  # type: ignore[attr-defined]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.silent.set()  # type: ignore[attr-defined]
    server.shutdown()


@pytest.fixture
def read(port: int, certificate: Path) -> Callable[[str], bytes]:
    """Read an item whose image is at an address; PORT in it is the site's."""

    async def work(address: str) -> bytes:
        config = RemoteConfig(hosts=(HOST, INSIDE, "*.cdn.example"), seconds=3, redirects=2)
        trusting = ssl.create_default_context(cafile=str(certificate))
        fetcher = Fetcher(
            config,
            image_bytes=200_000,
            resolver=Names(),
            allowed=lambda address: address == "127.0.0.1" or is_public(address),
            context=trusting,
        )
        try:
            item = image_part(address.replace("PORT", str(port)))
            counted: list[int] = []
            found = await Reader(LimitsConfig(), fetcher, counted.append).item(item)
        finally:
            await fetcher.close()
        assert isinstance(found, Picture)
        assert counted == [len(found.data)]
        return found.data

    return lambda address: asyncio.run(work(address))


@pytest.mark.parametrize(
    "address",
    [
        f"https://{HOST}:PORT/image.png",
        f"https://{HOST.upper()}.:PORT/image.png",
        f"https://{HOST}:PORT/to/https://{HOST}:PORT/image.png",
        f"https://{HOST}:PORT/to//image.png",
    ],
)
def test_an_image_of_a_named_host_is_fetched(read, address):
    assert read(address) == IMAGE


@pytest.mark.parametrize(
    ("address", "status", "code"),
    [
        (f"http://{HOST}:PORT/image.png", 400, "remote_refused"),
        (f"ftp://{HOST}/image.png", 400, "remote_refused"),
        ("file:///etc/passwd", 400, "remote_refused"),
        (f"https://me:secret@{HOST}:PORT/image.png", 400, "remote_refused"),
        ("https://other.example/image.png", 400, "remote_refused"),
        (f"https://{HOST}.other.example/image.png", 400, "remote_refused"),
        ("https://cdn.example/image.png", 400, "remote_refused"),
        ("https://127.0.0.1:PORT/image.png", 400, "remote_refused"),
        ("https://[::1]/image.png", 400, "remote_refused"),
        ("https://[", 400, "remote_refused"),
        ("https://.cdn.example/image.png", 400, "remote_refused"),
        ("https://a..cdn.example/image.png", 400, "remote_refused"),
        (f"https://{HOST}..:PORT/image.png", 400, "remote_refused"),
        (f"https://{'a' * 64}.cdn.example/image.png", 400, "remote_refused"),
        (f"https://{HOST}:PORT/to/https://a..cdn.example/image.png", 400, "remote_refused"),
        (f"https://{INSIDE}/image.png", 400, "remote_refused"),
        (f"https://{HOST}:PORT/to/https://169.254.169.254/latest", 400, "remote_refused"),
        (f"https://{HOST}:PORT/to/https://{INSIDE}/", 400, "remote_refused"),
        (f"https://{HOST}:PORT/to/http://{HOST}:PORT/image.png", 400, "remote_refused"),
        (f"https://{HOST}:PORT" + f"/to/https://{HOST}:PORT" * 3, 400, "remote_refused"),
        (f"https://{HOST}:PORT/large", 413, "image_too_large"),
        (f"https://{HOST}:PORT/text", 415, "unsupported_image"),
        (f"https://{HOST}:PORT/nothing", 400, "remote_failed"),
        ("https://images.cdn.example:PORT/image.png", 400, "remote_failed"),  # its certificate
        (f"https://{HOST}:PORT/never", 400, "remote_failed"),
    ],
)
def test_any_other_address_is_refused(read, address, status, code):
    with pytest.raises(ApiError) as refused:
        read(address)
    assert (refused.value.status, refused.value.code) == (status, code)


@pytest.mark.parametrize(
    ("entry", "hosts"),
    [
        ("bücher.example", ("bücher.example", "xn--bcher-kva.example", "BÜCHER.example.")),
        ("xn--bcher-kva.example", ("bücher.example", "xn--bcher-kva.example")),
        ("*.bücher.example", ("a.bücher.example", "a.b.xn--bcher-kva.example")),
        ("Images.Example.", ("images.example", "images.example.")),
        ("[2606:4700::1111]", ("[2606:4700::1111]",)),
    ],
)
def test_a_host_is_named_in_any_of_its_spellings(entry, hosts):
    async def work() -> None:
        fetcher = Fetcher(RemoteConfig(hosts=(entry,)), 1000, Names(), allowed=lambda _: False)
        told = dict.fromkeys(hosts, "at an address that may not be asked")  # and so a host that may
        for host, why in {**told, "other.example": "a host that this server may not ask"}.items():
            with pytest.raises(ApiError, match=why):
                await fetcher.fetch(f"https://{host}/image.png")
        await fetcher.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    "entry",
    [
        "https://images.example", "images.example:8443", "images.example/folder", "*", "*.", "",
        ".images.example", "*.*.example", "images*.example", "two images",
    ],
)  # fmt: skip
def test_what_no_host_can_match_is_no_entry(entry):
    with pytest.raises(ValidationError, match="is no host; write a name alone, such as"):
        RemoteConfig(hosts=(entry,))


@pytest.mark.parametrize(
    "address",
    [
        "64:ff9b:1::a00:1", "64:ff9b:1:ffff::808:808", "fec0::1", "feff::1", "::127.0.0.1",
        "::8.8.8.8", "::ffff:0:127.0.0.1", "192.0.0.8", "192.0.0.9", "3fff:fff::1", "5f00::1",
    ],
)  # fmt: skip
def test_what_is_nobodys_on_the_internet_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["::ffff:8.8.8.8", "192.0.1.1", "3ffe::1", "5f01::1"])
def test_what_lies_beside_that_is_public(address):
    assert is_public(address)


def test_a_name_that_its_codec_refuses_fails_its_own_item():
    class Codec(Names):
        async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET):
            raise UnicodeError("label empty or too long")

    async def work() -> None:
        fetcher = Fetcher(RemoteConfig(hosts=(HOST,)), 1000, Codec())
        reader = Reader(LimitsConfig(), fetcher, lambda _: None)
        with pytest.raises(ApiError) as failed:
            await reader.item(image_part(f"https://{HOST}/image.png"))
        assert (failed.value.status, failed.value.code) == (400, "remote_failed")
        await fetcher.close()

    asyncio.run(work())


class Slow:
    """A site whose images come, or fail, when they are let."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ended = 0
        self.coming = asyncio.Event()
        self.error: ApiError | None = None

    async def fetch(self, address: str) -> bytes:
        self.asked.append(address)
        try:
            await self.coming.wait()
        finally:
            self.ended += 1
        if self.error is not None:
            raise self.error
        return IMAGE


def at_once(work: Callable[..., Coroutine[Any, Any, None]]) -> None:
    """Do work with a slow site, what was counted, and five items at one address of it."""

    async def run() -> None:
        site, counted = Slow(), []
        reader = Reader(LimitsConfig(), site, counted.append)  # type: ignore[arg-type]
        part = image_part(f"https://{HOST}/a.png")
        items = [asyncio.create_task(reader.item(part)) for _ in range(5)]
        await asyncio.sleep(0.01)
        await asyncio.wait_for(work(site, counted, items, lambda: reader.item(part)), 10)

    asyncio.run(run())


def test_items_at_one_address_wait_for_one_fetch():
    async def work(site, counted, items, again):
        items[0].cancel()  # that which came first
        await asyncio.sleep(0.01)
        assert site.ended == 0
        site.coming.set()
        found = await asyncio.gather(*items, again(), return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert found[1:] == [Picture(IMAGE)] * 5
        assert await again() == Picture(IMAGE)
        assert (len(site.asked), counted) == (1, [len(IMAGE)])

    at_once(work)


def test_a_fetch_that_fails_fails_for_each_item_and_may_be_tried_again():
    async def work(site, counted, items, again):
        site.error = ApiError(400, "remote_failed", "cannot be fetched")
        site.coming.set()
        failures = await asyncio.gather(*items, return_exceptions=True)
        assert len({id(failure) for failure in failures}) == 5
        assert {(one.status, one.code, one.message) for one in failures} == {
            (400, "remote_failed", "cannot be fetched")
        }
        assert len(site.asked) == 1
        site.error = None
        assert await again() == Picture(IMAGE)
        assert (len(site.asked), counted) == (2, [len(IMAGE)])

    at_once(work)


def test_a_fetch_that_none_waits_for_ends():
    async def work(site, counted, items, again):
        for item in items:
            item.cancel()
        await asyncio.wait(items)
        one_more = asyncio.create_task(again())  # while the first is being given up
        await asyncio.sleep(0.01)
        assert site.ended == 1
        site.coming.set()
        assert await one_more == Picture(IMAGE)
        assert (len(site.asked), counted) == (2, [len(IMAGE)])

    at_once(work)


def test_a_request_that_goes_through_a_second_model_fetches_and_counts_nothing_twice():
    fetched: list[str] = []
    counted: list[int] = []

    class Site:
        async def fetch(self, address: str) -> bytes:
            fetched.append(address)
            return IMAGE

    class MovedError(Exception):
        pass

    class Moved:
        """A model that is served no more."""

        card = ModelCard("small", "1", "digest", 32, 1.0)

        async def encode(self, tower: str, items: list[bytes | str]) -> Encoded:
            assert (tower, items) == ("image", [IMAGE, IMAGE])
            raise MovedError

    addresses = [f"https://{HOST}/{name}.png" for name in "ab"]
    body = json.dumps({"input": [image_part(address) for address in addresses]}).encode()
    asked = parse_request(EmbeddingsRequest, body)

    async def rounds() -> None:
        reader = Reader(LimitsConfig(), Site(), counted.append)  # type: ignore[arg-type]
        for _ in range(3):
            with pytest.raises(MovedError):
                await embeddings(asked, Moved(), reader)  # type: ignore[arg-type]

    asyncio.run(rounds())
    assert fetched == addresses
    assert counted == [len(IMAGE)] * 2
