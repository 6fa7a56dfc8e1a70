"""The evaluation job: a trained model against images and pairs it has not seen.

Images and texts are embedded on Ray Data's workers; the scores are the library's pure functions of
the embeddings. What is written, below `evaluation/NAME/`:
    embeddings/part-*.parquet   id, image and text embedding of every pair
    result.json                 the metrics, and the examples that the report shows
    clip_benchmark/*.json       the metrics in LAION's CLIP_benchmark's form, a file a task
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from ray_jobs import job
from ray_jobs.classification import (
    ClassificationConfig,
    ClassificationScore,
    open_sets,
    score_set,
)
from ray_jobs.encoding import (
    EncoderConfig,
    PairEncoder,
    check_texts,
    fetch_checkpoint,
    matrix,
    vectors,
    with_text,
)
from ray_jobs.image_sets import ImageSet
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.pairs import TextColumn
from ray_jobs.retrieval import (
    RetrievalConfig,
    RetrievalScore,
    example_queries,
    open_captioned,
    search_set,
)
from ray_jobs.storage import Storage, digest_of_json
from ray_jobs.training.batches import PairFiles
from rwkv_clip.evaluation import benchmark_result, retrieval

Array = npt.NDArray[Any]

SUMMARY = "score a model on pairs it has not seen, and on sets of images"
configure = job.configure
run = partial(job.run_stage, "evaluate")


class EvaluationConfig(EncoderConfig):
    """How a model is evaluated."""

    # Left out of what tells results apart, because the weights do.
    model: str | None = Field(
        None,
        description="what `rwkv-clip evaluate` scores: models:/NAME@ALIAS, or the folder or URI of "
        "a checkpoint; the model that was trained in this storage if absent",
        exclude=True,
    )
    text: TextColumn = Field("caption", description="of the texts that images are searched by")
    examples: PositiveInt = Field(12, description="queries that the report shows")
    classification: tuple[ClassificationConfig, ...] = Field(
        (), description="sets of labelled images that are classified"
    )
    retrieval: tuple[RetrievalConfig, ...] = Field(
        (), description="sets of captioned images that are searched"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "EvaluationConfig":
        for told, taken in (("classification", ()), ("retrieval", ("test",))):  # the pairs' own
            names = [*taken, *(one.name for one in getattr(self, told))]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(
                    f"{told}: two sets are called {twice[0]!r}, and results are told apart by name"
                )
        return self

    @property
    def has_sets(self) -> bool:
        """Whether there is something to evaluate on besides pairs."""
        return bool(self.classification or self.retrieval)


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        metrics: by name, fractions from 0 to 1 and counts.
        chance: what recall_at_10 would be by chance; 0 where no pairs were searched.
        examples: queries that the report shows, as `example_queries` gives them: of the pairs, or
            where there are none of the first set of captioned images.
        checkpoint: what was evaluated.
        data_digest: of all that it was evaluated on.
        clip_benchmark: the results as LAION's CLIP_benchmark writes them, by file name.
        classification: `ClassificationScore`'s fields, for each set and task.
        retrieval: `RetrievalScore`'s fields, for each set.
        tested: by metric, what `scored_on` gives for the data that it was found on.
        seconds: that embedding and scoring took; 0 in results of older releases.
        images: of all that it was evaluated on.
    """

    metrics: dict[str, float]
    chance: float
    examples: list[dict[str, Any]]
    checkpoint: str
    data_digest: str
    clip_benchmark: dict[str, dict[str, Any]]
    classification: list[dict[str, Any]] = field(default_factory=list)
    retrieval: list[dict[str, Any]] = field(default_factory=list)
    tested: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)
    images: int = 0

    @property
    def searched(self) -> bool:
        """Whether there were pairs to search."""
        return bool(self.chance)


@dataclass(frozen=True)
class OpenedSets:
    """The sets of images of an evaluation, with their files.

    Attributes:
        labelled: what `open_sets` gives.
        captioned: what `open_captioned` gives.
    """

    labelled: list[tuple[ClassificationConfig, ImageSet, ImageSet | None]]
    captioned: list[tuple[RetrievalConfig, ImageSet]]

    @classmethod
    def of(cls, config: EvaluationConfig) -> "OpenedSets":
        """Look for the files; raises SourceError where a set cannot be read."""
        return cls(open_sets(config.classification), open_captioned(config.retrieval))

    @property
    def images(self) -> int:
        """How many there are, those that linear probes learn from included."""
        labelled = sum(test.rows + (train.rows if train else 0) for _, test, train in self.labelled)
        return labelled + sum(images.rows for _, images in self.captioned)

    @property
    def digests(self) -> list[str]:
        """What tells each from any other."""
        found = [labelled_digest(*one) for one in self.labelled]
        return found + [captioned_digest(*one) for one in self.captioned]


