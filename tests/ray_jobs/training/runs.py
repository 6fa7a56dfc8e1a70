"""Trainings that tests compare, and one that waits to be killed."""

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest

from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.storage import Storage
from ray_jobs.train import TrainResult, train
from ray_jobs.training.batches import PairFiles
from ray_jobs.training.config import TrainConfig
from ray_jobs.training.loop import WorkerTask
from tests.ray_jobs.small import TRAIN

LEFT_OFF = (4, 8)  # steps with a checkpoint, after which a held run waits
HALF_EMPTY = 3  # the step for which the first of two workers has no usable sample
SKIPPED = 7  # the step for which nobody has one


def config_of(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**TRAIN, **changes})


def batch_rows(storage: Storage, step: int, lanes: Collection[int] | None = None) -> set[int]:
    """The rows that a step, counted from 1, takes from some lanes; from all if absent."""
    plan = WorkerTask(config_of(), PairFiles.of(storage), step).plan
    return {
        int(row)
        for window in plan.windows(step - 1, step)
        for lane in (range(plan.lanes) if lanes is None else lanes)
        for row in plan.rows_of(window, lane)
    }


def spoil(storage: Storage, rows: Collection[int]) -> None:
    """Make the images of some rows of the data set such as nobody can decode."""
    first = 0
    for part in Manifest.from_storage(storage).parts:
        table = storage.read_table(part.path)
        images = table["image"].to_pylist()
        there = range(first, first + len(images))
        broken = [
            b"harmed" if row in rows else image for row, image in zip(there, images, strict=True)
        ]
        at = table.schema.get_field_index("image")
        changed = table.set_column(at, table.schema.field(at), pa.array(broken, pa.binary()))
        storage.write_table(part.path, changed, row_group_size=part.row_groups[0])
        first += len(images)


def curve(result: TrainResult) -> dict[int, float]:
    """The loss by the step."""
    return {int(record["step"]): record["loss"] for record in result.history}


def assert_same_curve(
    result: TrainResult, expected: TrainResult, rounding: float, log_steps: int = 1
) -> None:
    """Whether every step is there once, and has the expected loss."""
    losses, last = curve(expected), expected.steps
    logged = [*range(log_steps, last, log_steps), last]
    logged = [step for step in logged if step != SKIPPED]
    assert result.steps == last
    assert (result.skipped_steps, result.left_out) == (1, expected.left_out)
    assert [record["step"] for record in result.history] == logged
    assert curve(result) == pytest.approx({step: losses[step] for step in logged}, rel=rounding)


@dataclass(frozen=True)
class Held:
    """Notes every step, and waits after each of those of `LEFT_OFF` for a test to let it go on."""

    storage: Storage

    def __call__(self, record: Mapping[str, float]) -> None:
        step = int(record["step"])
        number = len(self.seen())
        self.storage.write_json(f"seen/{number:03d}.json", step)
        waiting = threading.Event()
        while step - 1 in LEFT_OFF and not self.storage.exists(self._leave(step - 1)):
            waiting.wait(0.05)

    def seen(self) -> list[int]:
        """The steps in the order in which they were done, by all attempts."""
        return [self.storage.read_json(name) for name in self.storage.names("seen")]

    def let_go(self, step: int) -> None:
        self.storage.write_json(self._leave(step), None)

    def _leave(self, step: int) -> str:
        return f"leave/{step}.json"


def train_held(config: TrainConfig, storage: Storage) -> TrainResult:
    """Train, and wait where a test may want to kill it."""
    return train(config, storage, on_record=Held(storage))
