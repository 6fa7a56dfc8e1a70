"""Whether the cluster has room for what is to run in it, told before anything waits for it."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """Processes that hold resources at the same time, each of them on one node.

    Attributes:
        key: of the configuration, that says so.
        cpus: of each.
        gpus: of each.
        count: how many there are.
    """

    key: str
    cpus: float
    gpus: float = 0.0
    count: int = 1

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{self.key}: {times}{self.cpus:g} CPUs{gpus}"


def warn_without_room(*needs: Need, then: str = "this waits for ever") -> bool:
    """Warn where the nodes that are there now, all of them idle, cannot hold all this at once.

    No more than a warning, because a cluster may grow when something waits.

    Args:
        needs: all of it.
        then: what comes of it unless the cluster grows, and what to do.

    Returns:
        Whether there is room.
    """
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    there = [node["Resources"] for node in nodes if node["Alive"]]
    if fits(needs, there):
        return True
    wanted = ", ".join(map(str, needs))
    largest = ", ".join(
        f"{one.get('CPU', 0.0):g} CPUs and {one.get('GPU', 0.0):g} GPUs" for one in there[:8]
    )
    logger.warning(
        "not enough room in the cluster: %s on a node, but the %s now: unless the cluster grows, "
        "%s",
        wanted,
        f"nodes have {largest}" if len(there) > 1 else f"only node has {largest}",
        then,
    )
    return False


def fits(needs: Iterable[Need], nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether nodes with these resources hold all of it, by placing the largest first."""
    free = [[node.get("GPU", 0.0), node.get("CPU", 0.0)] for node in nodes]
    for need in sorted(needs, key=lambda one: (one.gpus, one.cpus), reverse=True):
        for _ in range(need.count):
            place = min((one for one in free if _holds(one, need)), default=None)
            if place is None:
                return False
            place[0] -= need.gpus
            place[1] -= need.cpus
    return True


def _holds(free: list[float], need: Need) -> bool:
    least = 1e-6  # Ray counts in ten thousandths
    return free[0] + least >= need.gpus and free[1] + least >= need.cpus
