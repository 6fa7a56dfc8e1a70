"""`/v1/classify`: how well each label fits an image, by the model's own scale."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from serve.errors import ApiError
from serve.inputs import Reader, Shape
from serve.messages import Vectors
from serve.together import together
from serve.towers import Served, answer_headers, answered_by, check_model

TEMPLATES = ["a photo of a {}."]


class ClassifyRequest(Shape):
    """What `/v1/classify` takes."""

    image: str = Field(description="data:image/…;base64,…, or the base64 alone")
    labels: list[str] = Field(min_length=1, description="as they read in a sentence")
    templates: list[str] | None = Field(
        TEMPLATES,
        min_length=1,
        description="sentences with {} where the label goes; their embeddings are averaged",
    )
    model: str | None = Field(None, description="the served model's name, or nothing")


async def classify(asked: ClassifyRequest, served: Served, reader: Reader) -> Response:
    """Probabilities of labels, the likeliest first; raises ApiError."""
    limits = reader.limits
    templates = asked.templates or TEMPLATES
    prompts = len(asked.labels) * len(templates)
    if prompts > limits.prompts:
        raise ApiError(
            413,
            "too_many_labels",
            f"labels: {len(asked.labels)} labels in {len(templates)} templates are "
            f"{prompts:,} texts, more than {limits.prompts:,}",
            "labels",
        )
    for at, template in enumerate(templates):
        if "{}" not in template:
            place = f"templates.{at}"
            raise ApiError(
                400, "invalid_template", f"{place}: has no {{}}, where the label goes", place
            )
    texts: list[str] = []
    room = limits.body_bytes  # for texts that a small request can make many and long
    for at, label in enumerate(asked.labels):
        with _told_as(f"labels.{at}"):
            reader.text(label)
            for template in templates:
                # Before it is made: a template may hold the label any number of times.
                length = len(template) + template.count("{}") * (len(label) - len("{}"))
                reader.check_length(length)
                room -= length
                if room < 0:
                    raise ApiError(
                        413,
                        "too_many_labels",
                        f"makes texts of more than {limits.body_bytes:,} characters together",
                    )
                texts.append(template.replace("{}", label))
    with _told_as("image"):
        image = await reader.picture(asked.image)
    card = served.card
    check_model(asked.model, card)
    seen, told = await together(
        (served.encode("image", [image.data]), served.encode("text", texts))
    )
    if seen.failures:
        raise ApiError(400, "broken_image", f"image: {seen.failures[0]}", "image")
    similarity = _classes(told.vectors, len(asked.labels)) @ seen.vectors[0]
    chances = _softmax(card.scale * similarity)
    order = sorted(range(len(chances)), key=lambda at: -chances[at])
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {
                    "object": "label",
                    "index": at,
                    "label": asked.labels[at],
                    "probability": float(chances[at]),
                    "similarity": float(similarity[at]),
                }
                for at in order
            ],
            **answered_by(card, seen.tokens + told.tokens),
        },
        headers=answer_headers(card, [seen, told]),
    )


def _classes(vectors: Vectors, labels: int) -> Vectors:
    """Of length one, [labels, D], from those of the prompts, [labels * templates, D].

    As `rwkv_clip.evaluation.class_embeddings`, without PyTorch and for vectors of length one. A
    label whose prompts cancel each other fits nothing: it gets zeros.
    """
    mean = vectors.reshape(labels, -1, vectors.shape[1]).mean(1)
    norm = np.linalg.norm(mean, axis=1, keepdims=True)
    classes: Vectors = np.divide(mean, norm, out=np.zeros_like(mean), where=norm > 0)
    return classes


def _softmax(logits: Vectors) -> Vectors:
    powers = np.exp(logits - logits.max())
    chances: Vectors = powers / powers.sum()
    return chances


@contextmanager
def _told_as(place: str) -> Iterator[None]:
    """Name the place in the request that an error is about."""
    try:
        yield
    except ApiError as error:
        raise ApiError(error.status, error.code, f"{place}: {error.message}", place) from None
