"""The ingress: the deployment that speaks OpenAI's language.

It holds no model, and so it loads neither PyTorch nor MLflow: it starts soon, and is small.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from ray import serve
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rwkv_clip._version import __version__
from rwkv_clip.memory import give_back_freed_memory
from serve.bodies import Bodies
from serve.classification import ClassifyRequest, classify
from serve.config import ServeFile
from serve.embeddings import embeddings
from serve.errors import ApiError
from serve.inputs import EmbeddingsRequest, Reader, Shape, parse_request
from serve.keys import VARIABLE, Keys
from serve.messages import ModelCard
from serve.metrics import LEFT, OTHER_ROUTE, RequestMetrics, gathered
from serve.openapi import document
from serve.readiness import Readiness
from serve.remote import Fetcher
from serve.searching import Searcher, SearchRequest
from serve.towers import Handle, Served, Towers, check_model

logger = logging.getLogger(__name__)

Answer = Callable[[Request], Awaitable[Response]]
Work = Callable[[Any, Served, Reader], Awaitable[Response]]
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
        director: says which model is served.
        image, text: the towers.
        index: that searches, if there is anything to be searched.
        keyed: whether clients need a key.

    Raises:
        ValueError: they do, and this node's environment has none.
    """

    def __init__(
        self,
        config: ServeFile,
        director: Handle,
        image: Handle,
        text: Handle,
        index: Handle | None,
        keyed: bool,
    ) -> None:
        give_back_freed_memory()  # that of bodies
        self.config = config.serve
        limits, remote = self.config.limits, self.config.remote
        self.ongoing = 0
        self.towers = Towers(director, image, text, lambda: self.ongoing)
        self.searcher = Searcher(self.config.search, index)
        self.fetcher = Fetcher(remote, limits.image_bytes) if remote else None
        self.bodies = Bodies(limits.body_bytes, limits.bodies_bytes)
        self.keys = Keys()
        if keyed and not self.keys.needed:
            raise ValueError(
                f"{VARIABLE} is set where the endpoint was started, and not on this node, whose "
                "replica would take requests without a key; set it for `ray start` on every node"
            )
        self.metrics = RequestMetrics()
        self.readiness = Readiness(self.towers, self.config.request_seconds)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The routes."""
        open_docs = self.config.docs
        app = FastAPI(
            title="RWKV-CLIP",
            version=__version__,
            docs_url="/docs" if open_docs else None,
            redoc_url=None,
            openapi_url="/openapi.json" if open_docs else None,
            # A redirection names http:// behind a proxy that ends TLS.
            redirect_slashes=False,
        )
        app.openapi_schema = document(
            __version__, self.keys.needed, () if self.config.metrics else ("/metrics",)
        )
        app.add_exception_handler(HTTPException, self._http_error)
        for route, shape, work in (
            ("/v1/embeddings", EmbeddingsRequest, embeddings),
            ("/v1/classify", ClassifyRequest, classify),
            ("/v1/search", SearchRequest, self.searcher.search),
        ):
            _add_route(app, route, self._v1(route, shape, work), "POST")
        asked_for: dict[str, Answer] = {
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.model,
            "/healthz": self.healthz,
            "/readyz": self.readyz,
        }
        if self.config.metrics:
            asked_for["/metrics"] = self.tell_metrics
        for route, answer in asked_for.items():
            _add_route(app, route, self._answering(route, answer), "GET")  # and HEAD with it
        app.add_route("/", _page, ["GET"])
        app.mount("/page", StaticFiles(directory=PAGE))
        return app

    async def models(self, _: Request) -> Response:
        """The served model, as the only one of a list."""

        async def tell(served: Served) -> Response:
            return JSONResponse({"object": "list", "data": [_told(served.card)]})

        return await self.towers.through_one_model(tell)

    async def model(self, request: Request) -> Response:
        """The served model by its name; raises ApiError for another's."""
        asked = request.path_params["model"]

        async def tell(served: Served) -> Response:
            check_model(asked, served.card)
            return JSONResponse(_told(served.card))

        return await self.towers.through_one_model(tell)

    async def healthz(self, _: Request) -> Response:
        """Whether this process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """Whether both towers give embeddings, or did and are busy, and how the model stands."""
        self._check_ending()
        card = await self.readiness.card()
        self._check_ending()  # which may have come meanwhile
        if card is None:
            return JSONResponse({"status": "busy"})
        standing = await self.towers.standing()
        told: dict[str, Any] = {
            "status": "ready",
            "model": card.name,
            "model_version": card.version,
        }
        if standing.coming is not None:
            told["loading"] = standing.coming.version
        # Probes have no key, and the reasons may name hosts and files.
        if self.keys.good(request.headers.get("authorization")):
            if standing.refused:
                told["refused"] = [
                    {"model_version": version, "reason": reason}
                    for version, reason in standing.refused
                ]
            if standing.trouble is not None:
                told["trouble"] = standing.trouble
        return JSONResponse(told)

    async def tell_metrics(self, _: Request) -> Response:
        """All nodes' numbers."""
        return PlainTextResponse(await gathered(), media_type="text/plain; version=0.0.4")

    def _v1(self, route: str, shape: type[Shape], work: Work) -> Answer:
        """A route that takes a JSON object, and answers by one model."""

        async def answer(request: Request) -> Response:
            _check_encoding(request)
            request.state.coming = True
            async with self.bodies.read(request) as body:
                request.state.coming = False
                _check_sent(request, body.content)
                asked = parse_request(shape, body.content)
                body.content = b""  # read, and the request is held until its answer
                reader = Reader(self.config.limits, self.fetcher, body.count)
                return await self.towers.through_one_model(
                    lambda served: work(asked, served, reader)
                )

        return self._answering(route, answer)

    def _answering(self, route: str, answer: Answer) -> Answer:
        """A route with keys, a limit of time, numbers, and every error in OpenAI's shape."""

        async def answering(request: Request) -> Response:
            began = time.monotonic()
            self.ongoing += 1
            try:
                response = await self._admitted(request, route, answer)
            except ApiError as error:
                response = error_response(error)
            except asyncio.CancelledError:  # as Serve tells that the client has left
                self.metrics.count(route, LEFT)
                raise
            except ClientDisconnect:  # as Starlette does, where the body was still coming
                self.metrics.count(route, LEFT)
                return Response()  # nobody gets it
            except Exception:
                number = request.headers.get("x-request-id", "without an id")
                # The trace names the place; inputs are in no message of ours.
                logger.exception("request %s failed", number)
                response = error_response(
                    ApiError(500, "internal", f"the server failed; its log has request {number}")
                )
            finally:
                self.ongoing -= 1
            version = response.headers.get("x-model-version", "")
            seconds = time.monotonic() - began
            self.metrics.answered(route, response.status_code, version, seconds)
            return response

        return answering

    async def _admitted(self, request: Request, route: str, answer: Answer) -> Response:
        # The route, not the address: that begins with whatever the application is served under.
        if route.startswith("/v1/"):
            self.keys.check(request.headers.get("authorization"))
            self._check_ending()
            if self.ongoing > self.config.ingress.max_ongoing:
                raise ApiError(
                    429, "overloaded", "too many requests are under way; send this one again later"
                )
        try:
            async with asyncio.timeout(self.config.request_seconds):
                return await answer(request)
        except TimeoutError:
            raise _late(request, self.config.request_seconds) from None

    def _check_ending(self) -> None:
        """Raise ApiError where no more requests are taken."""
        if self.towers.ending:
            raise ApiError(503, "ending", "this server is being ended; ask another one")

    async def _http_error(self, request: Request, error: Exception) -> Response:  # noqa: ARG002
        """Unknown paths and methods in OpenAI's shape too."""
        status = getattr(error, "status_code", 500)
        # Files of the page are the only ones that do not say what may be done with them.
        headers = {"Allow": "GET, HEAD"} if status == 405 else {}
        headers |= getattr(error, "headers", None) or {}
        told = getattr(error, "detail", "error")
        if self.config.docs:
            told += "; /docs lists what there is"
        self.metrics.count(OTHER_ROUTE, status)
        code = "not_found" if status == 404 else "bad_method"
        return error_response(ApiError(status, code, told), headers)


