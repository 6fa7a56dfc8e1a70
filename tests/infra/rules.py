"""What schemas do not hold: KubeRay's own rules, Kueue's, Kubernetes', and this project's.

Each rule is a function of an overlay's objects that gives what is wrong in it.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml
from ray._private import ray_constants

import rwkv_clip
from tests.infra.manifests import (
    CLUSTER_OF,
    QUEUE,
    ROOT,
    Document,
    Pod,
    cluster_of,
    identity,
    locked,
    named,
    of_kind,
    pods,
)

Rule = Callable[[Sequence[Document]], Iterator[str]]
GUIDE = ROOT / "docs" / "operators-guide.md"
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_SECRET_WORD = re.compile(r"PASSWORD|SECRET|TOKEN|(API|ACCESS)_KEY", re.IGNORECASE)
_CLUSTER_WIDE = ("Namespace", "ResourceFlavor", "ClusterQueue")
_ALPHA = ("networkPolicy", "tlsOptions", "historyServerOptions")
_FOREIGN_LABEL = "gateway.networking.k8s.io/gateway-name"  # of pods that a gateway brings
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_LAST_SECONDS = 20  # for Ray's processes to end, once its node is drained


def check_rules(documents: Sequence[Document]) -> list[str]:
    """What is wrong in an overlay."""
    return [text for rule in RULES for text in rule(documents)]


def _clusters(documents: Sequence[Document]) -> Iterator[tuple[str, Document, Document]]:
    """Each of KubeRay's objects: its name, itself, and its cluster."""
    for one in of_kind(documents, *CLUSTER_OF):
        yield identity(one), one, cluster_of(one)


# KubeRay


def ray_version(documents: Sequence[Document]) -> Iterator[str]:
    """Ray's version is that of the lock files, and knows tokens."""
    versions = {locked("ray", file) for file in ("cpu.txt", "cuda.txt")}
    for where, _, cluster in _clusters(documents):
        told = cluster.get("rayVersion")
        if {told} != versions:
            yield f"{where}: rayVersion is {told}; the lock files have {', '.join(versions)}"
        numbers = tuple(int(number) for number in re.findall(r"\d+", told or "0")[:2])
        if numbers < (2, 52):
            yield f"{where}: token authentication needs rayVersion 2.52"


def token_auth(documents: Sequence[Document]) -> Iterator[str]:
    """No cluster is open, and the token is a Secret's."""
    for where, _, cluster in _clusters(documents):
        auth = cluster.get("authOptions", {})
        if auth.get("mode") != "token" or not auth.get("secretName"):
            yield f"{where}: authOptions takes mode: token and a secretName"
        if auth.get("enableK8sTokenAuth"):
            yield f"{where}: enableK8sTokenAuth excludes secretName"


def alpha_features(documents: Sequence[Document]) -> Iterator[str]:
    """What KubeRay 1.7 refuses unless a feature gate is opened."""
    for where, _, cluster in _clusters(documents):
        yield from (f"{where}: {name} is alpha and off" for name in _ALPHA if name in cluster)
        if cluster.get("gcsFaultToleranceOptions", {}).get("backend", "redis") != "redis":
            yield f"{where}: gcsFaultToleranceOptions.backend other than redis is alpha and off"


def deletion(documents: Sequence[Document]) -> Iterator[str]:
    """A job's deletion rules agree with each other and with the rest of it."""
    for one in of_kind(documents, "RayJob"):
        where, spec = identity(one), one["spec"]
        shutdown = spec.get("shutdownAfterJobFinishes", False)
        if spec.get("ttlSecondsAfterFinished", 0) and not shutdown:
            yield f"{where}: ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
        if spec.get("suspend") and not shutdown:
            yield f"{where}: suspend needs shutdownAfterJobFinishes"
        strategy = spec.get("deletionStrategy")
        if strategy is None:
            if not shutdown:
                yield f"{where}: nothing deletes its cluster"
            continue
        rules = strategy.get("deletionRules", [])
        if not rules or "onSuccess" in strategy or "onFailure" in strategy:
            yield f"{where}: deletionStrategy takes deletionRules and nothing else"
        if shutdown:
            yield f"{where}: deletionRules exclude shutdownAfterJobFinishes"
        scales = spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling")
        if scales and any(rule["policy"] == "DeleteWorkers" for rule in rules):
            yield f"{where}: DeleteWorkers excludes autoscaling"
        yield from (f"{where}: {text}" for text in _deletion_times(rules))


