"""Results in the JSON of LAION's CLIP_benchmark, so that its tables and plots take them.

One file holds one result: dataset, model, pretrained, task, metrics, language. Scores are
fractions. Image retrieval is text-to-image, text retrieval is image-to-text. CLIP_benchmark gives
no acc5 for fewer than five classes and writes NaN there; that is no JSON, so here it is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from rwkv_clip.evaluation.classification import ClassificationResult
from rwkv_clip.evaluation.linear_probe import LinearProbeResult
from rwkv_clip.evaluation.retrieval import RetrievalResult

Task = Literal["zeroshot_classification", "zeroshot_retrieval", "linear_probe"]
TASKS: tuple[Task, ...] = get_args(Task)
Metrics = Mapping[str, float | None]

_FEWEST_CLASSES_FOR_TOP5 = 5


@dataclass(frozen=True)
class BenchmarkResult:
    """One file of CLIP_benchmark.

    Attributes:
        dataset: its name there, such as "cifar10" or "wds/mscoco_captions".
        model: the architecture's name.
        pretrained: which weights of it.
        task: what was measured.
        metrics: by CLIP_benchmark's names; None where there is no value.
        language: of class names, prompts or captions.
    """

    dataset: str
    model: str
    pretrained: str
    task: Task
    metrics: Metrics
    language: str = "en"


def benchmark_result(
    result: ClassificationResult | RetrievalResult | LinearProbeResult,
    *,
    dataset: str,
    model: str,
    pretrained: str,
    language: str = "en",
) -> BenchmarkResult:
    """A result of this package under CLIP_benchmark's names."""
    task, metrics = _named(result)
    return BenchmarkResult(dataset, model, pretrained, task, metrics, language)


def write_result(path: str | Path, result: BenchmarkResult) -> None:
    """Write one result, in place of what is there.

    Raises:
        ValueError: a metric is NaN or infinite.
    """
    text = json.dumps(asdict(result) | {"metrics": dict(result.metrics)}, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_result(path: str | Path) -> BenchmarkResult:
    """Read one result, of this package or of CLIP_benchmark.

    Metrics that are no numbers (CLIP_benchmark's NaN, or what its versions add) become None or are
    left out; unknown keys are ignored, and language is "en" where it is missing.

    Raises:
        ValueError: the file is no such result; the message names it and what is wrong.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise ValueError(f"{path} is no result of CLIP_benchmark: it has no object `metrics`")
    task = content.get("task")
    if task not in TASKS:
        raise ValueError(f"{path} has task {task!r}; takes {', '.join(TASKS)}")
    texts: dict[str, str] = {}
    for key in ("dataset", "model", "pretrained", "language"):
        value = content.get(key, "en" if key == "language" else None)
        if not isinstance(value, str):
            raise ValueError(f"{path} has {key} {value!r}; takes a string")
        texts[key] = value
    try:
        metrics = _numbers(content["metrics"])
    except OverflowError as error:
        raise ValueError(f"{path} has a metric that is too large a number: {error}") from error
    return BenchmarkResult(task=task, metrics=metrics, **texts)


def _named(
    result: ClassificationResult | RetrievalResult | LinearProbeResult,
) -> tuple[Task, dict[str, float | None]]:
    if isinstance(result, RetrievalResult):
        images, texts = result.text_to_image.recall_at, result.image_to_text.recall_at
        return "zeroshot_retrieval", {
            **{f"image_retrieval_recall@{k}": value for k, value in images.items()},
            **{f"text_retrieval_recall@{k}": value for k, value in texts.items()},
        }
    if isinstance(result, LinearProbeResult):
        scores = _classification(result.classification)
        named = {f"lp_{key}": value for key, value in scores.items()}
        return "linear_probe", {**named, "l2_strength": result.strength}
    return "zeroshot_classification", _classification(result)


def _classification(result: ClassificationResult) -> dict[str, float | None]:
    return {
        "acc1": result.top1,
        "acc5": result.top5 if result.classes >= _FEWEST_CLASSES_FOR_TOP5 else None,
        "mean_per_class_recall": result.mean_per_class,
    }


def _numbers(metrics: Mapping[str, object]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for key, value in metrics.items():
        if value is None:
            numbers[key] = None
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[key] = float(value) if math.isfinite(value) else None
    return numbers
