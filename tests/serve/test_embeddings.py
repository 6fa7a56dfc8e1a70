"""`/v1/embeddings`: the model's own vectors, in order, whatever else is asked for."""

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI

from rwkv_clip import image_transform, tokenize
from rwkv_clip.model import RWKVCLIP
from serve import inputs
from serve.bodies import Bodies
from serve.classification import ClassifyRequest
from serve.config import LimitsConfig
from serve.errors import ApiError
from serve.inputs import EmbeddingsRequest, Picture, Reader, Shape, Text, parse_request
from serve.searching import SearchRequest
from tests.serve.small import data_uri, image_part, picture


@torch.inference_mode()
def of_texts(model: RWKVCLIP, texts: list[str]) -> np.ndarray:
    return model.encode_text(tokenize(texts, model.config.context_length)).numpy()


@torch.inference_mode()
def of_images(model: RWKVCLIP, images: list[bytes]) -> np.ndarray:
    transform = image_transform(model.config, exif_orientation=True)
    return model.encode_image(torch.stack([transform(image) for image in images])).numpy()


def vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return np.array([one["embedding"] for one in data], np.float32)


def test_openais_client_gets_texts_and_images(endpoint, model):
    client = OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0)
    texts = ["a red heart", "two dogs"]
    answer = client.embeddings.create(model="small", input=texts)
    found = np.array([one.embedding for one in answer.data])
    np.testing.assert_allclose(found, of_texts(model, texts), atol=1e-5)
    assert answer.model == "small"
    assert answer.usage.prompt_tokens == 5 + 4
    image = picture(0)
    (single,) = client.embeddings.create(model="small", input=data_uri(image)).data
    np.testing.assert_allclose(single.embedding, of_images(model, [image])[0], atol=1e-5)
    assert [one.id for one in client.models.list()] == ["small"]


def test_mixed_items_keep_their_order_in_batches_of_any_size(client, model):
    images = [picture(seed, (30 + seed, 50)) for seed in range(9)]
    texts = [f"text number {at}" for at in range(9)]
    items: list[object] = []
    for at, (image, text) in enumerate(zip(images, texts, strict=True)):
        uri, raw = data_uri(image), base64.b64encode(image).decode()
        parts = [
            image_part(one) for one in (uri, f"\n {uri}", raw, base64.encodebytes(image).decode())
        ]
        items.append([uri, f" \n{uri}", *parts][at % 6])
        items.append(text if at % 2 else {"type": "text", "text": text})
    found = vectors(client.post("/v1/embeddings", json={"input": items}))
    np.testing.assert_allclose(found[0::2], of_images(model, images), atol=1e-5)
    np.testing.assert_allclose(found[1::2], of_texts(model, texts), atol=1e-5)


def test_formats_and_dimensions(client, model):
    asked = {"input": "a red heart", "dimensions": 8}
    expected = of_texts(model, ["a red heart"])[:, :8]
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(
        vectors(client.post("/v1/embeddings", json=asked)), expected, atol=1e-5
    )
    answer = client.post("/v1/embeddings", json={**asked, "encoding_format": "base64"}).json()
    packed = base64.b64decode(answer["data"][0]["embedding"])
    np.testing.assert_allclose(np.frombuffer(packed, "<f4"), expected[0], atol=1e-5)


