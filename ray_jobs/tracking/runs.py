"""A pipeline's runs in MLflow: one parent, and a child for each stage.

Choices:
- The storage remembers its runs (`tracking/`), so a pipeline that was killed goes on in the runs it
  began. Another configuration begins another parent; the stages it finds done are logged there from
  their results. A stage of other data is another run: it must not go on in the old one's curve,
  whose parameters MLflow does not let it change either.
- A run ends as FINISHED, FAILED (an error, kept as the tag `error`) or KILLED, also by kill -9: a
  watcher process sees the driver's pipe end.
- A pipeline does not start with an MLflow it cannot reach. Losing MLflow later costs no work: what
  could not be logged is told, and logged when the pipeline is started again.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.exceptions import MlflowException
from mlflow.utils.git_utils import get_git_commit
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_SOURCE_NAME,
)

from ray_jobs.storage import Storage, digest_of_json
from ray_jobs.tracking.config import (
    STORE_ERRORS,
    TrackingConfig,
    TrackingError,
    check_artifacts,
    tracking_place,
)
from ray_jobs.tracking.machine import MachineMetrics
from ray_jobs.tracking.metrics import StepMetrics
from ray_jobs.tracking.notes import Notes
from ray_jobs.tracking.store import open_store
from rwkv_clip import __version__

logger = logging.getLogger(__name__)

_PARAM_LIMIT = 5000
_DIGEST_LIMIT = 36
_MISSED = (
    "MLflow %s (%s); the work goes on, and what is missing there is logged when the pipeline is "
    "started again"
)
_PASSING = (
    "runs and models are noted in %s, on this machine alone; to keep them whatever becomes of it, "
    "name an MLflow server by tracking.uri or MLFLOW_TRACKING_URI"
)
_CONTINUED = "continued.{}"  # tag: `code_version` of the latest start that took a run up
_BATCH = 100
_NO_SUCH_RUN = "RESOURCE_DOES_NOT_EXIST"
_REFUSALS = frozenset(  # by another error MLflow, or what it stands on, is away
    {
        _NO_SUCH_RUN,
        "BAD_REQUEST",
        "INVALID_PARAMETER_VALUE",
        "INVALID_STATE",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
    }
)


class StageRun:
    """A run in MLflow that is being written; nothing that it is told fails when MLflow is away.

    Attributes:
        run_id: None where there is no run; what it is told is passed over then.
        complete: whether MLflow has all that it was told.
    """

    def __init__(self, client: MlflowClient | None, run_id: str | None) -> None:
        self._client, self.run_id = client, run_id
        self.complete = run_id is not None
        self._steps = StepMetrics(client, run_id) if client and run_id else None

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings, nested ones by dotted names."""
        params = [Param(key, str(value)[:_PARAM_LIMIT]) for key, value in flatten(values)]
        for first in range(0, len(params), _BATCH):
            self._tell("log_batch", params=params[first : first + _BATCH])

    def metrics(self, values: Mapping[str, float]) -> None:
        """Log figures that have no step."""
        now = int(time.time() * 1000)
        batch = [Metric(name, float(value), now, 0) for name, value in values.items()]
        self._tell("log_batch", metrics=batch)

    def step(self, record: Mapping[str, float]) -> None:
        """Log the metrics of a training step."""
        if self._steps is not None:
            self._steps(record)

    def history(self, records: Iterable[Mapping[str, float]]) -> None:
        """Log the metrics of all training steps that the run lacks."""
        if self._steps is not None:
            self._guarded(self._steps.catch_up, records)

    def validations(self, records: Sequence[Mapping[str, float]]) -> None:
        """Log the metrics of all validations that the run lacks."""
        if self._client is not None and self.run_id is not None and records:
            probe = next(name for name in records[0] if name != "step")
            steps = StepMetrics(self._client, self.run_id, probe)
            self._guarded(steps.catch_up, records)

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags."""
        tags = [RunTag(key, str(value)[:_PARAM_LIMIT]) for key, value in values.items()]
        self._tell("log_batch", tags=tags)

    def dataset(self, name: str, source: str, digest: str, context: str) -> None:
        """Note which data the run read."""
        kind = source.partition("://")[0] if "://" in source else "local"
        dataset = Dataset(name, digest[:_DIGEST_LIMIT], kind, json.dumps({"uri": source}))
        tags = [InputTag("mlflow.data.context", context)]
        self._tell("log_inputs", datasets=[DatasetInput(dataset, tags)])

    def json(self, name: str, value: Any) -> None:
        """Leave a JSON document with the run."""
        self._tell("log_dict", value, name)

    def text(self, name: str, value: str) -> None:
        """Leave a text with the run."""
        self._tell("log_text", value, name)

    def figure(self, name: str, figure: Any) -> None:
        """Leave a matplotlib figure with the run."""
        self._tell("log_figure", figure, name)

    def end(self, status: str) -> None:
        """Say how the run ended."""
        self._tell("set_terminated", status)

    def take_up(self) -> None:
        """Go on with a run that was begun before, and count that.

        The version that began it stays noted; the one that went on has tags of its own.
        """

        def restart(run_id: str) -> None:
            if self._client is not None:
                tags = self._client.get_run(run_id).data.tags
                self._client.set_tag(run_id, "restarts", str(int(tags.get("restarts", 0)) + 1))
                for key, value in code_version().items():
                    self._client.set_tag(run_id, _CONTINUED.format(key), value)
                if "error" in tags:
                    self._client.delete_tag(run_id, "error")
                self._client.update_run(run_id, status="RUNNING")

        self._guarded(restart, self.run_id)

    def _tell(self, verb: str, *args: Any, **kwargs: Any) -> None:
        if self._client is not None and self.run_id is not None:
            self._guarded(getattr(self._client, verb), self.run_id, *args, **kwargs)

    def _guarded(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except STORE_ERRORS as error:
            if self.complete:
                _warn_missed(error)
            self.complete = False


class Tracker:
    """The runs of one pipeline; use it as a context around the whole of it.

    Args:
        config: where runs go.
        storage: of the pipeline; remembers the runs' ids.
        settings: everything that decides the pipeline's results.
        name: the parent run's.

    Raises:
        TrackingError: MLflow cannot be reached, or takes no run.
    """

    def __init__(
        self, config: TrackingConfig, storage: Storage, settings: Mapping[str, Any], name: str
    ) -> None:
        self.config, self.storage, self.settings, self.name = config, storage, settings, name
        place = tracking_place(config, storage)
        check_artifacts(place, storage)
        self.uri = place.uri
        if place.passing:
            logger.warning(_PASSING, self.uri)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `place` tells
        os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
        self.client = open_store(self.uri)
        self._notes = Notes(storage, self.uri, settings)
        try:
            self.experiment = self._experiment(place.artifacts)
            if any(map(self._gone, self._notes.runs())):
                self._notes.forget()
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"MLflow at {self.uri} cannot be used ({str(error).splitlines()[0]}); mend "
                "tracking.uri or MLFLOW_TRACKING_URI, or set tracking to null"
            ) from error
        self._watcher: subprocess.Popen[str] | None = None
        self._monitor: MachineMetrics | None = None

    def __enter__(self) -> "Tracker":
        held = self._notes.parent()
        self.parent = self._begin(held.get("run_id"), self.name, None, must=True)
        try:
            if not held.get("complete"):
                self._notes.note_parent(self.parent.run_id, complete=False)
                self.parent.params(self.settings)
                self.parent.json("config.json", self.settings)
                self._notes.note_parent(self.parent.run_id, complete=self.parent.complete)
            self._start_monitor()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _start_monitor(self) -> None:
        seconds, run_id = self.config.system_metrics_seconds, self.parent.run_id
        if seconds is not None and run_id is not None:
            self._monitor = MachineMetrics(run_id, seconds, self.uri)
            self._monitor.start()  # type: ignore[no-untyped-call]

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        if self._monitor is not None:
            self._monitor.finish()  # type: ignore[no-untyped-call]
        self._end(self.parent, error)
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.stdin.close()
            self._watcher.wait()

    @property
    def place(self) -> str:
        """How to look at the parent run."""
        if self.uri.startswith("http"):
            page = f"#/experiments/{self.experiment}/runs/{self.parent.run_id}"
            return f"{self.uri.rstrip('/')}/{page}"
        return f"mlflow ui --backend-store-uri {self.uri}"

    def logged(self, stage: str) -> bool:
        """Whether MLflow has all of a stage."""
        return bool(self._notes.stage(stage).get("complete"))

    def run_id(self, stage: str) -> str | None:
        """The id of a stage's run, if it has one."""
        held: str | None = self._notes.stage(stage).get("run_id")
        return held

    @contextmanager
    def stage(self, name: str, done: bool = True, of: Any = None) -> Iterator[StageRun]:
        """The child run of a stage, which ends as the block does; nowhere if it is all there.

        Args:
            name: of the stage.
            done: whether its results are in the storage. A run that has those of before, which are
                not there any more, stays as it is, and another one begins.
            of: the data that it is of, and the model, as JSON takes it; another one begins where
                that has changed.
        """
        before, told = self._notes.stage(name), digest_of_json(of)
        # What releases noted that did not note this is taken for the same.
        same = before.get("of", told) == told
        if same and before.get("complete") and done:
            yield StageRun(None, None)
            return
        held = before.get("run_id") if same and not before.get("complete") else None
        run = self._begin(held, name, self.parent.run_id)
        noted = {"run_id": run.run_id, "complete": False, "of": told}
        try:
            self._notes.note_stage(name, noted)
            yield run
        except BaseException as error:
            self._end(run, error)
            if done and before:  # the results that are there are still of that run
                self._notes.note_stage(name, before)
            raise
        self._end(run, None)
        self._notes.note_stage(name, {**noted, "complete": run.complete})

    def _experiment(self, artifacts: str | None) -> str:
        held = self.client.get_experiment_by_name(self.config.experiment)
        if held is not None:
            if held.lifecycle_stage != "active":
                raise TrackingError(
                    f"the experiment {held.name} of MLflow at {self.uri} was deleted and takes no "
                    f"runs; restore it (MLFLOW_TRACKING_URI={self.uri} mlflow experiments "
                    f"restore --experiment-id {held.experiment_id}), or name another one by "
                    "tracking.experiment"
                )
            return str(held.experiment_id)
        return str(self.client.create_experiment(self.config.experiment, artifacts))

    def _gone(self, run_id: str) -> bool:
        """Whether a run has been deleted; raises MlflowException where MLflow does not tell."""
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage != "active")
        except MlflowException as error:
            if error.error_code == _NO_SUCH_RUN:
                return True
            raise

    def _begin(
        self, held: str | None, name: str, parent: str | None, *, must: bool = False
    ) -> StageRun:
        """Create a run, or take up one that was begun before.

        Raises:
            TrackingError: MLflow refuses a run that must be.
        """
        try:
            run_id = held or self._create(name, parent)
        except MlflowException as error:
            if must and _is_refusal(error):
                raise TrackingError(
                    f"MLflow at {self.uri} refuses a run in the experiment "
                    f"{self.config.experiment} ({_first_line(error)}); mend that, name another one "
                    "by tracking.experiment, or set tracking to null"
                ) from error
            _warn_missed(error)
            return StageRun(None, None)
        self._tell_watcher("open", run_id)  # first, so that whatever comes now, the run ends
        run = StageRun(self.client, run_id)
        if held is not None:
            run.take_up()
        return run

    def _create(self, name: str, parent: str | None) -> str:
        tags = {MLFLOW_RUN_NAME: name, MLFLOW_SOURCE_NAME: "rwkv-clip", **code_version()}
        if parent is not None:
            tags[MLFLOW_PARENT_RUN_ID] = parent
        return str(self.client.create_run(self.experiment, tags=tags).info.run_id)

    def _end(self, run: StageRun, error: BaseException | None) -> None:
        if run.run_id is None:
            return
        if error is None:
            run.end("FINISHED")
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            run.end("KILLED")
        else:
            run.tags({"error": str(error) or type(error).__name__})
            run.end("FAILED")
        self._tell_watcher("close", run.run_id)

    @contextmanager
    def reopened(self, run_id: str) -> Iterator[None]:
        """Work that MLflow does inside a run that has finished; afterwards it has again.

        Meanwhile it runs for MLflow, and the watcher ends it if this process dies.
        """
        self._tell_watcher("open", run_id)
        try:
            yield
        finally:
            self.client.set_terminated(run_id, "FINISHED")
            self._tell_watcher("close", run_id)

    def finished(self, run_id: str) -> None:
        """End a run whose work is done: whoever died while it was reopened left it otherwise."""
        if not self._gone(run_id) and self.client.get_run(run_id).info.status != "FINISHED":
            self.client.set_terminated(run_id, "FINISHED")

    def _tell_watcher(self, verb: str, run_id: str) -> None:
        if self._watcher is None:
            # As a file: as a module it would import its package, and MLflow for the whole run.
            file = Path(__file__).with_name("watcher.py")
            command = [sys.executable, "-P", str(file), self.uri]
            # A session of its own: what ends this program's process group shall not end it.
            self._watcher = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, text=True, start_new_session=True
            )
        if self._watcher.stdin is not None and self._watcher.poll() is None:
            self._watcher.stdin.write(f"{verb} {run_id}\n")
            self._watcher.stdin.flush()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow has answered, and will say the same when it is asked again."""
    return isinstance(error, MlflowException) and error.error_code in _REFUSALS


def _warn_missed(error: Exception) -> None:
    logger.warning(
        _MISSED, "refuses it" if _is_refusal(error) else "does not answer", _first_line(error)
    )


@contextmanager
def current_store(uri: str) -> Iterator[None]:
    """Make a store MLflow's current one for the block, for what MLflow offers in no other way."""
    held = os.environ.get(MLFLOW_TRACKING_URI.name)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # the way to take it back
        if held is not None:
            os.environ[MLFLOW_TRACKING_URI.name] = held


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names with their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def code_version() -> dict[str, str]:
    """The program's version, and the commit where it runs from a checkout."""
    version = {"rwkv_clip.version": __version__}
    if commit := get_git_commit(str(Path(__file__).parents[2])):
        version[MLFLOW_GIT_COMMIT] = commit
    return version
