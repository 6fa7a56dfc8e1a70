"""Whether both towers give embeddings."""

import asyncio
import io
import time

from PIL import Image

from serve.errors import ApiError
from serve.messages import ModelCard
from serve.together import together
from serve.towers import Served, Towers

_WAIT_SECONDS = 5.0  # less than probes wait for an answer
_FRESH_SECONDS = 1.0  # that one try-out answers for


class Readiness:
    """Tries the towers out, once for all who ask at about the same time.

    Args:
        towers: to try out.
        limit: seconds that a try-out may take altogether.
    """

    def __init__(self, towers: Towers, limit: float) -> None:
        self._towers, self._limit = towers, limit
        self._trial: asyncio.Task[ModelCard | ApiError] | None = None
        self._began = 0.0
        self._proved = False  # the towers have given an embedding
        # The last try-out that ended got none in all its time. Ages do not count: while nobody asks
        # whether they work, they may work all the time.
        self._hung = False

    async def card(self) -> ModelCard | None:
        """The model's that gives embeddings; None for towers that did and are busy now.

        Who turns away a server that is busy makes the others busier. Towers that neither work nor
        refuse work for as long as a request may take are not busy but broken.

        Raises:
            ApiError: they give none.
        """
        if self._trial is None or (
            self._trial.done() and time.monotonic() - self._began >= _FRESH_SECONDS
        ):
            self._began = time.monotonic()
            self._trial = asyncio.create_task(self._tried_out())
        # Whoever asks again joins the try-out that waits in the towers' queues.
        await asyncio.wait([self._trial], timeout=_WAIT_SECONDS)
        found = self._trial.result() if self._trial.done() else _nothing_within(_WAIT_SECONDS)
        if isinstance(found, ModelCard):
            return found
        if self._proved and (found.status == 429 or (found.code == "timeout" and not self._hung)):
            return None
        raise found

    async def _tried_out(self) -> ModelCard | ApiError:
        try:
            async with asyncio.timeout(self._limit):
                served = await self._towers.through_one_model(_embeddings)
        except TimeoutError:
            self._hung = True
            return _nothing_within(self._limit)
        except ApiError as error:
            if error.status == 429:
                self._hung = False
            return error
        self._proved, self._hung = True, False
        return served.card


def _nothing_within(seconds: float) -> ApiError:
    return ApiError(503, "timeout", f"the towers gave no embedding within {seconds:g} seconds")


async def _embeddings(served: Served) -> Served:
    text, image = await together(
        (served.encode("text", ["ready"]), served.encode("image", [_dot()]))
    )
    if not len(text.vectors) or not len(image.vectors):
        raise ApiError(503, "not_ready", "the model gives no embeddings; see the server's log")
    return served


def _dot() -> bytes:
    """A picture of one pixel."""
    out = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(out, "PNG")
    return out.getvalue()
