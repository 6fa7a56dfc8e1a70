"""Models in MLflow's registry, and which of them is the champion."""

import base64
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import requires, version
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.logging_utils import MLFLOW_LOGGING_STREAM
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

import rwkv_clip
from ray_jobs.storage import Storage
from ray_jobs.tracking.runs import Tracker, current_store
from ray_jobs.tracking.source import stored_model
from rwkv_clip.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from rwkv_clip.ops import build_info

logger = logging.getLogger(__name__)

CHAMPION = "champion"
_NO_CHAMPION = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no model, no alias
_WEIGHTS = "weights"  # the tag that holds their digest


@dataclass(frozen=True)
class Registered:
    """A model's place in the registry.

    Attributes:
        uri: as `mlflow.pyfunc.load_model` takes it.
        version: of the registered model.
        champion: whether it is the champion, or is to be: `crown` gives it the alias.
        told: why, or why not.
        before: the champion's version that it was compared with, if there was one.
    """

    uri: str
    version: str
    champion: bool
    told: str
    before: str | None = None


def register(
    tracker: Tracker,
    storage: Storage,
    checkpoint: str,
    metrics: Mapping[str, float] | None,
    tested: Mapping[str, Mapping[str, str]] | None,
) -> Registered:
    """Register a checkpoint as the model of the tracker's training run, once for the same weights.

    It is to be the champion when there is none, or when it beats the champion on the configured
    metric on the same test data: that which the metric is of, whatever else was evaluated on.

    A champion without the tag `test_set` is of an older release and has one digest of all its test
    data together. Where that was pairs alone it is the pairs' own, and is compared; otherwise such
    a champion stays, and how to exchange it is told.

    Args:
        tracker: holds the training run, under the stage `train`.
        storage: holds the checkpoint.
        checkpoint: the checkpoint folder's name in the storage.
        metrics: of the evaluation, if there was one.
        tested: by metric, what `scored_on` gives for the data that it was found on.

    Raises:
        MlflowException: MLflow does not answer.
    """
    client, config = tracker.client, tracker.config
    run_id = tracker.run_id("train")
    if run_id is None:
        raise MlflowException("the training has no run in MLflow")
    weights = stored_model(storage, checkpoint).digest
    version = _registered(client, config.model_name, run_id, weights)
    if version is None:
        with tracker.reopened(run_id):
            version = _log_model(tracker, storage, checkpoint, run_id, weights)
    elif version.run_id:
        tracker.finished(version.run_id)
    tags = {"checkpoint": storage.child_uri(checkpoint)}
    if (score := (metrics or {}).get(config.champion_metric)) is not None:
        tags |= {config.champion_metric: repr(score), **(tested or {})[config.champion_metric]}
    for key, value in tags.items():
        client.set_model_version_tag(config.model_name, version.version, key, value)
    champion = champion_of(client, config.model_name)
    wins, told = _wins(champion, version, config.champion_metric, tags)
    uri = f"models:/{config.model_name}/{version.version}"
    held = str(champion.version) if champion else None
    before = held if held != str(version.version) else None
    return Registered(uri, str(version.version), wins, told, before)


def crown(tracker: Tracker, registered: Registered) -> Registered:
    """Let a version have the alias, which endpoints follow, if it is to be the champion.

    It does not get it if there is another champion by now than the one it has beaten.

    Returns:
        What became of it.

    Raises:
        MlflowException: MLflow does not answer.
    """
    if not registered.champion:
        return registered
    client, name = tracker.client, tracker.config.model_name
    now = champion_of(client, name)
    if now is not None and str(now.version) not in (registered.before, registered.version):
        told = f"version {now.version} has become the champion meanwhile; start again to compare"
        return replace(registered, champion=False, told=told)
    client.set_registered_model_alias(name, CHAMPION, registered.version)
    return registered


