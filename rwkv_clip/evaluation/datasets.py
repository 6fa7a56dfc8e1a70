"""The data sets of the paper's zero-shot classification: prompts, the metric, and the counts.

They are data, in datasets.json beside this file, in the paper's order. Class names belong to the
data sets and are not here; a digest tells whether one has those of the published numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from rwkv_clip.evaluation.classification import ClassificationResult


@dataclass(frozen=True)
class DatasetSpec:
    """How a data set is evaluated.

    Attributes:
        name: how it is called here.
        classes: how many.
        test_images: how many the published evaluation has; None where it does not say.
        metric: the field of ClassificationResult that is reported for it.
        class_names_sha256: of the class names joined by newlines, in UTF-8.
        templates: sentences with `{}` where the class name goes.
    """

    name: str
    classes: int
    test_images: int | None
    metric: Literal["top1", "mean_per_class"]
    class_names_sha256: str
    templates: tuple[str, ...]

    def score(self, result: ClassificationResult) -> float:
        """The number that is reported for this data set, a fraction."""
        return result.top1 if self.metric == "top1" else result.mean_per_class

    def has_class_names(self, class_names: Sequence[str]) -> bool:
        """Whether these are the class names, in the order, of the published evaluation."""
        digest = hashlib.sha256("\n".join(class_names).encode()).hexdigest()
        return digest == self.class_names_sha256


def dataset_names() -> tuple[str, ...]:
    """All names, in the paper's order."""
    return tuple(_specs())


def dataset_spec(name: str) -> DatasetSpec:
    """The data set of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    specs = _specs()
    if name not in specs:
        raise ValueError(f"no data set is named {name!r}; takes {', '.join(specs)}")
    return specs[name]


@cache
def _specs() -> dict[str, DatasetSpec]:
    text = files("rwkv_clip.evaluation").joinpath("datasets.json").read_text(encoding="utf-8")
    return {
        name: DatasetSpec(name=name, **fields | {"templates": tuple(fields["templates"])})
        for name, fields in json.loads(text).items()
    }
