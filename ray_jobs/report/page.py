"""The page from what was collected."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ray_jobs.progress import duration
from ray_jobs.report.collect import Report
from ray_jobs.report.figures import loss_figure, rate_figure, svg, validation_figure

_DIRECTIONS = ("text_to_image", "image_to_text")
_CUTOFFS = (1, 5, 10)
_ACCURACIES = ("top1", "top5", "mean_per_class")


@dataclass(frozen=True)
class Row:
    """Scores of one kind.

    Attributes:
        name: what was done.
        scores: fractions.
        rank: the median rank; None for what is not searched.
        baseline: the second training's scores, if there are any.
    """

    name: str
    scores: Sequence[float]
    rank: float | None
    baseline: Sequence[float] | None

    @property
    def margins(self) -> list[tuple[str, str]]:
        """By how many points the baseline is surpassed, each with its class of the style sheet."""
        told = []
        for score, other in zip(self.scores, self.baseline or (), strict=False):
            points = round(100 * (score - other), 1)
            kind = "up" if points > 0 else "down" if points < 0 else ""
            told.append((f"{points + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}"), kind))
        return told


@dataclass(frozen=True)
class Table:
    """All scores on one data set.

    Attributes:
        of: what is known of the data set.
        large: the place of the score to look at first.
        chance: what guessing gives of that score.
        rows: the scores.
    """

    of: Mapping[str, Any]
    large: int
    chance: float
    rows: Sequence[Row]


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
    history, validations = report.train.history, report.train.validations
    baseline = report.baseline_train.history if report.baseline_train else ()
    losses = loss_figure(history, baseline, report.baseline_texts) if history else None
    return environment.get_template("page.html.j2").render(
        report=report,
        pairs=list(_pairs(report)),
        retrieval_sets=list(_retrieval_sets(report)),
        classification_sets=list(_classification_sets(report)),
        curves=[svg(losses), svg(rate_figure(history))] if losses else [],
        validations=svg(validation_figure(validations)) if validations else "",
        last=history[-1] if history else {},
        guessing=math.log(report.configuration["train"]["batch"]),
        waiting=_waiting(history),
        configuration=yaml.safe_dump(
            dict(report.configuration), sort_keys=False, allow_unicode=True
        ),
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


def _pairs(report: Report) -> Iterator[Table]:
    """The pairs, if any were searched."""
    found, other = report.evaluation, report.baseline
    if found is not None and found.searched:
        rows = _directions(found.metrics, other.metrics if other is not None else None)
        yield Table({"pairs": found.metrics["pairs"]}, 2, found.chance, rows)


def _retrieval_sets(report: Report) -> Iterator[Table]:
    """The sets of captioned images."""
    for (one, other), *_ in _beside(report, "retrieval"):
        rows = _directions(one["found"], other["found"] if other else None)
        yield Table(one, 0, 1 / one["images"], rows)


def _classification_sets(report: Report) -> Iterator[Table]:
    """The sets of labelled images."""
    for scores in _beside(report, "classification"):
        rows = [
            Row(
                _plain(one["task"]),
                [one[name] for name in _ACCURACIES],
                None,
                [other[name] for name in _ACCURACIES] if other else None,
            )
            for one, other in scores
        ]
        first, _ = scores[0]
        yield Table(first, _ACCURACIES.index(first["metric"]), 1 / first["classes"], rows)


def _beside(report: Report, kind: str) -> list[list[tuple[dict[str, Any], dict[str, Any] | None]]]:
    """The evaluation's scores of a kind, by set, each with the baseline's on the same."""
    told = getattr(report.evaluation, kind, [])
    others = getattr(report.baseline, kind, [])
    held = {(one["name"], one.get("task")): one for one in others}
    sets: dict[str, list[tuple[dict[str, Any], dict[str, Any] | None]]] = {}
    for one in told:
        beside = held.get((one["name"], one.get("task")))
        sets.setdefault(one["name"], []).append((one, beside))
    return list(sets.values())


def _directions(found: Mapping[str, float], other: Mapping[str, float] | None) -> list[Row]:
    """What was found in either direction."""
    return [
        Row(
            _plain(direction),
            _recalls(found, direction),
            found[f"{direction}_median_rank"],
            _recalls(other, direction) if other is not None else None,
        )
        for direction in _DIRECTIONS
    ]


def _recalls(metrics: Mapping[str, float], direction: str) -> list[float]:
    return [metrics[f"{direction}_recall_at_{k}"] for k in _CUTOFFS]