def labelled_digest(config: ClassificationConfig, test: ImageSet, train: ImageSet | None) -> str:
    """Tells what is asked of a set of labelled images, and of which, from anything else."""
    told = config.model_dump(mode="json", exclude={"test", "train"})
    told["templates"] = config.prompts()
    return digest_of_json([told, test.digest, train.digest if train else None])


def captioned_digest(config: RetrievalConfig, images: ImageSet) -> str:
    """Tells a set of captioned images from anything else."""
    return digest_of_json([config.model_dump(mode="json", exclude={"test"}), images.digest])


def scored_on(name: str, digest: str, text: str = "") -> dict[str, str]:
    """What two scores must agree in to be compared.

    Args:
        name: of the test data, for people.
        digest: what tells it, and what is asked of it, from anything else.
        text: which of the pairs' texts images were searched by.
    """
    return {"test_set": name, "test_digest": digest, "test_text": text}


class Evaluation:
    """A checkpoint of the storage, with the pairs and the sets of images that it is scored on.

    Args:
        config: how.
        storage: holds the checkpoint and the pairs.
        checkpoint: the checkpoint folder's name in the storage.
        name: of the data set of pairs; None for sets of images alone.
        folder: of the storage, that gets embeddings and result.
        sets: those of the configuration, if they were opened before.

    Attributes:
        digest: of all that it is evaluated on.
        identity: all that decides the result.
        held: what an earlier run with the same settings found.

    Raises:
        SourceError: a set of images cannot be read.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        storage: Storage,
        checkpoint: str,
        name: str | None = "test",
        folder: str = "evaluation",
        sets: OpenedSets | None = None,
    ) -> None:
        # Here, because MLflow takes a second, and the actors that embed import this module too.
        from ray_jobs.tracking.source import stored_model

        self.config, self.storage, self.checkpoint = config, storage, checkpoint
        self.manifest = Manifest.from_storage(storage, name) if name else None
        self._sets = sets or OpenedSets.of(config)
        pairs = self.manifest.data_digest if self.manifest else None
        self.digest = digest_of_json([pairs, *self._sets.digests])
        self.identity = {
            "config": config.model_copy(
                update={"classification": tuple(one for one, *_ in self._sets.labelled)}
            ).model_dump(mode="json"),
            "checkpoint": checkpoint,
            # Another training leaves its checkpoints under the same names.
            "weights": stored_model(storage, checkpoint).digest,
            "data_digest": self.digest,
        }
        self._place = f"{folder}/{name or 'sets'}"
        self._record = f"{self._place}/result.json"
        self.held: EvaluationResult | None = None
        found = storage.find_json(self._record)
        if found is not None and found["run"] == self.identity:
            self.held = EvaluationResult(**found["result"])

    def run(self) -> EvaluationResult:
        """Embed and score, if that is not done; Ray must be initialised.

        Raises:
            SourceError: a set of images has no captions, or labels without names.
            TextsError: the pairs have no texts to search by.
        """
        if self.held is not None:
            return self.held
        started = time.perf_counter()
        config, storage, checkpoint = self.config, self.storage, self.checkpoint
        result = EvaluationResult({}, 0.0, [], checkpoint, self.digest, {})
        if self.manifest is not None:
            check_texts(PairFiles.of(storage, self.manifest.name), config.text, "evaluation.text")
            table = _embed(config, storage, checkpoint, self.manifest)
            storage.write_table(f"{self._place}/embeddings/part-00000.parquet", table)
            result = _score(config, table, checkpoint, self.manifest, self.digest)
            on = scored_on(self.manifest.name, self.manifest.data_digest, config.text)
            result.tested.update(dict.fromkeys(result.metrics, on))
        for labelled, test, train in self._sets.labelled:
            scores = score_set(labelled, test, train, config, storage, checkpoint)
            _add(result, scores, labelled_digest(labelled, test, train))
        for captioned, images in self._sets.captioned:
            score = search_set(captioned, images, config, storage, checkpoint, config.examples)
            _add_search(result, score, captioned_digest(captioned, images))
        for file, value in result.clip_benchmark.items():
            storage.write_json(f"{self._place}/clip_benchmark/{file}", value)
        pairs = self.manifest.rows if self.manifest else 0
        result = replace(
            result, seconds=time.perf_counter() - started, images=pairs + self._sets.images
        )
        storage.write_json(self._record, {"run": self.identity, "result": asdict(result)})
        return result


def _add(result: EvaluationResult, scores: Sequence[ClassificationScore], digest: str) -> None:
    """Take up what a data set's scores say."""
    for score in scores:
        told = asdict(score)
        result.clip_benchmark[f"{score.name}-{score.task}.json"] = told.pop("clip_benchmark")
        result.classification.append(told)
        result.metrics.update(score.metrics())
        result.tested.update(dict.fromkeys(score.metrics(), scored_on(score.name, digest)))
    for task in {one["task"] for one in result.classification}:
        averaged = [one for one in result.classification if one["task"] == task]
        name = f"{task}_average"
        result.metrics[name] = float(np.mean([one[one["metric"]] for one in averaged]))
        parts = [result.tested[f"{one['name']}_{task}_top1"]["test_digest"] for one in averaged]
        names = ", ".join(one["name"] for one in averaged)
        result.tested[name] = scored_on(names, digest_of_json(parts))


