"""Zero-shot classification and linear probes on data sets of labelled images.

A data set is a folder whose folders are the classes, or Parquet files with an image and a label:

    classification:
      - name: cifar10
        test: {path: data/cifar10/test}
        train: {path: data/cifar10/train}

The prompts of the published data sets are known by their names. Class names are those of the
folders, the names that a Parquet file of the `datasets` library carries, or given.
"""

import hashlib
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ray_jobs.encoding import ImageEncoder, fetch_checkpoint, matrix, vectors
from ray_jobs.execution import arrange
from ray_jobs.progress import Progress
from ray_jobs.sources import SourceError
from ray_jobs.sources.base import MAX_FILE_BYTES, FilesConfig, Unit
from ray_jobs.sources.files import find_files, open_file
from ray_jobs.sources.parquet import image_bytes, read_footer, read_rows, row_group_units
from ray_jobs.storage import Storage
from rwkv_clip.config import BaseConfig
from rwkv_clip.evaluation import (
    ClassificationResult,
    benchmark_result,
    classify,
    dataset_names,
    dataset_spec,
    linear_probe,
    zero_shot_classifier,
)

logger = logging.getLogger(__name__)

ZERO_SHOT, LINEAR_PROBE = "zero_shot", "linear_probe"
_DEFAULT_TEMPLATES = ("a photo of a {}.",)
_PARQUET = (".parquet", ".pq")
_LOWER = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_IMAGES = (*_LOWER, *(suffix.upper() for suffix in _LOWER))


class LabelledConfig(FilesConfig):
    """Images with labels: a folder of class folders, or Parquet files."""

    image: str = Field("image", description="column of encoded images, in Parquet files")
    label: str = Field("label", description="column of labels, in Parquet files")


class ClassificationConfig(BaseConfig):
    """A data set that a model is to classify."""

    name: str = Field(description=f"of the data set; known are {', '.join(dataset_names())}")
    test: LabelledConfig = Field(description="the images that are classified")
    train: LabelledConfig | None = Field(
        None, description="the images that a linear probe learns from; absent for zero-shot alone"
    )
    class_names: tuple[str, ...] | dict[str, str] | None = Field(
        None,
        description="names in the order of the labels, or names by label; those of the data if "
        "absent",
    )
    templates: tuple[str, ...] | None = Field(
        None, description="prompts with {} for the class name; the published ones if absent"
    )

    @model_validator(mode="after")
    def _templates_take_a_name(self) -> "ClassificationConfig":
        for template in self.templates or ():
            if "{}" not in template:
                raise ValueError(f"templates: {template!r} has no {{}}; the class name goes there")
        return self

    def prompts(self) -> tuple[str, ...]:
        """The templates."""
        if self.templates:
            return self.templates
        return dataset_spec(self.name).templates if self.is_known else _DEFAULT_TEMPLATES

    @property
    def is_known(self) -> bool:
        """Whether it is one of the published data sets."""
        return self.name in dataset_names()


class EncoderConfig(BaseConfig):
    """What embeds."""

    batch: PositiveInt = Field(256, description="images or texts embedded at a time")
    workers: PositiveInt = Field(1, description="processes that embed")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that each holds")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each holds")


@dataclass(frozen=True)
class ClassificationScore:
    """How well a data set was classified.

    Attributes:
        name: of the data set.
        task: ZERO_SHOT or LINEAR_PROBE.
        images: that were classified.
        left_out: images that could not be decoded.
        classes: how many there are.
        top1, top5, mean_per_class: fractions.
        metric: which of them is reported for this data set.
        published_names: whether the class names are those of the published numbers; None if there
            are no published numbers.
        clip_benchmark: the same as LAION's CLIP_benchmark writes it.
    """

    name: str
    task: str
    images: int
    left_out: int
    classes: int
    top1: float
    top5: float
    mean_per_class: float
    metric: str
    published_names: bool | None
    clip_benchmark: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """By names that MLflow takes."""
        names = ("top1", "top5", "mean_per_class")
        return {f"{self.name}_{self.task}_{name}": getattr(self, name) for name in names}


