"""An engine that is a Python function: any captioner, tagger, or pair of them.

    captioning:
      engine: {kind: python, model: "my_models.blip:load", arguments: {device: cuda}, gpus: 1}

`load(**arguments)` is called once in each worker and gives a function from images (Pillow, RGB) to
as many `rwkv_clip.descriptions.Caption(caption, tags)`.
"""

import importlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray.data

from ray_jobs.synthesis.captioner import MODEL, Captioner, captioned, is_given
from ray_jobs.synthesis.chunks import Chunk
from ray_jobs.synthesis.config import PythonConfig
from ray_jobs.synthesis.task import Row
from ray_jobs.synthesis.worker import Work
from rwkv_clip.descriptions import Caption
from rwkv_clip.transforms import ImageDecodeError, small_picture

logger = logging.getLogger(__name__)


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
    """

    def __init__(self, config: PythonConfig, image_side: int, work: Work) -> None:
        self.config, self.image_side, self.work = config, image_side, work
        self.captioner: Captioner = find(config)(**config.arguments)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Do a chunk; gives its counts, as `ChunkWorker.run`."""
        began = time.time()
        chunk = Chunk.of(batch)
        rows = self.work.read(chunk)
        done = {row["id"]: captioned(row, None, "given") for row in rows if is_given(row)}
        shown: list[tuple[Row, Any]] = []
        for row in rows:
            if row["id"] in done:
                continue
            try:
                shown.append((row, small_picture(row["image"], self.image_side, row["id"])))
            except ImageDecodeError as error:
                done[row["id"]] = captioned(row, None, "none: image", refused_text=str(error))
        for at in range(0, len(shown), self.config.batch):
            for one in self._caption(shown[at : at + self.config.batch]):
                done[one["id"]] = one
        self.work.write(chunk, [done[row["id"]] for row in rows])
        counts = {"part": chunk.part, "index": chunk.index, "rows": chunk.rows, "began": began}
        return {name: [value] for name, value in counts.items()}

    def _caption(self, shown: Sequence[tuple[Row, Any]]) -> list[Row]:
        """A batch; one by one if it fails, so that one image costs no other."""
        try:
            found = list(self.captioner([image for _, image in shown]))
            if len(found) != len(shown):
                raise ValueError(f"{len(found)} captions for {len(shown)} images")
            captions = [Caption(str(one[0]), tuple(map(str, one[1]))) for one in found]
        except Exception as error:  # somebody else's code, which fails as it likes
            if len(shown) > 1:
                return [row for one in shown for row in self._caption([one])]
            logger.exception("no caption for %s", shown[0][0]["id"])
            told = f"{type(error).__name__}: {error}"
            reason = "model_error"
            return [
                captioned(
                    shown[0][0],
                    None,
                    f"none: {reason}",
                    attempts=1,
                    refused_reason=reason,
                    refused_text=told,
                )
            ]
        pairs = zip(shown, captions, strict=True)
        return [captioned(row, one, MODEL, attempts=1) for (row, _), one in pairs]


def python_stream(
    config: PythonConfig, image_side: int, chunks: ray.data.Dataset, work: Work
) -> ray.data.Dataset:
    """Counts of the chunks, as the function does them."""
    return chunks.map_batches(
        PythonCaptioner,
        fn_constructor_args=(config, image_side, work),
        batch_size=1,
        num_cpus=config.cpus,
        num_gpus=config.gpus or None,
        compute=ray.data.ActorPoolStrategy(size=config.workers),
    )
