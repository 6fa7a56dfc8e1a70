"""What `/openapi.json` says.

The routes read their bodies by themselves, so that what a body holds is bounded while it comes.
FastAPI therefore knows nothing of them, and the document is put together here: bodies by the shapes
that read them, answers by shapes that only tests compare with what is sent.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from serve.classification import ClassifyRequest
from serve.inputs import EmbeddingsRequest
from serve.searching import SearchRequest

_PLACE = "#/components/schemas/{model}"
_JSON = "application/json"


class Failure(BaseModel):
    """Why there is no answer."""

    message: str
    type: str
    param: str | None = Field(description="the place in the request")
    code: str = Field(description="a word that programs tell errors by")
    index: int | None = Field(None, description="of the item, in a request with several")


class ErrorAnswer(BaseModel):
    """Every error."""

    error: Failure


class Usage(BaseModel):
    """What was counted."""

    prompt_tokens: int
    total_tokens: int


class ModelAnswer(BaseModel):
    """By whom an answer is."""

    model: str
    model_version: str
    usage: Usage


class Embedding(BaseModel):
    """An item's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="a text is the base64 of float32 numbers")


class BadItem(BaseModel):
    """An item that could not be embedded, where on_error is item."""

    object: Literal["error"]
    index: int
    error: Failure


class EmbeddingsAnswer(ModelAnswer):
    """Vectors in the order of the items."""

    object: Literal["list"]
    data: list[Embedding | BadItem]


class Label(BaseModel):
    """How well a label fits."""

    object: Literal["label"]
    index: int = Field(description="among the request's labels")
    label: str
    probability: float
    similarity: float


class ClassifyAnswer(ModelAnswer):
    """Labels, the likeliest first."""

    object: Literal["list"]
    data: list[Label]


class Result(BaseModel):
    """A pair that was found."""

    object: Literal["result"]
    index: int
    id: str
    score: float
    text: str | None
    image: str | None = Field(None, description="data:image/jpeg;base64,…, with with_images")


class SearchAnswer(ModelAnswer):
    """Pairs, the nearest first."""

    object: Literal["list"]
    data: list[Result]


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: str
    dimensions: int = Field(description="of an embedding")


class Models(BaseModel):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """This process answers."""

    status: Literal["ok"]


class Refusal(BaseModel):
    """A version that was not taken."""

    model_version: str
    reason: str


class Ready(BaseModel):
    """The towers give embeddings, or did and are busy."""

    status: Literal["ready", "busy"]
    model: str | None = None
    model_version: str | None = None
    loading: str | None = Field(None, description="the version that comes")
    refused: list[Refusal] | None = Field(None, description="told to whoever has a key")
    trouble: str | None = Field(None, description="told to whoever has a key")


@dataclass(frozen=True)
class Operation:
    """What may be asked for at a path.

    Attributes:
        path: of the route.
        summary: of it.
        answer: its shape; None for a text.
        body: the request's shape; None where there is none, which is asked for by GET.
        errors: statuses that it may answer with, besides those of all paths under /v1.
    """

    path: str
    summary: str
    answer: type[BaseModel] | None
    body: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()


_OF_BODIES = (400, 404, 408, 413, 415)
_OF_V1 = (429, 500, 503)
_ERRORS = {
    400: "The request, or an item of it, cannot be read",
    401: "No key of this server was shown",
    404: "It is not served here",
    408: "The body has not come in time",
    413: "The request asks for more than may be asked for",
    415: "The body, or an image in it, is of a type that is not taken",
    429: "Too much is under way; Retry-After says when to send it again",
    500: "The server failed",
    503: "The server cannot answer now; Retry-After says when to send it again",
}
_OPERATIONS = (
    Operation(
        "/v1/embeddings", "Vectors of texts and images",
        EmbeddingsAnswer, EmbeddingsRequest, _OF_BODIES,
    ),
    Operation(
        "/v1/classify", "How well each label fits an image",
        ClassifyAnswer, ClassifyRequest, _OF_BODIES,
    ),
    Operation(
        "/v1/search", "The pairs with the nearest images",
        SearchAnswer, SearchRequest, _OF_BODIES,
    ),
    Operation("/v1/models", "The served model", Models),
    Operation("/v1/models/{model}", "The served model by its name", Model, errors=(404,)),
    Operation("/healthz", "Whether this process answers", Health),
    Operation(
        "/readyz", "Whether both towers give embeddings", Ready, errors=(429, 500, 503)
    ),
    Operation("/metrics", "Numbers for Prometheus", None, errors=(500, 503)),
)  # fmt: skip


def document(version: str, keyed: bool, closed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The endpoint in OpenAPI's terms.

    Args:
        version: of this software.
        keyed: whether clients need a key.
        closed: paths that are not there.
    """
    operations = [one for one in _OPERATIONS if one.path not in closed]
    shapes: list[type[BaseModel]] = [ErrorAnswer]
    shapes += [one for each in operations for one in (each.answer, each.body) if one]
    _, defined = models_json_schema(
        [(shape, "validation") for shape in shapes], ref_template=_PLACE
    )
    components: dict[str, Any] = {"schemas": defined["$defs"]}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "RWKV-CLIP", "version": version},
        "paths": {
            one.path: {"post" if one.body else "get": _described(one, keyed)} for one in operations
        },
        "components": components,
    }


def _described(one: Operation, keyed: bool) -> dict[str, Any]:
    errors = {*one.errors}
    told: dict[str, Any] = {"summary": one.summary}
    if one.path.startswith("/v1/"):
        errors |= {*_OF_V1, *([401] if keyed else [])}
        if keyed:
            told["security"] = [{"key": []}]
    if "{model}" in one.path:
        told["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if one.body:
        told["requestBody"] = {"content": _content(one.body), "required": True}
    content = _content(one.answer) if one.answer else {"text/plain": {"schema": {"type": "string"}}}
    told["responses"] = {
        "200": {"description": one.summary, "content": content},
        **{
            str(status): {"description": _ERRORS[status], "content": _content(ErrorAnswer)}
            for status in sorted(errors)
        },
    }
    return told


def _content(shape: type[BaseModel]) -> dict[str, Any]:
    return {_JSON: {"schema": {"$ref": _PLACE.format(model=_name(shape))}}}


def _name(shape: type[BaseModel]) -> str:
    return shape.__name__
