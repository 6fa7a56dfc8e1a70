"""The deployments that hold a tower each, and put what comes at the same time into one batch."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from ray import serve

from rwkv_clip import image_transform, tokenize
from rwkv_clip.transforms import ImageDecodeError
from serve.config import EncoderConfig, ServeFile
from serve.models import ModelPlace, check_model, check_vectors, load_model

Tower = Literal["image", "text"]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModelCard:
    """What a served model is.

    Attributes:
        name, version: as in `ModelPlace`.
        digest: SHA-256 of its weights' file.
        dimensions: of an embedding.
        scale: that similarities are multiplied by before a softmax.
    """

    name: str
    version: str
    digest: str
    dimensions: int
    scale: float


@dataclass(frozen=True)
class Encoded:
    """What a tower made of a request's items.

    Attributes:
        vectors: [n, D], of the items that could be read.
        indices: of these n among the items that were sent.
        failures: messages by the index of each other item.
        tokens: that went through the tower, for `usage`.
        model: that made the vectors.
        seconds: of `preprocess`, `queue` and `inference`.
    """

    vectors: Vectors
    indices: list[int]
    failures: dict[int, str]
    tokens: int
    model: ModelCard
    seconds: dict[str, float]


@dataclass
class _Ready:
    """Items of one request on their way into a batch."""

    inputs: torch.Tensor
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Done:
    vectors: Vectors
    waited: float
    took: float


class Encoder:
    """One tower of one model.

    Args:
        tower: which.
        config: of the endpoint.
        place: of the model.
    """

    def __init__(self, tower: Tower, config: ServeFile, place: ModelPlace) -> None:
        self.tower = tower
        settings: EncoderConfig = getattr(config.serve, tower)
        self.device = torch.device("cuda" if settings.gpus and torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(settings.threads)
        loaded, digest = load_model(place, config.s3())
        self.model = model = loaded.to(self.device)
        check_model(model)
        scale = float(model.logit_scale.exp())
        self.card = ModelCard(place.name, place.version, digest, model.config.embed_dim, scale)
        self.batch = settings.batch
        self.workers = ThreadPoolExecutor(settings.decode_threads, "preprocess")
        self.runner = ThreadPoolExecutor(1, "model")  # which keeps the event loop free
        # Phones keep photographs as the sensor lies, with a tag that says how to turn them.
        self.transform = image_transform(
            model.config, exif_orientation=True, max_pixels=config.serve.limits.image_pixels
        )
        self._infer.set_max_batch_size(settings.batch)  # type: ignore[attr-defined]
        self._infer.set_batch_wait_timeout_s(settings.batch_wait_seconds)  # type: ignore[attr-defined]

    async def describe(self) -> ModelCard:
        """The model that answers."""
        return self.card

    async def encode(self, items: Sequence[bytes | str]) -> Encoded:
        """Embed encoded images, or texts; an item that cannot be read costs no other."""
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        read = await asyncio.gather(
            *(loop.run_in_executor(self.workers, self._read, item) for item in items)
        )
        inputs = [one for one in read if isinstance(one, torch.Tensor)]
        indices = [at for at, one in enumerate(read) if isinstance(one, torch.Tensor)]
        failures = {
            at: f"is an image that {one.reason}"
            for at, one in enumerate(read)
            if isinstance(one, ImageDecodeError)
        }
        preprocessed = time.monotonic() - started
        pieces = [inputs[at : at + self.batch] for at in range(0, len(inputs), self.batch)]
        done: list[_Done] = await asyncio.gather(
            *(self._infer(_Ready(torch.stack(piece))) for piece in pieces)
        )
        dimensions = self.card.dimensions
        vectors = [one.vectors for one in done] or [np.empty((0, dimensions), np.float32)]
        return Encoded(
            np.concatenate(vectors),
            indices,
            failures,
            self._units(inputs),
            self.card,
            {
                "preprocess": preprocessed,
                "queue": max((one.waited for one in done), default=0.0),
                "inference": sum(one.took for one in done),
            },
        )

    async def check_health(self) -> None:
        """Fail where the thread that runs the model is no more; Serve then replaces the replica."""
        await asyncio.get_running_loop().run_in_executor(self.workers, bool)

    def _read(self, item: bytes | str) -> torch.Tensor | ImageDecodeError:
        if isinstance(item, str):
            return tokenize([item], self.model.config.context_length)[0]
        try:
            return self.transform(item)
        except ImageDecodeError as error:
            return error

    def _units(self, inputs: Sequence[torch.Tensor]) -> int:
        """Tokens of texts with their two marks, or patches of images."""
        if self.tower == "image":
            return len(inputs) * int(self.model.config.image.grid) ** 2
        return sum(int(one.argmax()) + 1 for one in inputs)  # the end mark is the largest

    @serve.batch(batch_size_fn=lambda waiting: sum(len(one.inputs) for one in waiting))
    async def _infer(self, waiting: list[_Ready]) -> list[_Done]:
        waited = [time.monotonic() - one.since for one in waiting]
        inputs = torch.cat([one.inputs for one in waiting])
        started = time.monotonic()
        run = partial(self._forward, inputs)
        vectors = await asyncio.get_running_loop().run_in_executor(self.runner, run)
        took = time.monotonic() - started
        parts = np.split(vectors, np.cumsum([len(one.inputs) for one in waiting])[:-1])
        return [_Done(part, wait, took) for part, wait in zip(parts, waited, strict=True)]

    @torch.inference_mode()
    def _forward(self, inputs: torch.Tensor) -> Vectors:
        inputs = inputs.to(self.device)
        encode = self.model.encode_image if self.tower == "image" else self.model.encode_text
        vectors: Vectors = encode(inputs).float().cpu().numpy()
        check_vectors(vectors, self.card.dimensions, self.tower)
        return vectors