def _deletion_times(rules: Sequence[Document]) -> Iterator[str]:
    times: dict[tuple[str, str], dict[str, int]] = {}
    for rule in rules:
        condition = rule["condition"]
        on = [key for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        if len(on) != 1:
            yield "a deletion rule takes one of jobStatus and jobDeploymentStatus"
            continue
        policies = times.setdefault((on[0], condition[on[0]]), {})
        if rule["policy"] in policies:
            yield f"two rules say {rule['policy']} on {condition[on[0]]}"
        policies[rule["policy"]] = condition.get("ttlSeconds", 0)
    for (_, value), policies in times.items():
        order = [policies[name] for name in _DELETION_ORDER if name in policies]
        if order != sorted(order):
            yield f"on {value}, ttlSeconds must be DeleteWorkers <= DeleteCluster <= DeleteSelf"


def retries(documents: Sequence[Document]) -> Iterator[str]:
    """A job is tried again, and not for ever."""
    for one in of_kind(documents, "RayJob"):
        spec = one["spec"]
        if spec.get("backoffLimit", 0) < 1:
            yield f"{identity(one)}: backoffLimit is not positive, so one failure ends the job"
        if not spec.get("activeDeadlineSeconds"):
            yield f"{identity(one)}: activeDeadlineSeconds is missing"
        if spec.get("clusterSelector"):
            yield f"{identity(one)}: clusterSelector excludes backoffLimit"


def autoscaling(documents: Sequence[Document]) -> Iterator[str]:
    """The autoscaler is the second one, and groups have bounds that hold."""
    for where, _, cluster in _clusters(documents):
        options = cluster.get("autoscalerOptions", {})
        scales, version = cluster.get("enableInTreeAutoscaling"), options.get("version")
        if scales and version != "v2":
            yield f"{where}: autoscalerOptions.version is not v2"
        if options and not scales:
            yield f"{where}: autoscalerOptions without enableInTreeAutoscaling do nothing"
        templates = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
        policies = {one["template"]["spec"].get("restartPolicy", "Never") for one in templates}
        if version == "v2" and policies != {"Never"}:
            yield f"{where}: autoscaler v2 takes restartPolicy Never, or none"
        for group in cluster.get("workerGroupSpecs", []):
            yield from _bounds(f"{where} group {group['groupName']}", group, bool(scales))


def _bounds(where: str, group: Document, scales: bool) -> Iterator[str]:
    if "minReplicas" not in group or "maxReplicas" not in group:
        yield f"{where}: minReplicas and maxReplicas are both needed"
        return
    least, most, now = group["minReplicas"], group["maxReplicas"], group.get("replicas", 0)
    if not least <= now <= most:
        yield f"{where}: replicas={now} is not within {least} and {most}"
    if not scales and least != most:
        yield f"{where}: without autoscaling there are always {now} workers; make the bounds equal"
    if "idleTimeoutSeconds" in group and not scales:
        yield f"{where}: idleTimeoutSeconds needs autoscaler v2"


def upgrades(documents: Sequence[Document]) -> Iterator[str]:
    """An endpoint is exchanged without a gap; step by step only with all that this needs."""
    for one in of_kind(documents, "RayService"):
        where, strategy = identity(one), one["spec"].get("upgradeStrategy", {})
        kind = strategy.get("type")
        if kind not in ("NewCluster", "NewClusterWithIncrementalUpgrade"):
            yield f"{where}: upgradeStrategy.type {kind} leaves a gap"
        if kind != "NewClusterWithIncrementalUpgrade":
            continue
        options = strategy.get("clusterUpgradeOptions", {})
        step, surge = options.get("stepSizePercent"), options.get("maxSurgePercent", 100)
        if not cluster_of(one).get("enableInTreeAutoscaling"):
            yield f"{where}: an incremental upgrade needs autoscaling"
        if step is None or not 0 < step <= 100:
            yield f"{where}: stepSizePercent takes 1 to 100"
        elif step > surge:
            yield f"{where}: stepSizePercent is more than maxSurgePercent"
        if options.get("intervalSeconds", 0) <= 0:
            yield f"{where}: intervalSeconds must be positive"
        if not options.get("gatewayClassName"):
            yield f"{where}: gatewayClassName is missing"


def redis(documents: Sequence[Document]) -> Iterator[str]:
    """The head's memory is in Redis by gcsFaultToleranceOptions alone, with a Secret's password."""
    for where, one, cluster in _clusters(documents):
        main = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        names = {env["name"] for env in main.get("env", [])}
        for name in sorted(names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}):
            yield f"{where}: {name} belongs into gcsFaultToleranceOptions"
        if "ray.io/ft-enabled" in one["metadata"].get("annotations", {}):
            yield f"{where}: ray.io/ft-enabled belongs into gcsFaultToleranceOptions"
        options = cluster.get("gcsFaultToleranceOptions")
        if options and "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
            yield f"{where}: redisPassword takes valueFrom.secretKeyRef"


