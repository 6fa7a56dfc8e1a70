"""Training that is killed, in part or whole, has the curve of training that is not."""

from pathlib import Path

import pytest

from ray_jobs.storage import Storage
from ray_jobs.train import train
from tests.ray_jobs.killing import below, kill_all, start_job, wait_until
from tests.ray_jobs.training.runs import LEFT_OFF, SKIPPED, Held, assert_same_curve, config_of

_SNAPSHOT = "train/checkpoint_manager_snapshot.json"  # Ray Train's, of the checkpoints it knows


def waits(storage: Storage, step: int) -> bool:
    """Whether a held run waits after a step, and would go on from the checkpoint of it."""
    if step + 1 not in Held(storage).seen():
        return False
    if not Path(storage.path(f"train/step-{step:09d}/training.json")).exists():
        return False
    snapshot = Path(storage.path(_SNAPSHOT))
    return snapshot.exists() and f"step-{step:09d}" in snapshot.read_text()


@pytest.mark.slow
def test_a_worker_is_killed_and_then_the_driver_and_the_whole_cluster(undisturbed, own_storage):
    _, expected = undisturbed
    held, (first, second) = Held(own_storage), LEFT_OFF
    job = start_job(
        "tests.ray_jobs.training.runs",
        "train_held",
        "TrainConfig",
        own_storage.uri,
        config_of().model_dump_json(),
    )
    try:
        wait_until(lambda: waits(own_storage, first) or job.poll() is not None, "a checkpoint")
        for worker in below(job, "ray::RayTrainWorker"):
            worker.kill()
        held.let_go(first)
        wait_until(lambda: waits(own_storage, second) or job.poll() is not None, "another one")
    finally:
        kill_all(job)
    assert SKIPPED in range(first + 1, second)
    seen = [*range(1, first + 2), *range(first + 1, second + 2)]
    assert held.seen() == [step for step in seen if step != SKIPPED]
    assert not own_storage.exists("train/result.json")
    assert_same_curve(train(config_of(), own_storage), expected, 1e-5)
