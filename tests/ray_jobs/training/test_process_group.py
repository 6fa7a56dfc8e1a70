"""Workers join each other whatever befalls them meanwhile, and leave nothing where they cannot.

The cluster has two CPUs, so that two workers have no room beside the traces of two others.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ray_jobs.training import process_group
from ray_jobs.training.process_group import ProcessGroupConfig


def join(settings: dict[str, str]) -> None:
    """Note the sum of one of each worker, and which port they met at."""
    total = torch.ones(1)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        (store,) = process_group._listening
        assert os.environ["MASTER_PORT"] == str(store.port)
        Path(settings["noted"]).write_text(str(int(total)))


def together(config: ProcessGroupConfig, folder: Path, workers: int) -> str:
    """What workers note."""
    noted = folder / "noted"
    trainer: Any = TorchTrainer
    trainer(
        join,
        train_loop_config={"noted": str(noted)},
        torch_config=config,
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="run", storage_path=str(folder)),
    ).fit()
    return noted.read_text()


class Mortal(process_group._Listening):
    """A group whose second worker dies as the first is asked where they meet."""

    def execute_single(self, rank: int, function: Any, *args: Any, **named: Any) -> Any:
        self.execute_single_async(1, os._exit, 1)
        return super().execute_single(rank, function, *args, **named)


class FirstOnesDie(process_group._Backend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        mortal = Mortal(worker_group)
        super().on_start(worker_group if self._failures else mortal, backend_config)


@dataclass
class FirstOnesDieConfig(ProcessGroupConfig):
    @property
    def backend_cls(self) -> type[process_group._Backend]:
        return FirstOnesDie


@pytest.mark.usefixtures("ray_cluster")
def test_workers_one_of_which_died_before_they_met_are_replaced(tmp_path: Path) -> None:
    assert together(FirstOnesDieConfig(max_failures=1), tmp_path, workers=2) == "2"


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_cannot_meet_end_the_run_when_no_more_may_fail(tmp_path: Path) -> None:
    cannot = ProcessGroupConfig(backend="telepathy", max_failures=0)
    with pytest.raises(Exception, match=r"could not join each other.*max_failures \(0\)"):
        together(cannot, tmp_path, workers=1)
