"""A run of a task over a data set: what synthesis and captioning have in common.

Rows are done in chunks that are published whole. A run that was killed does the chunks that are not
there; an engine that dies or hangs costs the chunks it had in work.
"""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import ray.data
from ray.exceptions import RayError

from ray_jobs.beside import Beside, written
from ray_jobs.execution import arrange, work_items
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.models import ModelError, check_model
from ray_jobs.progress import Progress
from ray_jobs.storage import Storage
from ray_jobs.synthesis.chunks import open_work, seal, tidy, work_of
from ray_jobs.synthesis.config import HttpConfig, VllmConfig
from ray_jobs.synthesis.task import Task
from ray_jobs.synthesis.watch import Watch
from ray_jobs.synthesis.worker import Patience, Work

_ERROR_LINE = re.compile(r"(?!ray\.exceptions\.)[\w.]*(?:Error|Exception|Exit)\b(?:\([\w.]*\))?: ")

_ADVICE = "To change retry attempts"  # Ray Data's, behind every error

# Counts of chunks as they are done, for items of work; in its block, what does them may run.
Stream = Callable[[ray.data.Dataset, Work], AbstractContextManager[ray.data.Dataset]]


_NOTE_SECONDS = 30.0  # between notes of what a run took so far

# Items of work for each engine, where there are chunks enough: the last of them are a small part.
_ITEMS = 250


@dataclass(frozen=True)
class Effort:
    """What a task took, in all runs so far.

    Attributes:
        incidents: engines that died or hung; `Incident`'s fields.
        seconds: of work.
        engine_seconds: of these, from where the first chunk was begun to where the last one was
            done: without the engines' start.
    """

    incidents: list[dict[str, Any]]
    seconds: float
    engine_seconds: float


class SynthesisError(RuntimeError):
    """A model's work cannot start or go on; the message says what to do."""


