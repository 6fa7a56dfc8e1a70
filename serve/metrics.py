"""What is counted: through Ray's metrics, so that Prometheus finds it on every node's exporter.

`/metrics` gathers from all nodes what is said of this endpoint and of Ray Serve, for those who
would rather ask the endpoint than the nodes. Numbers are there some seconds after the fact: Ray's
workers hand them over every ten.
"""

import asyncio
import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import httpx
import ray
from ray.serve.metrics import Counter, Histogram

from serve.messages import Tower

logger = logging.getLogger(__name__)

_MILLISECONDS = [1.0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 60000]
_ITEMS = [1.0, 2, 4, 8, 16, 32, 64, 128, 256]
# Ray's annotations want one name, and its code takes any number.
_REQUEST_TAGS: Any = ("route", "status", "model_version")
_TOWER_TAGS: Any = ("tower", "model_version")
OTHER_ROUTE = "other"  # all paths and methods that are not there, or clients would make labels
LEFT = 499  # the status of requests whose client left before the answer, as nginx has it
_OURS = ("ray_rwkv_clip_", "ray_serve_")
_SECONDS = 5.0  # for a node to tell


class RequestMetrics:
    """Of an ingress."""

    def __init__(self) -> None:
        self._requests = Counter(
            "rwkv_clip_requests",
            description="Answered requests; with status 499 those whose client left before.",
            tag_keys=_REQUEST_TAGS,
        )
        self._time = Histogram(
            "rwkv_clip_request_ms",
            description="From a request's arrival to its answer.",
            boundaries=_MILLISECONDS,
            tag_keys=("route",),
        )

    def answered(self, route: str, status: int, version: str, seconds: float) -> None:
        """Count a request, and its time."""
        self.count(route, status, version)
        self._time.observe(1000 * seconds, tags={"route": route})

    def count(self, route: str, status: int, version: str = "") -> None:
        """Count a request alone: one whose time says nothing of this server."""
        self._requests.inc(tags={"route": route, "status": str(status), "model_version": version})


class TowerMetrics:
    """Of a tower's replica."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        histogram = partial(Histogram, tag_keys=_TOWER_TAGS)
        self._batch = histogram(
            "rwkv_clip_batch_size", description="Items in a batch.", boundaries=_ITEMS
        )
        self._times = {
            name: histogram(f"rwkv_clip_{name}_ms", description=told, boundaries=_MILLISECONDS)
            for name, told in (
                ("preprocess", "Decoding or tokenizing of a request's items."),
                ("queue_wait", "Waiting of items for the model to be free."),
                ("inference", "The model's time for a batch."),
            )
        }

    def batch(self, version: str, items: int, seconds: float) -> None:
        """Count a batch."""
        self._batch.observe(items, tags=self._tags(version))
        self._times["inference"].observe(1000 * seconds, tags=self._tags(version))

    def request(self, version: str, preprocess: float, waited: float) -> None:
        """Count a request's seconds."""
        self._times["preprocess"].observe(1000 * preprocess, tags=self._tags(version))
        self._times["queue_wait"].observe(1000 * waited, tags=self._tags(version))

    def _tags(self, version: str) -> dict[str, str]:
        return {"tower": self.tower, "model_version": version}


async def gathered() -> str:
    """All nodes' metrics of this endpoint and of Serve, in Prometheus' text format."""
    nodes = await asyncio.to_thread(ray.nodes)
    places = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if node["Alive"]
    ]
    async with httpx.AsyncClient(timeout=_SECONDS, trust_env=False) as client:
        texts = await asyncio.gather(*(_told(client, place) for place in places))
    return merged(texts)


async def _told(client: httpx.AsyncClient, place: str) -> str:
    try:
        return (await client.get(place)).raise_for_status().text
    except httpx.HTTPError as error:
        logger.warning("%s tells nothing: %s", place, type(error).__name__)
        return ""


def merged(texts: Iterable[str]) -> str:
    """Several expositions as one: each family's lines together, under one head."""
    heads: dict[str, dict[str, None]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                kind, _, rest = line[2:].partition(" ")
                family = rest.partition(" ")[0]
                if kind in ("HELP", "TYPE") and family.startswith(_OURS):
                    heads.setdefault(family, {})[line] = None
            elif line.startswith(_OURS):
                samples.setdefault(family, []).append(line)
    blocks = (
        "\n".join([*heads.get(family, ()), *lines]) for family, lines in sorted(samples.items())
    )
    return "".join(f"{block}\n" for block in blocks)