def names(documents: Sequence[Document]) -> Iterator[str]:
    """KubeRay makes longer names of these."""
    for one in of_kind(documents, *CLUSTER_OF):
        name, most = one["metadata"]["name"], _LONGEST_NAME[one["kind"]]
        if len(name) > most or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{identity(one)}: takes at most {most} of a-z, 0-9 and -"


def ports(documents: Sequence[Document]) -> Iterator[str]:
    """KubeRay finds the endpoint's port, and Prometheus the metrics, by the ports' names."""
    for one in of_kind(documents, "RayService"):
        for pod in pods([one]):
            found = {port["name"]: port["containerPort"] for port in pod.main.get("ports", [])}
            if found.get("serve") != 8000:
                yield f"{pod.where}: no port named serve with the number 8000"
    for pod in _ray_pods(documents):
        if "metrics" not in {port["name"] for port in pod.main.get("ports", [])}:
            yield f"{pod.where}: no port named metrics"
    for one in of_kind(documents, "PodMonitor"):
        for pod in pods(documents):
            found = {port["name"] for port in pod.main.get("ports", [])}
            wanted = {read["port"] for read in one["spec"]["podMetricsEndpoints"]}
            if matches(one["spec"]["selector"], pod.labels) and wanted - found:
                lacking = ", ".join(sorted(wanted - found))
                yield f"{pod.where}: {identity(one)} reads {lacking}, which no port is named"


def _ray_pods(documents: Sequence[Document]) -> Iterator[Pod]:
    return (pod for pod in pods(documents) if pod.role in ("head", "worker"))


# Kueue


