"""An endpoint with a small model, and clients of it."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from ray import serve

from rwkv_clip.model import RWKVCLIP, create_model, load_checkpoint, save_checkpoint
from serve.app import build
from serve.command import start
from serve.config import ServeFile
from tests.serve.small import small_config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "small"
    torch.manual_seed(0)
    save_checkpoint(create_model(small_config()), folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> RWKVCLIP:
    return load_checkpoint(checkpoint).eval()


@pytest.fixture(scope="session")
def endpoint(ray_cluster: None, checkpoint: Path) -> Iterator[str]:
    """Its address."""
    tower = {"cpus": 0.2, "batch": 8}
    settings = {
        "model": str(checkpoint),
        "port": free_port(),
        "limits": {"body_bytes": 2_000_000, "items": 20, "image_bytes": 500_000},
        "image": tower,
        "text": tower,
    }
    config = ServeFile.model_validate({"serve": settings})
    start(config.serve)
    serve.run(build(config), name="rwkv-clip")
    yield f"http://127.0.0.1:{config.serve.port}"
    serve.shutdown()


@pytest.fixture
def client(endpoint: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint, timeout=60) as made:
        yield made
