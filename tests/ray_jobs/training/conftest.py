"""A small ingested data set that the training tests share, and a run that nothing befell."""

from pathlib import Path

import pytest

from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.storage import Storage
from ray_jobs.train import TrainResult, train
from tests.ray_jobs.small import PAIRS
from tests.ray_jobs.training.runs import HALF_EMPTY, SKIPPED, batch_rows, config_of, spoil


@pytest.fixture(scope="session")
def emoji_storage(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Two hundred emoji pairs in row groups of 32, in more than one part.

    After their ingestion, the images of a whole global batch came to harm, and those of the first
    of two workers in another.
    """
    storage = Storage.at(tmp_path_factory.mktemp("emoji"))
    source = {"kind": "emoji", "limit": PAIRS, "unit_rows": 90}
    ingest(IngestConfig(source=source, row_group_rows=32), storage)
    first_worker = batch_rows(storage, HALF_EMPTY, lanes=range(2))
    spoil(storage, {*batch_rows(storage, SKIPPED), *first_worker})
    return storage


@pytest.fixture
def own_storage(emoji_storage: Storage, tmp_path: Path) -> Storage:
    """A storage with the same pairs, and a training folder of its own."""
    (tmp_path / "pairs").symlink_to(emoji_storage.path("pairs"))
    return Storage.at(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(
    emoji_storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Storage, TrainResult]:
    """A run on one worker, to its end, and where it is."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "pairs").symlink_to(emoji_storage.path("pairs"))
    storage = Storage.at(folder)
    return storage, train(config_of(), storage)
