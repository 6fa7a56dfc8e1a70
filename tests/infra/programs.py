"""Whether the programs in manifests would start: their command lines are parsed by the real command
line, their configurations by the real models, and what these ask for fits into the clusters.
"""

import contextlib
import importlib
import io
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from mlflow.cli import server as mlflow_server
from mlflow.environment_variables import MLFLOW_SERVER_ENABLE_JOB_EXECUTION
from mlflow.server.security_utils import is_allowed_host_header
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from ray_jobs.pipeline import PipelineConfig
from rwkv_clip.cli import CommandError, _parser
from rwkv_clip.config import ConfigError, config_from_args, load_config
from serve.app import http_options
from serve.config import LimitsConfig, ServeFile
from tests.infra.manifests import Document, Pod, identity, named, of_kind, pods
from tests.infra.rules import quantity

# Of a worker with a replica of everything; and what requests take, in terms of limits.bodies_bytes.
# Measured with configs/emoji.yaml: 1.6 GB at rest, 2.1 GB with 128 MiB, and 3.6 GB with 512.
_MEMORY_OF_REPLICAS = 7 << 28
_MEMORY_OF_BODIES = 4


class ProgramError(ValueError):
    """A program that would not start."""


def check_programs(documents: Sequence[Document]) -> list[str]:
    """What is wrong with the programs of an overlay."""
    checks = (_jobs, _applications, _mlflow, _keys)
    return [text for check in checks for text in check(documents)]


def _jobs(documents: Sequence[Document]) -> Iterator[str]:
    for one in of_kind(documents, "RayJob"):
        found = list(pods([one]))
        head = next(pod for pod in found if pod.role == "head")
        try:
            config = _job_config(one["spec"]["entrypoint"], head, documents)
        except ProgramError as error:
            yield f"{identity(one)}: entrypoint: {error}"
            continue
        yield from (f"{identity(one)}: {text}" for text in misfits(job_needs(config), found))


def _job_config(entrypoint: str, head: Pod, documents: Sequence[Document]) -> PipelineConfig:
    """What a job is told to do; raises ProgramError."""
    words = shlex.split(entrypoint)
    if words[:2] != ["python", "-m"] or len(words) < 3:
        raise ProgramError(f"{entrypoint!r} is not python -m ray_jobs.JOB")
    package, _, job = words[2].partition(".")
    if package != "ray_jobs":
        raise ProgramError(f"{words[2]} is no job")
    arguments = [job, *words[3:]]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            args = _parser(arguments).parse_args(arguments)
    except (SystemExit, CommandError) as error:
        raise ProgramError(told.getvalue().strip() or str(error)) from error
    if args.config is None:
        raise ProgramError("has no --config")
    with _mounted(str(args.config), head, documents) as file:
        args.config = file
        try:
            return config_from_args(PipelineConfig, args)
        except ConfigError as error:
            raise ProgramError(str(error)) from error


@contextlib.contextmanager
def _mounted(path: str, pod: Pod, documents: Sequence[Document]) -> Iterator[Path]:
    """A file as a pod sees it, from the ConfigMap that it mounts; raises ProgramError."""
    folder, _, name = path.rpartition("/")
    volume = next(
        (one["name"] for one in pod.main["volumeMounts"] if one["mountPath"] == folder), None
    )
    source = next((one for one in pod.spec["volumes"] if one["name"] == volume), {})
    wanted = source.get("configMap", {}).get("name")
    found = named(documents, "ConfigMap", wanted) if wanted else None
    if found is None or name not in found["data"]:
        raise ProgramError(f"{pod.where} has no file {path}")
    with tempfile.TemporaryDirectory() as copy:
        file = Path(copy, name)
        file.write_text(found["data"][name], encoding="utf-8")
        yield file


def _applications(documents: Sequence[Document]) -> Iterator[str]:
    for one in of_kind(documents, "RayService"):
        try:
            yield from (
                f"{identity(one)}: {text}" for text in _application_problems(one, documents)
            )
        except ProgramError as error:
            yield f"{identity(one)}: {error}"


