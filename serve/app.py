"""The application: an ingress that speaks OpenAI's language, and the two towers behind it.

rwkv-clip serve --config FILE
serve run serve.app:application config=FILE
"""

import asyncio
import io
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from rwkv_clip._version import __version__
from rwkv_clip.config import load_config
from serve.config import EncoderConfig, ServeFile
from serve.encoders import Encoded, Encoder, ModelCard, Tower
from serve.errors import ApiError
from serve.inputs import (
    EmbeddingsRequest,
    Picture,
    Text,
    encoded_vector,
    parse_request,
    read_item,
    request_items,
)
from serve.models import find_model

logger = logging.getLogger(__name__)

Handle = DeploymentHandle[Any]
Answer = Callable[[Request], Awaitable[Response]]
RETRY_SECONDS = 1


@serve.ingress()
class Ingress:
    """Reads requests, sends their items to the towers, and writes the answers.

    Args:
        config: of the endpoint.
        image, text: the towers.
    """

    def __init__(self, config: ServeFile, image: Handle, text: Handle) -> None:
        self.config = config.serve
        self.towers: dict[Tower, Handle] = {"image": image, "text": text}
        self.card: ModelCard | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The routes."""
        open_docs = self.config.docs
        app = FastAPI(
            title="RWKV-CLIP",
            version=__version__,
            docs_url="/docs" if open_docs else None,
            redoc_url=None,
            openapi_url="/openapi.json" if open_docs else None,
        )
        app.middleware("http")(self._around)
        app.add_exception_handler(HTTPException, _http_error)
        body = {"content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}}}
        app.post("/v1/embeddings", openapi_extra={"requestBody": {**body, "required": True}})(
            self.embeddings
        )
        app.get("/v1/models")(self.models)
        app.get("/healthz")(self.healthz)
        app.get("/readyz")(self.readyz)
        return app

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts and images."""
        asked = parse_request(await self._body(request))
        items = request_items(asked, self.config.limits)
        card = await self._ready()
        self._check_model(asked, card)
        data: list[dict[str, Any] | None] = [None] * len(items)
        failures: dict[int, ApiError] = {}
        sent: dict[Tower, list[tuple[int, bytes | str]]] = {"image": [], "text": []}
        for at, item in enumerate(items):
            try:
                read = read_item(item, self.config.limits)
            except ApiError as error:
                failures[at] = error
                continue
            tower, payload = _addressed(read)
            sent[tower].append((at, payload))
        _stop_at(failures, asked, len(items))
        towers = [tower for tower in self.towers if sent[tower]]
        answers: list[Encoded] = await asyncio.gather(
            *(self._encode(tower, [payload for _, payload in sent[tower]]) for tower in towers)
        )
        for tower, answer in zip(towers, answers, strict=True):
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
        _stop_at(failures, asked, len(items))
        for at, failure in failures.items():
            told = _about(at, failure, asked, len(items)).body()["error"]
            data[at] = {"object": "error", "index": at, "error": told}
        tokens = sum(answer.tokens for answer in answers)
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "model": card.name,
                "model_version": card.version,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
            headers=_timings(answers),
        )

    async def models(self) -> Response:
        """The served model."""
        card = await self._ready()
        told = {
            "id": card.name,
            "object": "model",
            "created": 0,
            "owned_by": "rwkv-clip",
            "version": card.version,
            "dimensions": card.dimensions,
        }
        return JSONResponse({"object": "list", "data": [told]})

    async def healthz(self) -> Response:
        """Whether this process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Whether both towers give embeddings."""
        card = await self._ready()
        text, image = await asyncio.gather(
            self._encode("text", ["ready"]), self._encode("image", [_dot()])
        )
        if not len(text.vectors) or not len(image.vectors):
            raise ApiError(503, "not_ready", "the model gives no embeddings; see the server's log")
        return JSONResponse({"status": "ready", "model": card.name, "model_version": card.version})

    async def _around(self, request: Request, answer: Answer) -> Response:
        """Every error in OpenAI's shape; Serve itself gives answers their x-request-id."""
        try:
            return await answer(request)
        except ApiError as error:
            return error_response(error)
        except Exception:
            number = request.headers.get("x-request-id", "without an id")
            # The trace names the place; inputs are in no message of ours.
            logger.exception("request %s failed", number)
            return error_response(
                ApiError(500, "internal", f"the server failed; its log has request {number}")
            )

    async def _body(self, request: Request) -> bytes:
        """The body; raises ApiError before it is read if it is too large or of another type."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        if kind.lower() != "application/json":
            raise ApiError(415, "not_json", "send JSON, with Content-Type: application/json")
        limit = self.config.limits.body_bytes
        too_large = ApiError(
            413, "body_too_large", f"the body has more than {limit:,} bytes; send several requests"
        )
        told = request.headers.get("content-length", "")
        if told.isdecimal() and int(told) > limit:
            raise too_large
        body = bytearray()
        async for block in request.stream():
            body += block
            if len(body) > limit:
                raise too_large
        return bytes(body)

    async def _ready(self) -> ModelCard:
        if self.card is None:
            self.card = await self._call("text", "describe")
        return self.card

    async def _encode(self, tower: Tower, items: Sequence[bytes | str]) -> Encoded:
        answer: Encoded = await self._call(tower, "encode", items)
        return answer

    async def _call(self, tower: Tower, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self.towers[tower], method).remote(*arguments)
        except BackPressureError:
            raise ApiError(
                429, "overloaded", "too many requests wait; send this one again later"
            ) from None
        except (DeploymentUnavailableError, RayServeException) as error:
            logger.warning("the %s tower is away: %s", tower, type(error).__name__)
            raise ApiError(
                503, "unavailable", f"the {tower} encoder is not there now; send it again later"
            ) from None

    def _check_model(self, asked: EmbeddingsRequest, card: ModelCard) -> None:
        if asked.model not in (None, "", card.name, f"{card.name}/{card.version}"):
            raise ApiError(
                404,
                "model_not_found",
                f"model: is not served here; {card.name!r} is, or leave it out",
                "model",
            )
        if asked.dimensions is not None and asked.dimensions > card.dimensions:
            raise ApiError(
                400,
                "too_many_dimensions",
                f"dimensions: is {asked.dimensions}, and the model has {card.dimensions}",
                "dimensions",
            )


def application(arguments: dict[str, str]) -> serve.Application:
    """The application for `serve run serve.app:application config=FILE`, and for Serve's files.

    Args:
        arguments: `config`, the run's file; other names are as `--set` takes them.
    """
    named = dict(arguments)
    file = named.pop("config", None)
    overrides = [f"{key}={value}" for key, value in named.items()]
    return build(load_config(ServeFile, Path(file) if file else None, overrides))


def build(config: ServeFile) -> serve.Application:
    """The application; raises ModelError if there is no model to serve."""
    place = find_model(config)
    image, text = (
        _deployment(tower, getattr(config.serve, tower)).bind(tower, config, place)
        for tower in ("image", "text")
    )
    ingress = config.serve.ingress
    deployment = serve.deployment(
        name="ingress",
        num_replicas=ingress.replicas,
        max_ongoing_requests=ingress.max_ongoing,
        ray_actor_options={"num_cpus": ingress.cpus},
    )(Ingress)
    return deployment.bind(config, image, text)


def _deployment(tower: str, config: EncoderConfig) -> serve.Deployment:
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas, max_replicas=config.max_replicas
            )
        }
    return serve.deployment(
        name=tower,
        max_ongoing_requests=config.max_ongoing,
        max_queued_requests=config.max_queued,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        **scaling,
    )(Encoder)


def error_response(error: ApiError) -> Response:
    """An error as an answer."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 (FastAPI's)
    """Unknown paths and methods in OpenAI's shape too."""
    status = getattr(error, "status_code", 500)
    told = f"{getattr(error, 'detail', 'error')}; /docs lists what there is"
    return error_response(ApiError(status, "not_found" if status == 404 else "bad_method", told))


