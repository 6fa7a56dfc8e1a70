"""The two towers as the ingress sees them."""

import logging
from collections.abc import Sequence
from typing import Any

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.encoders import Encoded, ModelCard, Tower
from serve.errors import ApiError

logger = logging.getLogger(__name__)

Handle = DeploymentHandle[Any]


class Towers:
    """Calls to the encoders, whose failures are answers.

    Args:
        image, text: the deployments.
    """

    def __init__(self, image: Handle, text: Handle) -> None:
        self.handles: dict[Tower, Handle] = {"image": image, "text": text}
        self._card: ModelCard | None = None

    async def card(self) -> ModelCard:
        """What is served; raises ApiError as long as nothing is."""
        if self._card is None:
            self._card = await call(self.handles["text"], "text", "describe")
        return self._card

    async def encode(self, tower: Tower, items: Sequence[bytes | str]) -> Encoded:
        """Embed encoded images, or texts; raises ApiError if the tower cannot be reached."""
        answer: Encoded = await call(self.handles[tower], tower, "encode", items)
        return answer


async def call(handle: Handle, told: str, method: str, *arguments: Any) -> Any:
    """A deployment's answer; raises ApiError where it has none."""
    try:
        return await getattr(handle, method).remote(*arguments)
    except BackPressureError:
        raise ApiError(
            429, "overloaded", "too many requests wait; send this one again later"
        ) from None
    except (DeploymentUnavailableError, RayServeException) as error:
        logger.warning("%s is away: %s", told, type(error).__name__)
        raise ApiError(
            503, "unavailable", f"the {told} deployment is not there now; send it again later"
        ) from None


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


def timings(answers: Sequence[Encoded]) -> dict[str, str]:
    """The header Server-Timing, in milliseconds; of towers that worked side by side, the slower."""
    names = ("preprocess", "queue", "inference")
    slowest = {name: max((one.seconds[name] for one in answers), default=0.0) for name in names}
    return {"Server-Timing": ", ".join(f"{k};dur={1000 * v:.1f}" for k, v in slowest.items())}
