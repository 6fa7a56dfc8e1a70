"""Which model a configuration means: one of MLflow's registry, or a folder's."""

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rwkv_clip.checkpoint_files import WEIGHTS_FILE
from serve.config import S3Section, ServeFile
from serve.files import open_filesystem
from serve.messages import ModelPlace

_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


class ModelError(ValueError):
    """A model cannot be served; the message says why and what to do."""


def find_model(config: ServeFile) -> ModelPlace:
    """The version that a configuration means now; an alias may mean another one later.

    Raises:
        ModelError: there is none.
    """
    asked = config.model_name()
    if not asked.startswith("models:/"):
        return _in_folder(asked, config.s3())
    wanted = _REGISTERED.fullmatch(asked)
    if wanted is None:
        raise ModelError(f"{asked} is no model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    uri = config.tracking_uri() or _beside(config)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    name, version = wanted["name"], wanted["version"]
    try:
        if version is None:
            version = client.get_model_version_by_alias(name, wanted["alias"]).version
        else:
            client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in _NOT_THERE:
            why = str(error).partition("\n")[0]
            raise ModelError(f"the registry {uri} does not tell what {asked} is: {why}") from error
        raise ModelError(
            f"{asked} is not in the registry {uri} ({error.error_code}); rwkv-clip "
            "pipeline registers one, and makes it the champion by its test_data; or set "
            "serve.model to models:/NAME/VERSION or to a checkpoint's folder"
        ) from error
    return ModelPlace(name, str(version), f"models:/{name}/{version}", uri)


def _beside(config: ServeFile) -> str:
    """MLflow's store of a storage that has one of its own."""
    if config.storage is None or "://" in config.storage.uri:
        raise ModelError(
            "the storage holds no registry; name MLflow's address by tracking.uri or "
            "MLFLOW_TRACKING_URI, or set serve.model"
        )
    file = Path(config.storage.uri).resolve() / "mlflow" / "mlflow.db"
    if not file.is_file():
        raise ModelError(f"there is no registry {file}; run the job first, or set serve.model")
    return f"sqlite:///{file}"


def _in_folder(uri: str, s3: S3Section) -> ModelPlace:
    try:
        filesystem, folder = open_filesystem(uri, s3)
        info = filesystem.get_file_info(f"{folder}/{WEIGHTS_FILE}")
        digest = _file_digest(uri, s3.model_dump_json(), info.size, info.mtime_ns)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{uri} is no checkpoint: {WEIGHTS_FILE} cannot be read ({error})"
        ) from error
    name = folder.rstrip("/").rpartition("/")[2]
    return ModelPlace(name, digest[:12], uri)


@lru_cache(maxsize=8)  # whoever watches a folder reads its weights again only if they have changed
def _file_digest(uri: str, s3: str, size: int | None, changed: int | None) -> str:  # noqa: ARG001
    """SHA-256 of the weights' file, of a size, that was changed at a time."""
    filesystem, folder = open_filesystem(uri, S3Section.model_validate_json(s3))
    digest = hashlib.sha256()
    with filesystem.open_input_stream(f"{folder}/{WEIGHTS_FILE}") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
