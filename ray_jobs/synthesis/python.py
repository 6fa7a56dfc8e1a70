"""An engine that is a Python function: any captioner, tagger, or pair of them.

    captioning:
      engine: {kind: python, model: "my_models.blip:load", arguments: {device: cuda}, gpus: 1}

`load(**arguments)` is called once in each worker and gives a function from images (Pillow, RGB) to
as many `rwkv_clip.descriptions.Caption(caption, tags)`; a tagger's caption is "". An image that it
raises an exception for has no caption; if it then fails at a plain grey picture too, which it is
shown first of all, its process is ended and started anew. So it is when it hangs, or ends itself.
"""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray.data
from PIL import Image

from ray_jobs.synthesis.captioner import MODEL, Captioner, captioned, is_given
from ray_jobs.synthesis.config import PythonConfig
from ray_jobs.synthesis.task import GIVEN, Row, storable
from ray_jobs.synthesis.turns import Turn
from ray_jobs.synthesis.worker import ChunkWorker, EngineDiedError, Work
from rwkv_clip.descriptions import MAX_DESCRIPTION, Caption
from rwkv_clip.descriptions.sources import MAX_TAG, MAX_TAGS, clean_source
from rwkv_clip.images import ImageDecodeError, small_picture

logger = logging.getLogger(__name__)

MODEL_ERROR = "model_error"
_EMPTY = "answer_empty"

_Shown = tuple[Row, Image.Image]


def check_python(config: PythonConfig) -> None:
    """Raises ValueError unless there is such a function."""
    find(config)


def find(config: PythonConfig) -> Any:
    """The function that makes the captioner; raises ValueError."""
    module, _, name = config.model.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{config.model} cannot be imported ({error}); takes MODULE:FUNCTION of an installed "
            "package"
        ) from error


class PythonCaptioner:
    """Captions chunks; one in each of Ray Data's actors.

    Args:
        config: of the function.
        image_side: longer side of what it is shown, in pixels.
        work: what is to be done.

    Raises:
        RuntimeError: it has no caption for a plain picture.
    """

    def __init__(self, *, config: PythonConfig, image_side: int, work: Work) -> None:
        self.config, self.image_side = config, image_side
        self.worker = ChunkWorker(work)
        # One thread makes and calls the captioner, because many a library wants that.
        self._thread = ThreadPoolExecutor(1, "captioner")
        with self.worker.starting():
            self.captioner: Captioner = self._thread.submit(self._load).result()
        with self.worker.asking():
            error = self._thread.submit(self._trouble).result()
        if error is not None:
            raise RuntimeError(
                f"{config.model} fails at a plain grey picture, and so at any: {error}"
            )

    def _load(self) -> Captioner:
        try:
            captioner: Captioner = find(self.config)(**self.config.arguments)
        except SystemExit as error:
            raise RuntimeError(f"{self.config.model} {_exited(error)}") from error
        return captioner

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        """Do an item's chunks; gives their counts."""
        yield await self.worker.do(batch, self._caption)

    async def _caption(self, rows: Sequence[Row], _turn: Turn) -> list[Row]:
        done = {row["id"]: captioned(row, None, GIVEN) for row in rows if is_given(row)}
        rest = [row for row in rows if row["id"] not in done]
        for at in range(0, len(rest), self.config.batch):
            shown: list[_Shown] = []
            for row in rest[at : at + self.config.batch]:
                try:
                    picture = await asyncio.to_thread(
                        small_picture, row["image"], self.image_side, row["id"]
                    )
                except ImageDecodeError as error:
                    done[row["id"]] = captioned(row, None, "none: image", refused_text=str(error))
                else:
                    shown.append((row, picture))
            for one in await self._ask(shown):
                done[one["id"]] = one
        return [done[row["id"]] for row in rows]

    async def _ask(self, shown: Sequence[_Shown]) -> list[Row]:
        """A batch; one by one if it fails, so that one image costs no other."""
        if not shown:
            return []
        try:
            captions = await self._call([picture for _, picture in shown])
        except _CaptionerError as error:
            if len(shown) > 1:
                return [row for one in shown for row in await self._ask([one])]
            row, told = shown[0][0], str(error)
            logger.warning("%s: %s", row["id"], storable(told))
            source, reason = f"none: {MODEL_ERROR}", MODEL_ERROR
            return [
                captioned(row, None, source, attempts=1, refused_reason=reason, refused_text=told)
            ]
        pairs = zip(shown, captions, strict=True)
        return [_answered(row, one) for (row, _), one in pairs]

    async def _call(self, pictures: Sequence[Image.Image]) -> list[Caption]:
        loop = asyncio.get_running_loop()
        with self.worker.asking():
            return await loop.run_in_executor(self._thread, self._captions, pictures)

    def _captions(self, pictures: Sequence[Image.Image]) -> list[Caption]:
        """Raises _CaptionerError, or EngineDiedError where no other picture has captions either."""
        try:
            return self._found(pictures)
        except SystemExit as error:
            raise EngineDiedError(_exited(error)) from error
        except Exception as error:  # somebody else's code, which fails as it likes
            told = f"{type(error).__name__}: {error}"
            # One picture alone is to blame if another has a caption still. If not, as after an
            # error of a GPU, all that follow would be found without one.
            if len(pictures) == 1 and self._trouble() is not None:
                raise EngineDiedError(told) from error
            raise _CaptionerError(told) from error

    def _trouble(self) -> str | None:
        """Why a plain picture has no caption, if it has none."""
        side = min(self.image_side, 224)
        try:
            self._found([Image.new("RGB", (side, side), "grey")])
        except SystemExit as error:
            return _exited(error)
        except Exception as error:  # as above
            return f"{type(error).__name__}: {error}"
        return None

    def _found(self, pictures: Sequence[Image.Image]) -> list[Caption]:
        found = list(self.captioner(pictures))
        if len(found) != len(pictures):
            raise ValueError(f"{len(found)} captions for {len(pictures)} images")
        return [_cleaned(one) for one in found]


