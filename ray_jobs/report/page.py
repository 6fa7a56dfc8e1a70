"""The page from what was collected."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ray_jobs.progress import duration
from ray_jobs.report.collect import Report
from ray_jobs.report.figures import loss_figure, rate_figure, svg, validation_figure

_DIRECTIONS = {"text_to_image": "Text to image", "image_to_text": "Image to text"}
_CUTOFFS = (1, 5, 10)


def render(report: Report) -> str:
    """The report as an HTML document.

    All texts are escaped: web texts are not trusted.
    """
    environment = Environment(
        loader=PackageLoader("ray_jobs.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, percent=_percent, count=_count, plain=_plain)
    history = report.train.history
    baseline = report.baseline_train.history if report.baseline_train else ()
    return environment.get_template("page.html.j2").render(
        report=report,
        scores=_scores(report),
        retrieval_sets=_retrieval_sets(report),
        classification_sets=_classification_sets(report),
        curves=[svg(loss_figure(history, baseline)), svg(rate_figure(history))] if history else [],
        validations=svg(validation_figure(report.train.validations))
        if report.train.validations
        else "",
        last=history[-1] if history else {},
        waiting=_waiting(history),
        configuration=yaml.safe_dump(dict(report.configuration), sort_keys=False),
    )


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _plain(name: str) -> str:
    """A name from the code as people read it."""
    return name.replace("_", " ")


def _waiting(history: list[dict[str, float]]) -> float:
    """The share of the training time that was spent waiting for data."""
    seconds = sum(record["seconds"] for record in history)
    waited = sum(record["data_wait_share"] * record["seconds"] for record in history)
    return waited / max(seconds, 1e-9)


def _scores(report: Report) -> list[dict[str, Any]]:
    """Rows of the headline table."""
    if report.evaluation is None or not report.evaluation.searched:
        return []
    rows = []
    for key, name in _DIRECTIONS.items():
        row: dict[str, Any] = {"direction": name}
        row["recall"] = _recalls(report.evaluation.metrics, key)
        row["rank"] = report.evaluation.metrics[f"{key}_median_rank"]
        if report.baseline is not None:
            row["baseline"] = _recalls(report.baseline.metrics, key)
        rows.append(row)
    return rows


def _retrieval_sets(report: Report) -> list[dict[str, Any]]:
    """Rows of the table of captioned images, with the baseline's of the same set."""
    rows = []
    for one, other in _beside(report, "retrieval", ("name",)):
        for key in _DIRECTIONS:
            row = {"of": one, "direction": key, "recall": _recalls(one["found"], key)}
            row["rank"] = one["found"][f"{key}_median_rank"]
            if other is not None:
                row["baseline"] = _recalls(other["found"], key)
            rows.append(row)
    return rows


def _classification_sets(report: Report) -> list[dict[str, Any]]:
    """Rows of the table of labelled images, with the baseline's of the same set and task."""
    rows = []
    for one, other in _beside(report, "classification", ("name", "task")):
        row: dict[str, Any] = {"of": one}
        if other is not None:
            row["baseline"] = {key: other[key] for key in ("top1", "top5", "mean_per_class")}
        rows.append(row)
    return rows


def _beside(
    report: Report, kind: str, keys: Sequence[str]
) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """The evaluation's scores of a kind, and what the baseline has on the same."""
    if report.evaluation is None:
        return []
    others = getattr(report.baseline, kind) if report.baseline is not None else []
    held = {tuple(one[key] for key in keys): one for one in others}
    scores = getattr(report.evaluation, kind)
    return [(one, held.get(tuple(one[key] for key in keys))) for one in scores]


def _recalls(metrics: Mapping[str, float], direction: str) -> list[float]:
    return [metrics[f"{direction}_recall_at_{k}"] for k in _CUTOFFS]