BROKEN = picture(3, (60, 60), "JPEG")
BAD = {
    "truncated": (data_uri(BROKEN[: len(BROKEN) // 2], "jpeg"), 400, "broken_image"),
    "svg": (data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), 415, None),
    "no base64": ("data:image/png;base64,????", 400, "invalid_base64"),
    "not encoded": ("data:image/png,abc", 400, "invalid_data_uri"),
    "a document": ("data:text/plain;base64,YWJj", 415, "not_an_image"),
    "an address": (image_part("https://example.com/cat.png"), 400, "remote_image"),
    "blank": ("  ", 400, "empty_text"),
    "long": ("x" * 100_001, 413, "text_too_long"),
    "heavy": (data_uri(b"\0" * 6_000_010), 413, "image_too_large"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_item_is_named_and_costs_no_other(client, model, name):
    item, status, code = BAD[name]
    items = ["good", item, "better"]
    answer = client.post("/v1/embeddings", json={"input": items})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["index"] == 1
    assert error["param"] == "input.1"
    assert code in (None, error["code"])
    one_by_one = client.post("/v1/embeddings", json={"input": items, "on_error": "item"})
    assert one_by_one.status_code == 200
    data = one_by_one.json()["data"]
    assert data[1]["error"]["code"] == error["code"]
    found = np.array([data[0]["embedding"], data[2]["embedding"]])
    np.testing.assert_allclose(found, of_texts(model, ["good", "better"]), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({}, 400, "input"),
        ({"input": 3}, 400, "input"),
        ({"input": None}, 400, "input"),
        ({"input": [[1, 2]]}, 400, "input.0"),
        ({"input": ["x", {"type": "text"}]}, 400, "input.1"),
        ({"input": "x", "dimensions": 0}, 400, "dimensions"),
        ({"input": "x", "dimensions": 33}, 400, "dimensions"),
        ({"input": "x", "model": "other"}, 404, "model"),
        ({"input": ["x"] * 201}, 413, "input"),
        ({"input": [{"type": "audio"}]}, 400, "input.0"),
        ({"input": [1.5]}, 400, "input.0"),
        ({"input": [{"type": "words " * 1000}]}, 400, "input.0"),
    ],
)
def test_a_bad_request_is_told_by_its_key(client, body, status, param):
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert len(answer.content) < 500  # nothing of the request comes back


def test_bodies_that_are_no_json_or_too_large(client):
    headers = {"content-type": "application/json"}
    broken = client.post("/v1/embeddings", content=b'{"input": ', headers=headers)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    large = client.post("/v1/embeddings", json={"input": "x" * 9_000_001})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    form = client.post("/v1/embeddings", data={"input": "x"})
    assert form.status_code == 415
    assert client.get("/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/v1/embeddings").status_code == 405


def read(item: object) -> Text | Picture:
    return asyncio.run(Reader(LimitsConfig(), None, lambda _: None).item(item))


@pytest.mark.parametrize(
    "text",
    [
        "Data: sales in 2023, by region", "data:", "data:,", "DATA:a;b,c", "Data:2023;base64",
        "data: image/png;base64,", "Data: image/png;base64, and more", "data:a b/c,d",
        "data:and/or more, or less",
    ],
)  # fmt: skip
def test_a_text_may_begin_as_a_data_uri_does(text):
    assert read(text) == Text(text)


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png,a", "data:text/plain;base64,YQ==", "data:;base64,YQ==",
        "data:image;base64,iVBOR", "Data:png;a=b;BASE64,iVBOR",
    ],
)  # fmt: skip
def test_what_looks_like_a_data_uri_is_a_text_only_in_a_part(uri):
    with pytest.raises(ApiError, match="a text that begins so is sent as"):
        read(uri)
    assert read({"type": "text", "text": uri}) == Text(uri)


def test_images_are_read_in_a_thread(monkeypatch):
    check = inputs.check_picture
    threads: list[threading.Thread] = []

    def checked(data: bytes, limits: LimitsConfig) -> None:
        threads.append(threading.current_thread())
        check(data, limits)

    monkeypatch.setattr(inputs, "check_picture", checked)
    assert read(data_uri(picture(0))) == Picture(picture(0))
    assert threading.main_thread() not in threads
    assert len(threads) == 1


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        (EmbeddingsRequest, b'{"input":[%s1]}' % (b'{"":[]},' * 30_000)),
        (EmbeddingsRequest, b'{"input":"a","x":[%s1]}' % (b"[]," * 50_001)),
        (EmbeddingsRequest, b'{"input":[%s""]}' % (rb'"\\",' * 60_000)),
        (SearchRequest, b'{"input":%s1%s}' % (b"[" * 100_001, b"]" * 100_001)),
    ],
    ids=["objects", "unknown", "strings", "lists"],
)
def test_json_of_too_many_pieces_is_not_read(shape, body, monkeypatch):
    monkeypatch.setattr(Shape, "model_validate_json", None)
    with pytest.raises(ApiError) as refused:
        parse_request(shape, body)
    assert (refused.value.status, refused.value.code) == (413, "too_many_pieces")