@dataclass(frozen=True)
class TaskRun:
    """A run.

    Attributes:
        section: of the configuration, for messages.
        verb: what is done, for the progress line.
        storage: holds the pairs, and gets what is made of them.
        manifest: of the data set.
        task: what is done for each row.
        identity: what decides the outcome; tables of another identity are not mixed with these.
        chunk_rows: rows done, published or redone at once.
        patience: with engines, which are started anew after it.
        engines: that work at a time, at most.
    """

    section: str
    verb: str
    storage: Storage
    manifest: Manifest
    task: Task
    identity: Mapping[str, Any]
    chunk_rows: int
    patience: Patience
    engines: int

    @property
    def beside(self) -> Beside:
        """The tables that are filled."""
        return Beside(self.task.kind, self.manifest.name)

    def finished(self) -> dict[str, Any] | None:
        """What `conclude` was given, if all is done; raises SynthesisError if it is another's."""
        value = self.storage.find_json(self.beside.manifest_file)
        if value is None:
            return None
        if value["run"] != self.identity:
            raise self._other(value["run"])
        result: dict[str, Any] = value["result"]
        return result

    def claim(self) -> None:
        """Note whose tables the folder holds; refuse to mix them with others."""
        folder = self.beside.folder
        record = f"{folder}/run.json"
        held = self.storage.find_json(record)
        if held == self.identity:
            return
        if held is not None and self.storage.names(folder, suffix=".parquet", recursive=True):
            raise self._other(held)
        self.storage.write_json(record, self.identity)

    def run(self, stream: Stream) -> Effort:
        """Do the chunks that are not there.

        Raises:
            SynthesisError: the engines cannot go on.
        """
        todo, unsealed = open_work(self.storage, self.manifest, self.beside, self.chunk_rows)
        left = Counter(chunk.part for chunk in todo)
        for part, chunks in unsealed.items():
            if not left[part]:
                seal(self.storage, self.beside, chunks)
        record = f"{self.beside.folder}/record.json"
        held = self.storage.find_json(record) or {}
        earlier = Effort(**{"incidents": [], "seconds": 0.0, "engine_seconds": 0.0, **held})
        if not todo:
            return earlier
        started = noted = time.monotonic()
        first = last = math.inf
        watch = Watch()

        def note() -> Effort:
            effort = Effort(
                [*earlier.incidents, *watch.incidents()],
                earlier.seconds + time.monotonic() - started,
                earlier.engine_seconds + (last - first if last < math.inf else 0.0),
            )
            self.storage.write_json(record, asdict(effort))
            return effort

        try:
            for began in self._do(stream, watch, todo, unsealed, left):
                first, last = min(first, began), time.time()
                if time.monotonic() - noted > _NOTE_SECONDS:  # for whoever goes on after a kill
                    noted = time.monotonic()
                    note()
        finally:
            effort = note()
            watch.close()
        return effort

    def conclude(self, result: Mapping[str, Any]) -> None:
        """Note that all is done, and what came out."""
        # Another run's late chunks, where two were at work at once.
        tidy(self.storage, self.manifest, self.beside)
        value = {"run": self.identity, "result": dict(result)}
        self.storage.write_json(self.beside.manifest_file, value)

    def _do(
        self,
        stream: Stream,
        watch: Watch,
        todo: list[Any],
        unsealed: Mapping[str, list[Any]],
        left: Counter[str],
    ) -> Iterator[float]:
        """Do the chunks; gives when each was begun, as they are done."""
        rows, name = self.manifest.rows, self.manifest.name
        done = rows - sum(chunk.rows for chunk in todo)
        others = tuple(one for one in written(self.storage, name) if one != self.beside)
        items = work_of(todo, _ITEMS * self.engines)
        work = Work(
            self.storage,
            name,
            others,
            self.task,
            watch,
            self.patience,
            self.engines,
            share=math.ceil(len(items) / self.engines),
        )
        with (
            Progress(f"{self.verb} {name}", rows, "pairs", done=done) as progress,
            ThreadPoolExecutor(4) as pool,
            stream(work_items(items), work) as counted,
        ):
            sealing: list[Future[None]] = []
            ahead = _Ahead(self.engines)
            for counts in self._counts(arrange(counted, slow=True), watch):
                part = counts["part"]
                left[part] -= 1
                if not left[part]:
                    sealing.append(pool.submit(seal, self.storage, self.beside, unsealed[part]))
                # What fails is told while there is something to mend, not after days.
                for future in [one for one in sealing if one.done()]:
                    sealing.remove(future)
                    self._sealed(future)
                befallen = len(watch.incidents())
                note = f"{befallen} incidents" if befallen else ""
                progress.update(counts["rows"], note, ahead=ahead.of(counts))
                yield counts["began"]
            for future in sealing:
                self._sealed(future)

    def _sealed(self, future: "Future[None]") -> None:
        try:
            future.result()
        except OSError as error:
            raise SynthesisError(
                f"a table below {self.storage.child_uri(self.beside.folder)} cannot be made: "
                f"{error}. What is done is kept: start again when that is mended"
            ) from error

    def _counts(self, dataset: ray.data.Dataset, watch: Watch) -> Iterator[dict[str, Any]]:
        try:
            # Nothing is fetched ahead: a chunk would be told of when the next one is done.
            batches: Any = dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            )
            for batch in batches:
                yield from batch.to_pylist()
        except RayError as error:
            told = "; ".join(f"{one['kind']}: {one['detail']}" for one in watch.incidents()[-3:])
            raise SynthesisError(
                f"the engines cannot go on: {_cause(error)}. {told or 'no engine died before'}. "
                f"What is done is kept: mend {self.section}.engine and start again"
            ) from error

    def _other(self, held: Mapping[str, Any]) -> SynthesisError:
        differ = [
            key for key in {**held, **self.identity} if held.get(key) != self.identity.get(key)
        ]
        return SynthesisError(
            f"{self.storage.child_uri(self.beside.folder)} holds what was made with another "
            f"{', '.join(differ)}; choose another storage.uri, or delete that folder"
        )


class _Ahead:
    """Rows that are answered in chunks that are not done.

    Args:
        workers: that there are at a time.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._told: dict[str, int] = {}  # the last who told last

    def of(self, counts: Mapping[str, Any]) -> int:
        """All of them, with what one worker tells anew."""
        self._told.pop(counts["worker"], None)
        self._told[counts["worker"]] = counts["ahead"]
        if len(self._told) > self._workers:  # one has died, most likely who was silent for longest
            del self._told[next(iter(self._told))]
        return sum(self._told.values())


def engine_stream(engine: VllmConfig | HttpConfig) -> Stream:
    """Chunks done by an engine; what only it needs is imported here."""
    if isinstance(engine, HttpConfig):
        from ray_jobs.synthesis.http import http_stream

        key = os.environ.get(engine.api_key_env)
        return lambda items, work: http_stream(engine, key, items, work)
    from ray_jobs.synthesis.engine import vllm_stream  # and with it vLLM

    return lambda items, work: vllm_stream(engine, items, work)


def check_engine(engine: VllmConfig | HttpConfig, section: str) -> None:
    """Raises SynthesisError if there is no such model."""
    try:
        if isinstance(engine, VllmConfig):
            check_model(engine.model)
    except ModelError as error:
        raise SynthesisError(f"{section}.engine.model: {error}") from error


def _cause(error: BaseException) -> str:
    """The error that was raised, on one line; Ray puts traces before it and advice behind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(_ADVICE)]
    told = [at for at, line in enumerate(lines) if _ERROR_LINE.match(line)]
    if not told:
        return (lines or [type(error).__name__])[-1]
    found = lines[told[-1]]
    if "validation error" in found:  # pydantic's, who says below what it is
        found = " ".join(lines[told[-1] : told[-1] + 3])
    return found
