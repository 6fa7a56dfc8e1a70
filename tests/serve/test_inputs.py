"""What a request may cost, and that nothing is read which nobody waits for."""

import asyncio
import base64
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from rwkv_clip import tokenize
from rwkv_clip.images import ImageDecodeError
from serve import encoders
from serve.batching import Room
from serve.config import LimitsConfig, ServeFile
from serve.encoders import Encoder, Turns
from serve.errors import ApiError
from serve.inputs import (
    EmbeddingsRequest,
    Picture,
    Reader,
    check_picture,
    read_header,
    request_items,
)
from tests.rwkv_clip.test_images import bmp, of_scans
from tests.serve.small import data_uri, picture

LIMITS = LimitsConfig()


def blank(size: tuple[int, int], kind: str = "PNG") -> bytes:
    out = BytesIO()
    Image.new("1" if kind == "PNG" else "L", size).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("image", "status", "told"),
    [
        (of_scans(101), 400, "is an image that has 101 scans, more than the 100"),
        *[
            (bmp(kind), 415, "is an image that is a compressed BMP; save it as a PNG; supported")
            for kind in (1, 4)
        ],
        (blank((1, 65_536)), 413, "is an image of more than 65,535 pixels on a side"),
        (blank((65_536, 1)), 413, "is an image of more than 65,535 pixels on a side"),
    ],
    ids=["scans", "BMP of runs", "BMP of a JPEG", "high", "wide"],
)
def test_an_image_that_takes_too_long_is_refused_at_its_header(image, status, told):
    with pytest.raises(ApiError) as refused:
        check_picture(read_header(image, LIMITS), LIMITS)
    assert refused.value.status == status
    assert refused.value.message.startswith(told)


def test_panoramas_and_a_full_request_of_photographs_are_let_pass():
    check_picture(read_header(blank((20_000, 1_900)), LIMITS), LIMITS)
    check_picture(read_header(blank((400, 65_500), "JPEG"), LIMITS), LIMITS)
    photograph = read_header(blank((3_648, 2_736), "JPEG"), LIMITS)  # of ten megapixels
    assert LIMITS.items * photograph.cost <= LIMITS.request_pixels
    screen = read_header(blank((1_920, 1_080)), LIMITS)
    assert LIMITS.items * screen.cost <= LIMITS.request_pixels