def _application_problems(service: Document, documents: Sequence[Document]) -> Iterator[str]:
    told = yaml.safe_load(service["spec"]["serveConfigV2"])
    try:
        deployed = ServeDeploySchema.model_validate(told)
    except ValidationError as error:
        raise ProgramError(f"serveConfigV2: {error}") from error
    yield from (f"serveConfigV2: unknown key {key}" for key in unknown_keys(told, deployed))
    found = list(pods([service]))
    http = deployed.http_options
    for application in deployed.applications:
        module, _, name = application.import_path.partition(":")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ProgramError(f"{application.import_path}: {error}") from error
        configs = [
            _served(application.args, pod, documents)
            for pod in found
            if pod.role in ("head", "worker")
        ]
        for config in configs:
            wanted = http_options(config.serve)
            if http.model_dump(include=set(wanted)) != wanted:
                yield f"http_options differ from what the configuration makes, {wanted}"
        if http.host != "0.0.0.0":
            yield f"http_options.host is {http.host}, which no other pod reaches"
        yield from misfits(serve_needs(configs[0]), found)
        yield from _too_large_bodies(configs[0].serve.limits, found)


def _too_large_bodies(limits: LimitsConfig, found: Sequence[Pod]) -> Iterator[str]:
    """Workers that the kernel would end for what clients send."""
    bodies = _MEMORY_OF_BODIES * limits.bodies_bytes
    for pod in (pod for pod in found if pod.role == "worker"):
        memory = quantity(pod.main["resources"]["limits"]["memory"])
        if _MEMORY_OF_REPLICAS + bodies > memory:
            yield (
                f"{pod.where}: limits.bodies_bytes may take {bodies:,} bytes, which do not fit "
                f"into {memory:,.0f} beside the replicas"
            )


def _served(arguments: dict[str, Any], pod: Pod, documents: Sequence[Document]) -> ServeFile:
    named_values = dict(arguments)
    path = named_values.pop("config", None)
    if path is None:
        raise ProgramError("args has no config")
    overrides = [f"{key}={value}" for key, value in named_values.items()]
    with _mounted(path, pod, documents) as file:
        try:
            load_config(PipelineConfig, file)  # the jobs read the same file
            return load_config(ServeFile, file, overrides)
        except ConfigError as error:
            raise ProgramError(str(error)) from error


def unknown_keys(told: Any, model: BaseModel) -> list[str]:
    """Keys that a model of Ray Serve's lets pass although it does not know them."""
    known = type(model).model_fields
    found = [key for key in told if key not in known]
    for key, value in told.items():
        inner = getattr(model, key, None)
        if isinstance(inner, BaseModel) and isinstance(value, dict):
            found += [f"{key}.{one}" for one in unknown_keys(value, inner)]
        elif isinstance(inner, list):
            for given, parsed in zip(value, inner, strict=True):
                if isinstance(parsed, BaseModel):
                    found += [f"{key}.{one}" for one in unknown_keys(given, parsed)]
    return found


def _mlflow(documents: Sequence[Document]) -> Iterator[str]:
    server = named(documents, "Deployment", "mlflow")
    if server is None:
        yield "there is no Deployment mlflow"
        return
    container = next(pods([server])).main
    given = {one["name"]: one.get("value") for one in container.get("env", [])}
    if given.get(MLFLOW_SERVER_ENABLE_JOB_EXECUTION.name) != "false":
        yield "Deployment/mlflow: starts ten processes for jobs that nobody gives it"
    words = container["args"]
    try:
        if words[:2] != ["mlflow", "server"]:
            raise ProgramError("its args do not begin with mlflow server")
        options = mlflow_server.make_context("server", list(words[2:])).params
    except (click.ClickException, ProgramError) as error:
        yield f"Deployment/mlflow: {error}"
        return
    service = named(documents, "Service", "mlflow")
    served = {port["port"] for port in service["spec"]["ports"]} if service else set()
    if options["host"] != "0.0.0.0" or options["port"] not in served:
        yield "Deployment/mlflow: does not listen where the Service mlflow sends"
    for settings in of_kind(documents, "ConfigMap"):
        uri = settings["data"].get("MLFLOW_TRACKING_URI")
        if uri is None:
            continue
        host = uri.removeprefix("http://")
        if not is_allowed_host_header((options["allowed_hosts"] or "").split(","), host):
            yield f"{identity(settings)}: MLflow refuses {host}; it is not in --allowed-hosts"
        if host != f"mlflow:{options['port']}":
            yield f"{identity(settings)}: {uri} is not the Service mlflow"


