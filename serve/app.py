"""The application: an ingress that speaks OpenAI's language, and the two towers behind it.

`rwkv-clip serve --config FILE` runs it, and so does `serve run serve.app:application config=FILE`.
"""

import asyncio
import io
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from PIL import Image
from ray import serve
from ray.serve.config import AutoscalingConfig
from starlette.exceptions import HTTPException

from rwkv_clip._version import __version__
from rwkv_clip.config import load_config
from serve.classification import ClassifyRequest, classify
from serve.config import EncoderConfig, ServeFile
from serve.embeddings import embeddings
from serve.encoders import Encoder
from serve.errors import ApiError
from serve.index import Index, IndexFiles, find_index
from serve.inputs import EmbeddingsRequest, parse_request
from serve.keys import Keys
from serve.models import find_model
from serve.searching import Searcher, SearchRequest
from serve.towers import Handle, Towers

logger = logging.getLogger(__name__)

Answer = Callable[[Request], Awaitable[Response]]
RETRY_SECONDS = 1
PAGE = Path(__file__).parent / "page"
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@serve.ingress()
class Ingress:
    """Reads requests, sends their items to the towers, and writes the answers.

    Args:
        config: of the endpoint.
        image, text: the towers.
        files: that are searched, if there are any.
        index: that searches them.
    """

    def __init__(
        self,
        config: ServeFile,
        image: Handle,
        text: Handle,
        files: IndexFiles | None,
        index: Handle | None,
    ) -> None:
        self.config = config.serve
        self.searcher = Searcher(files, index)
        self.towers = Towers(image, text)
        self.keys = Keys()

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
        for path, shape, method in (
            ("/v1/embeddings", EmbeddingsRequest, self.embeddings),
            ("/v1/classify", ClassifyRequest, self.classify),
            ("/v1/search", SearchRequest, self.search),
        ):
            content = {"application/json": {"schema": shape.model_json_schema()}}
            told = {"requestBody": {"content": content, "required": True}}
            app.post(path, openapi_extra=told)(method)
        app.get("/", include_in_schema=False)(_page)
        app.mount("/page", StaticFiles(directory=PAGE))
        app.get("/v1/models")(self.models)
        app.get("/healthz")(self.healthz)
        app.get("/readyz")(self.readyz)
        return app

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts and images."""
        asked = parse_request(EmbeddingsRequest, await self._body(request))
        return await embeddings(asked, self.towers, self.config.limits)

    async def classify(self, request: Request) -> Response:
        """How well each label fits an image."""
        asked = parse_request(ClassifyRequest, await self._body(request))
        return await classify(asked, self.towers, self.config.limits)

    async def search(self, request: Request) -> Response:
        """The pairs whose images are nearest to a text or an image."""
        asked = parse_request(SearchRequest, await self._body(request))
        return await self.searcher.search(asked, self.towers, self.config.limits)

    async def models(self) -> Response:
        """The served model."""
        card = await self.towers.card()
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
        card = await self.towers.card()
        text, image = await asyncio.gather(
            self.towers.encode("text", ["ready"]), self.towers.encode("image", [_dot()])
        )
        if not len(text.vectors) or not len(image.vectors):
            raise ApiError(503, "not_ready", "the model gives no embeddings; see the server's log")
        return JSONResponse({"status": "ready", "model": card.name, "model_version": card.version})

    async def _around(self, request: Request, answer: Answer) -> Response:
        """Every error in OpenAI's shape; Serve itself gives answers their x-request-id."""
        try:
            if request.url.path.startswith("/v1"):
                self.keys.check(request.headers.get("authorization"))
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
    """The application.

    Raises:
        ModelError: there is no model to serve.
        SearchError: what is to be searched cannot be read.
        ValueError: there are to be keys, and there are none.
    """
    Keys()
    place = find_model(config)
    files = find_index(config)
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
    index = _index(files).bind(files) if files is not None else None
    return deployment.bind(config, image, text, files, index)


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


def _index(files: IndexFiles) -> serve.Deployment:
    settings = files.settings
    return serve.deployment(
        name="index",
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        ray_actor_options={"num_cpus": settings.cpus},
    )(Index)


async def _page() -> Response:
    """The search page; what it loads comes from here alone."""
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _CONTENT_POLICY})


def error_response(error: ApiError) -> Response:
    """An error as an answer."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 (FastAPI's)
    """Unknown paths and methods in OpenAI's shape too."""
    status = getattr(error, "status_code", 500)
    told = f"{getattr(error, 'detail', 'error')}; /docs lists what there is"
    return error_response(ApiError(status, "not_found" if status == 404 else "bad_method", told))


def _dot() -> bytes:
    """A picture of one pixel."""
    out = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(out, "PNG")
    return out.getvalue()
