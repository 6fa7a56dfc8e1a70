"""The embedding job: vectors of an ingested data set, for search and for whoever wants them.

    rwkv-clip embed --config FILE

Beside each part of the pairs it writes a table of the same rows, as far as their images can be
decoded: `vectors/NAME/part-00000.parquet` with id, image_embedding and text_embedding. A run that
was killed does the parts that are not there.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from pydantic import Field

from ray_jobs import job
from ray_jobs.beside import written
from ray_jobs.encoding import EncoderConfig, ImageEncoder, fetch_checkpoint, vectors
from ray_jobs.execution import arrange
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.pairs import TextColumn
from ray_jobs.progress import Progress
from ray_jobs.storage import Storage
from ray_jobs.training.batches import PairFiles

if TYPE_CHECKING:  # the actors that embed import this module, and MLflow takes a second
    from ray_jobs.tracking.source import ModelSource

_READERS = 16  # of footers, which an object store takes its time to give

SUMMARY = "embed an ingested data set, for search"
configure = job.configure
run = partial(job.run_stage, "embed")


class EmbedError(RuntimeError):
    """Embedding cannot start; the message says what to do."""


class EmbedConfig(EncoderConfig):
    """What is embedded, and with what."""

    data: str = Field("test", description="a data set of the storage: train, test or validation")
    model: str | None = Field(
        None,
        description="models:/NAME@ALIAS, or the folder or URI of a checkpoint; if absent what is "
        "served: `serve.model`, or without it the registry's champion, and where there is none the "
        "model that was trained in this storage",
    )
    text: TextColumn | None = Field("caption", description="of texts; null for images alone")
    replace: bool = Field(
        False, description="replace vectors of another model or of other data, instead of stopping"
    )


@dataclass(frozen=True)
class EmbedResult:
    """What a finished run left.

    Attributes:
        rows: that have vectors.
        left_out: rows whose image could not be decoded.
        dimensions: of a vector.
        seconds: of work, in the run that finished it.
        model: where the model came from.
        resumed: whether an earlier run had done all of it.
    """

    rows: int
    left_out: int
    dimensions: int
    seconds: float
    model: str
    resumed: bool = False


def vectors_folder(name: str) -> str:
    """Where the vectors of a data set are."""
    return f"vectors/{name}"


def embed(config: EmbedConfig, storage: Storage, source: "ModelSource") -> EmbedResult:
    """Embed a data set of the storage; goes on where an earlier run stopped.

    Ray must be initialised.

    Args:
        config: how.
        storage: holds the pairs, and gets the vectors.
        source: of the model.

    Raises:
        EmbedError: the storage holds vectors of another model, which are not to be replaced.
    """
    manifest = Manifest.from_storage(storage, config.data)
    folder = vectors_folder(config.data)
    # Who embeds other texts than a table says need not embed anew.
    says = [one for one in written(storage, config.data) if config.text in one.says]
    identity = {
        "model": source.digest,
        "text": config.text,
        "precision": config.precision,
        "data_digest": manifest.data_digest,
        "beside": {one.kind: storage.read_json(one.manifest_file)["run"] for one in says},
    }
    record, claim = f"{folder}/manifest.json", f"{folder}/run.json"
    # What an older release did not note is taken for the same.
    held = {**identity, **(storage.find_json(claim) or {})}
    if held != identity:
        if not config.replace:
            raise EmbedError(
                f"{storage.child_uri(folder)} holds vectors of another model than {source.name}, "
                "or of other data, texts or precision; set embed.replace, or delete that folder, "
                "to embed anew"
            )
        for file in storage.names(folder, recursive=True):
            if file != claim:  # which goes last, so that a run killed here is known by it
                storage.delete(file)
    if (done := storage.find_json(record)) is not None:
        return EmbedResult(**done["result"], resumed=True)
    storage.write_json(claim, identity)
    checkpoint = source.publish(storage, f"{folder}/model")
    started = time.monotonic()
    _embed(config, storage, manifest, checkpoint)
    files = [_file(config.data, part.name) for part in manifest.parts]
    with ThreadPoolExecutor(_READERS) as pool:
        shapes = list(pool.map(partial(_shape, storage), files))
    rows = sum(count for count, _ in shapes)
    dimensions = shapes[-1][1] if shapes else 0
    result = EmbedResult(
        rows, manifest.rows - rows, dimensions, time.monotonic() - started, source.name
    )
    told = asdict(result)
    del told["resumed"]
    storage.write_json(record, {"run": identity, "result": told})
    return result


class PartEncoder(ImageEncoder):
    """Embeds whole parts; one in each of Ray Data's actors.

    Args:
        storage: holds the checkpoint and the pairs.
        checkpoint: its folder's name.
        config: what is embedded.
    """

    def __init__(self, storage: Storage, checkpoint: str, config: EmbedConfig) -> None:
        model = fetch_checkpoint(storage, checkpoint)
        super().__init__(model, config, gpus_key="embed.gpus_per_worker")
        self.storage, self.config = storage, config
        self.files = PairFiles.of(storage, config.data)

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[int]]]:
        """Do a part; gives rows as they are done, the last ones when the part is written."""
        (part,) = batch["part"].tolist()
        left = sum(self.files.row_groups[part])
        tables = []
        for pairs in self.files.batches(part, self.config.batch):
            tables.append(self._table(pairs))
            left -= len(pairs)
            if left:
                yield {"rows": [len(pairs)]}
        file = _file(self.config.data, self.files.names[part])
        self.storage.write_table(file, pa.concat_tables(tables))
        yield {"rows": [len(pairs)]}

    @torch.inference_mode()
    def _table(self, pairs: Sequence[Mapping[str, Any]]) -> pa.Table:
        ids = [pair["id"] for pair in pairs]
        image_emb, usable, _ = self.encode_images([pair["image"] for pair in pairs], ids)
        columns = {
            "id": pa.array([ids[at] for at in usable], pa.string()),
            "image_embedding": vectors(image_emb),
        }
        if self.config.text is not None:
            texts = [pairs[at][self.config.text] or "" for at in usable]
            columns["text_embedding"] = vectors(self.encode_texts(texts))
        return pa.table(columns)


def _embed(config: EmbedConfig, storage: Storage, manifest: Manifest, checkpoint: str) -> None:
    files = {*storage.names(vectors_folder(config.data), suffix=".parquet")}
    there = {part.name for part in manifest.parts if _file(config.data, part.name) in files}
    todo = [at for at, part in enumerate(manifest.parts) if part.name not in there]
    if not todo:
        return
    work = [{"part": at} for at in todo]
    dataset = config.embedded("embed", work, PartEncoder, storage, checkpoint, config)
    done = sum(part.rows for part in manifest.parts if part.name in there)
    with Progress(f"embed {config.data}", manifest.rows, "pairs", done=done) as progress:
        for row in arrange(dataset).iter_rows():
            progress.update(row["rows"])


def _shape(storage: Storage, name: str) -> tuple[int, int]:
    """Rows and dimensions of a part, from its footer."""
    about = storage.read_footer(name)
    return about.num_rows, about.schema.to_arrow_schema().field("image_embedding").type.list_size


def _file(name: str, part: str) -> str:
    return f"{vectors_folder(name)}/{part}.parquet"


if __name__ == "__main__":
    job.main("embed")