def test_json_may_begin_with_a_byte_order_mark():
    body = json.dumps({"input": "a"}).encode("utf-8-sig")
    assert parse_request(EmbeddingsRequest, body).input == "a"


def test_texts_and_long_lists_are_read_whatever_they_hold():
    texts = ['[{,"\\' * 20_000 + end for end in ("", '"', "\\")] * 3
    body = json.dumps({"input": texts}).encode()
    assert parse_request(EmbeddingsRequest, body).input == texts
    labels = [f"label {at}" for at in range(10_000)]
    body = json.dumps({"image": "", "labels": labels}).encode()
    assert parse_request(ClassifyRequest, body).labels == labels


def test_what_is_never_read_of_an_item_is_not_kept():
    extra = [{}] * 1000
    part = {"type": "text", "text": "a", "x": extra}
    image = {"type": "image_url", "image_url": {"url": "b", "detail": extra}, "x": extra}
    odd = [extra, {"type": extra, "text": extra}, {"image_url": extra}, "a", 3]
    body = json.dumps({"input": [part, image, *odd]}).encode()
    assert parse_request(EmbeddingsRequest, body).input == [
        {"type": "text", "text": "a"}, image_part("b"), [],
        {"type": None, "text": None}, {"image_url": None}, "a", 3,
    ]  # fmt: skip
    body = json.dumps({"input": part}).encode()
    assert parse_request(SearchRequest, body).input == {"type": "text", "text": "a"}


class Coming:
    """A request whose body comes in blocks, each when `more` is set."""

    def __init__(self, told: int, *blocks: bytes) -> None:
        self.headers = {"content-length": str(told)}
        self.blocks = blocks
        self.more = asyncio.Event()

    async def stream(self) -> AsyncIterator[bytes]:
        for block in self.blocks:
            yield block
            await self.more.wait()


def test_a_body_takes_room_as_it_comes():
    async def work() -> None:
        bodies = Bodies(100, 200)

        async def read(request: Coming) -> bytes:
            async with bodies.read(request) as body:  # type: ignore[arg-type]
                return body.content

        slow = [Coming(100, b"x" * 50, b"x" * 50) for _ in range(3)]
        waiting = [asyncio.create_task(read(request)) for request in slow]
        await asyncio.sleep(0)
        assert bodies.held == 150
        assert await read(Coming(50)) == b""
        for refused in (Coming(51), Coming(0, b"x" * 51)):  # told by its header, and not told
            with pytest.raises(ApiError, match="too much is being read"):
                await read(refused)
        for request in slow:
            request.more.set()
        assert await asyncio.gather(*waiting) == [b"x" * 100] * 3
        assert bodies.held == 0

    asyncio.run(work())


def test_memory_is_given_back_once_the_last_of_many_bodies_has_gone(monkeypatch):
    given_back = []
    monkeypatch.setattr("serve.bodies.trim_freed_memory", lambda: given_back.append(True))

    async def work() -> None:
        bodies = Bodies(8 << 20, 64 << 20)

        async def read(size: int, times: int) -> None:
            coming = [Coming(0, b"x" * size) for _ in range(times)]
            for request in coming:
                request.more.set()
            async with AsyncExitStack() as stack:
                for request in coming:
                    await stack.enter_async_context(bodies.read(request))  # type: ignore[arg-type]

        for _ in range(20):
            await read(1 << 20, 1)
        assert given_back == []
        await read(1 << 20, 20)

    asyncio.run(work())
    assert given_back == [True]


def test_a_large_image_gets_to_its_tower(client):
    """Serve's calls are of 4 MiB at most unless it is told otherwise."""
    image = picture(0, (1400, 1300))
    assert 5 << 20 < len(image) < 6_000_000
    answer = client.post("/v1/embeddings", json={"input": data_uri(image)})
    assert answer.status_code == 200, answer.text


def test_every_answer_has_an_id_and_timings(client):
    answer = client.post("/v1/embeddings", json={"input": "x"}, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert "inference;dur=" in answer.headers["server-timing"]
    assert len(client.get("/healthz").headers["x-request-id"]) > 30
    ready = client.get("/readyz").json()
    assert (ready["status"], ready["model"]) == ("ready", "small")