class LabelledImages:
    """Where labelled images are; safe to send to other processes.

    Args:
        config: of the files.
        key: of the configuration, for errors.

    Raises:
        SourceError: there are none, or they cannot be read.
    """

    def __init__(self, config: LabelledConfig, key: str) -> None:
        self.config, self.key = config, key
        self.names: tuple[str, ...] | None = None
        files = find_files(config, (*_PARQUET, *_IMAGES))
        self.is_parquet = any(file.uri.endswith(_PARQUET) for file in files)
        self.units: list[list[Unit]] = []
        if self.is_parquet:
            for file in (one for one in files if one.uri.endswith(_PARQUET)):
                metadata, schema = read_footer(file.uri, config.s3)
                self._check(schema, file.uri)
                self.names = self.names or _feature_names(schema, config.label)
                self.units += [
                    [unit] for unit in row_group_units(file, metadata, config.unit_rows, 1 << 29)
                ]
        else:
            single = [Unit(file.uri, file.label, 0, 1, size=file.size) for file in files]
            for unit in single:
                if "/" not in unit.label:
                    raise SourceError(
                        f"{key}.path: {unit.path} is in no folder of a class; each class is a "
                        "folder of its images"
                    )
            rows = config.unit_rows
            self.units = [single[at : at + rows] for at in range(0, len(single), rows)]

    @property
    def rows(self) -> int:
        """How many images there are."""
        return sum(unit.rows or 0 for units in self.units for unit in units)

    @property
    def digest(self) -> str:
        """Tells these files from any others, as long as one that changes changes its size."""
        told = [
            [unit.label, unit.first, unit.rows, unit.size] for one in self.units for unit in one
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def read(self, units: Sequence[Unit]) -> Iterator[tuple[str, str, bytes]]:
        """Name, label and encoded image of each; an image that cannot be read is empty."""
        for unit in units:
            if self.is_parquet:
                yield from self._rows(unit)
                continue
            with open_file(unit.path, self.config.s3) as stream:
                small = (unit.size or 0) <= MAX_FILE_BYTES
                image = bytes(stream.read()) if small else b""
            yield unit.label, posixpath.dirname(unit.label).partition("/")[0], image

    def _rows(self, unit: Unit) -> Iterator[tuple[str, str, bytes]]:
        columns = [self.config.image, self.config.label]
        for number, row in read_rows(unit, columns, self.config.s3):
            name = f"{unit.label}:{number}"
            if isinstance(row, str):
                logger.warning("left out: %s: %s", name, row)
                continue
            image = image_bytes(row[self.config.image])
            yield name, str(row[self.config.label]), bytes(image or b"")  # type: ignore[call-overload]

    def _check(self, schema: pa.Schema, where: str) -> None:
        for field, column in (("image", self.config.image), ("label", self.config.label)):
            if column not in schema.names:
                raise SourceError(
                    f"{self.key}.{field}: {where} has no column {column!r}; it has "
                    f"{', '.join(schema.names)}"
                )


def _feature_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library keeps in a Parquet file's metadata."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, told["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


class LabelledEncoder(ImageEncoder):
    """Embeds labelled images; one in each of Ray Data's actors.

    Args:
        storage: holds the checkpoint.
        checkpoint: its folder's name.
        images: where they are.
        batch: images embedded at a time.
    """

    def __init__(
        self, storage: Storage, checkpoint: str, images: LabelledImages, batch: int
    ) -> None:
        super().__init__(fetch_checkpoint(storage, checkpoint))
        self.images, self.batch = images, batch

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        """Embeddings of the unit's images."""
        (at,) = batch["unit"].tolist()
        waiting: list[tuple[str, str, bytes]] = []
        for row in self.images.read(self.images.units[at]):
            waiting.append(row)
            if len(waiting) == self.batch:
                yield self._table(waiting)
                waiting = []
        if waiting:
            yield self._table(waiting)

    def _table(self, rows: Sequence[tuple[str, str, bytes]]) -> pa.Table:
        names = [name for name, _, _ in rows]
        embedded, usable, _ = self.encode_images([image for _, _, image in rows], names)
        return pa.table(
            {
                "label": pa.array([rows[at][1] for at in usable], pa.string()),
                "image_embedding": vectors(embedded),
            }
        )


def open_sets(
    configs: Sequence[ClassificationConfig],
) -> list[tuple[ClassificationConfig, LabelledImages, LabelledImages | None]]:
    """The data sets with their files; raises SourceError before any work."""
    opened = []
    for at, config in enumerate(configs):
        key = f"evaluation.classification.{at}"
        test = LabelledImages(config.test, f"{key}.test")
        train = LabelledImages(config.train, f"{key}.train") if config.train else None
        opened.append((config, test, train))
    return opened


def score_set(
    config: ClassificationConfig,
    test: LabelledImages,
    train: LabelledImages | None,
    encoder: EncoderConfig,
    storage: Storage,
    checkpoint: str,
) -> list[ClassificationScore]:
    """Classify a data set, zero-shot and, if there are images to learn from, by a linear probe.

    Raises:
        SourceError: labels and class names do not fit.
    """
    table, left_out = _embed(f"classify {config.name}", test, encoder, storage, checkpoint)
    learnt = None
    if train is not None:
        learnt, _ = _embed(f"probe {config.name}", train, encoder, storage, checkpoint)
    found = {*table["label"].to_pylist(), *(learnt["label"].to_pylist() if learnt else ())}
    if not found:
        raise SourceError(f"{test.key}.path: none of the images can be decoded")
    names = _class_names(config, found, test)
    labels = list(names)
    class_names = list(names.values())
    published = None
    if config.is_known:
        published = dataset_spec(config.name).has_class_names(class_names)
        if not published:
            logger.warning(
                "%s: the class names are not those of the published numbers", config.name
            )
    images, targets = matrix(table["image_embedding"]), _indices(table["label"], labels)
    model = fetch_checkpoint(storage, checkpoint).eval()
    classes = zero_shot_classifier(model, class_names, config.prompts(), encoder.batch)
    metric = dataset_spec(config.name).metric if config.is_known else "top1"

    def told(task: str, result: ClassificationResult, benchmark: Any) -> ClassificationScore:
        return ClassificationScore(
            config.name,
            task,
            len(table),
            left_out,
            len(labels),
            result.top1,
            result.top5,
            result.mean_per_class,
            metric,
            published,
            asdict(
                benchmark_result(
                    benchmark, dataset=config.name, model="RWKV-CLIP", pretrained=checkpoint
                )
            ),
        )

    zero_shot = classify(images, classes, targets)
    scores = [told(ZERO_SHOT, zero_shot, zero_shot)]
    if learnt is not None:
        probe = linear_probe(
            matrix(learnt["image_embedding"]),
            _indices(learnt["label"], labels),
            images,
            targets,
            num_classes=len(labels),
        )
        scores.append(told(LINEAR_PROBE, probe.classification, probe))
    return scores


def _embed(
    told: str, images: LabelledImages, config: EncoderConfig, storage: Storage, checkpoint: str
) -> tuple[pa.Table, int]:
    """Labels and embeddings of all images, in order, and how many images were left out."""
    work = [pa.table({"unit": [at]}) for at in range(len(images.units))]
    dataset = ray.data.from_arrow(work).map_batches(
        LabelledEncoder,
        fn_constructor_args=(storage, checkpoint, images, config.batch),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker or None,
    )
    arrange(dataset, ordered=True)
    tables: list[pa.Table] = []
    batches: Iterator[Any] = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    with Progress(told, images.rows, "images") as progress:
        for batch in batches:
            tables.append(batch)
            progress.update(batch.num_rows)
    table = pa.concat_tables(tables).combine_chunks()
    return table, images.rows - len(table)


def _class_names(
    config: ClassificationConfig, found: set[str], images: LabelledImages
) -> dict[str, str]:
    """Names by label, in the labels' order; raises SourceError where a label has no name."""
    key = images.key.rpartition(".")[0]
    given = config.class_names
    if given is None and images.names is not None:
        given = images.names
    numbers = all(label.isdecimal() for label in found)
    if isinstance(given, Mapping):
        names = dict(given)
    elif given is not None:
        labels = map(str, range(len(given))) if numbers else iter(sorted(found))
        names = dict(zip(labels, given, strict=False))
        if not numbers and len(given) != len(found):
            raise SourceError(
                f"{key}.class_names: has {len(given)} names, and the data has {len(found)} labels; "
                "give a name for each, in the labels' order, or names by label"
            )
    elif numbers and images.is_parquet:
        raise SourceError(
            f"{key}.class_names: the labels are numbers, and the files do not name them; give the "
            "names in order"
        )
    else:
        names = {label: label.replace("_", " ") for label in sorted(found)}
    if missing := sorted(found - set(names)):
        raise SourceError(
            f"{key}.class_names: has no name for the label {missing[0]!r}; {len(names)} are named"
        )
    if repeated := [name for name, times in Counter(names.values()).items() if times > 1]:
        logger.warning("%s: several classes are named %r", config.name, repeated[0])
    return names


def _indices(labels: pa.ChunkedArray, order: Sequence[str]) -> npt.NDArray[np.int64]:
    found = pc.index_in(labels, pa.array(order, pa.string()))
    return np.asarray(found.to_numpy(), np.int64)
