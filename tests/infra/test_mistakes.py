"""Mistakes made on purpose: each is found, and told by its place."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.infra import manifests, programs, rules
from tests.infra.manifests import Document, cluster_of, identity, of_kind
from tests.infra.programs import check_programs
from tests.infra.rules import check_rules
from tests.infra.schemas import check_schema

pytestmark = pytest.mark.usefixtures("kustomize")

Documents = list[Document]
Change = Callable[[Documents], Any]


def one(documents: Documents, kind: str, name: str = "") -> Document:
    return next(
        each for each in of_kind(documents, kind) if each["metadata"]["name"].startswith(name)
    )


def job(documents: Documents) -> Document:
    return one(documents, "RayJob")["spec"]


def endpoint(documents: Documents) -> Document:
    return one(documents, "RayService")["spec"]


def cluster(documents: Documents, kind: str = "RayJob") -> Document:
    return cluster_of(one(documents, kind))


def head(documents: Documents, kind: str = "RayJob") -> Document:
    return cluster(documents, kind)["headGroupSpec"]["template"]["spec"]


def group(documents: Documents, kind: str = "RayJob") -> Document:
    return cluster(documents, kind)["workerGroupSpecs"][0]


def worker(documents: Documents, kind: str = "RayJob") -> Document:
    return group(documents, kind)["template"]["spec"]


def env(container: Document, name: str, value: str) -> None:
    container.setdefault("env", []).append({"name": name, "value": value})


def run_file(documents: Documents, old: str, new: str) -> None:
    """Change the runs' configurations, in whichever ConfigMap they are."""
    for each in of_kind(documents, "ConfigMap"):
        if "run.yaml" in each["data"]:
            assert old in each["data"]["run.yaml"]
            each["data"]["run.yaml"] = each["data"]["run.yaml"].replace(old, new)


def text_in(holder: Document, key: str, old: str, new: str) -> None:
    assert old in holder[key]
    holder[key] = holder[key].replace(old, new)


def drop(documents: Documents, kind: str, name: str = "") -> None:
    documents.remove(one(documents, kind, name))