def _cleaned(found: Any) -> Caption:
    """What a captioner gave for an image, cleaned as the answers of models are."""
    match found:
        case (str(caption), list(tags) | tuple(tags)) if all(isinstance(tag, str) for tag in tags):
            cleaned = dict.fromkeys(clean_source(tag, MAX_TAG) for tag in tags[:MAX_TAGS])
            return Caption(
                clean_source(caption, MAX_DESCRIPTION), tuple(tag for tag in cleaned if tag)
            )
    raise ValueError(
        "takes Caption(caption, tags) for each image, a string and a list of strings, either of "
        f"them empty where there is none; got {found!r:.200}"
    )


def _answered(row: Row, found: Caption) -> Row:
    """The row for a pair whose image the captioner took."""
    if found.caption or found.tags:
        return captioned(row, found, MODEL, attempts=1)
    return captioned(row, None, f"none: {_EMPTY}", attempts=1, refused_reason=_EMPTY)


def _exited(error: SystemExit) -> str:
    return f"called sys.exit({error.code!r})"


class _CaptionerError(Exception):
    """The captioner has nothing for what it was shown; the message says what it raised."""


@contextmanager
def python_stream(
    config: PythonConfig, image_side: int, items: ray.data.Dataset, work: Work
) -> Iterator[ray.data.Dataset]:
    """Counts of the chunks, as the function does them."""
    at_a_time = 2  # chunks, so that one is read and shrunk while another is captioned
    yield items.map_batches(
        PythonCaptioner,
        fn_constructor_kwargs={"config": config, "image_side": image_side, "work": work},
        batch_size=1,
        num_cpus=config.cpus,
        num_gpus=config.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            size=config.workers,
            max_tasks_in_flight_per_actor=at_a_time,
            max_concurrent_calls_per_actor=at_a_time,
        ),
    )
