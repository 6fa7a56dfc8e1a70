"""The main job: pairs in, a trained and evaluated model out. `rwkv-clip pipeline --config FILE`.

    python -m ray_jobs.pipeline --config configs/emoji.yaml

Each stage leaves its result in the storage and is skipped when that is there already, so a run that
was killed at any moment is started again with the same command.
"""

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from ray_jobs.cluster import RayConfig, connected
from ray_jobs.evaluate import EvaluationConfig, EvaluationResult, evaluate
from ray_jobs.ingest import IngestConfig, IngestError, Manifest, ingest
from ray_jobs.progress import Progress, duration
from ray_jobs.sources import SourceError
from ray_jobs.storage import Storage, StorageConfig
from ray_jobs.synthesize import SynthesisConfig, SynthesisError, SynthesisResult, synthesize
from ray_jobs.train import TrainError, TrainResult, pair_files, total_steps, train
from ray_jobs.training.config import TrainConfig
from ray_jobs.training.loop import NonFiniteLossError
from ray_jobs.training.records import Listener
from rwkv_clip.cli import CommandError
from rwkv_clip.config import BaseConfig, add_config_options, config_from_args

logger = logging.getLogger(__name__)

SUMMARY = "run every stage: ingest, describe, train, evaluate"
_FAILURES = (SourceError, IngestError, SynthesisError, TrainError, NonFiniteLossError)


class PipelineConfig(BaseConfig):
    """A whole run."""

    storage: StorageConfig
    ray: RayConfig = RayConfig()
    train_data: IngestConfig = Field(description="the pairs that are learnt from")
    test_data: IngestConfig | None = Field(None, description="the pairs that are searched")
    synthesis: SynthesisConfig | None = Field(
        None, description="how descriptions are written; absent to train without"
    )
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


@dataclass(frozen=True)
class Stage:
    """How a stage went, for the table at the end."""

    name: str
    outcome: str
    seconds: float


@dataclass(frozen=True)
class PipelineResult:
    """What a run left."""

    stages: list[Stage]
    synthesis: SynthesisResult | None
    train: TrainResult
    evaluation: EvaluationResult | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the pipeline that the arguments ask for, and print its table."""
    config = config_from_args(PipelineConfig, args)
    storage = Storage(config.storage)
    try:
        with connected(config.ray) as logs:
            _say(f"storage: {storage.uri}\nlogs of Ray and its workers: {logs}")
            result = pipeline(config, storage)
    except _FAILURES as error:
        raise CommandError(str(error)) from error
    _say(_table(storage, result))
    return 0


def pipeline(config: PipelineConfig, storage: Storage) -> PipelineResult:
    """Run all stages; Ray must be initialised.

    Raises:
        SourceError, IngestError, SynthesisError, TrainError, NonFiniteLossError: as the stages do.
    """
    stages: list[Stage] = []
    start = time.perf_counter()
    data = ingest(config.train_data, storage, "train")
    test = ingest(config.test_data, storage, "test") if config.test_data else None
    stages.append(Stage("ingest", _ingested(data, test), time.perf_counter() - start))

    described = None
    if config.synthesis is not None:
        start = time.perf_counter()
        described = synthesize(config.synthesis, storage)
        stages.append(Stage("describe", _described(described), time.perf_counter() - start))

    start = time.perf_counter()
    trained = _train(config, storage)
    outcome = f"{trained.steps:,} steps of {config.train.batch:,}"
    if trained.resumed:
        outcome += ", were done already"
    stages.append(Stage("train", outcome, time.perf_counter() - start))

    evaluated = None
    if test is not None:
        start = time.perf_counter()
        evaluated = evaluate(config.evaluation, storage, trained.checkpoint, "test")
        recall = 100 * evaluated.metrics["text_to_image_recall_at_10"]
        stages.append(Stage("evaluate", f"R@10 {recall:.1f} %", time.perf_counter() - start))
    return PipelineResult(stages, described, trained, evaluated)


def _train(config: PipelineConfig, storage: Storage) -> TrainResult:
    """Train, telling how far it is from the records that the first worker sends."""
    batch = config.train.batch
    total = total_steps(config.train, pair_files(storage)) * batch
    with Progress("train", total, "pairs") as progress:

        def show(record: Mapping[str, float]) -> None:
            done = int(record["step"]) * batch
            if progress.count == progress.skipped == 0 and done > config.train.log_steps * batch:
                progress.skip(done)
            waits = f"waits {100 * record['data_wait_share']:.0f} % for data"
            progress.update(max(done - progress.count, 0), f"loss {record['loss']:.3f}, {waits}")

        with Listener(show) as listener:
            result = train(config.train, storage, on_record=listener.send)
        if result.resumed:
            progress.skip(total)
    return result


def _ingested(train_data: Manifest, test: Manifest | None) -> str:
    counts = [f"{train_data.rows:,} pairs to train"]
    if test is not None:
        counts.append(f"{test.rows:,} to test")
    rejected = sum(train_data.rejected.values()) + sum(test.rejected.values() if test else ())
    return ", ".join([*counts, f"{rejected:,} rejected"])


def _described(result: SynthesisResult) -> str:
    told = f"{100 * result.kept_share:.0f} % of {result.rows:,} by {result.model}"
    if result.incidents:
        told += f", {len(result.incidents)} chunks redone"
    return told + (", were done already" if result.resumed else "")


def _table(storage: Storage, result: PipelineResult) -> str:
    lines = [
        f"{stage.name:<10} {duration(stage.seconds):>12}   {stage.outcome}"
        for stage in result.stages
    ]
    if result.evaluation is not None:
        lines.append("")
        metrics = result.evaluation.metrics
        for direction in ("text_to_image", "image_to_text"):
            scores = "  ".join(
                f"R@{k} {100 * metrics[f'{direction}_recall_at_{k}']:5.1f} %" for k in (1, 5, 10)
            )
            lines.append(f"{direction.replace('_', ' '):<15} {scores}")
        lines.append(f"by chance       R@10 {100 * result.evaluation.chance:5.1f} %")
    lines.append(f"model: {storage.child_uri(result.train.checkpoint)}")
    return "\n".join(lines)


def _say(text: str) -> None:
    """What the command line shows."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ray_jobs.pipeline`, with the same options as `rwkv-clip pipeline`."""
    from rwkv_clip.cli import main as command

    arguments = list(sys.argv[1:] if argv is None else argv)
    return command(["pipeline", *arguments])


if __name__ == "__main__":
    sys.exit(main())