def queues(documents: Sequence[Document]) -> Iterator[str]:
    """What Kueue admits: jobs of a fixed size that give everything back."""
    for where, one, cluster in _clusters(documents):
        queue = one["metadata"].get("labels", {}).get(QUEUE)
        if queue is None:
            continue
        if named(documents, "LocalQueue", queue) is None:
            yield f"{where}: there is no LocalQueue {queue}"
        if cluster.get("enableInTreeAutoscaling"):
            yield f"{where}: a queued job has no autoscaler"
        if one["kind"] == "RayJob" and not one["spec"].get("shutdownAfterJobFinishes"):
            yield f"{where}: a queued job needs shutdownAfterJobFinishes"
        groups = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
        if len(groups) > 7 or "head" in groups:
            yield f"{where}: a queued job has at most seven groups, none named head"
        quota, wanted = _quota(documents), _wanted(one)
        for name in sorted(wanted):
            there = quota.get(name, 0)
            if wanted[name] > there:
                told = f"{wanted[name]:g} of {there:g}"
                yield f"{where}: asks for more {name} than the quota of its queue: {told}"
    for queue in of_kind(documents, "LocalQueue"):
        name = queue["spec"]["clusterQueue"]
        found = named(documents, "ClusterQueue", name)
        if found is None:
            yield f"{identity(queue)}: there is no ClusterQueue {name}"
            continue
        for group in found["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                covered = [one["name"] for one in flavor["resources"]]
                if covered != group["coveredResources"]:
                    yield f"{identity(found)}: {flavor['name']} does not name the covered resources"
                if named(documents, "ResourceFlavor", flavor["name"]) is None:
                    yield f"{identity(found)}: there is no ResourceFlavor {flavor['name']}"


def _quota(documents: Sequence[Document]) -> dict[str, float]:
    """Of all queues together, by resource."""
    found: dict[str, float] = {}
    for queue in of_kind(documents, "ClusterQueue"):
        for group in queue["spec"]["resourceGroups"]:
            for one in (one for flavor in group["flavors"] for one in flavor["resources"]):
                found[one["name"]] = found.get(one["name"], 0) + quantity(one["nominalQuota"])
    return found


def _wanted(document: Document) -> dict[str, float]:
    """What an object's pods ask for together, by resource."""
    found: dict[str, float] = {}
    for pod in pods([document]):
        told = pod.main["resources"]
        for name, value in {**told.get("limits", {}), **told["requests"]}.items():
            found[name] = found.get(name, 0) + pod.most * quantity(value)
    return found


# Images and versions


def images(documents: Sequence[Document]) -> Iterator[str]:
    """Every image has an exact version or a digest; ours and MLflow's fit this tree."""
    for pod in pods(documents):
        for container in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
            yield from (f"{pod.where}: {text}" for text in _image_problems(container["image"]))
    for one in of_kind(documents, *CLUSTER_OF):
        if len({pod.main["image"] for pod in pods([one])}) > 1:
            yield f"{identity(one)}: head, workers and submitter have different images"


def _image_problems(image: str) -> Iterator[str]:
    place, _, digest = image.partition("@")
    name, _, tag = place.rpartition("/")[2].partition(":")
    if digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        yield f"{image} has no digest: sha256: and 64 hexadecimal digits"
    if digest and not tag:
        return  # exact, and tells no version
    if not re.search(r"\d+\.\d+", tag):
        yield f"{image} has no exact version"
    version = rwkv_clip.__version__
    # Whatever tells builds apart may follow.
    if name == "rwkv-clip" and not re.fullmatch(rf"{re.escape(version)}-(cpu|cuda)([-._].+)?", tag):
        yield (
            f"{image} is not of this checkout, whose tags begin with {version}-cpu or "
            f"{version}-cuda; it is checked by the checkout that it was built from"
        )
    # A server knows what older clients say.
    if name == "mlflow" and (not tag.endswith("-full") or _numbers(tag) < _numbers(locked(name))):
        yield f"{image} is not v{locked(name)}-full, which is our clients' version, or a newer one"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


# Secrets


def secrets(documents: Sequence[Document]) -> Iterator[str]:
    """Secrets are named and never written down, and the guide tells how each is made."""
    for one in of_kind(documents, "Secret"):
        yield f"{identity(one)}: Secrets do not belong into files"
    for one in of_kind(documents, "ConfigMap"):
        for key in one.get("data", {}):
            if _SECRET_WORD.search(key):
                yield f"{identity(one)}: {key} belongs into a Secret"
    for pod in pods(documents):
        for container in pod.spec["containers"]:
            for env in container.get("env", []):
                value = env.get("value", "")
                is_path = value.startswith(("@/", "/")) or "$(" in value
                if _SECRET_WORD.search(env["name"]) and value and not is_path:
                    yield f"{pod.where}: {env['name']} is written down; take secretKeyRef"
    guide = GUIDE.read_text(encoding="utf-8")
    for name in sorted(_secret_names(documents)):
        if f"secret generic {name} " not in guide:
            yield f"Secret {name} is in no command of {GUIDE.name}"


def _secret_names(value: Any) -> set[str]:
    """The names of all Secrets that are spoken of below."""
    found: set[str] = set()
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("secretRef", "secretKeyRef"):
                found.add(inner["name"])
            elif key == "secretName":
                found.add(inner)
            else:
                found |= _secret_names(inner)
    elif isinstance(value, list | tuple):
        for one in value:
            found |= _secret_names(one)
    return found


# Pods


def security(documents: Sequence[Document]) -> Iterator[str]:
    """What the namespace's `restricted` asks of pods."""
    for pod in pods(documents):
        settings = pod.spec.get("securityContext", {})
        if not settings.get("runAsNonRoot") or not settings.get("runAsUser"):
            yield f"{pod.where}: securityContext lacks runAsNonRoot and runAsUser"
        if settings.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.where}: securityContext lacks seccompProfile RuntimeDefault"
        for container in pod.spec["containers"]:
            yield from _container_security(f"{pod.where} {container['name']}", container)
        if "hostPath" in yaml.safe_dump(pod.spec.get("volumes", [])):
            yield f"{pod.where}: hostPath is refused"
    for where, _, cluster in _clusters(documents):
        if cluster.get("enableInTreeAutoscaling"):
            yield from _container_security(f"{where} autoscaler", cluster["autoscalerOptions"])


