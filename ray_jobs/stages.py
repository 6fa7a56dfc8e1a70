"""The pipeline's stages: each done, tracked, timed, and told in the table at the end."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_jobs.beside import CAPTIONS, DESCRIPTIONS, Beside
from ray_jobs.caption import CaptionResult, caption
from ray_jobs.embed import EmbedConfig, EmbedError, embed
from ray_jobs.encoding import check_texts
from ray_jobs.evaluate import Evaluation, EvaluationResult, OpenedSets
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.memory import PeakMemory
from ray_jobs.progress import Progress
from ray_jobs.report import (
    Report,
    StageTime,
    StageTimes,
    loss_figure,
    rate_figure,
    render,
    validation_figure,
)
from ray_jobs.storage import Storage
from ray_jobs.summary import Stage
from ray_jobs.synthesize import SynthesisResult, synthesize
from ray_jobs.tracking import StageRun, Tracker
from ray_jobs.tracking.config import STORE_ERRORS
from ray_jobs.tracking.metrics import counts
from ray_jobs.tracking.registry import CHAMPION, Registered, champion_of, crown, register
from ray_jobs.tracking.source import ModelSource, ModelSourceError, model_source, stored_model
from ray_jobs.train import (
    VALIDATION,
    TrainResult,
    check_trainable,
    data_identity,
    is_trained,
    total_steps,
    train,
    trained,
)
from ray_jobs.training.batches import PairFiles
from ray_jobs.training.config import TrainConfig
from ray_jobs.training.records import Listener

if TYPE_CHECKING:  # which imports this module
    from ray_jobs.pipeline import PipelineConfig

logger = logging.getLogger(__name__)

REPORT = "report.html"
BASELINE = "baseline"
_MEMORY = "memory.json"


class Stages:
    """The stages of one run.

    Args:
        config: of the pipeline.
        storage: gets what they make.
        tracker: of their runs; None where nothing is tracked.

    Attributes:
        table: of the stages that are done, for the end.
        took: of those whose time is known, for the report.
    """

    def __init__(self, config: "PipelineConfig", storage: Storage, tracker: Tracker | None) -> None:
        self.config, self.storage, self.tracker = config, storage, tracker
        self.table: list[Stage] = []
        self.times = StageTimes(storage)
        self.took: list[StageTime] = []

    def ingest(self) -> tuple[Manifest, Manifest | None, Manifest | None]:
        """Read all data sets; gives those that are learnt from, searched, and validated by."""
        config = self.config
        took: list[tuple[float, int]] = []
        with self._stage("ingest") as told:
            data = self._ingest_one(config.train_data, "train", took)
            test = self._ingest_one(config.test_data, "test", took) if config.test_data else None
            validation = None
            if config.validation_data is not None:
                validation = self._ingest_one(config.validation_data, VALIDATION, took)
            self._check_texts(test)
            counts = [f"{data.rows:,} pairs to train"]
            if test is not None:
                counts.append(f"{test.rows:,} to test")
            if validation is not None:
                counts.append(f"{validation.rows:,} to validate")
            sets = [one for one in (data, test, validation) if one is not None]
            rejected = sum(sum(one.rejected.values()) for one in sets)
            told.append(", ".join([*counts, f"{rejected:,} rejected"]))
        self._took("ingest", sum(one for one, _ in took), sum(rows for _, rows in took), "pairs")
        return data, test, validation

    def check_training(self, data: Manifest) -> None:
        """Raise TrainError before hours of describing what could not be trained on afterwards."""
        config = self.config
        texts = {"train.data.texts": config.train.data.texts}
        if config.baseline is not None:
            texts["baseline"] = config.baseline
        asked = {CAPTIONS: config.captioning, DESCRIPTIONS: config.synthesis}
        coming = [
            text
            for kind, section in asked.items()
            if section is not None
            for text in Beside(kind, data.name).says
        ]
        check_trainable(config.train, PairFiles.of(self.storage, data.name), texts, coming)

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
            check_texts(files, validation.text, "train.validation.text", validation.pairs)

    def caption(self, data: Manifest) -> CaptionResult | None:
        """Caption and tag, if that is asked for."""
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
                    **counts("source", result.sources),
                }
            )
            run.json("incidents.json", result.incidents)
            without = sum(n for key, n in result.sources.items() if key.startswith("none"))
            outcome = f"{result.rows:,} by {result.model}, {without:,} without a caption"
            told.append(outcome + _already(result.resumed))
        self._took("caption", result.seconds, result.rows, "pairs")
        return result

    def describe(self, data: Manifest) -> SynthesisResult | None:
        """Write descriptions, if that is asked for."""
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
                    **counts("source", result.sources),
                    **counts("refused", result.refusals),
                }
            )
            run.json("incidents.json", result.incidents)
            outcome = f"{100 * result.kept_share:.0f} % of {result.rows:,} by {result.model}"
            if result.incidents:
                outcome += f", {len(result.incidents)} chunks redone"
            told.append(outcome + _already(result.resumed))
        self._took("describe", result.seconds, result.rows, "pairs")
        return result

    def train(self, folder: str, config: TrainConfig, data: Manifest) -> TrainResult:
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

    def evaluate_alone(self, test: Manifest | None) -> EvaluationResult | None:
        """Of the model that was trained here, or of any other, whose results have a folder."""
        name, storage = self.config.evaluation.model, self.storage
        if name is None:
            return self.evaluate("evaluation", trained(storage).best, test)
        with model_source(name, storage, self.config.tracking) as source:
            folder = f"evaluation-{source.digest[:12]}"
            checkpoint = source.publish(storage, f"{folder}/model")
            return self.evaluate(folder, checkpoint, test)

    def evaluate(
        self,
        folder: str,
        checkpoint: str,
        test: Manifest | None,
        sets: OpenedSets | None = None,
    ) -> EvaluationResult | None:
        """Score a checkpoint, if there is anything to score it on."""
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
            told.append(_found(result) + _already(done))
        self._took(folder, result.seconds, result.images, "images")
        return result

    def embed_after(self, config: EmbedConfig, registered: Registered | None) -> None:
        """Embed after the registration; leave vectors as they are if MLflow was away then."""
        asked = self._asked_for(config)
        if asked is None and self.tracker is not None and registered is None:
            told = "waits until MLflow tells which model is served; start again to embed"
            self.table.append(Stage("embed", told, 0.0))
            return
        others = asked is None and registered is not None and not registered.champion
        try:
            self.embed(config, registered)
        except EmbedError as error:
            if not others:
                raise
            # Vectors of this run, say, which another one's model has won against since.
            self.table.append(Stage("embed", f"{error}", 0.0))

    def embed(self, config: EmbedConfig, registered: Registered | None = None) -> None:
        """Embed with the model that is served, or as the configuration asks."""
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

    def tag_run(self, data: Sequence[Manifest], described: SynthesisResult | None) -> None:
        """Note with the parent run what the model was made from."""
        if self.tracker is None:
            return
        tags = {f"data_digest.{one.name}": one.data_digest for one in data}
        if described is not None:
            tags |= {"llm": described.model, "prompt_version": described.prompt}
        self.tracker.parent.tags(tags)

    def register(
        self, trained: TrainResult, evaluated: EvaluationResult | None
    ) -> Registered | None:
        """Register the model, where runs are tracked and MLflow answers."""
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

    def crown(self, registered: Registered | None) -> Registered | None:
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
            self.table.append(Stage("crown", f"{crowned.uri}, {crowned.told}", 0.0))
        return crowned

    def publish(self, report: Report) -> None:
        """Leave the report in the storage and with the parent run."""
        with self._stage("report") as told:
            page = render(report)
            self.storage.write_bytes(REPORT, page.encode())
            if self.tracker is not None:
                self.tracker.parent.text(REPORT, page)
            told.append(f"{len(page) / 1e6:.1f} MB")

    @contextmanager
    def _stage(self, name: str) -> Iterator[list[str]]:
        """A row of the table at the end; the block appends what came out."""
        told: list[str] = []
        start = time.perf_counter()
        yield told
        self.table.append(Stage(name, "".join(told), time.perf_counter() - start))

    @contextmanager
    def _tracked(self, name: str, done: bool, of: Any) -> Iterator[StageRun]:
        nowhere = nullcontext(StageRun(None, None))
        with self.tracker.stage(name, done, of) if self.tracker else nowhere as run:
            yield run

    def _note_data(self, run: StageRun, data: Manifest, context: str) -> None:
        source = self.storage.child_uri(f"pairs/{data.name}")
        run.dataset(data.name, source, data.data_digest, context)

    def peak_memory(self, memory: PeakMemory) -> int:
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


def _found(result: EvaluationResult) -> str:
    """The main score of all that was searched or classified."""
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
    return ", ".join(outcomes)


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
