"""Trainings that tests compare, and one that waits to be killed."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from ray_jobs.storage import Storage
from ray_jobs.train import TrainResult, train
from ray_jobs.training.config import TrainConfig
from tests.ray_jobs.small import TRAIN

LEFT_OFF = (4, 8)  # steps with a checkpoint, after which a held run waits


def config_of(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**TRAIN, **changes})


def curve(result: TrainResult) -> dict[int, float]:
    """The loss by the step."""
    return {int(record["step"]): record["loss"] for record in result.history}


def assert_same_curve(
    result: TrainResult, expected: TrainResult, rounding: float, log_steps: int = 1
) -> None:
    """Whether every step is there once, and has the expected loss."""
    losses, last = curve(expected), expected.steps
    logged = [*range(log_steps, last, log_steps), last]
    assert result.steps == last
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
