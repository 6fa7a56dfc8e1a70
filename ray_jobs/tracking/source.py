"""Where a model comes from: MLflow's registry, a checkpoint anywhere, or the run of the storage."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import mlflow.artifacts

from ray_jobs.storage import Storage, StorageConfig
from ray_jobs.tracking.config import (
    STORE_ERRORS,
    TrackingConfig,
    TrackingError,
    tracking_place,
)
from ray_jobs.tracking.runs import current_store
from ray_jobs.tracking.store import open_store
from rwkv_clip.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE

_REGISTRY = "models:/"


class ModelSourceError(ValueError):
    """There is no such model; the message says what to do."""


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint's two files.

    Attributes:
        name: as it was asked for.
        storage: that holds them.
        folder: of the storage.
        digest: of the weights.
    """

    name: str
    storage: Storage
    folder: str
    digest: str

    def publish(self, storage: Storage, folder: str) -> str:
        """A folder of a storage that holds it, a copy if it is elsewhere; gives the name."""
        if self.storage.uri == storage.uri:
            return self.folder
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            content = self.storage.read_bytes(_inside(self.folder, file))
            storage.write_bytes(f"{folder}/{file}", content)
        return folder


@contextmanager
def model_source(
    name: str, storage: Storage, tracking: TrackingConfig | None
) -> Iterator[ModelSource]:
    """Find a model, for as long as the block goes on.

    Args:
        name: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a checkpoint's folder or URI.
        storage: of the run, whose registry serves where the configuration names none.
        tracking: where the registry is.

    Raises:
        ModelSourceError: there is no such model.
    """
    if not name.startswith(_REGISTRY):
        elsewhere = Storage(StorageConfig(uri=name, s3=storage.config.s3))
        yield stored_model(elsewhere, "", name)
        return
    if tracking is None:
        raise ModelSourceError(f"{name} is in MLflow's registry, and the configuration has none")
    place = tracking_place(tracking, storage)
    with tempfile.TemporaryDirectory() as folder:
        try:
            open_store(place.uri)  # which may have to be made, as by a run that begins now
            with current_store(place.uri):  # the way to name the registry that is looked in
                fetched = mlflow.artifacts.download_artifacts(name, dst_path=folder)
        except (*STORE_ERRORS, TrackingError) as error:
            raise ModelSourceError(f"{name} cannot be had from {place.uri}: {error}") from error
        found = sorted(Path(fetched).rglob(WEIGHTS_FILE))
        if not found:
            raise ModelSourceError(f"{name} is no model of this program: it has no {WEIGHTS_FILE}")
        yield stored_model(Storage.at(found[0].parent), "", name)


def stored_model(storage: Storage, folder: str, name: str = "") -> ModelSource:
    """The checkpoint in a folder of a storage; raises ModelSourceError."""
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        if not storage.exists(_inside(folder, file)):
            raise ModelSourceError(
                f"{name or storage.child_uri(folder)} has no {file}; name the folder of a "
                "checkpoint, or models:/NAME@ALIAS"
            )
    weights = _inside(folder, WEIGHTS_FILE)
    changed = storage.filesystem.get_file_info(storage.path(weights)).mtime_ns
    return ModelSource(name or folder, storage, folder, _digest(storage, weights, changed))


@lru_cache(maxsize=16)
def _digest(storage: Storage, file: str, changed: int | None) -> str:
    """Of a file, as it is since a time; several stages of a run ask for that of one model."""
    del changed  # a part of what is kept, because another training writes to the same names
    return hashlib.sha256(storage.read_bytes(file)).hexdigest()


def _inside(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file
