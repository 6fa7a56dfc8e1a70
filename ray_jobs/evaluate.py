"""The evaluation job: a trained model against pairs it has not seen.

Images and texts are embedded on Ray Data's workers; the scores are the library's pure functions of
the embeddings. What is written, below `evaluation/NAME/`:
    embeddings/part-*.parquet   id, image and text embedding of every pair
    result.json                 the metrics, and the examples that the report shows
    clip_benchmark.json         the metrics in LAION's CLIP_benchmark's form
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import ray.data
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ray_jobs import job
from ray_jobs.encoding import PairEncoder, named_metrics
from ray_jobs.execution import arrange
from ray_jobs.ingest import Manifest
from ray_jobs.progress import Progress
from ray_jobs.storage import Storage
from ray_jobs.training.batches import PairFiles
from rwkv_clip.config import BaseConfig
from rwkv_clip.evaluation import benchmark_result, retrieval, top_k
from rwkv_clip.model import RWKVCLIP, load_checkpoint

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

SUMMARY = "score the trained model on pairs it has not seen"
configure = job.configure
run = partial(job.run_stage, "evaluate")


class EvaluationConfig(BaseConfig):
    """How a model is evaluated."""

    text: str = Field("caption", description="the column of texts that images are searched by")
    batch: PositiveInt = Field(256, description="images or texts embedded at a time")
    workers: PositiveInt = Field(1, description="processes that embed")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that each holds")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each holds")
    examples: PositiveInt = Field(12, description="queries that the report shows")


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        metrics: by name, fractions from 0 to 1 and counts.
        chance: what recall_at_10 would be by chance.
        examples: queries, each with its text, its id, and the ids of the five nearest images.
        checkpoint: what was evaluated.
        data_digest: of the pairs.
        clip_benchmark: the result as LAION's CLIP_benchmark writes it.
    """

    metrics: dict[str, float]
    chance: float
    examples: list[dict[str, Any]]
    checkpoint: str
    data_digest: str
    clip_benchmark: dict[str, Any]


def evaluate(
    config: EvaluationConfig,
    storage: Storage,
    checkpoint: str,
    name: str = "test",
    folder: str = "evaluation",
) -> EvaluationResult:
    """Evaluate a checkpoint of the storage on one of its data sets.

    Ray must be initialised. Returns at once if it was done already with the same settings.

    Args:
        config: how.
        storage: holds the checkpoint and the pairs.
        checkpoint: the checkpoint folder's name in the storage.
        name: of the data set.
        folder: of the storage, that gets embeddings and result.
    """
    manifest = Manifest.from_storage(storage, name)
    wanted = {
        "config": config.model_dump(mode="json"),
        "checkpoint": checkpoint,
        "data_digest": manifest.data_digest,
    }
    record = f"{folder}/{name}/result.json"
    if storage.exists(record) and (held := storage.read_json(record))["run"] == wanted:
        return EvaluationResult(**held["result"])
    table = _embed(config, storage, checkpoint, manifest)
    storage.write_table(f"{folder}/{name}/embeddings/part-00000.parquet", table)
    result = _score(config, table, checkpoint, manifest)
    storage.write_json(f"{folder}/{name}/clip_benchmark.json", result.clip_benchmark)
    storage.write_json(record, {"run": wanted, "result": asdict(result)})
    return result


class Encoder(PairEncoder):
    """Embeds pairs of the storage; one in each of Ray Data's actors."""

    def __init__(self, storage: Storage, checkpoint: str, files: PairFiles, text: str) -> None:
        super().__init__(fetch_checkpoint(storage, checkpoint), files, text)

    def __call__(self, batch: Mapping[str, Array]) -> pa.Table:
        """Embeddings of the rows first .. first + rows of the data set."""
        found = self.encode(int(batch["first"][0]), int(batch["rows"][0]))
        return pa.table(
            {
                "id": found.ids,
                "text": found.texts,
                "image_embedding": _vectors(found.image_emb),
                "text_embedding": _vectors(found.text_emb),
            }
        )


def fetch_checkpoint(storage: Storage, name: str) -> RWKVCLIP:
    """A model from a checkpoint folder of any storage; raises CheckpointError."""
    if storage.is_local:
        return load_checkpoint(storage.path(name))
    with TemporaryDirectory() as folder:
        pafs.copy_files(
            storage.path(name), folder, source_filesystem=storage.filesystem
        )  # only tensors and JSON are read from it
        return load_checkpoint(Path(folder))


def _vectors(values: Tensor) -> pa.FixedSizeListArray:
    flat = values.float().cpu().numpy().reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])


def _embed(
    config: EvaluationConfig, storage: Storage, checkpoint: str, manifest: Manifest
) -> pa.Table:
    """Embeddings of all pairs, in order."""
    files = PairFiles.of(storage, manifest.name)
    work = [
        pa.table({"first": [first], "rows": [min(config.batch, manifest.rows - first)]})
        for first in range(0, manifest.rows, config.batch)
    ]
    dataset = ray.data.from_arrow(work).map_batches(
        Encoder,
        fn_constructor_args=(storage, checkpoint, files, config.text),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker or None,
    )
    arrange(dataset, ordered=True)
    tables = []
    with Progress(f"evaluate {manifest.name}", manifest.rows, "pairs") as progress:
        for batch in _arrow_batches(dataset):
            tables.append(batch)
            progress.update(batch.num_rows)
    return pa.concat_tables(tables).combine_chunks()


def _arrow_batches(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _score(
    config: EvaluationConfig, table: pa.Table, checkpoint: str, manifest: Manifest
) -> EvaluationResult:
    images, texts = _matrix(table["image_embedding"]), _matrix(table["text_embedding"])
    owner = np.arange(len(table))
    result = retrieval(images, texts, owner)
    metrics = {"pairs": float(len(table)), **named_metrics(result)}
    examples = _examples(config.examples, table, images, texts)
    written = asdict(
        benchmark_result(result, dataset=manifest.name, model="RWKV-CLIP", pretrained=checkpoint)
    )
    chance = 10 / max(len(table), 10)
    return EvaluationResult(metrics, chance, examples, checkpoint, manifest.data_digest, written)


def _matrix(column: pa.ChunkedArray) -> Array:
    array = column.combine_chunks()
    width: int = array.type.list_size
    values: Array = array.flatten().to_numpy().reshape(-1, width)
    return values


def _examples(count: int, table: pa.Table, images: Array, texts: Array) -> list[dict[str, Any]]:
    """Queries spread evenly over the data set, not chosen by their outcome."""
    ids: Sequence[str] = table["id"].to_pylist()
    queries = np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)
    nearest = top_k(texts[queries], images, min(5, len(ids)))
    return [
        {
            "id": ids[query],
            "text": table["text"][int(query)].as_py(),
            "nearest": [ids[at] for at in row.tolist()],
            "similarity": [round(float(value), 4) for value in values],
        }
        for query, row, values in zip(
            queries, nearest.indices, nearest.similarities.tolist(), strict=True
        )
    ]


if __name__ == "__main__":
    job.main("evaluate")
