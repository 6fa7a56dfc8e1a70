"""The two towers as the ingress sees them."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.errors import ApiError
from serve.messages import TOWERS, Elsewhere, Encoded, ModelCard, ModelPlace, Standing, Tower

logger = logging.getLogger(__name__)

Handle = DeploymentHandle[Any]
Answer = TypeVar("Answer")

_STANDING_SECONDS = 1.0  # between looks at what is served
_MODELS = 4  # that a request goes through until one is held by both towers
_REPLICAS = 3  # that a call goes to until one lives to answer


class _MovedError(Exception):
    """A tower does not hold the model any more; `place` is the one that it serves."""

    def __init__(self, place: ModelPlace) -> None:
        super().__init__(place.version)
        self.place = place


@dataclass(frozen=True)
class Served:
    """The model that a request goes through, whatever is served afterwards."""

    handles: dict[Tower, Handle]
    place: ModelPlace
    card: ModelCard

    async def encode(self, tower: Tower, items: Sequence[bytes | str]) -> Encoded:
        """Embed encoded images, or texts; raises ApiError if the tower cannot be reached."""
        answer: Encoded = _here(await call(self.handles[tower], tower, "encode", items, self.place))
        return answer


class Towers:
    """Chooses the model for each request.

    Args:
        director: says what is served.
        image, text: the towers' deployments.
        ongoing: how many requests the ingress answers now.
    """

    def __init__(
        self,
        director: Handle,
        image: Handle,
        text: Handle,
        ongoing: Callable[[], int],
    ) -> None:
        self.handles: dict[Tower, Handle] = dict(zip(TOWERS, (image, text), strict=True))
        self._director = director
        self._ingress, self._ongoing = uuid.uuid4().hex, ongoing
        self._standing: Standing | None = None
        self._follower: asyncio.Task[None] | None = None
        self._cards: dict[ModelPlace, ModelCard] = {}

    @property
    def ending(self) -> bool:
        """Whether no more requests are to be taken."""
        return self._standing is not None and self._standing.ending

    async def standing(self) -> Standing:
        """How things stand; raises ApiError as long as nobody can tell."""
        if self._follower is None or self._follower.done():
            self._follower = asyncio.create_task(self._follow())
        if self._standing is None:
            self._standing = await self._ask()
        return self._standing

    async def through_one_model(self, work: Callable[[Served], Awaitable[Answer]]) -> Answer:
        """Work that may call both towers, by a model that both hold; raises ApiError."""
        place = (await self.standing()).current
        for _ in range(_MODELS):
            try:
                return await work(Served(self.handles, place, await self._card(place)))
            except _MovedError as moved:
                place = moved.place
        raise ApiError(503, "unavailable", "the model is being exchanged; send it again later")

    async def _card(self, place: ModelPlace) -> ModelCard:
        if place not in self._cards:
            card: ModelCard = _here(await call(self.handles["text"], "text", "describe", place))
            while len(self._cards) >= _MODELS:
                del self._cards[next(iter(self._cards))]
            self._cards[place] = card
        return self._cards[place]

    async def _ask(self) -> Standing:
        ongoing = self._ongoing() if self.ending else None
        standing: Standing = await call(
            self._director, "director", "standing", self._ingress, ongoing
        )
        return standing

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_STANDING_SECONDS)
            try:
                self._standing = await self._ask()
            except ApiError:
                continue  # what was served last still is; `call` has told the log


async def call(handle: Handle, told: str, method: str, *arguments: Any) -> Any:
    """A deployment's answer; raises ApiError where it has none.

    What is called may be called twice: a replica that dies with a request is not the last one.
    """
    for _ in range(_REPLICAS):
        response = getattr(handle, method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # Serve does so where a client has left, not where time is up
            raise
        except BackPressureError:
            raise ApiError(
                429, "overloaded", "too many requests wait; send this one again later"
            ) from None
        except RayActorError as error:
            logger.warning("a replica of %s died: %s", told, type(error).__name__)
        except (DeploymentUnavailableError, RayServeException) as error:
            logger.warning("%s is away: %s", told, type(error).__name__)
            break
    raise ApiError(
        503, "unavailable", f"the {told} deployment is not there now; send it again later"
    )


def _here(answer: Any) -> Any:
    if isinstance(answer, Elsewhere):
        raise _MovedError(answer.serving)
    return answer


def check_model(asked: str | None, card: ModelCard) -> None:
    """Raise ApiError if another model is asked for than the one that is served."""
    if asked not in (None, "", card.name, f"{card.name}/{card.version}"):
        raise ApiError(
            404,
            "model_not_found",
            f"model: is not served here; {card.name!r} is, or leave it out",
            "model",
        )


def answered_by(card: ModelCard, tokens: int) -> dict[str, Any]:
    """What every answer of a model says of it."""
    return {
        "model": card.name,
        "model_version": card.version,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def answer_headers(card: ModelCard, answers: Sequence[Encoded]) -> dict[str, str]:
    """The model's version, and milliseconds; of towers that worked side by side, the slower's."""
    names = ("preprocess", "queue", "inference")
    slowest = {name: max((one.seconds[name] for one in answers), default=0.0) for name in names}
    told = ", ".join(f"{name};dur={1000 * slowest[name]:.1f}" for name in names)
    return {"Server-Timing": told, "X-Model-Version": card.version}
