"""The deployments that hold a tower each, and put what comes at the same time into one batch."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from threadpoolctl import threadpool_limits

from rwkv_clip import image_transform, tokenize
from rwkv_clip.images import ImageDecodeError
from rwkv_clip.model.config import CLIPConfig
from rwkv_clip.transforms import ImageTransform
from serve.batching import Batcher, Done, Room
from serve.compute import Compute, Encode
from serve.config import EncoderConfig, ServeFile
from serve.messages import (
    REPORT_SECONDS,
    Elsewhere,
    Encoded,
    ModelCard,
    ModelPlace,
    Orders,
    Report,
    Tower,
    Vectors,
)
from serve.metrics import TowerMetrics
from serve.models import check_vectors, load_model
from serve.registry import ModelError
from serve.succession import Director
from serve.together import together

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 4  # that may be decoded and wait for the model
_OF_A_REQUEST = 2  # of these: one is decoded while the model has the other
_SHORT = 2000  # characters that are tokenized sooner than a thread is woken
_PIECE = 10_000  # characters that are tokenized in one go, which nothing ends before it is done


@dataclass(frozen=True, eq=False)
class Held:
    """A model in memory, that has shown that it works."""

    place: ModelPlace
    card: ModelCard
    config: CLIPConfig
    encode: Encode
    transform: ImageTransform


class Turns:
    """What a request may have under way at once, so that others' work comes between its own.

    What waits for room or a thread is served in the order in which it came: a request that put all
    that it has there would make everyone else wait for the whole of it.

    Attributes:
        batch: is held for each batch.
        image: is held for each image while it is decoded.
    """

    def __init__(self, threads: int) -> None:
        self.batch = asyncio.Semaphore(_OF_A_REQUEST)
        # One more, so that a request alone keeps all threads busy.
        self.image = asyncio.Semaphore(threads + 1)


class Encoder:
    """One tower of the models that are served now.

    Args:
        tower: which.
        config: of the endpoint.
        director: says which models those are.

    Raises:
        ModelError: there is none that can be served.
        ValueError: it is to be on a GPU, and there is none.
    """

    async def __init__(  # type: ignore[misc]
        self, tower: Tower, config: ServeFile, director: DeploymentHandle[Director]
    ) -> None:
        self.tower, self.config, self.director = tower, config, director
        settings: EncoderConfig = getattr(config.serve, tower)
        self.batch = settings.batch
        self.compute = Compute(tower, settings)
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.threads = settings.decode_threads
        self.workers = ThreadPoolExecutor(self.threads, "preprocess", initializer=_work_alone)
        self.loader = ThreadPoolExecutor(1, "load", initializer=_work_alone)
        self.metrics = TowerMetrics(tower)
        self.batcher = Batcher(
            self._forward, settings.batch, self._observe, self.compute.take_threads
        )
        self.room = Room(_BATCHES_AHEAD * settings.batch)
        self.held: dict[ModelPlace, Held] = {}
        self.refused: dict[ModelPlace, str] = {}
        orders: Orders = await director.orders.remote(Report(tower, self.replica))
        self.serving = orders.current
        await self._begin(orders)
        self.follower = asyncio.create_task(self._follow())

    async def _begin(self, orders: Orders) -> None:
        """Load the model that is served, or where its files are gone the one that comes next.

        Raises:
            ModelError: there is neither.
        """
        why: ModelError | None = None
        for place in orders.hold:
            try:
                self.held[place] = await self._load(place)
                return
            except ModelError as error:
                why = why or error
        if why is not None:
            raise why

    async def describe(self, place: ModelPlace) -> ModelCard | Elsewhere:
        """What a model is."""
        held = self.held.get(place)
        return Elsewhere(self.serving) if held is None else held.card

    async def encode(self, items: Sequence[bytes | str], place: ModelPlace) -> Encoded | Elsewhere:
        """Embed encoded images, or texts, by one model; an item that is broken costs no other."""
        held = self.held.get(place)
        if held is None:
            return Elsewhere(self.serving)
        starts = range(0, len(items), self.batch)
        turns = Turns(self.threads)
        # By then whoever asked has given up, which Serve tells only of a client that has left.
        async with asyncio.timeout(self.config.serve.request_seconds):
            parts = await together(
                self._part(held, items[at : at + self.batch], turns) for at in starts
            )
        vectors = [part.vectors for part in parts]
        seconds = {
            "preprocess": sum(part.seconds["preprocess"] for part in parts),
            "queue": max((part.seconds["queue"] for part in parts), default=0.0),
            "inference": sum(part.seconds["inference"] for part in parts),
        }
        self.metrics.request(held.card.version, seconds["preprocess"], seconds["queue"])
        return Encoded(
            np.concatenate(vectors) if vectors else np.empty((0, held.card.dimensions), np.float32),
            [at + one for at, part in zip(starts, parts, strict=True) for one in part.indices],
            {
                at + one: told
                for at, part in zip(starts, parts, strict=True)
                for one, told in part.failures.items()
            },
            sum(part.tokens for part in parts),
            seconds,
        )

    async def check_health(self) -> None:
        """Fail where this replica takes no orders or computes no more; Serve then replaces it."""
        if self.follower.done():
            raise RuntimeError("this replica no longer follows the director")
        if self.compute.broken is not None:
            raise RuntimeError(
                f"the GPU computes nothing more in this process: {self.compute.broken}"
            )

    async def _part(self, held: Held, items: Sequence[bytes | str], turns: Turns) -> Encoded:
        """At most a batch of items."""
        async with turns.batch, self.room.of(len(items)):
            began = time.monotonic()
            read = await self._read(held, items, turns)
            inputs = [one for one in read if isinstance(one, torch.Tensor)]
            preprocessed = time.monotonic() - began
            if inputs:
                done = await self.batcher(held, torch.stack(inputs))
            else:
                empty = np.empty((0, held.card.dimensions), np.float32)
                done = Done(empty, waited=0.0, took=0.0)
        return Encoded(
            done.vectors,
            [at for at, one in enumerate(read) if isinstance(one, torch.Tensor)],
            {
                at: f"is an image that {one.reason}"
                for at, one in enumerate(read)
                if isinstance(one, ImageDecodeError)
            },
            self._units(held, inputs),
            {"preprocess": preprocessed, "queue": done.waited, "inference": done.took},
        )

    async def _read(
        self, held: Held, items: Sequence[bytes | str], turns: Turns
    ) -> list[torch.Tensor | ImageDecodeError]:
        """Pixels of images, some side by side, or tokens of texts, some at a time."""
        run = asyncio.get_running_loop().run_in_executor

        async def pixels(image: bytes) -> torch.Tensor | ImageDecodeError:
            async with turns.image:
                return await run(self.workers, _pixels, held, image)

        images = [item for item in items if isinstance(item, bytes)]
        if images:
            return await together(map(pixels, images))
        texts = [item for item in items if isinstance(item, str)]
        length = held.config.context_length
        if sum(map(len, texts)) <= _SHORT:
            return list(tokenize(texts, length))
        rows: list[torch.Tensor | ImageDecodeError] = []
        for piece in _pieces(texts):
            rows += await run(self.workers, tokenize, piece, length)
        return rows

    def _units(self, held: Held, inputs: Sequence[torch.Tensor]) -> int:
        """Tokens of texts with their two marks, or patches of images."""
        if self.tower == "image":
            return len(inputs) * int(held.config.image.grid) ** 2
        return sum(int(one.argmax()) + 1 for one in inputs)  # the end mark is the largest

    def _forward(self, held: Held, inputs: torch.Tensor) -> Vectors:
        vectors = self.compute.run(held.encode, inputs)
        check_vectors(vectors, held.card.dimensions, self.tower)
        return vectors

    def _observe(self, held: Held, items: int, seconds: float) -> None:
        self.metrics.batch(held.card.version, items, seconds)

    async def _follow(self) -> None:
        """Report to the director, and do as it says, for as long as this replica lives."""
        loading: asyncio.Task[None] | None = None
        away = False
        while True:
            report = Report(
                self.tower,
                self.replica,
                self.serving,
                tuple(self.held),
                tuple(self.refused.items()),
            )
            try:
                orders: Orders = await self.director.orders.remote(report)
                away = False
            except (RayServeException, RayError) as error:
                if not away:
                    logger.warning("the director is away: %s", type(error).__name__)
                away = True
            else:
                if orders.current in self.held:
                    self.serving = orders.current
                missing = self._forget_but(orders)
                if missing and (loading is None or loading.done()):
                    loading = asyncio.create_task(self._take(missing[0]))
            await asyncio.sleep(REPORT_SECONDS)

    def _forget_but(self, orders: Orders) -> list[ModelPlace]:
        """Let go of models that are not wanted; those that are wanted and not held."""
        kept = {*orders.hold, self.serving}
        self.held = {place: held for place, held in self.held.items() if place in kept}
        self.refused = {place: why for place, why in self.refused.items() if place in kept}
        return [place for place in orders.hold if place not in {*self.held, *self.refused}]

    async def _take(self, place: ModelPlace) -> None:
        try:
            self.held[place] = await self._load(place)
        except ModelError as error:
            self.refused[place] = str(error)
        except Exception as error:  # memory that does not suffice, and whatever else may befall
            logger.exception("version %s cannot be taken", place.version)
            self.refused[place] = f"cannot be loaded ({type(error).__name__}); see the log"

    async def _load(self, place: ModelPlace) -> Held:
        """Load and warm a model beside those that serve; raises ModelError."""
        return await asyncio.get_running_loop().run_in_executor(self.loader, self._loaded, place)

    def _loaded(self, place: ModelPlace) -> Held:
        model, digest = load_model(place, self.config.s3())
        served = self.held.get(self.serving)
        if served and served.card.dimensions != model.config.embed_dim:
            raise ModelError(
                f"its embeddings have {model.config.embed_dim} numbers, and clients keep those of "
                f"{served.card.dimensions}; start another server for it"
            )
        encode = self.compute.ready(model)
        card = ModelCard(
            place.name,
            place.version,
            digest,
            model.config.embed_dim,
            float(model.logit_scale.detach().exp()),
        )
        # Phones keep photographs as the sensor lies, with a tag that says how to turn them.
        transform = image_transform(
            model.config, exif_orientation=True, max_pixels=self.config.serve.limits.image_pixels
        )
        return Held(place, card, model.config, encode, transform)


def _work_alone() -> None:
    """Keep OpenMP from giving this thread helpers: they are the model's.

    As soon as a process has more of them than there are cores, they all sleep between any two steps
    of the work, and a call of the model takes a third longer.
    """
    torch.get_num_threads()  # PyTorch sets a thread's number when it is asked first, and not again
    threadpool_limits(1, user_api="openmp")


def _pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in order, as many together as have `_PIECE` characters, and a longer one alone."""
    piece: list[str] = []
    characters = 0
    for text in texts:
        if piece and characters + len(text) > _PIECE:
            yield piece
            piece, characters = [], 0
        piece.append(text)
        characters += len(text)
    yield piece


def _pixels(held: Held, image: bytes) -> torch.Tensor | ImageDecodeError:
    try:
        return held.transform(image)
    except ImageDecodeError as error:
        return error
