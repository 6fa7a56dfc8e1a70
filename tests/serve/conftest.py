"""An endpoint with a small model, and clients of it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from ray import serve

from ray_jobs.embed import EmbedConfig, embed
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.storage import Storage
from ray_jobs.tracking.source import stored_model
from rwkv_clip.model import RWKVCLIP, create_model, load_checkpoint, save_checkpoint
from serve.app import build
from serve.command import start
from serve.config import ServeFile
from tests.machine import free_port
from tests.serve.small import Registry, small_config


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "small"
    torch.manual_seed(0)
    save_checkpoint(create_model(small_config()), folder)
    return folder


@pytest.fixture(scope="session")
def registry(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """An MLflow store whose model `small` has the checkpoint as version 1, the champion."""
    made = Registry(f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}")
    made.champion(made.add(checkpoint))
    return made


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> RWKVCLIP:
    return load_checkpoint(checkpoint).eval()


@pytest.fixture(scope="session")
def searched(
    ray_cluster: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Storage:
    """A storage with pairs and their vectors."""
    storage = Storage.at(tmp_path_factory.mktemp("searched"))
    source = {"kind": "emoji", "vendor": "twemoji", "limit": 80, "unit_rows": 40}
    config = {"source": source, "cpus_per_task": 0.2, "row_group_rows": 16}
    ingest(IngestConfig.model_validate(config), storage, "test")
    model = stored_model(Storage.at(checkpoint), "", "small")
    embed(EmbedConfig(batch=32, cpus_per_worker=0.2), storage, model)
    return storage


@pytest.fixture(scope="session")
def settings(searched: Storage, registry: Registry) -> ServeFile:
    """The endpoint's."""
    tower = {"cpus": 0.2, "batch": 8, "max_ongoing": 8, "max_queued": 16}
    serve = {
        "port": free_port(),
        "watch_seconds": 0.5,
        "request_seconds": 45,
        "limits": {"body_bytes": 9_000_000, "items": 200, "image_bytes": 6_000_000},
        "image": tower,
        "text": tower,
        "search": {"cpus": 0.1, "results": 30},
    }
    tracking = {"uri": registry.uri, "model_name": "small"}
    whole = {"storage": {"uri": searched.uri}, "tracking": tracking, "serve": serve}
    return ServeFile.model_validate(whole)


@pytest.fixture(scope="package")
def endpoint(ray_cluster: None, settings: ServeFile) -> Iterator[str]:
    """Its address. It ends with this folder's tests, because it holds CPUs of the cluster."""
    start(settings.serve)
    serve.run(build(settings), name="rwkv-clip")
    yield f"http://127.0.0.1:{settings.serve.port}"
    serve.shutdown()


@pytest.fixture
def client(endpoint: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint, timeout=60) as made:
        yield made
