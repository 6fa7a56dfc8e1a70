"""The captioning job: a model that sees the images gives captions and tags to pairs without them.

    python -m ray_jobs.caption --config FILE

See `ray_jobs.synthesis.run` for how it goes on after a kill.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from ray_jobs import job
from ray_jobs.beside import Beside
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.room import warn_without_room
from ray_jobs.storage import Storage
from ray_jobs.synthesis.captioner import Captioning
from ray_jobs.synthesis.chunks import tables
from ray_jobs.synthesis.config import HttpConfig, PythonConfig, VllmConfig
from ray_jobs.synthesis.python import check_python, python_stream
from ray_jobs.synthesis.run import (
    Stream,
    SynthesisError,
    TaskRun,
    check_engine,
    engine_stream,
)
from ray_jobs.synthesis.task import SamplingConfig
from ray_jobs.synthesis.worker import Patience
from rwkv_clip.config import BaseConfig
from rwkv_clip.descriptions import CAPTION_PROMPT_VERSION

SUMMARY = "have a model caption and tag the ingested images"
configure = job.configure
run = partial(job.run_stage, "caption")


class CaptionConfig(BaseConfig):
    """How captions and tags are made for pairs that have none."""

    engine: Annotated[
        VllmConfig | HttpConfig | PythonConfig,
        Field(discriminator="kind", description="what the model runs on"),
    ]
    sampling: SamplingConfig = SamplingConfig(max_tokens=160)
    image_side: PositiveInt = Field(
        448, description="longer side of what the model is shown, in pixels"
    )
    chunk_rows: PositiveInt = Field(128, description="pairs captioned, published or redone at once")
    hang_seconds: PositiveFloat = Field(
        600, description="an engine that answers nothing for so long is started anew"
    )
    start_seconds: PositiveFloat = Field(
        3600, description="an engine that takes longer to start, as with its weights, is ended"
    )

    def identity(self, manifest: Manifest) -> dict[str, Any]:
        """What decides the captions; not where and how fast they are made."""
        return {
            "model": self.engine.model,
            **self.engine.identity(),
            "prompt": CAPTION_PROMPT_VERSION,
            "sampling": self.sampling.model_dump(mode="json"),
            "image_side": self.image_side,
            "chunk_rows": self.chunk_rows,
            "data_digest": manifest.data_digest,
        }


@dataclass(frozen=True)
class CaptionResult:
    """What a finished run left.

    Attributes:
        rows: pairs, each with one row.
        sources: how often each `caption_source` is there.
        incidents: engines that died or hung; `Incident`'s fields.
        seconds: of work, in all runs together.
        model: the model as the configuration named it.
        resumed: whether an earlier run had done all of it.
    """

    rows: int
    sources: dict[str, int]
    incidents: list[dict[str, Any]]
    seconds: float
    model: str
    resumed: bool = False


def caption(config: CaptionConfig, storage: Storage, name: str = "train") -> CaptionResult:
    """Caption and tag the pairs of a data set; goes on where an earlier run stopped.

    Ray must be initialised.

    Args:
        config: how.
        storage: holds the pairs, and gets the captions.
        name: of the data set.

    Raises:
        SynthesisError: there is no such model, no engine comes up, or the storage holds other
            captions.
    """
    manifest = Manifest.from_storage(storage, name)
    engine = config.engine
    task = TaskRun(
        "captioning",
        "caption",
        storage,
        manifest,
        Captioning(config.sampling, config.image_side),
        config.identity(manifest),
        config.chunk_rows,
        Patience(config.hang_seconds, config.start_seconds),
        engine.count,
    )
    if (held := task.finished()) is not None:
        return CaptionResult(**held, resumed=True)
    if isinstance(engine, PythonConfig):
        try:
            check_python(engine)
        except ValueError as error:
            raise SynthesisError(f"captioning.engine.model: {error}") from error
        stream: Stream = partial(python_stream, engine, config.image_side)
    else:
        check_engine(engine, "captioning")
        stream = engine_stream(engine)
    warn_without_room(*engine.needs("captioning.engine"))
    task.claim()
    effort = task.run(stream)
    sources: Counter[str] = Counter()
    for table in tables(storage, manifest, Beside(Captioning.kind, name), ["caption_source"]):
        sources.update(table["caption_source"].to_pylist())
    rows = sources.total()
    result = CaptionResult(
        rows, dict(sources.most_common()), effort.incidents, effort.seconds, engine.model
    )
    counts = asdict(result)
    del counts["resumed"]
    task.conclude(counts)
    return result


if __name__ == "__main__":
    job.main("caption")
