"""Connecting to Ray: a running cluster by its address, or a local one that ends with the program.

Ray's and vLLM's own talk stays in Ray's log files; their place is told, so that a terminal shows
the stages' progress and nothing else.
"""

import errno
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import ray
import ray.data
from pydantic import Field, PositiveFloat, PositiveInt
from ray._private import ray_logging
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.storage import Storage
from rwkv_clip.config import BaseConfig
from rwkv_clip.joining import joining
from rwkv_clip.quiet import QUIET
from rwkv_clip.signals import heeding

logger = logging.getLogger(__name__)

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_NO_SPACE = os.strerror(errno.ENOSPC)
# A worker takes 1 to 2 % of a core even when it has nothing to do, so idle ones are ended when ten
# seconds have passed without a task.
_FEW_IDLE = {
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "10000",
}
# Ray counts processes that hold next to no CPU as too many; and at a job's end it tells of actors
# that it would start again, though the job itself has ended them.
_NOT_TOLD = re.compile(
    r"PYTHON worker processes have been started|failed\..* it was killed by `ray\.kill`"
)
_SPILL_FULL = "Local disk is full"  # Ray's OutOfDiskError, however it is wrapped


class RayConfig(BaseConfig):
    """Where the jobs run."""

    address: str | None = Field(
        None, description="of a running cluster, or auto; a local one is started if absent"
    )
    num_cpus: PositiveInt | None = Field(None, description="of a local cluster; all if absent")
    object_store_gb: PositiveFloat = Field(2.0, description="shared memory of a local cluster")

    def running(self) -> str | None:
        """The address of a cluster that runs already, if the configuration or Ray names one."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def connected(config: RayConfig) -> Iterator[Path]:
    """A connection to Ray for the block; gives the folder of its log files.

    A connection that this process has already is used, and stays. Meanwhile SIGTERM ends the block
    as an interrupt does.

    Raises:
        CommandError: the cluster at the address cannot be joined, or a local one does not start.
    """
    if ray.is_initialized():
        yield _logs()
        return
    quieten()
    with _ended_by_sigterm() as heed:
        address = config.running()
        with joining(address):
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            else:
                os.environ.update({**QUIET, **_FEW_IDLE, **os.environ})
                ray.init(
                    "local",  # without one Ray would join what `ray start` began on this machine
                    num_cpus=config.num_cpus,
                    include_dashboard=False,
                    object_store_memory=int(config.object_store_gb * 1e9),
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
        heed()  # again: Ray has put a handler there that aborts
        quieten()
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            with _native_talk_in(_logs()):
                yield _logs()
        finally:
            ray.shutdown()


@contextmanager
def _ended_by_sigterm() -> Iterator[Callable[[], None]]:
    """SIGTERM ends the block, and with it the program; gives what `heeding` does."""
    status = 128 + signal.SIGTERM  # as shells tell it
    ended = False

    def end(*_: object) -> NoReturn:
        nonlocal ended
        ended = True
        sys.exit(status)

    with heeding({signal.SIGTERM: end}) as heed:
        try:
            yield heed
        except (SystemExit, KeyboardInterrupt):
            if ended:  # where it meets a `ray.get`, Ray makes a status of 1 of it
                sys.exit(status)
            raise


def unwritable(error: BaseException, storage: Storage) -> str | None:
    """What to do about an error of a storage that nothing can be written to; None for others."""
    refused = isinstance(error, OSError) and error.errno in _REFUSED
    if not refused or not storage.is_local or storage.path() not in str(error):
        return None
    return (
        f"storage.uri: {storage.uri} cannot be written: {error}. Give this user the right to, or "
        "choose another folder"
    )


def full_disk(error: BaseException, storage: str) -> str | None:
    """What to do about an error that a full disk is behind, whoever met it; None for others."""
    told, kept = str(error), "Free some and start again; what is done is kept"
    if _SPILL_FULL in told:
        return (
            f"{_SPILL_FULL}: Ray's object store overflowed, and the disk that it spills to is full "
            f"on one of the nodes. {kept}, or give nodes more memory (ray.object_store_gb of a "
            "local cluster, --object-store-memory of others)"
        )
    if _NO_SPACE in told:
        return (
            f"{_NO_SPACE}: the disk of {storage} is full, or that of Ray's files in "
            f"{tempfile.gettempdir()}. {kept}"
        )
    return None


def lasting_actor(cls: type) -> Any:
    """An actor that outlives every node but the driver's own, where it runs.

    It is started again if its process ends, and has forgotten then; calls to it wait for that.
    """
    node = ray.get_runtime_context().get_node_id()
    place: Any = NodeAffinitySchedulingStrategy(node, soft=False)  # which Ray's declarations lack
    actor: Any = ray.remote(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=place
    )(cls)
    return actor.remote()


def _logs() -> Path:
    node: Any = ray._private.worker.global_worker.node  # which knows the cluster's own folder
    return Path(node.get_logs_dir_path())


def quieten() -> None:
    """Let errors alone of Ray's own talk onto the terminal; its files get all of it.

    To be called again after an import of a part of Ray that sets up logging of its own.
    """
    # ray.llm's modules have a handler each.
    modules = [name for name in logging.root.manager.loggerDict if name.startswith("ray.llm.")]
    for name in ("ray", "ray.data", "ray.llm", "ray.serve", "ray.train", *modules):
        for handler in logging.getLogger(name).handlers:
            # Ray's loggers may share the root's handlers, which get everybody's words.
            shared = handler in logging.root.handlers
            if not shared and type(handler).__name__ != "SessionFileHandler":
                handler.setLevel(logging.ERROR)
    for name in ("alembic", "mlflow", "ray.dashboard", "vllm"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for printer in (ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator):
        printer.skip_re = _NOT_TOLD


@contextmanager
def _native_talk_in(folder: Path) -> Iterator[None]:
    """Let what Ray's C++ writes to this process's stderr go to a file, and what Python writes stay.

    A cluster elsewhere has no such folder here; then nothing changes.
    """
    if not folder.is_dir():
        yield
        return
    before = sys.stderr
    before.flush()
    terminal = os.dup(2)
    with (
        (folder / f"driver-{os.getpid()}.err").open("ab") as file,
        os.fdopen(os.dup(terminal), "w", buffering=1, errors="backslashreplace") as shown,
    ):
        os.dup2(file.fileno(), 2)
        _write_to(shown, instead_of=before)
        try:
            yield
        finally:
            shown.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            _write_to(before, instead_of=shown)


def _write_to(stream: TextIO, instead_of: TextIO) -> None:
    """Make a stream stderr, for those loggers too that have the one before."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is instead_of:
            handler.setStream(stream)
    sys.stderr = stream