def _keys(documents: Sequence[Document]) -> Iterator[str]:
    """The endpoint's keys are in a file that its pods have."""
    for one in of_kind(documents, "RayService"):
        for pod in pods([one]):
            if pod.role == "submitter":
                continue
            values = {env["name"]: env.get("value", "") for env in pod.main.get("env", [])}
            folder = values.get("RWKV_CLIP_API_KEYS", "").removeprefix("@").rpartition("/")[0]
            volume = {mount["mountPath"]: mount["name"] for mount in pod.main["volumeMounts"]}
            source = [v for v in pod.spec["volumes"] if v["name"] == volume.get(folder)]
            if not source or "secret" not in source[0]:
                yield f"{pod.where}: RWKV_CLIP_API_KEYS names no file of a Secret"


# What configurations ask of a cluster


@dataclass(frozen=True)
class Need:
    """Processes that run at one time.

    Attributes:
        what: they are.
        cpus, gpus: each holds.
    """

    what: str
    count: int
    cpus: float
    gpus: float = 0.0


def job_needs(config: PipelineConfig) -> list[list[Need]]:
    """What each stage of a job holds at a time, at least."""
    train, data = config.train, config.train.data
    stages = [[Need("ingest", 1, config.train_data.cpus_per_task)]]
    stages += [
        [Need(name, *_engine(section.engine))]
        for name, section in (("captioning", config.captioning), ("synthesis", config.synthesis))
        if section is not None
    ]
    training = [
        Need("train", train.workers, train.cpus_per_worker, train.gpus_per_worker),
        Need("train.data", data.tasks or 1, data.cpus_per_task),
    ]
    if train.validation is not None:
        training.append(Need("train.validation", 1, train.validation.cpus, train.validation.gpus))
    stages.append(training)
    for name, encoder in (("evaluation", config.evaluation), ("embed", config.embed)):
        if encoder is not None:
            held = (encoder.workers, encoder.cpus_per_worker, encoder.gpus_per_worker)
            stages.append([Need(name, *held)])
    return stages


def _engine(engine: Any) -> tuple[int, float, float]:
    if engine.kind == "vllm":
        return engine.engines, engine.cpus, engine.gpus
    if engine.kind == "http":
        return engine.clients, engine.cpus, 0.0
    return engine.workers, engine.cpus, engine.gpus


def serve_needs(config: ServeFile) -> list[list[Need]]:
    """What the endpoint holds at most."""
    serve = config.serve
    needs = [Need("serve.ingress", serve.ingress.replicas, serve.ingress.cpus)]
    for name, tower in (("serve.image", serve.image), ("serve.text", serve.text)):
        most = tower.max_replicas or tower.replicas
        needs.append(Need(name, most, tower.cpus, tower.gpus))
    if serve.search is not None:
        needs.append(Need("serve.search", serve.search.replicas, serve.search.cpus))
    return [needs]


def misfits(stages: Sequence[Sequence[Need]], found: Sequence[Pod]) -> Iterator[str]:
    """Stages that would wait for ever, because the cluster cannot become large enough."""
    for stage in stages:
        free = [list(_node(pod)) for pod in found if pod.role == "worker" for _ in range(pod.most)]
        # Those that need GPUs first, and the large ones.
        for need in sorted(stage, key=lambda one: (one.gpus, one.cpus), reverse=True):
            for _ in range(need.count):
                # A node without GPUs is taken first where none are needed.
                fitting = [
                    node for node in free
                    if node[0] >= need.cpus - 1e-6 and node[1] >= need.gpus - 1e-6
                ]  # fmt: skip
                if not fitting:
                    asked = f"{need.count} x {need.cpus:g} CPUs and {need.gpus:g} GPUs"
                    yield f"{need.what} takes {asked}, which do not fit into the worker groups"
                    break
                node = min(fitting, key=lambda one: one[1])
                node[0] -= need.cpus
                node[1] -= need.gpus


def _node(pod: Pod) -> tuple[float, float]:
    """CPUs and GPUs that Ray counts for a pod."""
    told = pod.main["resources"]
    limits, requests = told.get("limits", {}), told["requests"]
    cpus = quantity(limits.get("cpu", requests["cpu"]))
    return cpus, quantity(limits.get("nvidia.com/gpu", 0))
