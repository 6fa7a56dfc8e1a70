"""The synthesis job: a language model describes each pair from its web text, caption and tags.

    python -m ray_jobs.synthesize --config FILE

Descriptions are written in chunks that are published whole; a run that was killed does the chunks
that are not there. An engine that dies or hangs costs the chunks it had in work.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import ray.data
from pydantic import Field, PositiveFloat, PositiveInt
from ray.exceptions import RayError

from ray_jobs import job
from ray_jobs.execution import arrange
from ray_jobs.ingest import Manifest
from ray_jobs.models import ModelError, check_model
from ray_jobs.progress import Progress
from ray_jobs.storage import Storage
from ray_jobs.synthesis.chunks import manifest_file, open_work, seal, tables
from ray_jobs.synthesis.config import HttpConfig, VllmConfig
from ray_jobs.synthesis.describer import LLM, SamplingConfig
from ray_jobs.synthesis.watch import Watch
from rwkv_clip.config import BaseConfig
from rwkv_clip.descriptions import PROMPT_VERSION

SUMMARY = "have a language model describe the ingested pairs"
configure = job.configure
_ERROR_LINE = re.compile(r"(?!ray\.exceptions\.)[\w.]*(?:Error|Exception|Exit)\b(?:\([\w.]*\))?: ")
run = partial(job.run_stage, "synthesize")


class SynthesisError(RuntimeError):
    """Synthesis cannot start or go on; the message says what to do."""


class SynthesisConfig(BaseConfig):
    """How descriptions are written."""

    engine: Annotated[
        VllmConfig | HttpConfig, Field(discriminator="kind", description="what the model runs on")
    ]
    sampling: SamplingConfig = SamplingConfig()
    chunk_rows: PositiveInt = Field(128, description="pairs described, published or redone at once")
    hang_seconds: PositiveFloat = Field(
        300, description="an engine that answers nothing for so long is started anew"
    )

    def identity(self, manifest: Manifest) -> dict[str, Any]:
        """What decides the descriptions; not where and how fast they are made."""
        return {
            "model": self.engine.model,
            "prompt": PROMPT_VERSION,
            "sampling": self.sampling.model_dump(mode="json"),
            "chunk_rows": self.chunk_rows,
            "data_digest": manifest.data_digest,
        }


@dataclass(frozen=True)
class SynthesisResult:
    """What a finished run left.

    Attributes:
        rows: pairs, each with one row of descriptions.
        sources: how often each `description_source` is there.
        refusals: why answers were refused, for all rows that were refused at least once.
        retried: pairs that took more than one attempt.
        incidents: engines that died or hung; `Incident`'s fields.
        seconds: of work, in all runs together.
        model: the model as the configuration named it.
        prompt: the prompt's version.
        resumed: whether an earlier run had done all of it.
    """

    rows: int
    sources: dict[str, int]
    refusals: dict[str, int]
    retried: int
    incidents: list[dict[str, Any]]
    seconds: float
    model: str
    prompt: str
    resumed: bool = False

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
    identity = config.identity(manifest)
    if storage.exists(manifest_file(name)):
        return _finished(storage, name, identity)
    try:
        if isinstance(config.engine, VllmConfig):
            check_model(config.engine.model)
    except ModelError as error:
        raise SynthesisError(f"synthesis.engine.model: {error}") from error
    _claim(storage, name, identity)
    return _Synthesis(config, storage, manifest, identity).run()


class _Synthesis:
    """One run of `synthesize`."""

    def __init__(
        self,
        config: SynthesisConfig,
        storage: Storage,
        manifest: Manifest,
        identity: Mapping[str, Any],
    ) -> None:
        self.config, self.storage, self.manifest = config, storage, manifest
        self.name, self.identity = manifest.name, identity
        todo, self.unsealed = open_work(storage, manifest, config.chunk_rows)
        self.todo = todo
        self.left = Counter(chunk.part for chunk in todo)

    def run(self) -> SynthesisResult:
        record = f"descriptions/{self.name}/record.json"
        earlier = self.storage.read_json(record) if self.storage.exists(record) else {}
        incidents, seconds = earlier.get("incidents", []), earlier.get("seconds", 0.0)
        for part in self.unsealed:
            if not self.left[part]:
                seal(self.storage, self.name, self.unsealed[part])
        if self.todo:
            started = time.monotonic()
            watch = Watch()
            try:
                self._describe(watch)
            finally:
                incidents = [*incidents, *watch.incidents()]
                seconds += time.monotonic() - started
                self.storage.write_json(record, {"incidents": incidents, "seconds": seconds})
                watch.close()
        return self._conclude(incidents, seconds)

    def _describe(self, watch: Watch) -> None:
        done = self.manifest.rows - sum(chunk.rows for chunk in self.todo)
        with (
            Progress(f"describe {self.name}", self.manifest.rows, "pairs", done=done) as progress,
            ThreadPoolExecutor(4) as pool,
        ):
            sealing = []
            for counts in self._stream(watch):
                part = counts["part"]
                self.left[part] -= 1
                if not self.left[part]:
                    chunks = self.unsealed[part]
                    sealing.append(pool.submit(seal, self.storage, self.name, chunks))
                befallen = len(watch.incidents())
                progress.update(counts["rows"], f"{befallen} incidents" if befallen else "")
            for future in sealing:
                future.result()

    def _stream(self, watch: Watch) -> Iterator[dict[str, Any]]:
        """Counts of chunks as they are done."""
        config = self.config
        settings = {
            "storage": self.storage,
            "name": self.name,
            "sampling": config.sampling,
            "watch": watch,
            "hang_seconds": config.hang_seconds,
        }
        chunks = ray.data.from_items([asdict(chunk) for chunk in self.todo])
        dataset = arrange(self._engine(chunks, settings))
        try:
            yield from dataset.iter_rows()
        except RayError as error:
            told = "; ".join(f"{one['kind']}: {one['detail']}" for one in watch.incidents()[-3:])
            raise SynthesisError(
                f"the engines cannot go on: {_cause(error)}. {told or 'no engine died before'}. "
                "What is done is kept: mend synthesis.engine and start again"
            ) from error

    def _engine(self, chunks: ray.data.Dataset, settings: dict[str, Any]) -> ray.data.Dataset:
        engine = self.config.engine
        if isinstance(engine, HttpConfig):
            from ray_jobs.synthesis.http import http_stream

            return http_stream(engine, os.environ.get(engine.api_key_env), chunks, settings)
        from ray_jobs.synthesis.engine import vllm_stream  # and with it vLLM

        return vllm_stream(engine, chunks, settings)

    def _conclude(self, incidents: list[dict[str, Any]], seconds: float) -> SynthesisResult:
        sources: Counter[str] = Counter()
        refusals: Counter[str] = Counter()
        retried = rows = 0
        columns = ["description_source", "guard_reason", "attempts"]
        for table in tables(self.storage, self.manifest, columns):
            rows += table.num_rows
            sources.update(table["description_source"].to_pylist())
            refusals.update(reason for reason in table["guard_reason"].to_pylist() if reason)
            retried += sum(attempts > 1 for attempts in table["attempts"].to_pylist())
        result = SynthesisResult(
            rows=rows,
            sources=dict(sources.most_common()),
            refusals=dict(refusals.most_common()),
            retried=retried,
            incidents=incidents,
            seconds=seconds,
            model=self.config.engine.model,
            prompt=PROMPT_VERSION,
        )
        value = {"run": self.identity, "result": asdict(result)}
        self.storage.write_json(manifest_file(self.name), value)
        return result


def _claim(storage: Storage, name: str, identity: Mapping[str, Any]) -> None:
    """Note whose descriptions the folder holds; refuse to mix them with others."""
    folder = f"descriptions/{name}"
    record = f"{folder}/run.json"
    held = storage.read_json(record) if storage.exists(record) else None
    if held == identity:
        return
    if held is not None and storage.names(folder, suffix=".parquet", recursive=True):
        raise _other(storage, name, held, identity)
    storage.write_json(record, identity)


def _finished(storage: Storage, name: str, identity: Mapping[str, Any]) -> SynthesisResult:
    value = storage.read_json(manifest_file(name))
    if value["run"] != identity:
        raise _other(storage, name, value["run"], identity)
    return SynthesisResult(**{**value["result"], "resumed": True})


def _other(
    storage: Storage, name: str, held: Mapping[str, Any], wanted: Mapping[str, Any]
) -> SynthesisError:
    differ = [key for key in wanted if held.get(key) != wanted[key]]
    return SynthesisError(
        f"{storage.child_uri(f'descriptions/{name}')} holds descriptions made with another "
        f"{', '.join(differ)}; choose another storage.uri, or delete that folder"
    )


def _cause(error: BaseException) -> str:
    """The error that was raised, on one line; Ray puts traces before it and advice behind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if _ERROR_LINE.match(line)]
    return (told or lines or [type(error).__name__])[-1]


if __name__ == "__main__":
    job.main("synthesize")
