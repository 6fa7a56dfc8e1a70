"""How training's workers join each other: one process group, whose start may fail and is made good.

Ray Train looks for a free port on the first worker, lets it go, and has the worker listen there a
moment later, when another process may have it; it then gives the run up. Where a worker dies while
the others wait for it, Ray Train starts a new group, but keeps the resources of the one that never
was: on a cluster without as many again the run waits for ever. Here the first worker listens from
the start, and a group that could not join leaves its resources and is started again.
"""

import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train._internal.utils import get_address_and_port
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # the stubs lack it

logger = logging.getLogger(__name__)

_listening: list[TCPStore] = []  # of this process, which has one group in its life


@dataclass
class ProcessGroupConfig(TorchConfig):
    """Of a process group that is started again where its workers could not join.

    Attributes:
        max_failures: starts that may fail; -1: any number.
    """

    max_failures: int = 0

    @property
    def backend_cls(self) -> type["_Backend"]:
        """What starts the group, in the process of Ray Train's controller."""
        return _Backend


class _Backend(_TorchBackend):
    def __init__(self) -> None:
        self._failures = 0

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Let the workers join.

        Raises:
            WorkerGroupStartupFailedError: they could not; Ray Train starts others.
            RuntimeError: they could not, too often.
        """
        try:
            group: Any = _Listening(worker_group)
            super().on_start(group, backend_config)
        except RayError as error:
            self._failures += 1
            worker_group.shutdown()  # a group that has not started keeps its resources otherwise
            limit = backend_config.max_failures
            if 0 <= limit < self._failures:
                raise RuntimeError(
                    "the workers could not join each other, more often than train.max_failures "
                    f"({limit}) allows; started again, the run goes on from its last checkpoint: "
                    f"{error}"
                ) from error
            logger.warning("the workers could not join each other; others are started: %s", error)
            raise WorkerGroupStartupFailedError("the workers could not join each other") from error


class _Listening:
    """A group of workers whose first one, asked for a free port, listens there at once."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def execute_single(self, rank: int, function: Any, *args: Any, **named: Any) -> Any:
        if function is get_address_and_port:
            function = listen
        return self._group.execute_single(rank, function, *args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def __len__(self) -> int:
        return len(self._group)


def listen() -> tuple[str, int]:
    """Open the store by which workers find each other, in this process, for as long as it lives.

    PyTorch, told to serve a store on a port where this process has one, takes that.

    Returns:
        This node's address and the store's port.
    """
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    _listening[:] = [store]
    return address, store.port
