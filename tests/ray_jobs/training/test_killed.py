"""Training that is killed, in part or whole, has the curve of training that is not."""

import threading
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.storage import Storage
from ray_jobs.train import TrainResult, train
from ray_jobs.training.config import TrainConfig
from tests.ray_jobs.killing import PATIENCE, kill_all, processes_named, start_job, wait_until
from tests.ray_jobs.small import TRAIN

CONFIG = TrainConfig.model_validate({**TRAIN, "epochs": 4})


def checkpoints(storage: Storage) -> list[Path]:
    """Those that are complete."""
    return list(Path(storage.path("train")).glob("step-*/training.json"))


@pytest.fixture(scope="module")
def undisturbed(emoji_storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "pairs").symlink_to(emoji_storage.path("pairs"))
    return train(CONFIG, Storage.at(folder))


def assert_same_curve(result: TrainResult, expected: TrainResult) -> None:
    assert result.steps == expected.steps
    steps = [record["step"] for record in result.history]
    assert steps == [record["step"] for record in expected.history]
    losses = [record["loss"] for record in result.history]
    assert losses == pytest.approx([record["loss"] for record in expected.history], rel=1e-4)


@pytest.mark.slow
def test_the_driver_and_the_whole_cluster_are_killed(undisturbed, own_storage):
    settings = CONFIG.model_dump_json()
    job = start_job("ray_jobs.train", "train", "TrainConfig", own_storage.uri, settings)
    try:
        wait_until(lambda: checkpoints(own_storage) or job.poll() is not None, "a checkpoint")
    finally:
        kill_all(job)
    assert checkpoints(own_storage)
    assert not own_storage.exists("train/result.json")
    assert_same_curve(train(CONFIG, own_storage), undisturbed)


@pytest.mark.slow
def test_a_training_worker_is_killed(undisturbed, own_storage):
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(train(CONFIG, own_storage)), daemon=True
    )
    thread.start()
    wait_until(lambda: checkpoints(own_storage), "a checkpoint")
    for worker in processes_named("ray::RayTrainWorker"):
        worker.kill()
    thread.join(PATIENCE)
    assert results
    assert_same_curve(results[0], undisturbed)
