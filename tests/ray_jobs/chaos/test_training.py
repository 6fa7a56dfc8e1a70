"""Nodes that come and go while a model is trained."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.storage import Storage
from ray_jobs.train import TrainResult, train, trained
from ray_jobs.training.config import TrainConfig
from tests.ray_jobs.chaos.runs import make_pairs, start
from tests.ray_jobs.clusters import cluster
from tests.ray_jobs.figures import AddFigures, Figures
from tests.ray_jobs.killing import wait_until
from tests.ray_jobs.small import PAIRS, TRAIN

STEPS_BETWEEN = 10
NODE_CPUS = 4  # whole ones are left for Ray Data, which takes no part of one
SETTINGS: dict[str, Any] = {
    **TRAIN,
    # So small a rate that rounding stays what it is: one and two workers add in another order, and
    # at a larger rate a hundred steps make another course of that, faults or none.
    "recipe": {"learning_rate": 1e-6},
    "epochs": 50,
    "checkpoint_steps": STEPS_BETWEEN,
    "cpus_per_worker": 2.2,  # more than half a node's
    "workers": 2,
}


@pytest.fixture
def undisturbed(ray_cluster: None, tmp_path: Path) -> tuple[Storage, TrainResult]:
    """Pairs, and a training on them that nothing befell."""
    storage = make_pairs(tmp_path / "calm", PAIRS, 90)
    config = TrainConfig.model_validate({**SETTINGS, "cpus_per_worker": 0.4})
    return storage, train(config, storage)


def checkpoints(storage: Storage) -> list[int]:
    """The steps that have one."""
    found = Path(storage.path("train")).glob("step-*/training.json")
    return sorted(int(path.parent.name[-9:]) for path in found)


def latest(storage: Storage) -> dict[str, float]:
    """The last record of the newest checkpoint."""
    steps = checkpoints(storage)
    if not steps:
        return {"step": 0, "workers": 0}
    try:
        state = storage.read_json(f"train/step-{steps[-1]:09d}/training.json")
    except (FileNotFoundError, ValueError):  # it gave way to a newer one, or is being written
        return {"step": 0, "workers": 0}
    record: dict[str, float] = state["history"][-1]
    return record


@pytest.mark.chaos
def test_a_node_dies_and_another_joins_while_a_model_is_trained(
    undisturbed: tuple[Storage, TrainResult], tmp_path: Path, figures: AddFigures
) -> None:
    calm, expected = undisturbed
    storage = Storage.at(tmp_path / "disturbed")
    Path(storage.uri).mkdir()
    Path(storage.path("pairs")).symlink_to(calm.path("pairs"))
    settings = {**SETTINGS, "min_workers": 1, "max_failures": -1, "resize_seconds": 1.0}
    with cluster(cpus=0) as made:
        # Ray looks for nodes every twenty seconds, and begins with what it last saw; it waits for
        # the node that is gone for a minute otherwise.
        made.environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
        nodes = [made.node(cpus=NODE_CPUS), made.node(cpus=NODE_CPUS)]
        module = "tests.ray_jobs.chaos.runs"
        job = start(made, storage, module, "train_slowly", "TrainConfig", settings)
        # The second checkpoint: by then Ray Train knows of the first one.
        wait_until(lambda: job.ended() or latest(storage)["step"] > STEPS_BETWEEN, "checkpoints")
        assert latest(storage)["workers"] == 2
        made.kill(nodes[1])
        killed, before = time.monotonic(), latest(storage)["step"]
        wait_until(
            lambda: (
                job.ended()
                or (latest(storage)["workers"] == 1 and latest(storage)["step"] > before)
            ),
            "a checkpoint of one worker",
        )
        shrunk = time.monotonic() - killed
        made.node(cpus=NODE_CPUS)
        joined = time.monotonic()
        wait_until(lambda: job.ended() or latest(storage)["workers"] == 2, "two workers again")
        grown = time.monotonic() - joined
        wait_until(job.ended, "the end")
    result = trained(storage)
    steps = [record["step"] for record in result.history]
    workers = [int(record["workers"]) for record in result.history]
    changes = [
        workers[at] for at in range(len(workers)) if at == 0 or workers[at - 1] != workers[at]
    ]
    lost = len(set(range(1, expected.steps + 1)) - set(steps))
    twice = len(steps) - len(set(steps))
    redone = f"at most {STEPS_BETWEEN} steps; workers {changes} with the same batches"
    figures(Figures("node dies during training", lost, twice, redone, shrunk))
    figures(Figures("node joins during training", lost, twice, redone, grown))
    assert (lost, twice) == (0, 0)
    assert changes == [2, 1, 2]
    losses = np.array([record["loss"] for record in result.history])
    calm_losses = np.array([record["loss"] for record in expected.history])
    tolerance = 1e-4
    # Batches differ by far more than that: the same losses are the same batches, in the same order.
    assert np.abs(np.diff(calm_losses)).min() > 0
    assert np.median(np.abs(np.diff(calm_losses))) > 20 * tolerance * calm_losses.mean()
    np.testing.assert_allclose(losses, calm_losses, rtol=tolerance)
