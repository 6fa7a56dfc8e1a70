"""The manifests are right: their fields, the rules beyond schemas, and the programs they start."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from ray.serve._private.common import DeploymentStatus

import serve.metrics
from serve.command import FEWER_HOPS
from serve.keys import VARIABLE
from serve.metrics import RequestMetrics, TowerMetrics
from tests.infra.manifests import (
    K8S,
    ROOT,
    cluster_of,
    identity,
    kustomizations,
    of_kind,
    pods,
    render,
)
from tests.infra.programs import check_programs
from tests.infra.rules import GUIDE, check_rules, matches, quantity
from tests.infra.schemas import check_schema

pytestmark = pytest.mark.usefixtures("kustomize")

MONITORING = K8S / "components" / "monitoring"
NAME = re.compile(r"\b(?:ray|autoscaler)_[a-z_]+[a-z]\b")
LABELS = {"ray_io_cluster"}


@pytest.mark.parametrize(
    "folder", kustomizations(), ids=lambda folder: "-".join(folder.relative_to(K8S).parts[1:])
)
def test_every_overlay_builds_and_its_objects_have_the_fields_of_their_kinds(folder, crds):
    documents = render(folder)
    assert documents
    assert [text for one in documents for text in check_schema(one)] == []


def test_the_rules_that_schemas_do_not_hold(documents):
    assert check_rules(documents) == []


def test_the_programs_in_manifests_would_start(documents):
    assert check_programs(documents) == []


@pytest.mark.parametrize("part", ["pipeline", "endpoint", "workbench"])
def test_a_laptop_of_four_cpus_and_14_gb_holds_one_part_at_a_time(part):
    folder = K8S / "overlays/minimal"
    found = list(pods([*render(folder / "platform"), *render(folder / part)]))
    asked = [
        container["resources"]["requests"] for pod in found for container in pod.spec["containers"]
    ]
    assert sum(quantity(one["cpu"]) for one in asked) <= 4 - 1.2  # Kubernetes' and KubeRay's own
    assert sum(quantity(one["memory"]) for one in asked) <= 13e9


def test_the_rule_for_lists_of_urls_is_right_without_its_comment(documents):
    text = (K8S / "base/platform/network.yaml").read_text()
    text = re.sub(r"^# (?=apiVersion:|kind:|metadata:|spec:|  |---)", "", text, flags=re.MULTILINE)
    rule = next(one for one in yaml.safe_load_all(text) if one["metadata"]["name"] == "urls")
    assert check_schema(rule) == []
    assert [port["port"] for way in rule["spec"]["egress"] for port in way["ports"]] == [80]
    selector = rule["spec"]["podSelector"]
    taken = {pod.where.split()[0] for pod in pods(documents) if matches(selector, pod.labels)}
    assert taken == {"RayJob/pipeline", "RayCluster/workbench"}


def test_pods_of_a_namespace_with_the_guides_label_may_ask_the_endpoint(documents):
    told = re.search(r"kubectl label namespace NAME (\S+)=(\S+)", GUIDE.read_text())
    client = {told[1]: told[2]}
    workers = [
        pod for pod in pods(documents)
        if pod.where.startswith("RayService/") and pod.role == "worker"
    ]  # fmt: skip
    assert workers
    for worker in workers:
        peers = [
            peer
            for policy in of_kind(documents, "NetworkPolicy")
            if matches(policy["spec"]["podSelector"], worker.labels)
            for way in policy["spec"].get("ingress", [])
            if 8000 in [port["port"] for port in way.get("ports", [])]
            for peer in way["from"]
        ]
        selectors = [one["namespaceSelector"] for one in peers if "namespaceSelector" in one]
        assert any(matches(one, client) for one in selectors)
        assert not any(matches(one, {}) for one in selectors)


def test_no_autoscaler_of_nodes_moves_a_driver_for_the_sake_of_order(documents):
    for one in of_kind(documents, "RayJob"):
        told = cluster_of(one)["headGroupSpec"]["template"]["metadata"]["annotations"]
        assert told["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false", identity(one)
        assert told["karpenter.sh/do-not-disrupt"] == "true", identity(one)


def test_somebody_is_woken_where_the_endpoint_has_no_pods_at_all(gpu):
    (rules,) = (one["spec"]["groups"][0]["rules"] for one in of_kind(gpu, "PrometheusRule"))
    (asked,) = (one["expr"] for one in rules if one["alert"] == "EndpointDown")
    pods_ready = re.search(r"sum\((kube_pod_status_ready\{[^}]*\})\) == 0", asked)[1]
    assert f"or absent({pods_ready})" in asked
    # Not before there is an endpoint: what is applied with it tells that.
    (applied,) = re.findall(r'poddisruptionbudget="([^"]+)"', asked)
    folder = K8S / "overlays/gpu/endpoint"
    budgets = [one["metadata"]["name"] for one in of_kind(render(folder), "PodDisruptionBudget")]
    assert budgets == [applied]


def test_the_endpoints_nodes_talk_as_the_command_has_it(documents):
    found = 0
    for pod in pods(documents):
        for container in pod.spec["containers"]:
            given = {one["name"]: one.get("value") for one in container.get("env", [])}
            if VARIABLE in given:
                found += 1
                assert {name: given.get(name) for name in FEWER_HOPS} == FEWER_HOPS, pod
    assert found


def test_every_manifest_and_component_is_used_and_says_what_it_is():
    files = [path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml"]
    built = {path.parent for path in K8S.rglob("kustomization.yaml")}
    for path in files:
        assert path.name in (path.parent / "kustomization.yaml").read_text(), path
        assert path.parent in built
        assert path.read_text().startswith("# "), f"{path} does not say what it is"
    named = "\n".join(path.read_text() for path in K8S.rglob("kustomization.yaml"))
    for component in (K8S / "components").iterdir():
        assert f"components/{component.name}" in named, f"nothing uses {component}"


def expressions() -> list[str]:
    board = json.loads((MONITORING / "rwkv-clip.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    alerts = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    return found + [rule["expr"] for group in alerts["spec"]["groups"] for rule in group["rules"]]


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_there_are(monkeypatch):
    installed = Path(ray.__file__).parent
    boards = installed.glob("dashboard/modules/metrics/dashboards/*.py")
    told = "\n".join(file.read_text() for file in boards)
    # Of what no dashboard of Ray's shows.
    state = (installed / "serve/_private/deployment_state.py").read_text()
    told += "\n".join(f"ray_{name}" for name in re.findall(r'"(serve_deployment_\w+)",', state))
    ours = set()
    for kind, suffixes in (("Counter", ["_total"]), ("Histogram", ["_bucket", "_sum", "_count"])):

        def record(name, suffixes=suffixes, **_):
            ours.update(f"ray_{name}{suffix}" for suffix in suffixes)

        monkeypatch.setattr(serve.metrics, kind, record)
    RequestMetrics()
    TowerMetrics("image")
    asked = {name for text in expressions() for name in NAME.findall(text)} - LABELS
    assert {name for name in asked if name.startswith("ray_rwkv_clip_")} <= ours
    assert [name for name in asked - ours if name not in told] == []


def test_an_alert_tells_failing_deployments_from_those_that_change(gpu):
    (rules,) = (one["spec"]["groups"][0]["rules"] for one in of_kind(gpu, "PrometheusRule"))
    (asked,) = (one["expr"] for one in rules if one["alert"] == "EndpointUnhealthy")
    least = int(re.search(r"ray_serve_deployment_status\{.*\}\) < (\d+)$", asked)[1])
    told = {status.name for status in DeploymentStatus if status.to_numeric() < least}
    assert told == {"DEPLOY_FAILED", "UNHEALTHY"}


def test_the_dashboard_has_no_two_panels_in_one_place():
    board = json.loads((MONITORING / "rwkv-clip.json").read_text())
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("name", ["minimal", "gpu"])
def test_the_guide_applies_every_kustomization_and_no_other(name):
    applied = set(re.findall(rf"apply -k (infra/k8s/overlays/{name}/[a-z-]+)", GUIDE.read_text()))
    named = set(re.findall(rf"infra/k8s/overlays/{name}/[a-z-]+", GUIDE.read_text()))
    there = {str(folder.relative_to(ROOT)) for folder in kustomizations(K8S / "overlays" / name)}
    assert named == there
    # Those of a queue are told in a sentence.
    assert applied == {one for one in there if "queue" not in one}


def test_the_guide_shows_the_sizes_that_the_benchmark_computes():
    benchmark = ROOT / "benchmarks" / "sizing.py"
    answer = subprocess.run([sys.executable, benchmark], capture_output=True, text=True, check=True)
    table = answer.stdout.partition("\n\n")[2].strip()
    assert table.startswith("| pairs |")
    assert table in GUIDE.read_text()


def test_the_emoji_run_on_a_cluster_is_the_default_run():
    default = yaml.safe_load((ROOT / "configs/emoji.yaml").read_text())
    there = next(
        one for one in of_kind(render(K8S / "overlays/minimal/pipeline"), "ConfigMap")
        if "run.yaml" in one["data"]
    )  # fmt: skip
    run = yaml.safe_load(there["data"]["run.yaml"])
    changed = {"storage", "ray", "serve"}
    assert {key: value for key, value in run.items() if key not in changed} == {
        key: value for key, value in default.items() if key not in changed
    }
