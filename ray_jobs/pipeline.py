"""The main job: pairs in, a trained, evaluated and registered model out, and a report.

    rwkv-clip pipeline --config configs/emoji.yaml
    python -m ray_jobs.pipeline --config configs/emoji.yaml

Each stage leaves its result in the storage and is skipped when that is there already, so a run that
was killed at any moment is started again with the same command.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from pydantic import Field, model_validator
from ray.exceptions import RayError
from ray.train import TrainingFailedError

import rwkv_clip
from ray_jobs import job
from ray_jobs.beside import CAPTIONS, DESCRIPTIONS, Beside
from ray_jobs.caption import CaptionConfig, CaptionResult, caption
from ray_jobs.cluster import RayConfig, connected, full_disk
from ray_jobs.embed import EmbedConfig, EmbedError, embed
from ray_jobs.encoding import TextsError, check_texts
from ray_jobs.evaluate import Evaluation, EvaluationConfig, EvaluationResult, OpenedSets
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import IngestError, Manifest
from ray_jobs.memory import PeakMemory
from ray_jobs.progress import Progress
from ray_jobs.report import (
    Report,
    StageTime,
    StageTimes,
    collect,
    examples,
    loss_figure,
    rate_figure,
    render,
    validation_figure,
)
from ray_jobs.sources import SourceError
from ray_jobs.sources.base import on_server
from ray_jobs.storage import Storage, StorageConfig
from ray_jobs.summary import PipelineResult, Stage, stage_lines, table
from ray_jobs.synthesize import SynthesisConfig, SynthesisError, SynthesisResult, synthesize
from ray_jobs.tracking import StageRun, Tracker, TrackingConfig, TrackingError
from ray_jobs.tracking.config import STORE_ERRORS
from ray_jobs.tracking.registry import CHAMPION, Registered, champion_of, crown, register
from ray_jobs.tracking.source import ModelSource, ModelSourceError, model_source, stored_model
from ray_jobs.train import (
    VALIDATION,
    TrainError,
    TrainResult,
    data_identity,
    is_trained,
    total_steps,
    train,
    trained,
)
from ray_jobs.training.batches import PairFiles
from ray_jobs.training.config import TextWeights, TrainConfig
from ray_jobs.training.loop import NonFiniteLossError
from ray_jobs.training.records import Listener
from rwkv_clip.cli import CommandError
from rwkv_clip.config import BaseConfig, config_from_args

logger = logging.getLogger(__name__)

SUMMARY = "run every stage: ingest, caption, describe, train, evaluate, register, report"
REPORT = "report.html"
_MEMORY = "memory.json"
_BASELINE = "baseline"
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
        with connected(config.ray) as logs:
            _say(f"storage: {storage.uri}\nlogs of Ray and its workers: {logs}")
            if stage is None:
                told = table(storage, pipeline(config, storage))
            else:
                told = stage_lines(run_stage(config, storage, stage))
    except (*_FAILURES, OSError, RayError, TrainingFailedError) as error:
        if (full := full_disk(error, storage.uri)) is not None:
            raise CommandError(full) from error
        if not isinstance(error, _FAILURES):
            raise
        raise CommandError(str(error)) from error
    _say(told)
    return 0


def pipeline(config: PipelineConfig, storage: Storage) -> PipelineResult:
    """Run all stages; Ray must be initialised.

    Raises:
        SourceError, IngestError, SynthesisError, TrainError, NonFiniteLossError: as the stages do.
        TrackingError: MLflow cannot be reached.
    """
    with _opened(config, storage) as opened, PeakMemory() as memory:
        return opened.run(memory)


def run_stage(config: PipelineConfig, storage: Storage, stage: str) -> list[Stage]:
    """Run one stage alone, `ingest` to `embed`; Ray must be initialised.

    Raises:
        SourceError, IngestError, SynthesisError, TrainError, NonFiniteLossError: as the stages do,
            and where an earlier stage has not left what this one needs.
        TrackingError: MLflow cannot be reached.
    """
    with _opened(config, storage) as opened:
        opened.run_stage(stage)
        return opened.stages


@contextmanager
def _opened(config: PipelineConfig, storage: Storage) -> Iterator["_Pipeline"]:
    """The pipeline with its runs."""
    config = on_server(config, config.storage.s3)
    if config.tracking is None:
        yield _Pipeline(config, storage, None)
        return
    settings = config.model_dump(mode="json", exclude={"ray", "serve", "tracking"})
    with Tracker(config.tracking, storage, settings, config.name) as tracker:
        yield _Pipeline(config, storage, tracker)


class _Pipeline:
    """One run of `pipeline`."""

    def __init__(self, config: PipelineConfig, storage: Storage, tracker: Tracker | None) -> None:
        self.config, self.storage, self.tracker = config, storage, tracker
        self.stages: list[Stage] = []
        self.times = StageTimes(storage)
        self.took: list[StageTime] = []

    def run(self, memory: PeakMemory) -> PipelineResult:
        config = self.config
        if config.evaluation.model is not None:
            raise ModelSourceError(
                "evaluation.model is for `rwkv-clip evaluate`; a pipeline scores the models that "
                "it trains: leave it out"
            )
        sets = OpenedSets.of(config.evaluation)  # what cannot be read is told before any work
        data, test = self._ingest()
        captioned = self._caption(data)
        described = self._describe(data)
        main = self._train("train", config.train, data)
        evaluated = self._evaluate("evaluation", main.best, test, sets)
        baseline_train = baseline = None
        if (settings := config.baseline_train()) is not None:
            baseline_train = self._train(_BASELINE, settings, data)
            best = baseline_train.best
            baseline = self._evaluate(f"{_BASELINE}-evaluation", best, test, sets)
        registered = self._register(main, evaluated)
        if config.embed is not None:
            self._embed_after(config.embed, registered)
        # Last, because endpoints follow it at once, and search needs the champion's vectors.
        registered = self._crown(registered)
        peak = self._peak(memory)
        report = Report(
            title=config.name,
            configuration=config.model_dump(mode="json", exclude={"ray", "serve", "tracking"}),
            versions=_versions(),
            data=[data, test] if test else [data],
            train=main,
            stages=self.took,
            captioning=captioned,
            synthesis=described,
            evaluation=evaluated,
            baseline=baseline,
            baseline_train=baseline_train,
            baseline_texts=_texts(config.baseline) if config.baseline else "",
            registered=f"{registered.uri}: {registered.told}" if registered else "",
            peak_memory=peak,
            examples=examples(self.storage, test, sets, evaluated) if evaluated else (),
            **collect(self.storage, data, described is not None),
        )
        self._publish(report)
        return PipelineResult(
            stages=self.stages,
            captioning=captioned,
            synthesis=described,
            train=main,
            evaluation=evaluated,
            baseline=baseline,
            registered=registered,
            report=self.storage.child_uri(REPORT),
            peak_memory=peak,
            tracking=self.tracker.place if self.tracker else "",
        )

    def run_stage(self, stage: str) -> None:
        config, storage = self.config, self.storage
        if stage == "ingest":
            self._ingest()
            return
        if stage == "evaluate":
            test = Manifest.from_storage(storage, "test") if config.test_data else None
            if self._evaluate_alone(test) is None:
                raise TrainError(
                    "the configuration has neither test_data nor sets of images under evaluation"
                )
            return
        if stage == "embed":
            self._embed(config.embed or EmbedConfig())
            return
        data = Manifest.from_storage(storage, "train")
        if stage == "caption":
            if self._caption(data) is None:
                raise SynthesisError("the configuration has no section captioning; add one")
            return
        if stage == "synthesize" and config.synthesis is None:
            raise SynthesisError("the configuration has no section synthesis; add one")
        self._check_finished(data, "captioning", "caption", CAPTIONS)
        if stage == "synthesize":
            self._describe(data)
            return
        self._check_finished(data, "synthesis", "synthesize", DESCRIPTIONS)
        self._train("train", config.train, data)

    def _check_finished(self, data: Manifest, section: str, job: str, kind: str) -> None:
        """Raise SynthesisError if a section's texts are not there: readers would do without."""
        file = Beside(kind, data.name).manifest_file
        if getattr(self.config, section) is not None and not self.storage.exists(file):
            raise SynthesisError(
                f"{self.storage.child_uri(file)} does not exist: the {kind} that the section "
                f"{section} asks for are not finished; run {job} first, or leave that section out "
                f"(--set {section}=null)"
            )

    def _ingest(self) -> tuple[Manifest, Manifest | None]:
        config = self.config
        took: list[tuple[float, int]] = []
        with self._stage("ingest") as told:
            data = self._ingest_one(config.train_data, "train", took)
            test = self._ingest_one(config.test_data, "test", took) if config.test_data else None
            if config.validation_data is not None:
                self._ingest_one(config.validation_data, VALIDATION, took)
            self._check_texts(test)
            counts = [f"{data.rows:,} pairs to train"]
            if test is not None:
                counts.append(f"{test.rows:,} to test")
            rejected = sum(sum(one.rejected.values()) for one in (data, test) if one)
            told.append(", ".join([*counts, f"{rejected:,} rejected"]))
        self._took("ingest", sum(one for one, _ in took), sum(rows for _, rows in took), "pairs")
        return data, test

    def _ingest_one(
        self, config: IngestConfig, name: str, took: list[tuple[float, int]]
    ) -> Manifest:
        """A data set; appends its seconds and rows, where somebody knows what it took."""
        with self.times.measured(f"ingest {name}", config.digest()) as work:
            work.resumed = self.storage.exists(f"pairs/{name}/manifest.json")
            manifest = ingest(config, self.storage, name)
        if work.seconds:
            took.append((work.seconds, manifest.rows))
        return manifest

    def _check_texts(self, test: Manifest | None) -> None:
        """Raise TextsError before hours of work that nothing could be scored by."""
        if test is not None:
            files = PairFiles.of(self.storage, test.name)
            check_texts(files, self.config.evaluation.text, "evaluation.text")
        if (validation := self.config.train.validation) is not None:
            files = PairFiles.of(self.storage, VALIDATION)
            check_texts(files, validation.text, "train.validation.text")

    def _caption(self, data: Manifest) -> CaptionResult | None:
        config = self.config.captioning
        if config is None:
            return None
        done = self.storage.exists(Beside(CAPTIONS, data.name).manifest_file)
        of = config.identity(data)
        with self._stage("caption") as told, self._tracked("captioning", done, of) as run:
            run.params(of)
            self._note_data(run, data, "captioning")
            result = caption(config, self.storage)
            run.metrics(
                {
                    "rows": result.rows,
                    "incidents": len(result.incidents),
                    "rows_per_second": result.rows / max(result.seconds, 1e-9),
                    **{f"source_{key}": count for key, count in result.sources.items()},
                }
            )
            run.json("incidents.json", result.incidents)
            without = sum(n for key, n in result.sources.items() if key.startswith("none"))
            outcome = f"{result.rows:,} by {result.model}, {without:,} without a caption"
            told.append(outcome + _already(result.resumed))
        self._took("caption", result.seconds, result.rows, "pairs")
        return result

    def _describe(self, data: Manifest) -> SynthesisResult | None:
        config = self.config.synthesis
        if config is None:
            return None
        done = self.storage.exists(Beside(DESCRIPTIONS, data.name).manifest_file)
        of = config.identity(self.storage, data)
        with self._stage("describe") as told, self._tracked("synthesis", done, of) as run:
            run.params(of)
            self._note_data(run, data, "synthesis")
            result = synthesize(config, self.storage)
            run.metrics(
                {
                    "rows": result.rows,
                    "kept_share": result.kept_share,
                    "retried": result.retried,
                    "incidents": len(result.incidents),
                    "rows_per_second": result.rows / max(result.seconds, 1e-9),
                    **{f"source_{key}": count for key, count in result.sources.items()},
                    **{f"refused_{key}": count for key, count in result.refusals.items()},
                }
            )
            run.json("incidents.json", result.incidents)
            outcome = f"{100 * result.kept_share:.0f} % of {result.rows:,} by {result.model}"
            if result.incidents:
                outcome += f", {len(result.incidents)} chunks redone"
            told.append(outcome + _already(result.resumed))
        self._took("describe", result.seconds, result.rows, "pairs")
        return result

    def _train(self, folder: str, config: TrainConfig, data: Manifest) -> TrainResult:
        """Train, telling how far it is from the records that the first worker sends."""
        batch = config.batch
        total = total_steps(config, PairFiles.of(self.storage)) * batch
        names = [data.name] if config.validation is None else [data.name, VALIDATION]
        of = [data_identity(self.storage, name) for name in names]
        with (
            self._stage(folder) as told,
            self._tracked(folder, is_trained(self.storage, folder), of) as run,
            Progress(folder, total, "pairs") as progress,
        ):
            run.params(config.model_dump(mode="json"))
            self._note_data(run, data, "training")

            def show(record: Mapping[str, float]) -> None:
                run.step(record)
                done = int(record["step"]) * batch
                if progress.count == progress.skipped == 0 and done > config.log_steps * batch:
                    progress.skip(done)
                waits = f"waits {100 * record['data_wait_share']:.0f} % for data"
                progress.update(
                    max(done - progress.count, 0), f"loss {record['loss']:.3f}, {waits}"
                )

            with Listener(show) as listener:
                result = train(config, self.storage, on_record=listener.send, folder=folder)
            if result.resumed:
                progress.skip(total)
            run.history(result.history)
            run.validations(result.validations)
            run.metrics(
                {
                    "left_out": result.left_out,
                    "skipped_steps": result.skipped_steps,
                    "skipped_validations": result.skipped_validations,
                    "training_seconds": result.seconds,
                }
            )
            if run.run_id is not None:
                _draw(run, result)
            told.append(f"{result.steps:,} steps of {batch:,}" + _already(result.resumed))
        self._took(folder, result.seconds, result.steps * batch, "pairs")
        return result

    def _evaluate_alone(self, test: Manifest | None) -> EvaluationResult | None:
        """Of the model that was trained here, or of any other, whose results have a folder."""
        name, storage = self.config.evaluation.model, self.storage
        if name is None:
            return self._evaluate("evaluation", trained(storage).best, test)
        with model_source(name, storage, self.config.tracking) as source:
            folder = f"evaluation-{source.digest[:12]}"
            checkpoint = source.publish(storage, f"{folder}/model")
            return self._evaluate(folder, checkpoint, test)

    def _evaluate(
        self,
        folder: str,
        checkpoint: str,
        test: Manifest | None,
        sets: OpenedSets | None = None,
    ) -> EvaluationResult | None:
        config = self.config.evaluation
        if test is None and not config.has_sets:
            return None
        name = test.name if test is not None else None
        with self._stage(folder) as told:
            evaluation = Evaluation(config, self.storage, checkpoint, name, folder, sets)
            done = evaluation.held is not None
            with self._tracked(folder, done, evaluation.identity) as run:
                run.params({"checkpoint": checkpoint, **config.model_dump(mode="json")})
                if test is not None:
                    self._note_data(run, test, "evaluation")
                result = evaluation.run()
                run.metrics(result.metrics)
                for file, value in result.clip_benchmark.items():
                    run.json(f"clip_benchmark/{file}", value)
            outcomes = []
            if result.searched:
                recall = 100 * result.metrics["text_to_image_recall_at_10"]
                outcomes.append(f"text to image R@10 {recall:.1f} %")
            outcomes += [
                f"{one['name']} {one['task'].replace('_', ' ')} {100 * one[one['metric']]:.1f} %"
                for one in result.classification
            ]
            outcomes += [
                f"{one['name']} R@1 {100 * one['found']['text_to_image_recall_at_1']:.1f} %"
                for one in result.retrieval
            ]
            told.append(", ".join(outcomes) + _already(done))
        self._took(folder, result.seconds, result.images, "images")
        return result

    def _embed_after(self, config: EmbedConfig, registered: Registered | None) -> None:
        """Embed after the registration; leave vectors as they are if MLflow was away then."""
        asked = self._asked_for(config)
        if asked is None and self.tracker is not None and registered is None:
            told = "waits until MLflow tells which model is served; start again to embed"
            self.stages.append(Stage("embed", told, 0.0))
            return
        others = asked is None and registered is not None and not registered.champion
        try:
            self._embed(config, registered)
        except EmbedError as error:
            if not others:
                raise
            # Vectors of this run, say, which another one's model has won against since.
            self.stages.append(Stage("embed", f"{error}", 0.0))

    def _embed(self, config: EmbedConfig, registered: Registered | None = None) -> None:
        with (
            self._stage("embed") as told,
            self._embedding_model(self._asked_for(config), registered) as source,
        ):
            # Each model's vectors take their own time.
            with self.times.measured(f"embed {config.data}", [source.digest, config.text]) as work:
                result = embed(config, self.storage, source)
                work.resumed = result.resumed
            told.append(
                f"{result.rows:,} of {config.data} in {result.dimensions} dimensions by "
                f"{source.name}" + _already(result.resumed)
            )
        self._took("embed", work.seconds, result.rows, "pairs")

    def _asked_for(self, config: EmbedConfig) -> str | None:
        """The model that the file says vectors are of, or is served; None for the champion."""
        served, tracking = self.config.serve.get("model"), self.config.tracking
        if config.model is not None or not isinstance(served, str):
            return config.model
        champion = tracking and f"models:/{tracking.model_name}@{CHAMPION}"
        return None if served == champion else served

    @contextmanager
    def _embedding_model(
        self, asked: str | None, registered: Registered | None
    ) -> Iterator[ModelSource]:
        """The model that was asked for, or the one that an endpoint serves: the champion.

        Searches find nothing in vectors of any other. The model that was trained here is taken
        where it is the champion, or where there is none.
        """
        name = asked
        if name is None and self.tracker is not None and not (registered and registered.champion):
            name = _champion(self.tracker)
        if name is None:
            yield stored_model(self.storage, trained(self.storage).best)
            return
        with model_source(name, self.storage, self.config.tracking) as source:
            yield source

    def _register(
        self, trained: TrainResult, evaluated: EvaluationResult | None
    ) -> Registered | None:
        if self.tracker is None:
            return None
        with self._stage("register") as told:
            metrics = evaluated.metrics if evaluated else None
            tested = evaluated.tested if evaluated else None
            try:
                with self.times.measured("register", trained.best) as work:
                    there = _versions_of(self.tracker)
                    result = register(self.tracker, self.storage, trained.best, metrics, tested)
                    work.resumed = result.version in there
            except STORE_ERRORS as error:
                logger.warning("the model was not registered: %s; start again", error)
                told.append("MLflow did not answer; start again to register")
                return None
            told.append(f"{result.uri}, {result.told}")
            self.tracker.parent.metrics(metrics or {})
        self._took("register", work.seconds)
        return result

    def _crown(self, registered: Registered | None) -> Registered | None:
        """Crown what is to be the champion; what is to be told of it afterwards."""
        if self.tracker is None or registered is None:
            return registered
        try:
            crowned = crown(self.tracker, registered)
        except STORE_ERRORS as error:
            logger.warning("%s is not the %s: %s; start again", registered.uri, CHAMPION, error)
            told = f"not yet the {CHAMPION}: MLflow did not answer; start again"
            crowned = replace(registered, champion=False, told=told)
        if crowned != registered:
            self.stages.append(Stage("crown", f"{crowned.uri}, {crowned.told}", 0.0))
        return crowned

    def _publish(self, report: Report) -> None:
        """Leave the report in the storage and with the parent run."""
        with self._stage("report") as told:
            page = render(report)
            self.storage.write_bytes(REPORT, page.encode())
            if self.tracker is not None:
                self.tracker.parent.text(REPORT, page)
                digests = {f"data_digest.{one.name}": one.data_digest for one in report.data}
                self.tracker.parent.tags(digests)
                if report.synthesis is not None:
                    model, prompt = report.synthesis.model, report.synthesis.prompt
                    self.tracker.parent.tags({"llm": model, "prompt_version": prompt})
            told.append(f"{len(page) / 1e6:.1f} MB")

    @contextmanager
    def _stage(self, name: str) -> Iterator[list[str]]:
        """A row of the table at the end; the block appends what came out."""
        told: list[str] = []
        start = time.perf_counter()
        yield told
        self.stages.append(Stage(name, "".join(told), time.perf_counter() - start))

    @contextmanager
    def _tracked(self, name: str, done: bool, of: Any) -> Iterator[StageRun]:
        nowhere = nullcontext(StageRun(None, None))
        with self.tracker.stage(name, done, of) if self.tracker else nowhere as run:
            yield run

    def _note_data(self, run: StageRun, data: Manifest, context: str) -> None:
        source = self.storage.child_uri(f"pairs/{data.name}")
        run.dataset(data.name, source, data.data_digest, context)

    def _peak(self, memory: PeakMemory) -> int:
        """The most memory of this run and earlier ones, which may have done most of the work."""
        if self.config.ray.running():
            return 0
        held = self.storage.find_json(_MEMORY) or {}
        peak = max(memory.peak, int(held.get("peak_bytes", 0)))
        self.storage.write_json(_MEMORY, {"peak_bytes": peak})
        if self.tracker is not None:
            self.tracker.parent.metrics({"peak_memory_gb": peak / 1e9})
        return peak

    def _took(self, name: str, seconds: float, count: int = 0, unit: str = "") -> None:
        """A row of the report's table, where somebody knows what the stage took."""
        if seconds:
            self.took.append(StageTime(name, seconds, count, unit))


def _draw(run: StageRun, result: TrainResult) -> None:
    """Leave the report's curves with the training's run."""
    run.figure("loss.png", loss_figure(result.history))
    run.figure("rate.png", rate_figure(result.history))
    if result.validations:
        run.figure("validation.png", validation_figure(result.validations))


def _versions_of(tracker: Tracker) -> set[str]:
    """The versions that the registry has of the model."""
    found = tracker.client.search_model_versions(f"name='{tracker.config.model_name}'")
    return {str(one.version) for one in found}


def _champion(tracker: Tracker) -> str | None:
    """The version that is the registry's champion, if there is one; raises ModelSourceError."""
    name = tracker.config.model_name
    try:
        found = champion_of(tracker.client, name)
    except STORE_ERRORS as error:
        why = str(error).partition("\n")[0]
        raise ModelSourceError(
            f"{tracker.uri} does not tell which model is the {CHAMPION} of {name} ({why}); start "
            "again when it does, or set embed.model"
        ) from error
    return f"models:/{name}/{found.version}" if found else None


def _already(resumed: bool) -> str:
    return ", were done already" if resumed else ""


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