def _add_search(result: EvaluationResult, score: RetrievalScore, digest: str) -> None:
    told = asdict(score)
    result.clip_benchmark[f"{score.name}-retrieval.json"] = told.pop("clip_benchmark")
    examples = told.pop("examples")
    if not result.examples:
        result.examples.extend(examples)
    result.retrieval.append(told)
    result.metrics.update(score.metrics())
    result.tested.update(dict.fromkeys(score.metrics(), scored_on(score.name, digest)))


class Encoder(PairEncoder):
    """Embeds pairs of the storage; one in each of Ray Data's actors."""

    def __init__(
        self, storage: Storage, checkpoint: str, files: PairFiles, config: EvaluationConfig
    ) -> None:
        model = fetch_checkpoint(storage, checkpoint)
        gpus_key = "evaluation.gpus_per_worker"
        super().__init__(model, files, config.text, config, gpus_key=gpus_key)

    def __call__(self, batch: Mapping[str, Array]) -> pa.Table:
        """Embeddings of the rows first .. first + rows of the data set."""
        found = self.encode(int(batch["first"][0]), int(batch["rows"][0]))
        return pa.table(
            {
                "id": found.ids,
                "text": found.texts,
                "image_embedding": vectors(found.image_emb),
                "text_embedding": vectors(found.text_emb),
            }
        )


def _embed(
    config: EvaluationConfig, storage: Storage, checkpoint: str, manifest: Manifest
) -> pa.Table:
    """Embeddings of all pairs, in order."""
    files = PairFiles.of(storage, manifest.name)
    work = [
        {"first": first, "rows": min(config.batch, manifest.rows - first)}
        for first in range(0, manifest.rows, config.batch)
    ]
    arguments = (storage, checkpoint, files, config)
    told = f"evaluate {manifest.name}"
    return config.gather(told, manifest.rows, "pairs", work, Encoder, *arguments)


def _score(
    config: EvaluationConfig, table: pa.Table, checkpoint: str, manifest: Manifest, digest: str
) -> EvaluationResult:
    texts: list[str] = table["text"].to_pylist()
    asked = with_text(texts)
    images, queries = matrix(table["image_embedding"]), matrix(table["text_embedding"])[asked]
    result = retrieval(images, queries, asked)
    metrics = {"pairs": float(len(table)), **result.metrics()}
    if len(asked) < len(table):
        metrics["pairs_without_text"] = float(len(table) - len(asked))
    ids, told = table["id"].to_pylist(), [texts[at] for at in asked]
    examples = example_queries(config.examples, told, asked, ids, images, queries)
    written = asdict(
        benchmark_result(result, dataset=manifest.name, model="RWKV-CLIP", pretrained=checkpoint)
    )
    chance = 10 / max(len(table), 10)
    files = {f"{manifest.name}-retrieval.json": written}
    return EvaluationResult(metrics, chance, examples, checkpoint, digest, files)


if __name__ == "__main__":
    job.main("evaluate")
