"""The synthesis job: a language model describes each pair from its web text, caption and tags.

    python -m ray_jobs.synthesize --config FILE

See `ray_jobs.synthesis.run` for how it goes on after a kill.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from ray_jobs import job
from ray_jobs.beside import CAPTIONS, Beside
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.room import warn_without_room
from ray_jobs.storage import Storage
from ray_jobs.synthesis.chunks import tables
from ray_jobs.synthesis.config import HttpConfig, VllmConfig
from ray_jobs.synthesis.describer import LLM, Describing
from ray_jobs.synthesis.run import Effort, SynthesisError, TaskRun, check_engine, engine_stream
from ray_jobs.synthesis.task import SamplingConfig
from ray_jobs.synthesis.worker import Patience
from rwkv_clip.config import BaseConfig
from rwkv_clip.descriptions import PROMPT_VERSION

__all__ = ["SynthesisConfig", "SynthesisError", "SynthesisResult", "synthesize"]

SUMMARY = "have a language model describe the ingested pairs"
configure = job.configure
run = partial(job.run_stage, "synthesize")


class SynthesisConfig(BaseConfig):
    """How descriptions are written."""

    engine: Annotated[
        VllmConfig | HttpConfig, Field(discriminator="kind", description="what the model runs on")
    ]
    sampling: SamplingConfig = SamplingConfig()
    variants: PositiveInt = Field(
        1, le=16, description="descriptions of each pair, of which training takes one at random"
    )
    chunk_rows: PositiveInt = Field(128, description="pairs described, published or redone at once")
    hang_seconds: PositiveFloat = Field(
        300, description="an engine that answers nothing for so long is started anew"
    )
    start_seconds: PositiveFloat = Field(
        3600, description="an engine that takes longer to start, as with its weights, is ended"
    )

    def identity(self, storage: Storage, manifest: Manifest) -> dict[str, Any]:
        """What decides the descriptions; not where and how fast they are made."""
        identity = {
            "model": self.engine.model,
            **self.engine.identity(),
            "prompt": PROMPT_VERSION,
            "sampling": self.sampling.model_dump(mode="json"),
            "variants": self.variants,
            "chunk_rows": self.chunk_rows,
            "data_digest": manifest.data_digest,
        }
        captions = Beside(CAPTIONS, manifest.name).manifest_file
        if (captioned := storage.find_json(captions)) is not None:
            identity["captions"] = captioned["run"]
        return identity


@dataclass(frozen=True)
class SynthesisResult:
    """What a finished run left.

    Attributes:
        rows: pairs, each with one row of descriptions.
        sources: how often each `description_source` is there.
        refusals: why rows kept no answer of the model's: of each the last reason.
        retried: pairs that took more attempts than descriptions were asked for.
        alternatives: descriptions beyond the first of a pair.
        incidents: engines that died or hung; `Incident`'s fields.
        seconds: of work, in all runs together.
        engine_seconds: of these, without the engines' start.
        model: the model as the configuration named it.
        prompt: the prompt's version.
        resumed: whether an earlier run had done all of it.
    """

    rows: int
    sources: dict[str, int]
    refusals: dict[str, int]
    retried: int
    alternatives: int
    incidents: list[dict[str, Any]]
    seconds: float
    model: str
    prompt: str
    resumed: bool = False
    engine_seconds: float = 0.0

    @property
    def kept_share(self) -> float:
        """The share of pairs whose description is the model's."""
        return self.sources.get(LLM, 0) / max(self.rows, 1)


def synthesize(config: SynthesisConfig, storage: Storage, name: str = "train") -> SynthesisResult:
    """Describe the pairs of a data set; goes on where an earlier run stopped.

    Ray must be initialised.

    Args:
        config: how.
        storage: holds the pairs, and gets the descriptions.
        name: of the data set.

    Raises:
        SynthesisError: there is no such model, no engine comes up, or the storage holds other
            descriptions.
    """
    manifest = Manifest.from_storage(storage, name)
    task = TaskRun(
        "synthesis",
        "describe",
        storage,
        manifest,
        Describing(config.sampling, config.variants),
        config.identity(storage, manifest),
        config.chunk_rows,
        Patience(config.hang_seconds, config.start_seconds),
        config.engine.count,
    )
    if (held := task.finished()) is not None:
        return SynthesisResult(**held, resumed=True)
    check_engine(config.engine, "synthesis")
    warn_without_room(*config.engine.needs("synthesis.engine"))
    task.claim()
    effort = task.run(engine_stream(config.engine))
    result = _count(config, storage, manifest, effort)
    counts = asdict(result)
    del counts["resumed"]
    task.conclude(counts)
    return result


def _count(
    config: SynthesisConfig,
    storage: Storage,
    manifest: Manifest,
    effort: Effort,
) -> SynthesisResult:
    sources: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    retried = rows = alternatives = 0
    columns = ["description_source", "guard_reason", "attempts", "alternatives"]
    beside = Beside(Describing.kind, manifest.name)
    for table in tables(storage, manifest, beside, columns):
        rows += table.num_rows
        sources.update(table["description_source"].to_pylist())
        refusals.update(reason for reason in table["guard_reason"].to_pylist() if reason)
        retried += sum(attempts > config.variants for attempts in table["attempts"].to_pylist())
        alternatives += sum(len(more) for more in table["alternatives"].to_pylist() if more)
    return SynthesisResult(
        rows=rows,
        sources=dict(sources.most_common()),
        refusals=dict(refusals.most_common()),
        retried=retried,
        alternatives=alternatives,
        incidents=effort.incidents,
        seconds=effort.seconds,
        engine_seconds=effort.engine_seconds,
        model=config.engine.model,
        prompt=PROMPT_VERSION,
    )


if __name__ == "__main__":
    job.main("synthesize")
