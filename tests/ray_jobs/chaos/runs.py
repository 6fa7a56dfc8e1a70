"""What the fault tests share: jobs as programs of their own, and what they leave."""

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.storage import Storage
from ray_jobs.train import TrainResult, train
from ray_jobs.training.config import TrainConfig
from tests.ray_jobs.clusters import Cluster

_STEP_SECONDS = 0.25
_JOB = """
import sys
from ray_jobs.cluster import RayConfig, connected
from ray_jobs.storage import Storage
from {module} import {call}
from {home} import {config}

with connected(RayConfig()):
    {call}({config}.model_validate_json(sys.argv[2]), Storage.at(sys.argv[1]))
"""


def make_pairs(folder: Path, rows: int, part_rows: int, row_group_rows: int = 32) -> Storage:
    """A storage with ingested pairs."""
    storage = Storage.at(folder)
    source = {"kind": "emoji", "limit": rows, "unit_rows": part_rows}
    config = {"source": source, "cpus_per_task": 0.2, "row_group_rows": row_group_rows}
    ingest(IngestConfig.model_validate(config), storage, "train")
    return storage


def start(
    cluster: Cluster, storage: Storage, module: str, call: str, config: str, settings: Any
) -> "Job":
    """`call(config, storage)` on a cluster, in a process of its own."""
    home = "ray_jobs.training.config" if config == "TrainConfig" else module
    program = _JOB.format(module=module, call=call, config=config, home=home)
    log = cluster.folder / f"{call}.log"
    arguments = ["-c", program, storage.uri, json.dumps(settings)]
    return Job(cluster.start(arguments, log), log)


def train_slowly(config: TrainConfig, storage: Storage) -> TrainResult:
    """Train, with a pause at each step that leaves time for a fault."""
    return train(config, storage, on_record=_pause)


def _pause(record: Mapping[str, float]) -> None:
    threading.Event().wait(_STEP_SECONDS)


class Job:
    """A job that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self.log = process, log

    def ended(self) -> bool:
        """Whether it ended; fails the test if it did not end well."""
        status = self.process.poll()
        assert not status, self.log.read_text()[-6000:]
        return status == 0


def written_ids(storage: Storage, kind: str = "descriptions") -> list[str]:
    """The ids in all sealed tables beside the pairs."""
    return _ids(storage, [f"{kind}/train/{part.name}.parquet" for part in _parts(storage)])


def pair_ids(storage: Storage) -> list[str]:
    """Those of the pairs."""
    return _ids(storage, [part.path for part in _parts(storage)])


def missing_and_double(found: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
    """How many of the wanted ids are not there, and how many are there more than once."""
    counts = Counter(found)
    return len(set(wanted) - set(counts)), sum(count > 1 for count in counts.values())


def _parts(storage: Storage) -> Any:
    return Manifest.from_storage(storage).parts


def _ids(storage: Storage, names: Sequence[str]) -> list[str]:
    return [one for name in names for one in storage.read_table(name, ["id"])["id"].to_pylist()]
