"""What a run came to, and how the terminal shows it at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_jobs.caption import CaptionResult
from ray_jobs.evaluate import EvaluationResult
from ray_jobs.progress import duration
from ray_jobs.storage import Storage
from ray_jobs.synthesize import SynthesisResult
from ray_jobs.tracking.registry import Registered
from ray_jobs.train import TrainResult


@dataclass(frozen=True)
class Stage:
    """How a stage went, for the table at the end.

    Attributes:
        name: the stage's.
        outcome: what it did.
        seconds: that it took this time.
    """

    name: str
    outcome: str
    seconds: float


@dataclass(frozen=True)
class PipelineResult:
    """What a run left.

    Attributes:
        report: the report's place.
        peak_memory: the most that all processes held together, in bytes, in any run so far; 0 on
            a cluster that ran before, whose processes nobody looked at.
        tracking: how to look at the runs.
    """

    stages: list[Stage]
    captioning: CaptionResult | None
    synthesis: SynthesisResult | None
    train: TrainResult
    evaluation: EvaluationResult | None
    baseline: EvaluationResult | None
    registered: Registered | None
    report: str
    peak_memory: int
    tracking: str


def table(storage: Storage, result: PipelineResult) -> str:
    """The stages, the scores, and where everything is."""
    lines = [stage_lines(result.stages)]
    if result.evaluation is not None:
        lines += ["", *scores(result.evaluation, result.baseline), ""]
    if result.peak_memory:
        lines.append(f"memory: {result.peak_memory / 1e9:.1f} GB at its peak, of all processes")
    lines.append(f"model:  {storage.child_uri(result.train.best)}")
    if result.registered is not None:
        lines.append(f"        {result.registered.uri}")
    if result.tracking:
        lines.append(f"runs:   {result.tracking}")
    lines.append(f"report: {result.report}")
    return "\n".join(lines)


def stage_lines(stages: Sequence[Stage]) -> str:
    """A line for each stage."""
    width = max(len(stage.name) for stage in stages)
    return "\n".join(
        f"{stage.name:<{width}} {duration(stage.seconds):>12}   {stage.outcome}" for stage in stages
    )


def scores(evaluation: EvaluationResult, baseline: EvaluationResult | None) -> list[str]:
    """Lines of what was scored; below each the baseline's, and how far it is surpassed."""
    others = _measures(baseline) if baseline is not None else {}
    rows: list[tuple[str, str, Mapping[str, float]]] = []
    for label, measured in _measures(evaluation).items():
        rows.append((label, "{:5.1f} %", measured))
        if (other := others.get(label)) is None:
            continue
        margins = {name: value - other[name] for name, value in measured.items()}
        rows.append((f"{label} (baseline)", "{:5.1f} %", other))
        rows.append((f"{label} (margin)", "{:+5.1f}  ", margins))
    if evaluation.searched:
        rows.append(("by chance", "{:5.1f} %", {"R@10": evaluation.chance}))
    width = max(27, *(len(label) for label, _, _ in rows))
    lines = []
    for label, form, values in rows:
        told = "  ".join(f"{name} {form.format(100 * value)}" for name, value in values.items())
        lines.append(f"{label:<{width}} {told}".rstrip())
    return lines


def _measures(evaluation: EvaluationResult) -> dict[str, dict[str, float]]:
    """What the table shows of an evaluation, by what was searched or classified."""
    searched = [("", evaluation.metrics)] if evaluation.searched else []
    searched += [(f"{one['name']} ", one["found"]) for one in evaluation.retrieval]
    found = {
        f"{name}{direction.replace('_', ' ')}": {
            f"R@{k}": metrics[f"{direction}_recall_at_{k}"] for k in (1, 5, 10)
        }
        for name, metrics in searched
        for direction in ("text_to_image", "image_to_text")
    }
    for one in evaluation.classification:
        told = {"top-1": one["top1"], "top-5": one["top5"], "per class": one["mean_per_class"]}
        found[f"{one['name']} {one['task'].replace('_', ' ')}"] = told
    return found