def _add_route(app: FastAPI, route: str, answer: Answer, method: str) -> None:
    """Answer at an address, and with a slash at its end."""
    for path in (f"{route}/", route):  # in this order: a name of any path takes a slash too
        app.add_route(path, answer, [method])


def _told(card: ModelCard) -> dict[str, Any]:
    """A model as OpenAI's clients read it."""
    return {
        "id": card.name,
        "object": "model",
        "created": 0,
        "owned_by": "rwkv-clip",
        "version": card.version,
        "dimensions": card.dimensions,
    }


def _check_encoding(request: Request) -> None:
    """Raise ApiError for a body that would have to be unpacked, to nobody knows what size."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(
            415,
            "encoded_body",
            "Content-Encoding: bodies are taken as they are alone; send it without compression",
        )


def _check_sent(request: Request, content: bytes) -> None:
    """Raise ApiError for a body that Serve's proxy has lost.

    It leaves what comes with an offer to speak HTTP/2 to whoever takes the offer, and nobody does.
    """
    if not content and "upgrade" in request.headers:
        raise ApiError(
            400,
            "lost_body",
            "Upgrade: the body was lost with this header; have the client speak HTTP/1.1 alone, as "
            "Java's does with version(HTTP_1_1)",
        )


def _late(request: Request, seconds: float) -> ApiError:
    """Why there is no answer in time."""
    if getattr(request.state, "coming", False):
        return ApiError(
            408, "slow_body", f"the body has not come within {seconds:g} seconds; send it faster"
        )
    return ApiError(
        503,
        "timeout",
        f"there is no answer within {seconds:g} seconds; send fewer items, or send it again later",
    )


async def _page(_: Request) -> Response:
    """The search page; what it loads comes from here alone."""
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _CONTENT_POLICY})


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """An error as an answer."""
    told = {**(headers or {})}
    if error.status in (429, 503):
        told["Retry-After"] = str(RETRY_SECONDS)
    elif error.status == 401:
        told["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, told)
