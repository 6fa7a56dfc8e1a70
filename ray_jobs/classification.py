"""Zero-shot classification and linear probes on data sets of labelled images.

A data set is a folder whose folders are the classes, or Parquet files with an image and a label:

    classification:
      - name: cifar10
        test: {path: data/cifar10/test}
        train: {path: data/cifar10/train}

The prompts of the published data sets are known by their names. Class names are those of the
folders, the names that a Parquet file of the `datasets` library carries, or given.

ImageNet has 80,000 prompts and 1,281,167 images to learn from, so prompts are embedded where images
are, and a linear probe is fitted there.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from pydantic import Field, model_validator

from ray_jobs.encoding import (
    EncoderConfig,
    ImageEncoder,
    fetch_checkpoint,
    given_device,
    matrix,
    vectors,
)
from ray_jobs.image_sets import SET_NAME, ImageSet, ImageSetConfig, embed_set
from ray_jobs.sources import SourceError
from ray_jobs.storage import Storage
from rwkv_clip.config import BaseConfig
from rwkv_clip.evaluation import (
    ClassificationResult,
    LinearProbeResult,
    benchmark_result,
    class_embeddings,
    classify,
    dataset_names,
    dataset_spec,
    linear_probe,
    prompts,
    zero_shot_classifier,
)

logger = logging.getLogger(__name__)

ZERO_SHOT, LINEAR_PROBE = "zero_shot", "linear_probe"
_DEFAULT_TEMPLATES = ("a photo of a {}.",)
_GPUS = "evaluation.gpus_per_worker"
_FEW_PROMPTS = 256  # embedded here before a process that embeds would have started


class LabelledConfig(ImageSetConfig):
    """Images with labels: a folder of class folders, or Parquet files."""

    label: str = Field("label", description="column of labels, in Parquet files")


class ClassificationConfig(BaseConfig):
    """A data set that a model is to classify."""

    name: str = Field(
        pattern=SET_NAME, description=f"of the data set; known are {', '.join(dataset_names())}"
    )
    test: LabelledConfig = Field(description="the images that are classified")
    train: LabelledConfig | None = Field(
        None, description="the images that a linear probe learns from; absent for zero-shot alone"
    )
    class_names: tuple[str, ...] | dict[str, str] | str | None = Field(
        None,
        description="names in the order of the labels, or names by label, or a JSON file of "
        "either; those of the data if absent",
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


@dataclass(frozen=True)
class ClassificationScore:
    """How well a data set was classified.

    Attributes:
        name: of the data set.
        task: ZERO_SHOT or LINEAR_PROBE.
        images: that were classified.
        left_out: images that have no label, or cannot be read or decoded.
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


def _feature_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library keeps in a Parquet file's metadata."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, told["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def open_sets(
    configs: Sequence[ClassificationConfig],
) -> list[tuple[ClassificationConfig, ImageSet, ImageSet | None]]:
    """The data sets with their files and class names; raises SourceError before any work."""
    opened = []
    for at, config in enumerate(configs):
        key = f"evaluation.classification.{at}"
        if isinstance(config.class_names, str):
            # The names themselves: who changes the file changes what is asked.
            names = _named_in(config.class_names, f"{key}.class_names")
            config = config.model_copy(update={"class_names": names})
        test = labelled(config.test, f"{key}.test")
        train = labelled(config.train, f"{key}.train") if config.train else None
        opened.append((config, test, train))
    return opened


def labelled(config: LabelledConfig, key: str) -> ImageSet:
    """Images with labels; raises SourceError."""
    return ImageSet(config, config.label, key, "label", labels=True)


def score_set(
    config: ClassificationConfig,
    test: ImageSet,
    train: ImageSet | None,
    encoder: EncoderConfig,
    storage: Storage,
    checkpoint: str,
) -> list[ClassificationScore]:
    """Classify a data set, zero-shot and, if there are images to learn from, by a linear probe.

    Takes what `open_sets` gives, whose configuration has class names and no file of them.

    Raises:
        SourceError: labels and class names do not fit.
    """
    table = _with_labels(embed_set(f"classify {config.name}", test, encoder, storage, checkpoint))
    learnt: list[str] = []
    if train is not None:
        to_learn = embed_set(f"probe {config.name}", train, encoder, storage, checkpoint)
        to_learn = _with_labels(to_learn)
        learnt = _labels(to_learn)
        features = ray.put(matrix(to_learn["image_embedding"]))
        del to_learn  # gigabytes, for which the driver has no use
    found = {*_labels(table), *learnt}
    names = class_names_of(config, found, test)
    labels = list(names)
    class_names = list(names.values())
    images, targets = matrix(table["image_embedding"]), _indices(_labels(table), labels)
    classes = _classes(config, class_names, encoder, storage, checkpoint)
    metric = dataset_spec(config.name).metric if config.is_known else "top1"
    published = _published(config, class_names)

    def told(task: str, result: ClassificationResult, benchmark: Any) -> ClassificationScore:
        counts = (len(table), test.rows - len(table), len(labels))
        accuracies = (result.top1, result.top5, result.mean_per_class)
        written = benchmark_result(
            benchmark, dataset=config.name, model="RWKV-CLIP", pretrained=checkpoint
        )
        return ClassificationScore(
            config.name, task, *counts, *accuracies, metric, published, asdict(written)
        )

    zero_shot = classify(images, classes, targets)
    scores = [told(ZERO_SHOT, zero_shot, zero_shot)]
    if train is not None:
        # The processes that embedded have ended; there is room for one that holds as much.
        holding = ray.remote(num_cpus=encoder.cpus_per_worker, num_gpus=encoder.gpus_per_worker)
        task: Any = holding(_probe)
        arguments = (features, _indices(learnt, labels), images, targets, len(labels))
        probe: LinearProbeResult = ray.get(task.remote(*arguments))
        scores.append(told(LINEAR_PROBE, probe.classification, probe))
    return scores