MISSPELT: dict[str, tuple[Change, str]] = {
    "a job's field": (lambda d: job(d).update(backofLimit=1), "backofLimit"),
    "a worker group's": (lambda d: group(d).update(maxReplica=9), "maxReplica"),
    "a container's": (lambda d: head(d)["containers"][0].update(enviroment=[]), "enviroment"),
    "deep in a pod": (lambda d: worker(d)["volumes"][0]["configMap"].update(nam="x"), "nam"),
    "an upgrade's": (lambda d: endpoint(d)["upgradeStrategy"].update(kind="x"), "kind"),
    "a policy's value": (
        lambda d: job(d)["deletionStrategy"]["deletionRules"][0].update(policy="DeleteAll"),
        "DeleteAll",
    ),
    "a number as text": (lambda d: job(d).update(backoffLimit="3"), "integer"),
    "a Deployment's": (
        lambda d: one(d, "Deployment")["spec"].update(replica=2),
        "replica",
    ),
    "a budget's": (
        lambda d: one(d, "PodDisruptionBudget")["spec"].update(minAvailible=1),
        "minAvailible",
    ),
    "a network policy's": (
        lambda d: one(d, "NetworkPolicy", "ray")["spec"].update(egres=[]),
        "egres",
    ),
    "a monitor's": (
        lambda d: one(d, "PodMonitor")["spec"].update(podMetricEndpoints=[]),
        "podMetricEndpoints",
    ),
    "a queue's": (lambda d: one(d, "LocalQueue")["spec"].update(clusterQueu="x"), "clusterQueu"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_field_is_found(name, gpu, crds):
    change, told = MISSPELT[name]
    change(gpu)
    assert told in "\n".join(text for each in gpu for text in check_schema(each))


def test_schemas_fill_in_what_the_api_server_would(gpu, crds):
    options = endpoint(gpu)["upgradeStrategy"]["clusterUpgradeOptions"]
    del options["maxSurgePercent"]
    assert check_schema(one(gpu, "RayService")) == []
    assert "maxSurgePercent" not in options


RULES: dict[str, tuple[Change, str]] = {
    "Ray's version drifts": (
        lambda d: cluster(d).update(rayVersion="2.59.0"),
        "rayVersion is 2.59.0; the lock files have",
    ),
    "a Ray without tokens": (
        lambda d: cluster(d).update(rayVersion="2.51.0"),
        "needs rayVersion 2.52",
    ),
    "an open cluster": (lambda d: cluster(d, "RayCluster").pop("authOptions"), "mode: token"),
    "Kubernetes' tokens too": (
        lambda d: cluster(d)["authOptions"].update(enableK8sTokenAuth=True),
        "excludes secretName",
    ),
    "an alpha feature": (
        lambda d: cluster(d).update(networkPolicy={"mode": "DenyAll"}),
        "networkPolicy is alpha",
    ),
    "rules and shutdown": (
        lambda d: job(d).update(shutdownAfterJobFinishes=True),
        "exclude shutdownAfterJobFinishes",
    ),
    "a time without shutdown": (
        lambda d: job(d).update(ttlSecondsAfterFinished=60),
        "needs shutdownAfterJobFinishes",
    ),
    "suspended": (lambda d: job(d).update(suspend=True), "suspend needs"),
    "nothing is deleted": (lambda d: job(d).pop("deletionStrategy"), "nothing deletes"),
    "workers deleted under an autoscaler": (
        lambda d: job(d)["deletionStrategy"]["deletionRules"][0].update(policy="DeleteWorkers"),
        "DeleteWorkers excludes autoscaling",
    ),
    "the job goes before its cluster": (
        lambda d: job(d)["deletionStrategy"]["deletionRules"][1]["condition"].update(ttlSeconds=1),
        "DeleteWorkers <= DeleteCluster <= DeleteSelf",
    ),
    "two conditions in one rule": (
        lambda d: job(d)["deletionStrategy"]["deletionRules"][0]["condition"].update(
            jobDeploymentStatus="Failed"
        ),
        "one of jobStatus and jobDeploymentStatus",
    ),
    "a rule twice": (
        lambda d: job(d)["deletionStrategy"]["deletionRules"][1].update(policy="DeleteCluster"),
        "two rules say DeleteCluster",
    ),
    "no retries": (lambda d: job(d).update(backoffLimit=0), "backoffLimit is not positive"),
    "no end": (lambda d: job(d).pop("activeDeadlineSeconds"), "activeDeadlineSeconds"),
    "the old autoscaler": (
        lambda d: cluster(d)["autoscalerOptions"].update(version="v1"),
        "not v2",
    ),
    "restarted by the kubelet": (
        lambda d: worker(d).update(restartPolicy="Always"),
        "restartPolicy Never",
    ),
    "bounds the wrong way round": (
        lambda d: group(d).update(minReplicas=99),
        "is not within 99 and 24",
    ),
    "no bound": (lambda d: group(d).pop("maxReplicas"), "both needed"),
    "bounds without an autoscaler": (
        lambda d: cluster(d).update(enableInTreeAutoscaling=False),
        "make the bounds equal",
    ),
    "an upgrade with a gap": (
        lambda d: endpoint(d)["upgradeStrategy"].update(type="None"),
        "leaves a gap",
    ),
    "steps over the surge": (
        lambda d: endpoint(d)["upgradeStrategy"]["clusterUpgradeOptions"].update(
            stepSizePercent=50
        ),
        "stepSizePercent is more than maxSurgePercent",
    ),
    "no gateway": (
        lambda d: endpoint(d)["upgradeStrategy"]["clusterUpgradeOptions"].pop("gatewayClassName"),
        "gatewayClassName is missing",
    ),
    "steps without an autoscaler": (
        lambda d: cluster(d, "RayService").update(enableInTreeAutoscaling=False),
        "an incremental upgrade needs autoscaling",
    ),
    "Redis by a variable": (
        lambda d: env(head(d, "RayService")["containers"][0], "RAY_REDIS_ADDRESS", "redis:6379"),
        "belongs into gcsFaultToleranceOptions",
    ),
    "Redis' password written down": (
        lambda d: cluster(d, "RayService")["gcsFaultToleranceOptions"].update(
            redisPassword={"value": "hunter2"}
        ),
        "redisPassword takes valueFrom.secretKeyRef",
    ),
    "a Redis that nobody may reach": (
        lambda d: cluster(d, "RayService")["gcsFaultToleranceOptions"].update(
            redisAddress="rediss://redis.example.com:6380"
        ),
        "lets its head reach redisAddress rediss://redis.example.com:6380",
    ),
    "the way to Redis left out with it": (
        lambda d: drop(d, "NetworkPolicy", "endpoint-redis"),
        "lets its head reach redisAddress redis:6379",
    ),
    "a long name": (
        lambda d: one(d, "RayService")["metadata"].update(name="endpoint" * 6),
        "at most 47",
    ),
    "no port named serve": (
        lambda d: head(d, "RayService")["containers"][0]["ports"].pop(3),
        "no port named serve",
    ),
    "a port that nobody opens": (
        lambda d: head(d)["containers"][0]["ports"].pop(4),
        "PodMonitor/ray-heads reads as-metrics, which no port is named",
    ),
    "no port for metrics": (
        lambda d: worker(d)["containers"][0].pop("ports"),
        "no port named metrics",
    ),
    "the image drifts": (
        lambda d: worker(d)["containers"][0].update(image="rwkv-clip:0.0.9-cuda"),
        "rwkv-clip:0.0.9-cuda is not",
    ),
    "a digest that is none": (
        lambda d: worker(d)["containers"][0].update(image="rwkv-clip@sha256:..."),
        "rwkv-clip@sha256:... has no digest",
    ),
    "the newest image": (
        lambda d: worker(d)["containers"][0].update(image="rwkv-clip:latest"),
        "no exact version",
    ),
    "two images in a cluster": (
        lambda d: text_in(worker(d)["containers"][0], "image", "-cuda", "-cpu"),
        "different images",
    ),
    "MLflow drifts": (
        lambda d: one(d, "Deployment")["spec"]["template"]["spec"]["containers"][0].update(
            image="ghcr.io/mlflow/mlflow:v3.1.0-full"
        ),
        "mlflow:v3.1.0-full is not",
    ),
    "a Secret in a file": (
        lambda d: d.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}, "data": {}}
        ),
        "Secrets do not belong into files",
    ),
    "a password written down": (
        lambda d: env(worker(d)["containers"][0], "AWS_SECRET_ACCESS_KEY", "hunter2"),
        "AWS_SECRET_ACCESS_KEY is written down",
    ),
    "a token in a ConfigMap": (
        lambda d: one(d, "ConfigMap", "settings")["data"].update(HF_TOKEN="hf_1"),
        "HF_TOKEN belongs into a Secret",
    ),
    "a Secret that the guide does not make": (
        lambda d: cluster(d)["authOptions"].update(secretName="ray-token"),
        "Secret ray-token is in no command",
    ),
    "root": (lambda d: worker(d)["securityContext"].pop("runAsNonRoot"), "lacks runAsNonRoot"),
    "no seccomp": (
        lambda d: worker(d)["securityContext"].pop("seccompProfile"),
        "lacks seccompProfile",
    ),
    "capabilities": (
        lambda d: worker(d)["containers"][0].pop("securityContext"),
        "drop: [ALL]",
    ),
    "the autoscaler's capabilities": (
        lambda d: cluster(d)["autoscalerOptions"].pop("securityContext"),
        "autoscaler: securityContext lacks",
    ),
    "no memory asked for": (
        lambda d: worker(d)["containers"][0]["resources"]["requests"].pop("memory"),
        "requests of cpu and memory",
    ),
    "more memory than asked for": (
        lambda d: worker(d)["containers"][0]["resources"]["limits"].update(memory="64Gi"),
        "request as much",
    ),
    "less memory than asked for": (
        lambda d: worker(d)["containers"][0]["resources"]["limits"].update(memory="1Gi"),
        "more memory than its limit",
    ),
    "ready by another path": (
        lambda d: worker(d, "RayService")["containers"][0]["readinessProbe"]["httpGet"].update(
            path="/healthz"
        ),
        "not GET /readyz",
    ),
    "drained in less time than a request may take": (
        lambda d: worker(d, "RayService")["containers"][0]["env"].pop(),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is 30; requests may take 65 seconds",
    ),
    "killed while it is drained": (
        lambda d: worker(d, "RayService").update(terminationGracePeriodSeconds=60),
        "takes 110 seconds to end, and is given 60",
    ),
    "a cluster that ends before its requests": (
        lambda d: endpoint(d).update(rayClusterDeletionDelaySeconds=60),
        "rayClusterDeletionDelaySeconds is 60; requests may take 65 seconds",
    ),
    "not spread": (
        lambda d: worker(d, "RayService")["topologySpreadConstraints"].pop(),
        "does not spread",
    ),
    "a budget of all": (
        lambda d: one(d, "PodDisruptionBudget")["spec"].update(minAvailable=2),
        "keeps every node from being drained",
    ),
    "a budget in per cent": (
        lambda d: one(d, "PodDisruptionBudget")["spec"].update(minAvailable="50%"),
        "takes minAvailable as a number",
    ),
    "a misspelt label": (
        lambda d: one(d, "NetworkPolicy", "pipeline")["spec"]["podSelector"]["matchLabels"].update(
            {"app.kubernetes.io/component": "pipelin"}
        ),
        "takes no pod",
    ),
    "a configuration that is not there": (
        lambda d: worker(d)["volumes"][0]["configMap"].update(name="run"),
        "there is no ConfigMap run",
    ),
    "a mount without its volume": (lambda d: worker(d)["volumes"].pop(), "no volume ray-logs"),
    "an account that is not there": (
        lambda d: worker(d).update(serviceAccountName="default"),
        "there is no ServiceAccount default",
    ),
    "another namespace": (
        lambda d: one(d, "Service")["metadata"].update(namespace="default"),
        "its namespace is default",
    ),
    "a namespace for what has none": (
        lambda d: one(d, "ClusterQueue")["metadata"].update(namespace="rwkv-clip"),
        "not None",
    ),
    "an alert that looks elsewhere": (
        lambda d: one(d, "PrometheusRule")["spec"]["groups"][0]["rules"][0].update(
            expr='sum(kube_pod_status_ready{namespace="default"}) == 0'
        ),
        "asks for the namespace default, not rwkv-clip",
    ),
    "a queue for others": (
        lambda d: one(d, "ClusterQueue")["spec"]["namespaceSelector"]["matchLabels"].update(
            {"kubernetes.io/metadata.name": "default"}
        ),
        "asks for the namespace default, not rwkv-clip",
    ),
    "an open network": (lambda d: drop(d, "NetworkPolicy", "deny-all"), "denies everything"),
    "no DNS": (lambda d: drop(d, "NetworkPolicy", "dns"), "allows DNS"),
    "no API server": (
        lambda d: drop(d, "NetworkPolicy", "api-server"),
        "reach the API server",
    ),
    "a queue that is not there": (
        lambda d: one(d, "LocalQueue")["metadata"].update(name="trainings"),
        "there is no LocalQueue training",
    ),
}


