"""The main job: pairs in, a trained, evaluated and registered model out, and a report.

    rwkv-clip pipeline --config configs/emoji.yaml
    python -m ray_jobs.pipeline --config configs/emoji.yaml

Each stage leaves its result in the storage and is skipped when that is there already, so a run that
was killed at any moment is started again with the same command.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from pydantic import Field, model_validator
from ray.exceptions import RayError
from ray.train import TrainingFailedError

import rwkv_clip
from ray_jobs import job
from ray_jobs.beside import CAPTIONS, DESCRIPTIONS, Beside
from ray_jobs.caption import CaptionConfig
from ray_jobs.cluster import RayConfig, connected, full_disk, unwritable
from ray_jobs.embed import EmbedConfig, EmbedError
from ray_jobs.encoding import TextsError
from ray_jobs.evaluate import EvaluationConfig, OpenedSets
from ray_jobs.ingest import IngestConfig
from ray_jobs.ingestion.manifest import IngestError, Manifest
from ray_jobs.memory import PeakMemory
from ray_jobs.report import Report, collect, examples
from ray_jobs.sources import SourceError
from ray_jobs.sources.base import on_server
from ray_jobs.stages import BASELINE, REPORT, Stages
from ray_jobs.storage import Storage, StorageConfig, refused_by_server
from ray_jobs.summary import PipelineResult, Stage, stage_lines, table
from ray_jobs.synthesize import SynthesisConfig, SynthesisError
from ray_jobs.tracking import Tracker, TrackingConfig, TrackingError
from ray_jobs.tracking.source import ModelSourceError
from ray_jobs.train import TrainError
from ray_jobs.training.config import TextWeights, TrainConfig
from ray_jobs.training.loop import NonFiniteLossError
from rwkv_clip.cli import CommandError
from rwkv_clip.config import BaseConfig, config_from_args

SUMMARY = "run every stage: ingest, caption, describe, train, evaluate, register, report"
# What asks for texts beside the pairs: the section, and the job that writes them.
_ASKED_BY = {CAPTIONS: ("captioning", "caption"), DESCRIPTIONS: ("synthesis", "synthesize")}
_FAILURES = (
    SourceError,
    IngestError,
    SynthesisError,
    TrainError,
    NonFiniteLossError,
    TrackingError,
    EmbedError,
    ModelSourceError,
    TextsError,
)


class PipelineConfig(BaseConfig):
    """A whole run."""

    name: str = Field("RWKV-CLIP", description="what the report and the run are called")
    storage: StorageConfig
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig | None = Field(
        TrackingConfig(), description="where runs and models are tracked; null for nowhere"
    )
    train_data: IngestConfig = Field(description="the pairs that are learnt from")
    test_data: IngestConfig | None = Field(None, description="the pairs that are searched")
    validation_data: IngestConfig | None = Field(
        None, description="the pairs that train.validation searches while training goes on"
    )
    captioning: CaptionConfig | None = Field(
        None, description="how captions and tags are made; absent to take those that are there"
    )
    synthesis: SynthesisConfig | None = Field(
        None, description="how descriptions are written; absent to train without"
    )
    train: TrainConfig = TrainConfig()
    baseline: TextWeights | None = Field(
        None, description="texts of a second training, all else equal, to compare the first with"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    embed: EmbedConfig | None = Field(
        None, description="embeds a data set after the training; `rwkv-clip embed` needs no section"
    )
    serve: dict[str, Any] = Field({}, description="the endpoint's, which `rwkv-clip serve` checks")

    @model_validator(mode="after")
    def _validation_has_data(self) -> "PipelineConfig":
        if (self.train.validation is None) != (self.validation_data is None):
            raise ValueError("train.validation and validation_data go together; give both or none")
        return self

    @model_validator(mode="after")
    def _embedded_is_ingested(self) -> "PipelineConfig":
        there = [
            name
            for name in ("train", "test", "validation")
            if getattr(self, f"{name}_data") is not None
        ]
        if self.embed is not None and self.embed.data not in there:
            raise ValueError(
                f"embed.data is {self.embed.data!r}, and there is no {self.embed.data}_data; set "
                f"it to {' or '.join(there)}, or leave embed out"
            )
        return self

    def baseline_train(self) -> TrainConfig | None:
        """The second training, if one is asked for."""
        if self.baseline is None:
            return None
        data = self.train.data.model_copy(update={"texts": self.baseline})
        return self.train.model_copy(update={"data": data})


configure = job.configure


def run(args: argparse.Namespace) -> int:
    """Run the pipeline that the arguments ask for, and print its table."""
    return run_job(args)


def run_job(args: argparse.Namespace, stage: str | None = None) -> int:
    """Run the pipeline, or one stage of it, and print what came out."""
    config = config_from_args(PipelineConfig, args)
    storage = Storage(config.storage)
    try:
        storage.exists("pairs")  # before Ray, which takes its time: does the server answer?
        with connected(config.ray) as logs:
            _say(f"storage: {storage.uri}\nlogs of Ray and its workers: {logs}")
            if stage is None:
                told = table(storage, pipeline(config, storage))
            else:
                told = stage_lines(run_stage(config, storage, stage))
    except (*_FAILURES, OSError, RayError, TrainingFailedError) as error:
        if (cause := full_disk(error, storage.uri) or unwritable(error, storage)) is not None:
            raise CommandError(cause) from error
        if isinstance(error, _FAILURES):
            raise CommandError(str(error)) from error
        if (cause := refused_by_server(error, storage)) is not None:
            raise CommandError(cause) from error
        raise
    _say(told)
    return 0


def pipeline(config: PipelineConfig, storage: Storage) -> PipelineResult:
    """Run all stages; Ray must be initialised.

    Raises:
        SourceError, IngestError, SynthesisError, TrainError, NonFiniteLossError: as the stages do.
        TrackingError: MLflow cannot be reached.
    """
    with _opened(config, storage) as stages, PeakMemory() as memory:
        return _run(stages, memory)


def run_stage(config: PipelineConfig, storage: Storage, stage: str) -> list[Stage]:
    """Run one stage alone, `ingest` to `embed`; Ray must be initialised.

    Raises:
        SourceError, IngestError, SynthesisError, TrainError, NonFiniteLossError: as the stages do,
            and where an earlier stage has not left what this one needs.
        TrackingError: MLflow cannot be reached.
    """
    with _opened(config, storage) as stages:
        _run_alone(stages, stage)
        return stages.table


@contextmanager
def _opened(config: PipelineConfig, storage: Storage) -> Iterator[Stages]:
    """The stages with their runs."""
    config = on_server(config, config.storage.s3)
    if config.tracking is None:
        yield Stages(config, storage, None)
        return
    settings = config.model_dump(mode="json", exclude={"ray", "serve", "tracking"})
    with Tracker(config.tracking, storage, settings, config.name) as tracker:
        yield Stages(config, storage, tracker)


def _run(stages: Stages, memory: PeakMemory) -> PipelineResult:
    config, storage = stages.config, stages.storage
    if config.evaluation.model is not None:
        raise ModelSourceError(
            "evaluation.model is for `rwkv-clip evaluate`; a pipeline scores the models that "
            "it trains: leave it out"
        )
    sets = OpenedSets.of(config.evaluation)  # what cannot be read is told before any work
    data, test, validation = stages.ingest()
    manifests = [one for one in (data, test, validation) if one is not None]
    stages.check_training(data)
    captioned = stages.caption(data)
    described = stages.describe(data)
    main = stages.train("train", config.train, data)
    evaluated = stages.evaluate("evaluation", main.best, test, sets)
    stages.tag_run(manifests, described)
    registered = stages.register(main, evaluated)
    if config.embed is not None:
        stages.embed_after(config.embed, registered)
    # After that, because endpoints follow it at once, and search needs the champion's vectors.
    registered = stages.crown(registered)
    # Last, because it takes as long as the model took, which is served meanwhile.
    baseline_train = baseline = None
    if (settings := config.baseline_train()) is not None:
        baseline_train = stages.train(BASELINE, settings, data)
        baseline = stages.evaluate(f"{BASELINE}-evaluation", baseline_train.best, test, sets)
    result = PipelineResult(
        stages=stages.table,
        captioning=captioned,
        synthesis=described,
        train=main,
        evaluation=evaluated,
        baseline=baseline,
        registered=registered,
        report=storage.child_uri(REPORT),
        peak_memory=stages.peak_memory(memory),
        tracking=stages.tracker.place if stages.tracker else "",
    )
    report = Report(
        title=config.name,
        configuration=config.model_dump(mode="json", exclude={"ray", "serve", "tracking"}),
        versions=_versions(),
        data=manifests,
        train=main,
        stages=stages.took,
        captioning=captioned,
        synthesis=described,
        evaluation=evaluated,
        baseline=baseline,
        baseline_train=baseline_train,
        baseline_texts=_texts(config.baseline) if config.baseline else "",
        registered=f"{registered.uri}: {registered.told}" if registered else "",
        peak_memory=result.peak_memory,
        examples=examples(storage, test, sets, evaluated) if evaluated else (),
        **collect(storage, data, described is not None),
    )
    stages.publish(report)
    return result


def _run_alone(stages: Stages, stage: str) -> None:
    config, storage = stages.config, stages.storage
    if stage == "ingest":
        stages.ingest()
        return
    if stage == "evaluate":
        test = Manifest.from_storage(storage, "test") if config.test_data else None
        if stages.evaluate_alone(test) is None:
            raise TrainError(
                "the configuration has neither test_data nor sets of images under evaluation"
            )
        return
    if stage == "embed":
        embedding = config.embed or EmbedConfig()
        if embedding.data == "train":
            for kind in _ASKED_BY:
                if embedding.text in Beside(kind, "train").says:
                    _check_finished(config, storage, kind)
        stages.embed(embedding)
        return
    data = Manifest.from_storage(storage, "train")
    if stage == "caption":
        if stages.caption(data) is None:
            raise SynthesisError("the configuration has no section captioning; add one")
        return
    if stage == "synthesize" and config.synthesis is None:
        raise SynthesisError("the configuration has no section synthesis; add one")
    _check_finished(config, storage, CAPTIONS)
    if stage == "synthesize":
        stages.describe(data)
        return
    _check_finished(config, storage, DESCRIPTIONS)
    stages.train("train", config.train, data)


def _check_finished(config: PipelineConfig, storage: Storage, kind: str) -> None:
    """Raise SynthesisError if texts that are asked for are not there: readers would do without."""
    section, writer = _ASKED_BY[kind]
    file = Beside(kind, "train").manifest_file
    if getattr(config, section) is not None and not storage.exists(file):
        raise SynthesisError(
            f"{storage.child_uri(file)} does not exist: the {kind} that the section {section} "
            f"asks for are not finished; run {writer} first, or leave that section out "
            f"(--set {section}=null)"
        )


def _texts(weights: TextWeights) -> str:
    """Which texts a training reads."""
    shares = {name.replace("_", " "): weight for name, weight in weights if weight}
    if len(shares) == 1:
        return f"with {next(iter(shares))} alone"
    return "with " + ", ".join(f"{name} {weight:g}" for name, weight in shares.items())


def _versions() -> dict[str, str]:
    """Of what made the run."""
    versions = {"rwkv-clip": rwkv_clip.__version__}
    return versions | {name: version(name) for name in ("torch", "ray", "mlflow")}


def _say(text: str) -> None:
    """What the command line shows."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    job.main("pipeline")
