"""Whether an object has the fields that its kind has, and no others.

KubeRay's kinds are checked against its CRD schemas, Kubernetes' own against their strict schemas,
and the few of others against what is used of them here. Defaults are applied first, as the API
server does.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.infra.manifests import CLUSTER_OF, ROOT, Document, identity

CRDS = ROOT.parent / "shared" / "k8s" / "crds"
KUBERNETES = "1.34"
_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}


def check_schema(document: Document) -> list[str]:
    """What is wrong with an object's fields."""
    where = identity(document)
    if document["kind"] in CLUSTER_OF:
        schema = _crd(document["kind"])
        filled = copy.deepcopy(document)
        _fill(filled, schema)
        return [f"{where}: {text}" for text in _mistakes(filled, schema)]
    if document["kind"] in OTHERS:
        schema = _whole(OTHERS[document["kind"]])
        return [f"{where}: {text}" for text in _mistakes(document, schema)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(map(str, error.absolute_path))
        return [f"{where}: {place}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{where}: {error.message}"]
    return []


def _mistakes(document: Document, schema: Document) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]


def has_crds() -> bool:
    """Whether KubeRay's schemas are at hand."""
    return CRDS.is_dir()


@functools.cache
def _crd(kind: str) -> Document:
    """The strict schema of version v1 of one of KubeRay's kinds."""
    file: Path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    crd = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    versions = {one["name"]: one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"]}
    schema: Document = versions["v1"]
    _refuse_unknown(schema)
    schema["properties"]["metadata"] = _METADATA
    return schema


def _refuse_unknown(schema: Any) -> None:
    """Let a field that a schema does not name be a mistake; the API server would drop it."""
    if isinstance(schema, list):
        for one in schema:
            _refuse_unknown(one)
    elif isinstance(schema, dict):
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
        if "properties" in schema and "additionalProperties" not in schema and not open_ended:
            schema["additionalProperties"] = False
        for name, one in schema.items():
            # A property may be called `default` or `properties` itself.
            inner = one.values() if name == "properties" and isinstance(one, dict) else [one]
            for value in inner:
                _refuse_unknown(value)


def _fill(value: Any, schema: Document) -> None:
    """Add the defaults of what is absent."""
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                _fill(value[name], inner)
        rest = schema.get("additionalProperties")
        if isinstance(rest, dict):
            for one in value.values():
                _fill(one, rest)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for one in value:
            _fill(one, schema["items"])


def _object(required: str = "", **properties: Document) -> Document:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: Document) -> Document:
    return {"type": "array", "items": items, "minItems": 1}


def _whole(spec: Document) -> Document:
    return _object("apiVersion kind metadata spec", spec=spec, apiVersion=_TEXT, kind=_TEXT,
                   metadata=_METADATA)  # fmt: skip


_LABELS = {"type": "object", "additionalProperties": _TEXT}
_METADATA = _object("name", name=_TEXT, namespace=_TEXT, labels=_LABELS, annotations=_LABELS)
_SELECTOR = _object(
    matchLabels=_LABELS,
    matchExpressions=_list(_object("key operator", key=_TEXT, operator=_TEXT, values=_TEXTS)),
)
_RELABELING = _object(sourceLabels=_TEXTS, targetLabel=_TEXT, action=_TEXT, regex=_TEXT)
_QUOTA = {"type": ["integer", "string"]}

# What is used of kinds whose schemas are not at hand.
OTHERS: dict[str, Document] = {
    "PodMonitor": _object(
        "selector podMetricsEndpoints",
        jobLabel=_TEXT,
        selector=_SELECTOR,
        podTargetLabels=_TEXTS,
        podMetricsEndpoints=_list(
            _object("port", port=_TEXT, interval=_TEXT, relabelings=_list(_RELABELING))
        ),
    ),
    "PrometheusRule": _object(
        "groups",
        groups=_list(
            _object(
                "name rules",
                name=_TEXT,
                rules=_list(
                    _object(
                        "alert expr labels annotations",
                        alert=_TEXT,
                        expr=_TEXT,
                        labels=_LABELS,
                        annotations=_LABELS,
                        **{"for": _TEXT},
                    )
                ),
            )
        ),
    ),
    "ResourceFlavor": _object(
        nodeLabels=_LABELS,
        tolerations=_list(_object(key=_TEXT, operator=_TEXT, effect=_TEXT, value=_TEXT)),
    ),
    "ClusterQueue": _object(
        "namespaceSelector resourceGroups",
        namespaceSelector=_SELECTOR,
        queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
        preemption=_object(withinClusterQueue=_TEXT, reclaimWithinCohort=_TEXT),
        resourceGroups=_list(
            _object(
                "coveredResources flavors",
                coveredResources=_TEXTS,
                flavors=_list(
                    _object(
                        "name resources",
                        name=_TEXT,
                        resources=_list(_object("name nominalQuota", name=_TEXT,
                                                nominalQuota=_QUOTA)),
                    )
                ),
            )
        ),
    ),
    "LocalQueue": _object("clusterQueue", clusterQueue=_TEXT),
}  # fmt: skip