def queued(documents: Documents) -> Documents:
    """With the job that waits in a queue, and without the other."""
    drop(documents, "RayJob")
    found = manifests.render(manifests.K8S / "overlays/gpu/pipeline-queued")
    return [*documents, one(found, "RayJob")]


@pytest.mark.parametrize("name", RULES)
def test_a_broken_rule_is_told(name, gpu):
    change, told = RULES[name]
    documents = queued(gpu) if "queue that" in name else gpu
    change(documents)
    assert told in "\n".join(check_rules(documents))


def test_every_rule_is_broken_by_some_mistake(gpu):
    broken = set()
    for name, (change, told) in RULES.items():
        documents = manifests.overlay("gpu")
        documents = queued(documents) if "queue that" in name else documents
        change(documents)
        broken |= {rule for rule in rules.RULES if any(told in text for text in rule(documents))}
    assert {rule.__name__ for rule in rules.RULES} - {rule.__name__ for rule in broken} == set()


def test_what_kueue_does_not_admit_is_told(gpu):
    documents = queued(gpu)
    assert check_rules(documents) == []
    group(documents).update(maxReplicas=40)
    told = "\n".join(rules.queues(documents))
    assert "RayJob/pipeline (queued): asks for more cpu than the quota" in told
    cluster(documents).update(enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"})
    assert "a queued job has no autoscaler" in "\n".join(rules.queues(documents))


DIGEST = f"sha256:{'5e' * 32}"
ADAPTED_IMAGES = {
    "a digest": f"registry.example.com/rwkv-clip@{DIGEST}",
    "a version and its digest": f"registry.example.com:5000/rwkv-clip:0.1.0-cuda@{DIGEST}",
    "another build": "registry.example.com/rwkv-clip:0.1.0-cuda-2",
}


@pytest.mark.parametrize("name", ADAPTED_IMAGES)
def test_an_image_is_pinned_or_built_anew_as_the_guide_says(name, gpu):
    for pod in manifests.pods(gpu):
        if pod.role != "other":
            pod.main["image"] = ADAPTED_IMAGES[name]
    assert check_rules(gpu) == []


@pytest.mark.parametrize("tag", [":v99.0.0-full", f"@{DIGEST}"])
def test_mlflow_may_be_newer_than_its_clients(tag, gpu):
    for kind in ("Deployment", "CronJob"):
        (pod,) = manifests.pods([one(gpu, kind)])
        pod.main["image"] = f"ghcr.io/mlflow/mlflow{tag}"
    assert check_rules(gpu) == []


def test_a_managed_redis_is_reached_by_what_its_component_says_to_change(gpu):
    for kind in ("StatefulSet", "Service", "NetworkPolicy"):  # of redis.yaml
        drop(gpu, kind, "redis")
    options = cluster(gpu, "RayService")["gcsFaultToleranceOptions"]
    (way,) = one(gpu, "NetworkPolicy", "endpoint-redis")["spec"]["egress"]
    way["ports"][0]["port"] = 6380
    way["to"] = [{"ipBlock": {"cidr": "10.20.0.0/16"}}]
    for host in ("redis.example.com", "10.20.3.4"):
        options["redisAddress"] = f"rediss://{host}:6380"
        assert check_rules(gpu) == []
    options["redisAddress"] = "rediss://10.30.3.4:6380"
    assert "lets its head reach redisAddress" in "\n".join(check_rules(gpu))


def test_the_namespace_may_have_another_name(gpu):
    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [renamed(inner) for inner in value]
        if isinstance(value, str):
            return value.replace('namespace="rwkv-clip"', 'namespace="search"')
        return value

    found = [renamed(each) for each in gpu]
    one(found, "Namespace")["metadata"]["name"] = "search"
    selector = one(found, "ClusterQueue")["spec"]["namespaceSelector"]["matchLabels"]
    selector["kubernetes.io/metadata.name"] = "search"
    for each in found:
        if "namespace" in each["metadata"]:
            each["metadata"]["namespace"] = "search"
    assert check_rules(found) == []


def test_the_second_column_fits_when_all_is_changed_that_the_guide_names(gpu):
    plain, waiting = (cluster_of(each) for each in of_kind(gpu, "RayJob"))
    run_file(gpu, "engines: 8", "engines: 32")
    run_file(gpu, "  workers: 8", "  workers: 32")
    for each in plain["workerGroupSpecs"]:
        each["maxReplicas"] *= 4
    for told in (check_rules(gpu), check_programs(gpu)):
        assert [text for text in told if not text.startswith("RayJob/pipeline (queued)")] == []
    assert "RayJob/pipeline (queued): train takes 32 x 2 CPUs" in "\n".join(check_programs(gpu))
    for each in waiting["workerGroupSpecs"]:
        each.update({key: 4 * each[key] for key in ("replicas", "minReplicas", "maxReplicas")})
    assert check_programs(gpu) == []
    assert "than the quota of its queue" in "\n".join(check_rules(gpu))
    (resources,) = one(gpu, "ClusterQueue")["spec"]["resourceGroups"]
    for quota in resources["flavors"][0]["resources"]:
        number, unit = re.fullmatch(r"(\d+)(\w*)", str(quota["nominalQuota"])).groups()
        quota["nominalQuota"] = f"{4 * int(number)}{unit}"
    assert check_rules(gpu) == []


PROGRAMS: dict[str, tuple[Change, str]] = {
    "a wrong path": (
        lambda d: text_in(job(d), "entrypoint", "run.yaml", "runs.yaml"),
        "has no file /etc/rwkv-clip/runs.yaml",
    ),
    "a wrong folder": (
        lambda d: text_in(job(d), "entrypoint", "/etc/rwkv-clip/", "configs/"),
        "has no file configs/run.yaml",
    ),
    "a job that there is not": (
        lambda d: text_in(job(d), "entrypoint", "ray_jobs.pipeline", "ray_jobs.pipelines"),
        "pipelines",
    ),
    "another program": (
        lambda d: text_in(job(d), "entrypoint", "python -m", "python3"),
        "is not python -m ray_jobs.JOB",
    ),
    "an option that there is not": (
        lambda d: text_in(job(d), "entrypoint", "--config", "--configuration"),
        "--configuration",
    ),
    "a value that a key does not take": (
        lambda d: text_in(job(d), "entrypoint", "run.yaml", "run.yaml --set train.batch=many"),
        "train.batch",
    ),
    "a misspelt key": (lambda d: run_file(d, "epochs:", "epoch:"), "train.epoch: unknown key"),
    "a misspelt key of the endpoint": (
        lambda d: run_file(d, "max_replicas:", "most_replicas:"),
        "most_replicas",
    ),
    "an application that there is not": (
        lambda d: text_in(endpoint(d), "serveConfigV2", "serve.app:application", "serve.app:app"),
        "serve.app:app",
    ),
    "an endpoint's wrong path": (
        lambda d: text_in(endpoint(d), "serveConfigV2", "run.yaml", "serve.yaml"),
        "has no file /etc/rwkv-clip/serve.yaml",
    ),
    "a key that Serve ignores": (
        lambda d: text_in(endpoint(d), "serveConfigV2", "route_prefix:", "route_prefx:"),
        "unknown key applications.route_prefx",
    ),
    "another port": (
        lambda d: text_in(endpoint(d), "serveConfigV2", "8000", "8080"),
        "http_options differ",
    ),
    "an address for this machine alone": (
        lambda d: text_in(endpoint(d), "serveConfigV2", "0.0.0.0", "127.0.0.1"),
        "which no other pod reaches",
    ),
    "more GPUs than there can be": (
        lambda d: run_file(d, "workers: 8", "workers: 16"),
        "train takes 16 x 2 CPUs and 1 GPUs",
    ),
    "an engine that no node holds": (
        lambda d: run_file(d, "gpus: 1\n", "gpus: 16\n"),
        "synthesis takes",
    ),
    "too small workers": (
        lambda d: worker(d, "RayService")["containers"][0]["resources"].update(
            requests={"cpu": "1", "memory": "32Gi"}, limits={"cpu": "1", "memory": "32Gi"}
        ),
        "serve.image takes",
    ),
    "bodies of more memory than there is": (
        lambda d: worker(d, "RayService")["containers"][0]["resources"].update(
            requests={"cpu": "8", "memory": "3Gi"},
            limits={"cpu": "8", "memory": "3Gi", "nvidia.com/gpu": 1},
        ),
        "limits.bodies_bytes may take 2,147,483,648 bytes, which do not fit into 3,221,225,472",
    ),
    "an option of MLflow's that there is not": (
        lambda d: one(d, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"].append(
            "--allowed-host=x"
        ),
        "--allowed-host",
    ),
    "MLflow refuses its own name": (
        lambda d: one(d, "Deployment")["spec"]["template"]["spec"]["containers"][0].update(
            args=["mlflow", "server", "--host=0.0.0.0", "--allowed-hosts=localhost"]
        ),
        "MLflow refuses mlflow:5000",
    ),
    "MLflow runs jobs": (
        lambda d: env(
            one(d, "Deployment")["spec"]["template"]["spec"]["containers"][0],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION",
            "true",
        ),
        "for jobs that nobody gives it",
    ),
    "MLflow elsewhere": (
        lambda d: one(d, "ConfigMap", "settings")["data"].update(
            MLFLOW_TRACKING_URI="http://localhost:5000"
        ),
        "is not the Service mlflow",
    ),
    "keys in no file": (
        lambda d: text_in(
            worker(d, "RayService")["containers"][0]["env"][0], "value", "-keys/", "-key/"
        ),
        "names no file of a Secret",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_would_not_start_is_told(name, gpu):
    change, told = PROGRAMS[name]
    change(gpu)
    assert told in "\n".join(check_programs(gpu))


def test_a_node_of_each_kind_is_taken_by_what_needs_it(gpu):
    job_pods = list(manifests.pods([one(gpu, "RayJob")]))
    training = [programs.Need("train", 8, 2, 1), programs.Need("data", 4, 8)]
    assert list(programs.misfits([training], job_pods)) == []
    assert list(programs.misfits([[programs.Need("wide", 1, 100)]], job_pods)) == [
        "wide takes 1 x 100 CPUs and 0 GPUs, which do not fit into the worker groups"
    ]
    assert identity(one(gpu, "RayJob")) == "RayJob/pipeline"