def _container_security(where: str, container: Document) -> Iterator[str]:
    settings = container.get("securityContext", {})
    dropped = settings.get("capabilities", {}).get("drop")
    if settings.get("allowPrivilegeEscalation") is not False or dropped != ["ALL"]:
        yield f"{where}: securityContext lacks allowPrivilegeEscalation: false and drop: [ALL]"


def resources(documents: Sequence[Document]) -> Iterator[str]:
    """Every container says what it needs; Ray's memory is what it may use, and no more."""
    for pod in pods(documents):
        for container in pod.spec["containers"]:
            told = container.get("resources", {})
            requests, limits = told.get("requests", {}), told.get("limits", {})
            where = f"{pod.where} {container['name']}"
            if "cpu" not in requests or "memory" not in requests or "memory" not in limits:
                yield f"{where}: takes requests of cpu and memory and a limit of memory"
                continue
            if quantity(requests["memory"]) > quantity(limits["memory"]):
                yield f"{where}: requests more memory than its limit"
            if quantity(requests["cpu"]) > quantity(limits.get("cpu", requests["cpu"])):
                yield f"{where}: requests more CPUs than its limit"
            if pod.role in ("head", "worker") and requests["memory"] != limits["memory"]:
                yield f"{where}: Ray counts on its limit of memory; request as much"
            gpus = "nvidia.com/gpu"
            if requests.get(gpus, limits.get(gpus)) != limits.get(gpus):
                yield f"{where}: GPUs cannot be overcommitted"


def quantity(told: str | int | float) -> float:
    """A Kubernetes quantity as a number."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
             "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip
    found = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(told))
    assert found is not None, told
    return float(found[1]) * (units[found[2]] if found[2] else 1)


def readiness(documents: Sequence[Document]) -> Iterator[str]:
    """Pods of the endpoint get requests when it answers that it is ready, and spread out."""
    for one in of_kind(documents, "RayService"):
        for pod in pods([one]):
            if pod.role != "worker":
                continue
            probe = pod.main.get("readinessProbe", {}).get("httpGet", {})
            if (probe.get("path"), probe.get("port")) != ("/readyz", "serve"):
                yield f"{pod.where}: readinessProbe is not GET /readyz at the port serve"
            spread = {one["topologyKey"] for one in pod.spec.get("topologySpreadConstraints", [])}
            if not spread >= {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}:
                yield f"{pod.where}: does not spread over nodes and zones"


def draining(documents: Sequence[Document]) -> Iterator[str]:
    """What the endpoint's pods and clusters have to answer they answer before they end."""
    for one in of_kind(documents, "RayService"):
        http = yaml.safe_load(one["spec"]["serveConfigV2"]).get("http_options", {})
        longest = http.get("request_timeout_s") or 0
        may = f"requests may take {longest:g} seconds"
        kept = one["spec"].get("rayClusterDeletionDelaySeconds", 60)
        if kept <= longest:
            yield f"{identity(one)}: rayClusterDeletionDelaySeconds is {kept}; {may}"
        for pod in (pod for pod in pods([one]) if pod.role == "worker"):
            values = {env["name"]: env.get("value", "") for env in pod.main.get("env", [])}
            drain = float(values.get(_DRAIN, ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S))
            if drain <= longest:
                yield f"{pod.where}: {_DRAIN} is {drain:g}; {may}"
            hook = pod.main.get("lifecycle", {}).get("preStop", {}).get("exec", {})
            taken = float(hook.get("command", ["sleep", "0"])[1]) + drain + _LAST_SECONDS
            grace = pod.spec.get("terminationGracePeriodSeconds", 30)
            if taken > grace:
                yield f"{pod.where}: takes {taken:g} seconds to end, and is given {grace}"


