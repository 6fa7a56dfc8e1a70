"""What clients of HTTP may rely on, whatever they ask for."""

import asyncio
import gzip
import json
import select
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from openai import NotFoundError, OpenAI
from starlette.testclient import TestClient

from rwkv_clip.cli import main
from serve import command
from serve.config import ServeFile
from serve.ingress import Ingress
from serve.keys import VARIABLE
from serve.messages import ModelPlace, Standing
from serve.openapi import (
    ClassifyAnswer,
    EmbeddingsAnswer,
    ErrorAnswer,
    Health,
    Model,
    Models,
    Ready,
    SearchAnswer,
    document,
)
from tests.machine import free_port
from tests.serve.small import data_uri, picture


def parts(value: object) -> Iterator[dict[str, object]]:
    """All objects in a document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from parts(one)


@pytest.mark.parametrize("keyed", [False, True])
def test_every_reference_of_the_schema_resolves(keyed):
    told = document("1", keyed)
    places = []
    for part in parts(told):
        if "$ref" in part:
            places.append(part["$ref"])
        if "discriminator" in part:
            places += part["discriminator"]["mapping"].values()
    assert len({*places}) > 15
    for place in places:
        root, *keys = place.split("/")
        assert root == "#"
        found = told
        for key in keys:
            found = found[key]
    ways = {name for part in parts(told) for one in part.get("security", []) for name in one}
    assert ways == {*told["components"].get("securitySchemes", {})}
    assert bool(ways) == keyed


def test_the_schema_is_that_of_the_routes(client):
    told = client.get("/openapi.json").json()
    for path, operations in told["paths"].items():
        for method in ("get", "post", "put"):
            answer = client.request(method, path)
            assert (answer.status_code == 405) == (method not in operations), (path, method)
            assert str(answer.status_code) in {
                *operations.get(method, {}).get("responses", ["405"])
            }


def test_answers_are_as_the_schema_says(client):
    def post(path: str, **body: object) -> httpx.Response:
        return client.post(path, json=body)

    image = data_uri(picture(0))
    for shape, answer in (
        (EmbeddingsAnswer, post("/v1/embeddings", input=["x", image, ""], on_error="item")),
        (EmbeddingsAnswer, post("/v1/embeddings", input="x", encoding_format="base64")),
        (ClassifyAnswer, post("/v1/classify", image=image, labels=["a", "b"])),
        (SearchAnswer, post("/v1/search", input="x")),
        (SearchAnswer, post("/v1/search", input="x", with_images=True)),
        (Models, client.get("/v1/models")),
        (Model, client.get("/v1/models/small")),
        (Health, client.get("/healthz")),
        (Ready, client.get("/readyz")),
        (ErrorAnswer, post("/v1/embeddings", input=["x", ""])),
        (ErrorAnswer, client.get("/nothing")),
    ):
        shape.model_validate_json(answer.content, strict=True, extra="forbid")


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/small"]
)
def test_head_answers_as_get_does_without_a_body(client, path):
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == client.get(path).headers["content-type"]


# What a browser asks before it lets a page of another origin send JSON.
FROM_A_PAGE_ELSEWHERE = {
    "Origin": "https://elsewhere.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type",
}


def test_a_method_that_is_not_there_tells_which_are(client):
    for path, allowed in (
        ("/v1/embeddings", {"POST"}),
        ("/v1/models", {"GET", "HEAD"}),
        ("/page/page.js", {"GET", "HEAD"}),
    ):
        for method in ("PUT", "OPTIONS"):
            answer = client.request(method, path, headers=FROM_A_PAGE_ELSEWHERE)
            assert answer.status_code == 405
            assert {*answer.headers["allow"].split(", ")} == allowed
            assert answer.json()["error"]["code"] == "bad_method"
            assert not any(name.startswith("access-control") for name in answer.headers)
    refused = client.head("/v1/embeddings")
    assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")


def test_an_address_may_end_in_a_slash(client, endpoint):
    """It is answered, not redirected: behind TLS, Location would name http://."""
    body = {"input": "a heart"}
    assert client.post("/v1/embeddings/", json=body).status_code == 200
    told = client.get("/v1/models").json()
    assert client.get("/v1/models/").json() == told
    assert client.get("/v1/models/small/").json() == told["data"][0]
    for path in ("/readyz/", "/healthz/", "/metrics/"):
        assert client.get(path).status_code == 200
    made = OpenAI(base_url=f"{endpoint}/v1/", api_key="none").embeddings
    assert len(made.create(model="small", input="a heart").data) == 1
    assert client.get("/v1/nothing/").json()["error"]["code"] == "not_found"


def test_a_page_elsewhere_may_not_read_an_answer(client):
    answer = client.get("/v1/models", headers=FROM_A_PAGE_ELSEWHERE)
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_packed_body_is_refused_by_the_header_that_says_so(client):
    body = json.dumps({"input": "x"}).encode()
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    refused = client.post("/v1/embeddings", content=gzip.compress(body), headers=headers)
    assert refused.status_code == 415
    assert refused.json()["error"]["message"].startswith("Content-Encoding:")
    headers["content-encoding"] = "identity"
    assert client.post("/v1/embeddings", content=body, headers=headers).status_code == 200