def champion_of(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that has the alias; None if there is none, or no such model.

    Raises:
        MlflowException: MLflow does not tell.
    """
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in _NO_CHAMPION:
            return None
        raise


def _registered(client: MlflowClient, name: str, run_id: str, weights: str) -> ModelVersion | None:
    """The version with these weights, the run's own before any other run's of the same training.

    A training that was done again has other weights, and settings that do not decide them have
    another run.
    """
    found = client.search_model_versions(f"name='{name}' and tag.{_WEIGHTS}='{weights}'")
    return min(found, key=lambda one: (one.run_id != run_id, int(one.version)), default=None)


def _log_model(
    tracker: Tracker, storage: Storage, checkpoint: str, run_id: str, weights: str
) -> ModelVersion:
    """Log and register a model that needs nothing but MLflow and what a package index has."""
    name = tracker.config.model_name
    with (
        TemporaryDirectory() as folder,
        current_store(tracker.uri),
        mlflow.start_run(run_id=run_id),
    ):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"checkpoint": str(_local_checkpoint(storage, checkpoint, Path(folder)))},
            code_paths=[str(_local_library(Path(folder)))],
            input_example=_example(),
            pip_requirements=_requirements(),
        )
        with _quietly():
            registered = mlflow.register_model(info.model_uri, name, tags={_WEIGHTS: weights})
    return tracker.client.get_model_version(name, str(registered.version))


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep MLflow from printing what our line of this stage tells; its errors are raised."""
    before = MLFLOW_LOGGING_STREAM.enabled
    MLFLOW_LOGGING_STREAM.enabled = False
    try:
        yield
    finally:
        MLFLOW_LOGGING_STREAM.enabled = before


def _local_checkpoint(storage: Storage, checkpoint: str, root: Path) -> Path:
    """The model's two files, without the optimizer's state."""
    folder = root / "checkpoint"
    folder.mkdir()
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        (folder / file).write_bytes(storage.read_bytes(f"{checkpoint}/{file}"))
    return folder


def _local_library(root: Path) -> Path:
    """The library with its compiled operator, which it lacks where a job was sent its code."""
    package = Path(rwkv_clip.__file__).parent
    folder = root / package.name
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if (operator := build_info()["library"]) is not None:
        shutil.copy(operator, folder)
    return folder


def _requirements() -> list[str]:
    """What the library depends on, as it is here; the index has no builds such as 2.13.0+cpu."""
    needed = map(Requirement, requires("rwkv-clip") or [])
    names = [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [f"{name}=={Version(version(name)).public}" for name in names]


def _example() -> list[dict[str, str]]:
    """A text and an image."""
    png = BytesIO()
    Image.new("RGB", (16, 16), "red").save(png, "PNG")
    return [{"text": "a red square"}, {"image": base64.b64encode(png.getvalue()).decode()}]


def _wins(
    champion: ModelVersion | None, version: ModelVersion, metric: str, tags: Mapping[str, Any]
) -> tuple[bool, str]:
    """Whether a version takes or keeps the alias, and why."""
    if metric not in tags:
        return False, (
            f"not evaluated on {metric}, so it cannot become the champion; serve.model can name it"
        )
    if champion is None:
        return True, "the first champion"
    score = float(tags[metric])
    if str(champion.version) == str(version.version):
        return True, f"the champion, {metric} {score:.4f}"
    held = float(champion.tags.get(metric, math.nan))
    against = f"champion version {champion.version}"
    exchange = f"to exchange it, point the alias {CHAMPION} at version {version.version}"
    if math.isnan(held):
        return False, f"{against} was not evaluated on {metric} and stays; {exchange}"
    if champion.tags.get("test_digest") != tags["test_digest"]:
        if "test_set" not in champion.tags:
            return False, (
                f"{against} was evaluated on other test data, or by an older release, which did "
                f"not tell sets apart, and stays; {exchange}"
            )
        return False, f"{against} was evaluated on other test data and stays"
    if (text := champion.tags.get("test_text", tags["test_text"])) != tags["test_text"]:
        return False, f"{against} was evaluated by {text} and not by {tags['test_text']}, and stays"
    if score > held:
        return True, f"{metric} {score:.4f} beats {against}'s {held:.4f}"
    return False, f"{metric} {score:.4f} does not beat {against}'s {held:.4f}"