def disruption(documents: Sequence[Document]) -> Iterator[str]:
    """Kubernetes takes a number of pods that no Deployment owns; fewer than there are at least."""
    for one in of_kind(documents, "PodDisruptionBudget"):
        where, spec = identity(one), one["spec"]
        least = spec.get("minAvailable")
        if not isinstance(least, int) or "maxUnavailable" in spec:
            yield f"{where}: takes minAvailable as a number"
            continue
        matched = [pod for pod in pods(documents) if matches(spec["selector"], pod.labels)]
        if matched and least >= sum(pod.least for pod in matched):
            yield f"{where}: minAvailable={least} keeps every node from being drained"


# Names that must meet


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a selector takes a pod."""
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        one["operator"] == "In" and labels.get(one["key"]) in one["values"]
        for one in selector.get("matchExpressions", [])
    )


def selectors(documents: Sequence[Document]) -> Iterator[str]:
    """Every selector takes some pod: a label that is misspelt would take none, silently."""
    labels = [pod.labels for pod in pods(documents)]
    for one in documents:
        for key, selector in _selectors(one):
            wanted = {"matchLabels": selector} if key == "selector" else selector
            if _FOREIGN_LABEL in str(selector):
                continue
            if not any(matches(wanted, each) for each in labels):
                yield f"{identity(one)}: {key} {selector} takes no pod"


def _selectors(document: Document) -> Iterator[tuple[str, Document]]:
    if document["kind"] == "Service":
        yield "selector", document["spec"]["selector"]
    elif document["kind"] == "NetworkPolicy":
        yield from _pod_selectors(document["spec"])
    elif document["kind"] in ("PodDisruptionBudget", "PodMonitor"):
        yield "its selector", document["spec"]["selector"]
    elif document["kind"] in (*CLUSTER_OF, "Deployment", "StatefulSet"):
        for pod in pods([document]):
            for spread in pod.spec.get("topologySpreadConstraints", []):
                yield "labelSelector", spread["labelSelector"]


def _pod_selectors(value: Any) -> Iterator[tuple[str, Document]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # Pods of other namespaces are not ours to know.
            if key == "podSelector" and "namespaceSelector" not in value:
                yield key, inner
            else:
                yield from _pod_selectors(inner)
    elif isinstance(value, list):
        for one in value:
            yield from _pod_selectors(one)


def references(documents: Sequence[Document]) -> Iterator[str]:
    """What pods name is there: configurations, volumes, accounts."""
    for pod in pods(documents):
        wanted = {("ServiceAccount", pod.spec["serviceAccountName"])} if (
            "serviceAccountName" in pod.spec
        ) else set()  # fmt: skip
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                wanted.add(("ConfigMap", volume["configMap"]["name"]))
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                wanted.add(("PersistentVolumeClaim", claim))
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for container in pod.spec["containers"]:
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    wanted.add(("ConfigMap", source["configMapRef"]["name"]))
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            # A StatefulSet's claims are volumes too.
            for name in sorted(mounted - volumes - {"data"}):
                yield f"{pod.where}: no volume {name}"
        for kind, name in sorted(wanted):
            if named(documents, kind, name) is None:
                yield f"{pod.where}: there is no {kind} {name}"


def namespaces(documents: Sequence[Document]) -> Iterator[str]:
    """Everything is in one namespace, which refuses what is not `restricted`."""
    found = next(of_kind(documents, "Namespace"), None)
    if found is None:
        yield "there is no Namespace"
        return
    name = found["metadata"]["name"]
    enforce = "pod-security.kubernetes.io/enforce"
    if found["metadata"].get("labels", {}).get(enforce) != "restricted":
        yield f"{identity(found)} does not enforce restricted"
    for one in documents:
        namespace = one["metadata"].get("namespace")
        wanted = None if one["kind"] in _CLUSTER_WIDE else name
        if namespace != wanted:
            yield f"{identity(one)}: its namespace is {namespace}, not {wanted}"
        for other in sorted(_named_namespaces(one) - {name}):
            yield f"{identity(one)}: asks for the namespace {other}, not {name}"


def _named_namespaces(document: Document) -> set[str]:
    """Those that alerts and queues look into."""
    if document["kind"] == "PrometheusRule":
        return set(re.findall(r'\bnamespace="([^"]*)"', str(document["spec"])))
    if document["kind"] == "ClusterQueue":
        labels = document["spec"].get("namespaceSelector", {}).get("matchLabels", {})
        return {value for key, value in labels.items() if key == "kubernetes.io/metadata.name"}
    return set()


def network(documents: Sequence[Document]) -> Iterator[str]:
    """Everything is denied but what is allowed, and DNS and the API server are."""
    policies = list(of_kind(documents, "NetworkPolicy"))
    everyone = [one for one in policies if one["spec"]["podSelector"] == {}]
    denied = [one for one in everyone if not {"ingress", "egress"} & set(one["spec"])]
    if not any(set(one["spec"]["policyTypes"]) == {"Ingress", "Egress"} for one in denied):
        yield "no NetworkPolicy denies everything"
    if not any(53 in _egress_ports(one) for one in everyone):
        yield "no NetworkPolicy allows DNS to everyone; nothing would find anything"
    for where, one, cluster in _clusters(documents):
        if not cluster.get("enableInTreeAutoscaling"):
            continue
        head = next(pod for pod in pods([one]) if pod.role == "head")
        allowed = {
            port
            for policy in policies
            if matches(policy["spec"]["podSelector"], head.labels)
            for port in _egress_ports(policy)
        }
        if not {443, 6443} <= allowed:
            yield f"{where}: no NetworkPolicy lets its autoscaler reach the API server"


def way_to_redis(documents: Sequence[Document]) -> Iterator[str]:
    """A head may reach the Redis that it is told of, here or elsewhere."""
    policies = list(of_kind(documents, "NetworkPolicy"))
    for where, one, cluster in _clusters(documents):
        address = cluster.get("gcsFaultToleranceOptions", {}).get("redisAddress")
        if address is None:
            continue
        head = next(pod for pod in pods([one]) if pod.role == "head")
        ways = [
            way
            for policy in policies
            if matches(policy["spec"]["podSelector"], head.labels)
            for way in policy["spec"].get("egress", [])
        ]
        if not any(_leads_to(address, way, documents) for way in ways):
            yield f"{where}: no NetworkPolicy lets its head reach redisAddress {address}"


def _leads_to(address: str, way: Document, documents: Sequence[Document]) -> bool:
    """Whether an egress rule opens HOST:PORT; of a name that is not ours any range may be it."""
    url = urlsplit(address if "://" in address else f"redis://{address}")
    host, port = url.hostname or "", url.port or 6379
    if not any(
        one["port"] <= port <= one.get("endPort", one["port"]) for one in way.get("ports", [])
    ):
        return False
    peers = way.get("to", [])
    service = named(documents, "Service", host.partition(".")[0])
    if service is None:
        ranges = [peer["ipBlock"]["cidr"] for peer in peers if "ipBlock" in peer]
        return any(_may_be_in(host, cidr) for cidr in ranges) or any(
            "namespaceSelector" in peer for peer in peers
        )
    selector = {"matchLabels": service["spec"]["selector"]}
    behind = [pod for pod in pods(documents) if matches(selector, pod.labels)]
    return any(
        matches(peer["podSelector"], pod.labels)
        for peer in peers
        if "podSelector" in peer and "namespaceSelector" not in peer
        for pod in behind
    )


def _may_be_in(host: str, cidr: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(cidr)
    except ValueError:  # a name
        return True


def _egress_ports(policy: Document) -> set[int]:
    return {
        port["port"] for rule in policy["spec"].get("egress", []) for port in rule.get("ports", [])
    }


RULES: tuple[Rule, ...] = (
    ray_version,
    token_auth,
    alpha_features,
    deletion,
    retries,
    autoscaling,
    upgrades,
    redis,
    names,
    ports,
    queues,
    images,
    secrets,
    security,
    resources,
    readiness,
    draining,
    disruption,
    selectors,
    references,
    namespaces,
    network,
    way_to_redis,
)