class PromptEncoder(ImageEncoder):
    """Embeds prompts; one in each of Ray Data's actors."""

    def __init__(self, storage: Storage, checkpoint: str, config: EncoderConfig) -> None:
        super().__init__(fetch_checkpoint(storage, checkpoint), config, gpus_key=_GPUS)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """`text_embedding` of some prompts."""
        (texts,) = batch["texts"].tolist()
        return pa.table({"text_embedding": vectors(self.encode_texts(texts))})


def _classes(
    config: ClassificationConfig,
    class_names: Sequence[str],
    encoder: EncoderConfig,
    storage: Storage,
    checkpoint: str,
) -> torch.Tensor:
    """What `zero_shot_classifier` gives; many prompts are embedded by the encoder's processes."""
    templates, batch = config.prompts(), encoder.batch
    texts = [text for name in class_names for text in prompts(name, templates)]
    if len(texts) <= min(batch, _FEW_PROMPTS):
        model = fetch_checkpoint(storage, checkpoint)
        return zero_shot_classifier(model, class_names, templates, batch)
    work = [{"texts": texts[at : at + batch]} for at in range(0, len(texts), batch)]
    told = f"prompts of {config.name}"
    arguments = (storage, checkpoint, encoder)
    table = encoder.gather(told, len(texts), "prompts", work, PromptEncoder, *arguments)
    embedded = torch.tensor(matrix(table["text_embedding"]))
    return class_embeddings(embedded.unflatten(0, (len(class_names), -1)))


def _probe(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    tested: npt.NDArray[np.float32],
    targets: npt.NDArray[np.int64],
    classes: int,
) -> LinearProbeResult:
    """A linear probe, on the device of the task that this is called in."""
    device = given_device(_GPUS)
    learnt, asked = (torch.tensor(given, device=device) for given in (features, tested))
    return linear_probe(learnt, labels, asked, targets, num_classes=classes)


def class_names_of(
    config: ClassificationConfig, found: set[str], images: ImageSet
) -> dict[str, str]:
    """Names by label, in the labels' order; raises SourceError where a label has no name."""
    key = images.key.rpartition(".")[0]
    given = config.class_names
    if given is None and images.schema is not None:
        given = _feature_names(images.schema, images.column)
    numbers = all(label.isdecimal() for label in found)
    if isinstance(given, Mapping):
        names = dict(given)
    elif given is not None:
        labels = _numbered(found, len(given)) if numbers else sorted(found)
        names = dict(zip(labels, given, strict=False))
        if not numbers and len(given) != len(found):
            raise SourceError(
                f"{key}.class_names: has {len(given)} names, and the data has {len(found)} labels; "
                "give a name for each, in the labels' order, or names by label"
            )
    elif numbers:
        raise SourceError(
            f"{key}.class_names: the labels are numbers, and the data does not name them; give "
            "the names in order"
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


def _published(config: ClassificationConfig, class_names: Sequence[str]) -> bool | None:
    """Whether the names are those of the published numbers; None if there are no such numbers."""
    if not config.is_known:
        return None
    published = dataset_spec(config.name).has_class_names(class_names)
    if not published:
        logger.warning("%s: the class names are not those of the published numbers", config.name)
    return published


def _numbered(found: set[str], names: int) -> list[str]:
    """Labels that are numbers, in the order of so many names.

    They count from 0, and then some may be missing; or each name has one, as folders 001 to 100 do.
    """
    if len(found) == names and max(map(int, found)) >= names:
        return sorted(found, key=int)
    written = {int(label): label for label in found}
    return [written.get(number, str(number)) for number in range(names)]


def _named_in(path: str, key: str) -> tuple[str, ...] | dict[str, str]:
    """Class names from a JSON file: a list, or names by label; raises SourceError."""
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(read, dict):
            return {str(label): str(name) for label, name in read.items()}
        if isinstance(read, list):
            return tuple(map(str, read))
        problem = f"is a {type(read).__name__}"
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {error}"
    raise SourceError(
        f"{key}: {path} {problem}; takes a JSON file of names in the order of the labels, or of "
        "names by label"
    )


def _with_labels(table: pa.Table) -> pa.Table:
    """Without the images whose label is null."""
    return table.filter(pc.greater(pc.list_value_length(table["values"]), 0))


def _labels(table: pa.Table) -> list[str]:
    return [values[0] for values in table["values"].to_pylist()]


def _indices(labels: Sequence[str], order: Sequence[str]) -> npt.NDArray[np.int64]:
    place = {label: at for at, label in enumerate(order)}
    return np.array([place[label] for label in labels], np.int64)