def encoded(kind: str, side: int = 64, mode: str = "RGB", **options: object) -> bytes:
    out = BytesIO()
    Image.new(mode, (side, side)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("image", "cost"),
    [
        (encoded("PNG"), 1),
        (encoded("GIF"), 1),
        (encoded("BMP"), 1),
        (encoded("PNG", mode="I;16"), 2),
        (encoded("WEBP"), 1.5),
        (encoded("WEBP", lossless=True), 1.5),
        (encoded("JPEG"), 1 / 4),
        (encoded("JPEG", mode="CMYK"), 1 / 4),
        (encoded("MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))] * 9), 1 / 4),
        (encoded("JPEG", progressive=True), 10 / 16),
        (encoded("JPEG", mode="CMYK", progressive=True), 18 / 16),
        (of_scans(3), 1 / 4),
        (of_scans(25), 25 / 16),
        (of_scans(100), 100 / 16),
    ],
    ids=[
        "PNG", "GIF", "BMP", "16 bits", "WEBP", "lossless WEBP", "JPEG", "CMYK", "MPO",
        "progressive", "progressive CMYK", "3 scans", "25 scans", "100 scans",
    ],
)  # fmt: skip
def test_an_image_costs_what_its_decoder_takes(image, cost):
    assert read_header(image, LIMITS).cost == cost * 64 * 64


def test_large_photographs_are_let_pass_whatever_they_are_saved_as():
    for file in (
        encoded("JPEG", 4_900),  # of 24 megapixels
        encoded("JPEG", 4_900, progressive=True),
        blank((4_900, 4_900)),
    ):
        photograph = read_header(file, LIMITS)
        check_picture(photograph, LIMITS)
        assert 16 * photograph.cost <= LIMITS.request_pixels


def test_images_beyond_a_requests_pixels_are_refused_each_by_itself():
    reader = Reader(LimitsConfig(request_pixels=1000), None, lambda _: None)
    png, jpeg = data_uri(picture(0, (20, 20))), data_uri(picture(0, (20, 20), "JPEG"), "jpeg")
    asked = EmbeddingsRequest(input=[png, "a text", png, png, jpeg, jpeg, png])  # of 400 pixels

    async def work() -> None:
        for _ in range(2):  # as it is when the model is exchanged meanwhile
            items = request_items(asked, reader.limits)
            read = await asyncio.gather(*map(reader.item, items), return_exceptions=True)
            refused = {at: one for at, one in enumerate(read) if isinstance(one, Exception)}
            assert [*refused] == [3, 6]
            for error in refused.values():
                assert isinstance(error, ApiError)
                assert (error.status, error.code) == (413, "too_many_pixels")
                assert "the request has more than 1,000 pixels, where" in error.message

    asyncio.run(work())


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_an_images_bytes_are_counted_without_the_line_breaks_of_its_base64(encode):
    data = picture(0, (200, 200), "BMP")
    uri = f"data:image/bmp;base64,{encode(data).decode()}"

    def read(most: int) -> object:
        reader = Reader(LimitsConfig(image_bytes=most), None, lambda _: None)
        return asyncio.run(reader.item(uri))

    assert read(len(data)) == Picture(data)
    with pytest.raises(ApiError, match=f"of more than {len(data) - 1:,} bytes"):
        read(len(data) - 1)


class Held:
    """What a replica's model is read for; its pictures come when `more` is set."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(context_length=16)
        self.begun: list[bytes] = []
        self.first, self.more = threading.Event(), threading.Event()

    def transform(self, image: bytes) -> torch.Tensor:
        self.begun.append(image)
        self.first.set()
        self.more.wait()
        raise ImageDecodeError("is no matter")


def replica(**serve: Any) -> Any:
    """One that reads an item at a time."""
    config = ServeFile.model_validate({"serve": {"model": "a", **serve}})
    made = SimpleNamespace(
        config=config, batch=64, threads=1, workers=ThreadPoolExecutor(1), room=Room(256), held={}
    )
    made._part, made._read = (
        lambda *given: Encoder._part(made, *given),
        lambda *given: Encoder._read(made, *given),
    )
    return made


def test_texts_of_many_characters_are_tokenized_some_at_a_time(monkeypatch):
    held, made, pieces = Held(), replica(), []

    def noted(texts: list[str], length: int) -> torch.Tensor:
        pieces.append([len(text) for text in texts])
        return tokenize(texts, length)

    monkeypatch.setattr(encoders, "tokenize", noted)
    texts = ["a b " * 500, "c " * 3000, "d " * 3000, "e", "f " * 20_000, "g " * 20_000]
    read = asyncio.run(Encoder._read(made, held, texts, Turns(1)))
    assert pieces == [[2000, 6000], [6000, 1], [40_000], [40_000]]
    torch.testing.assert_close(torch.stack(read), tokenize(texts, 16))


def end_before_it_is_done(
    made: Any, work: Callable[[], Awaitable[Any]], first: threading.Event, more: threading.Event
) -> None:
    """Cancel work whose first item is being read, and wait for the threads to be done."""

    async def cancel() -> None:
        task = asyncio.ensure_future(work())
        assert await asyncio.to_thread(first.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    more.set()
    made.workers.shutdown()


def test_texts_that_nobody_waits_for_are_not_tokenized(monkeypatch):
    held, made, texts = Held(), replica(), []

    def slow(piece: list[str], length: int) -> torch.Tensor:
        texts.extend(piece)
        held.first.set()
        held.more.wait()
        return tokenize(piece, length)

    monkeypatch.setattr(encoders, "tokenize", slow)
    asked = [letter * 10_000 for letter in "abc"]
    end_before_it_is_done(
        made, lambda: Encoder._read(made, held, asked, Turns(1)), held.first, held.more
    )
    assert texts == asked[:1]


def test_images_that_nobody_waits_for_are_not_decoded():
    held, made, asked = Held(), replica(), [b"a", b"b", b"c"]
    end_before_it_is_done(
        made, lambda: Encoder._read(made, held, asked, Turns(1)), held.first, held.more
    )
    assert held.begun == asked[:1]


class Stopped(Executor):
    """Threads that never come to what waits for them."""

    def __init__(self) -> None:
        self.waiting: list[object] = []

    def submit(self, work: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        self.waiting.append(given[-1])
        return Future()


def test_who_sends_one_image_does_not_wait_for_all_of_whoever_sent_many_before():
    made, workers = replica(), Stopped()
    made.held["a"], made.batch, made.room, made.workers = Held(), 4, Room(16), workers

    async def work() -> None:
        for images in ([b"many"] * 40, [b"one"]):
            tasks.append(asyncio.ensure_future(Encoder.encode(made, images, "a")))
            async with asyncio.timeout(10):
                while images[0] not in workers.waiting:
                    await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    tasks: list[asyncio.Future[Any]] = []
    asyncio.run(work())
    assert workers.waiting == [b"many"] * 2 + [b"one"]  # of a thread, and one to keep it busy


def test_no_more_is_read_for_a_request_whose_time_is_over():
    held, made = Held(), replica(request_seconds=0.01)
    made.held["a"] = held

    async def work() -> None:
        task = asyncio.ensure_future(Encoder.encode(made, [b"a", b"b", b"c"], "a"))
        await asyncio.wait({task}, timeout=30)
        held.more.set()
        with pytest.raises(TimeoutError):
            await task

    asyncio.run(work())
    made.workers.shutdown()
    assert held.begun in ([], [b"a"])