def test_openais_client_asks_for_a_model_by_its_name(client, endpoint):
    models = OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0).models
    (listed,) = models.list()
    for name in ("small", f"small/{client.get('/readyz').json()['model_version']}"):
        assert models.retrieve(name) == listed
    with pytest.raises(NotFoundError, match="is not served here"):
        models.retrieve("another")
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()


def test_optional_keys_may_be_null(client):
    keys = ("model", "encoding_format", "dimensions", "on_error", "user")
    told = {"input": "x", **dict.fromkeys(keys)}
    plain = client.post("/v1/embeddings", json={"input": "x"}).json()
    assert client.post("/v1/embeddings", json=told).json() == plain
    bad = client.post("/v1/embeddings", json={**told, "input": ["x", ""]})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "input.1")
    told = {"input": "x", **dict.fromkeys(("limit", "with_images", "model"))}
    assert client.post("/v1/search", json=told).status_code == 200
    told = {"image": data_uri(picture(0)), "labels": ["a", "b"]}
    plain = client.post("/v1/classify", json=told).json()
    told |= dict.fromkeys(("templates", "model"))
    assert client.post("/v1/classify", json=told).json() == plain


def test_a_search_tells_how_long_it_searched(client):
    told = client.post("/v1/search", json={"input": "x"}).headers["server-timing"]
    names = [one.partition(";")[0] for one in told.split(", ")]
    assert names == ["preprocess", "queue", "inference", "search"]


@pytest.mark.parametrize(("path", "key"), [("embeddings", "dimensions"), ("search", "limit")])
def test_a_number_of_thousands_of_digits_does_not_come_back(client, path, key):
    body = f'{{"input": "x", "{key}": {"9" * 4000}}}'
    answer = client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, key)
    assert len(answer.content) < 300


def test_a_server_that_ends_is_not_ready(ray_cluster, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    config = ServeFile.model_validate({"serve": {"model": "somewhere"}})
    made = Ingress.__bases__[0](config, None, None, None, None, keyed=False)
    made.towers._standing = Standing(ModelPlace("small", "1", "s3://models/1"), ending=True)
    client = TestClient(made.__serve_build_asgi_app__())
    for answer in (client.get("/readyz"), client.get("/v1/models")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ending")
        assert answer.headers["retry-after"] == "1"
    assert client.get("/healthz").status_code == 200


def test_a_body_that_does_not_come_is_told_so(ray_cluster, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    config = ServeFile.model_validate({"serve": {"model": "somewhere", "request_seconds": 0.1}})
    made = Ingress.__bases__[0](config, None, None, None, None, keyed=False)
    transport = httpx.ASGITransport(made.__serve_build_asgi_app__())

    async def endless() -> AsyncIterator[bytes]:
        yield b'{"input": '
        await asyncio.Event().wait()

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/v1/embeddings", content=endless())

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "slow_body")
    assert (made.ongoing, made.bodies.held) == (0, 0)


def test_a_body_that_an_offer_of_http2_has_lost_is_told_so(endpoint):
    """As Java's client offers it; what comes with its header is gone when Serve reads on."""
    place = urlsplit(endpoint)
    body = b'{"input": "x"}'
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(body)}\r\n"
        "Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    )
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        with connection.makefile("rb") as file:
            content = file.read().partition(b"\r\n\r\n")[2]
    assert json.loads(content)["error"]["code"] == "lost_body"


def test_a_burst_is_told_in_openais_language_that_it_is_too_much(endpoint):
    """More at once than the ingress answers, and than Serve's proxy would hold for it."""
    place = urlsplit(endpoint)
    body = json.dumps({"input": ["a heart"] * 50})
    request = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    sockets = [socket.create_connection((place.hostname, place.port)) for _ in range(700)]
    try:
        for one in sockets:
            one.sendall(request)
        answers = []
        for one in sockets:
            select.select([one], [], [], 60)
            with one.makefile("rb") as file:
                head, _, content = file.read().partition(b"\r\n\r\n")
            answers.append((head.split()[1], content))
    finally:
        for one in sockets:
            one.close()
    assert {status for status, _ in answers} == {b"200", b"429"}
    for status, content in answers:
        if status == b"429":
            assert json.loads(content)["error"]["code"] == "overloaded"


def test_where_serve_runs_already_its_own_address_is_told(
    endpoint, settings, checkpoint, monkeypatch
):
    told = []

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("serving"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    for step in ("ray.init", "ray.shutdown"):  # the tests' cluster is there, and stays
        monkeypatch.setattr(step, lambda **_: None)
    for step in ("_come_up", "_take_away"):  # and so does its application
        monkeypatch.setattr(command, step, lambda *_: None)
    monkeypatch.setattr(command, "_tell", tell)
    for port in (settings.serve.port, free_port()):
        told.clear()
        options = (f"serve.model={checkpoint}", f"serve.port={port}")
        assert main(["serve", "--set", options[0], "--set", options[1]]) == 0
        assert told[0].startswith(f"serving at {endpoint}, where")
