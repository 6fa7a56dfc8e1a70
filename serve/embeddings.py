"""`/v1/embeddings`."""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi.responses import JSONResponse, Response

from serve.errors import ApiError
from serve.inputs import EmbeddingsRequest, Picture, Reader, Text, encoded_vector, request_items
from serve.messages import Tower
from serve.together import together
from serve.towers import Served, answer_headers, answered_by, check_model


async def embeddings(asked: EmbeddingsRequest, served: Served, reader: Reader) -> Response:
    """Vectors of texts and images, in the order in which they came.

    Raises:
        ApiError: the request cannot be answered, or an item cannot and the request wants all.
    """
    items = request_items(asked, reader.limits)
    card = served.card
    check_model(asked.model, card)
    if asked.dimensions is not None and asked.dimensions > card.dimensions:
        raise ApiError(
            400,
            "too_many_dimensions",
            f"dimensions: is more than the model has, which are {card.dimensions}",
            "dimensions",
        )
    data: list[dict[str, Any] | None] = [None] * len(items)
    failures: dict[int, ApiError] = {}
    sent: dict[Tower, list[tuple[int, bytes | str]]] = {"image": [], "text": []}
    for at, read in enumerate(await asyncio.gather(*(_read(reader, item) for item in items))):
        if isinstance(read, ApiError):
            failures[at] = read
        elif isinstance(read, Text):
            sent["text"].append((at, read.text))
        else:
            sent["image"].append((at, read.data))
    _stop_at(failures, asked)
    busy = [tower for tower, payloads in sent.items() if payloads]
    answers = await together(
        served.encode(tower, [payload for _, payload in sent[tower]]) for tower in busy
    )
    for tower, answer in zip(busy, answers, strict=True):
        places = [at for at, _ in sent[tower]]
        for vector, index in zip(answer.vectors, answer.indices, strict=True):
            data[places[index]] = {
                "object": "embedding",
                "index": places[index],
                "embedding": encoded_vector(
                    _shortened(vector, asked.dimensions), asked.encoding_format
                ),
            }
        for index, message in answer.failures.items():
            failures[places[index]] = ApiError(400, "broken_image", message)
    _stop_at(failures, asked)
    for at, failure in failures.items():
        told = _about(at, failure, asked).body()["error"]
        data[at] = {"object": "error", "index": at, "error": told}
    tokens = sum(answer.tokens for answer in answers)
    return JSONResponse(
        {"object": "list", "data": data, **answered_by(card, tokens)},
        headers=answer_headers(card, answers),
    )


async def _read(reader: Reader, item: object) -> Text | Picture | ApiError:
    try:
        return await reader.item(item)
    except ApiError as error:
        return error


def _about(at: int, error: ApiError, asked: EmbeddingsRequest) -> ApiError:
    place = f"input.{at}" if isinstance(asked.input, list) else "input"
    return ApiError(error.status, error.code, f"{place}: {error.message}", place, at)


def _stop_at(failures: Mapping[int, ApiError], asked: EmbeddingsRequest) -> None:
    """Raise the first bad item's error, unless each is to be told by itself."""
    if failures and asked.on_error != "item":
        first = min(failures)
        raise _about(first, failures[first], asked)


def _shortened(vector: npt.NDArray[np.float32], dimensions: int | None) -> npt.NDArray[np.float32]:
    if dimensions is None or dimensions == len(vector):
        return vector
    cut = vector[:dimensions]
    return cut / np.float32(max(float(np.linalg.norm(cut)), 1e-12))
