"""Manifests as the tests see them: rendered by kustomize, with the pods that will come of them."""

import copy
import functools
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "infra" / "k8s"
CLUSTER_OF = {  # where each of KubeRay's kinds has its cluster
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
}
QUEUE = "kueue.x-k8s.io/queue-name"  # the label that gives an object to Kueue

Document = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod's template, with the labels that its pods will have.

    Attributes:
        where: what it belongs to, for messages.
        role: `head`, `worker`, `submitter` or `other`.
        most: how many there are at most.
        group: of a Ray cluster.
    """

    where: str
    role: str
    labels: dict[str, str]
    spec: Document
    most: int = 1
    least: int = 1
    group: str = ""

    @property
    def main(self) -> Document:
        """The container that does the work."""
        container: Document = self.spec["containers"][0]
        return container


@functools.cache
def _rendered(folder: Path) -> list[Document]:
    answer = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise AssertionError(f"{folder.relative_to(ROOT)} does not build:\n{answer.stderr}")
    return [one for one in yaml.safe_load_all(answer.stdout) if one]


def render(folder: Path) -> list[Document]:
    """The objects of a kustomization, afresh, so that a caller may change them."""
    return copy.deepcopy(_rendered(folder))


def kustomizations(folder: Path = K8S / "overlays") -> list[Path]:
    """The folders below that are applied; `config` is a part of others."""
    found = sorted(file.parent for file in folder.rglob("kustomization.yaml"))
    return [one for one in found if one.name != "config"]


def overlay(name: str) -> list[Document]:
    """Every object of an overlay, each once."""
    found = {}
    for folder in kustomizations(K8S / "overlays" / name):
        for one in render(folder):
            found.setdefault(identity(one), one)
    return list(found.values())


def identity(document: Document) -> str:
    """An object's kind and name, and whether it waits in a queue.

    A job with and without one are two ways to run one thing; both are looked at.
    """
    queued = QUEUE in document["metadata"].get("labels", {})
    name = f"{document['kind']}/{document['metadata']['name']}"
    return f"{name} (queued)" if queued else name


def of_kind(documents: Sequence[Document], *kinds: str) -> Iterator[Document]:
    """The objects of some kinds."""
    return (one for one in documents if one["kind"] in kinds)


def named(documents: Sequence[Document], kind: str, name: str) -> Document | None:
    """One object; its generated name may end in a hash."""
    for one in of_kind(documents, kind):
        if one["metadata"]["name"] == name:
            return one
    return None


def at(document: Document, path: Sequence[str | int]) -> Any:
    """What stands at a path."""
    value: Any = document
    for step in path:
        value = value[step]
    return value


def cluster_of(document: Document) -> Document:
    """The Ray cluster's specification in one of KubeRay's objects."""
    cluster: Document = at(document, CLUSTER_OF[document["kind"]])
    return cluster


def pods(documents: Sequence[Document]) -> Iterator[Pod]:
    """Every pod's template."""
    for one in documents:
        where = identity(one)
        if one["kind"] in CLUSTER_OF:
            yield from _ray_pods(one, where)
        elif one["kind"] in ("Deployment", "StatefulSet"):
            template = one["spec"]["template"]
            yield Pod(where, "other", _labels(template), template["spec"], one["spec"]["replicas"])
        elif one["kind"] == "CronJob":
            template = one["spec"]["jobTemplate"]["spec"]["template"]
            yield Pod(where, "other", _labels(template), template["spec"])


def _ray_pods(document: Document, where: str) -> Iterator[Pod]:
    cluster = cluster_of(document)
    head = cluster["headGroupSpec"]["template"]
    yield Pod(f"{where} head", "head", _ray_labels(head, "head"), head["spec"])
    for group in cluster.get("workerGroupSpecs", []):
        name, template = group["groupName"], group["template"]
        labels = _ray_labels(template, "worker")
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 1)
        yield Pod(f"{where} group {name}", "worker", labels, template["spec"], most, least, name)
    submitter = document["spec"].get("submitterPodTemplate")
    if document["kind"] == "RayJob" and submitter:
        yield Pod(f"{where} submitter", "submitter", _labels(submitter), submitter["spec"])


def _labels(template: Document) -> dict[str, str]:
    labels: dict[str, str] = template.get("metadata", {}).get("labels", {})
    return labels


def _ray_labels(template: Document, node_type: str) -> dict[str, str]:
    """With those of KubeRay's that our selectors use."""
    return {**_labels(template), "ray.io/node-type": node_type}


def locked(name: str, file: str = "cpu.txt") -> str:
    """A package's version in a lock file."""
    for line in (ROOT / "requirements" / file).read_text().splitlines():
        package, _, version = line.partition("==")
        if package == name:
            return version.partition(" ")[0]
    raise AssertionError(f"{name} is not in requirements/{file}")
