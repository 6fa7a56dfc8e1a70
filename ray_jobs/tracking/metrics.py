"""Metrics on their way into MLflow: names that it takes, and each step once, whatever befell."""

import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 30.0
_NOT_METRICS = frozenset({"step", "seconds"})
_NO_METRIC = re.compile(r"[^A-Za-z0-9_\-. :]")  # in the name of one of MLflow's; / makes folders
_METRIC_NAME = 100  # characters; MLflow takes 250
_METRICS = 30  # of one kind


class StepMetrics:
    """Logs records of training steps to one run.

    A record whose step the run has already is left out, so a training that went back to its last
    checkpoint does not log its replayed steps twice. While MLflow is away records are passed over;
    `catch_up` logs what is missing from the run's full history.

    Args:
        client: of the store.
        run_id: of the run.
        probe: a metric that every record has; its steps are those that the run has.
    """

    def __init__(self, client: MlflowClient, run_id: str, probe: str = "loss") -> None:
        self._client, self._run_id, self._probe = client, run_id, probe
        self._quiet_until = 0.0

    def __call__(self, record: Mapping[str, float]) -> None:
        """Log a record, unless MLflow was away just now."""
        if time.monotonic() < self._quiet_until:
            return
        try:
            self._log(record)
        except MlflowException as error:
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            logger.warning(
                "MLflow did not take the metrics of step %d; training goes on, and they are logged "
                "when it is back (%s)",
                record["step"],
                str(error).splitlines()[0],
            )

    def catch_up(self, history: Iterable[Mapping[str, float]]) -> None:
        """Log every record that the run lacks; raises MlflowException if MLflow is still away."""
        for record in history:
            self._log(record)

    @cached_property
    def _logged(self) -> set[int]:
        """The steps that the run has."""
        return {
            metric.step for metric in self._client.get_metric_history(self._run_id, self._probe)
        }

    def _log(self, record: Mapping[str, float]) -> None:
        step = int(record["step"])
        if step in self._logged:
            return
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step)
            for name, value in record.items()
            if name not in _NOT_METRICS
        ]
        self._client.log_batch(self._run_id, metrics=metrics)
        self._logged.add(step)


def counts(told: str, counts: Mapping[str, int]) -> dict[str, int]:
    """Metrics of what the data may call as it likes, in names that MLflow takes, the most first."""
    metrics: Counter[str] = Counter()
    for at, (name, count) in enumerate(sorted(counts.items(), key=lambda one: -one[1])):
        kept = _NO_METRIC.sub("_", name)[:_METRIC_NAME] if at < _METRICS else "others"
        metrics[f"{told}_{kept}"] += count
    return dict(metrics)