def _addressed(item: Text | Picture) -> tuple[Tower, bytes | str]:
    return ("text", item.text) if isinstance(item, Text) else ("image", item.data)


def _about(at: int, error: ApiError, asked: EmbeddingsRequest, items: int) -> ApiError:
    single = items == 1 and not isinstance(asked.input, list)
    place = "input" if single else f"input.{at}"
    named = ApiError(error.status, error.code, f"{place}: {error.message}")
    return named.at(at, place)


def _stop_at(failures: dict[int, ApiError], asked: EmbeddingsRequest, items: int) -> None:
    """Raise the first bad item's error, unless each is to be told by itself."""
    if failures and asked.on_error == "request":
        first = min(failures)
        raise _about(first, failures[first], asked, items)


def _shortened(vector: Any, dimensions: int | None) -> Any:
    if dimensions is None or dimensions == len(vector):
        return vector
    cut = vector[:dimensions]
    return cut / max(float(np.linalg.norm(cut)), 1e-12)


def _timings(answers: Sequence[Encoded]) -> dict[str, str]:
    """Server-Timing, in milliseconds."""
    names = ("preprocess", "queue", "inference")
    slowest = {name: max((one.seconds[name] for one in answers), default=0.0) for name in names}
    return {"Server-Timing": ", ".join(f"{k};dur={1000 * v:.1f}" for k, v in slowest.items())}


def _dot() -> bytes:
    """A picture of one pixel."""
    out = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(out, "PNG")
    return out.getvalue()
