"""Connecting to Ray: a running cluster by its address, or a local one that ends with the program.

Ray's and vLLM's own talk stays in Ray's log files; their place is told, so that a terminal shows
the stages' progress and nothing else.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.data
from pydantic import Field, PositiveFloat, PositiveInt

from rwkv_clip.config import BaseConfig

logger = logging.getLogger(__name__)


class RayConfig(BaseConfig):
    """Where the jobs run."""

    address: str | None = Field(
        None, description="of a running cluster, or auto; a local one is started if absent"
    )
    num_cpus: PositiveInt | None = Field(None, description="of a local cluster; all if absent")
    object_store_gb: PositiveFloat = Field(2.0, description="shared memory of a local cluster")


@contextmanager
def connected(config: RayConfig) -> Iterator[Path]:
    """A connection to Ray for the block; gives the folder of its log files.

    A connection that this process has already is used, and stays.
    """
    if ray.is_initialized():
        yield _logs()
        return
    _quieten()
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            num_cpus=config.num_cpus,
            include_dashboard=False,
            object_store_memory=int(config.object_store_gb * 1e9),
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    _quieten()
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield _logs()
    finally:
        ray.shutdown()


def _logs() -> Path:
    session = ray.get_runtime_context().get_session_name()
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", session, "logs")


def _quieten() -> None:
    """Let errors alone of Ray's own talk onto the terminal; its files get all of it."""
    for name in ("ray", "ray.data", "ray.llm", "ray.serve", "ray.train"):
        for handler in logging.getLogger(name).handlers:
            if type(handler).__name__ != "SessionFileHandler":
                handler.setLevel(logging.ERROR)
    for name in ("alembic", "mlflow", "vllm"):
        logging.getLogger(name).setLevel(logging.WARNING)
