"""A full disk behind the object store is told with what to do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import small_file_system
from tests.ray_jobs.clusters import cluster
from tests.ray_jobs.figures import AddFigures, Figures
from tests.ray_jobs.killing import wait_until

# Twelve objects of 20 MB, where 80 MB fit the object store and 40 MB its spill folder.
_PROGRAM = """
import numpy as np, ray
from ray.exceptions import RayError
from ray_jobs.cluster import RayConfig, connected, full_disk

@ray.remote(resources={"spills": 1})
def overflow():
    return len([ray.put(np.ones(20_000_000, np.uint8)) for _ in range(12)])

with connected(RayConfig()):
    try:
        print("FITS", ray.get(overflow.remote()))
    except RayError as error:
        print("TOLD", full_disk(error, "s3://bucket/run"))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    with small_file_system(tmp_path / "spill", "40m") as folder:
        yield folder


@pytest.mark.chaos
def test_a_full_spill_folder_is_told_with_what_to_do(small_disk: Path, figures: AddFigures) -> None:
    with cluster(cpus=1) as made:
        options = [f"--address={made.address}", f"--object-spilling-directory={small_disk}"]
        made.start_node(options, 1, {"spills": 1})
        wait_until(lambda: made.alive() == 2, "the node")
        log = made.folder / "overflow.log"
        assert made.start(["-c", _PROGRAM], log).wait() == 0
        told = log.read_text()
    assert "TOLD Local disk is full: Ray's object store overflowed" in told
    assert "Free some and start again" in told
    figures(Figures("spill folder full", 0, 0, "a clear error; what is done is kept", None))
