"""A step under Ray Train and Ray Data against the same step in a bare loop.

Bare is a process without Ray: the same worker class makes its batches itself, one after the other,
and steps. Under Ray the batches come from Ray Data's workers, and records and checkpoints go where
they go in a real run. Model, data, seeds and threads are equal, and so must the losses be: they are
compared before any figure is printed.

    python benchmarks/trainer.py [--steps 60] [--repeats 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from _common import header, machine, row, verdict

from ray_jobs.cluster import RayConfig, connected
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.pipeline import PipelineConfig
from ray_jobs.storage import Storage
from ray_jobs.train import total_steps, train
from ray_jobs.training.batches import Batch, PairFiles
from ray_jobs.training.config import TrainConfig
from ray_jobs.training.loop import Place, Worker, WorkerTask
from rwkv_clip.config import load_config
from rwkv_clip.heap import kept_memory

GOAL = 1.05
LOG_STEPS = 5
WARM_RECORDS = 2
TOLERANCE = 1e-4
PAIRS = 1024
DEFAULT = Path(__file__).parents[1] / "configs" / "emoji.yaml"


def config(steps: int) -> TrainConfig:
    """The default run's training, for so many steps."""
    default = load_config(PipelineConfig, DEFAULT).train
    epochs = steps * default.batch / PAIRS
    changes = {"epochs": epochs, "log_steps": LOG_STEPS, "checkpoint_steps": 10_000}
    return default.model_copy(update=changes)


class BareWorker(Worker):
    """The worker without Ray: it makes its own batches, and keeps no checkpoint."""

    def _batches(self, last: int) -> Iterator[Batch]:
        maker = self._maker()
        for window in maker.plan.windows(0, last):
            yield from maker.batches(window)

    def _restore(self) -> None:
        """There is nothing to go on from."""

    def _checkpoint(self, metrics: Any) -> None:
        """None is kept."""


def bare(storage: Storage, steps: int) -> list[dict[str, float]]:
    """Records of the bare loop; called in a process of its own."""
    settings, files = config(steps), PairFiles.of(storage)
    worker = BareWorker(
        WorkerTask(settings, files, total_steps(settings, files)), Place.without_ray()
    )
    worker.run()
    return worker.state.history


def bare_process(storage: Storage, steps: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--bare", storage.uri, "--steps", str(steps)]
    environment = {**os.environ, **kept_memory()}  # as Ray Train's workers have it
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    history: list[dict[str, float]] = json.loads(answer.stdout.splitlines()[-1])
    return history


def step_seconds(history: list[dict[str, float]]) -> float:
    """The median over the records after the first ones."""
    return median(record["seconds"] / LOG_STEPS for record in history[WARM_RECORDS:])


def main() -> int:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description="Ray Train against a bare loop.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(bare(Storage.at(arguments.bare), arguments.steps)))
        return 0
    print(machine())
    taken: dict[str, list[float]] = {"bare loop": [], "Ray Train": []}
    waits = []
    with tempfile.TemporaryDirectory() as root, connected(RayConfig(object_store_gb=0.5)):
        storage = Storage.at(Path(root))
        source = {"kind": "emoji", "limit": PAIRS}
        ingest(IngestConfig.model_validate({"source": source}), storage, "train")
        for turn in range(arguments.repeats):
            alone = bare_process(storage, arguments.steps)
            result = train(config(arguments.steps), storage, folder=f"train-{turn}")
            for one, other in zip(alone, result.history, strict=True):
                if abs(one["loss"] - other["loss"]) > TOLERANCE * one["loss"]:
                    raise SystemExit(f"the losses differ: {one} {other}")
            taken["bare loop"].append(step_seconds(alone))
            taken["Ray Train"].append(step_seconds(result.history))
            waits += [record["data_wait_share"] for record in result.history[WARM_RECORDS:]]
    medians = {name: median(values) for name, values in taken.items()}
    for name, values in taken.items():
        print(f"{name}: runs {', '.join(f'{1000 * one:.0f}' for one in values)} ms a step")
    print(f"of its time Ray Train's worker waits {100 * median(waits):.1f} % for data")
    ratio = medians["Ray Train"] / medians["bare loop"]
    print()
    header("", "ms a step", "ratio", "target", "")
    row("bare loop, its own batches", f"{1000 * medians['bare loop']:.0f}", "", "", "")
    row(
        "Ray Train, batches from Ray Data",
        f"{1000 * medians['Ray Train']:.0f}",
        f"{ratio:.2f}",
        f"{GOAL}",
        verdict(ratio <= GOAL),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
