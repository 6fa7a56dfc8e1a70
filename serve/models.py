"""Where a served model comes from, and what it must be able to do before it serves anybody."""

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import mlflow
import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rwkv_clip.model import RWKVCLIP, load_checkpoint
from rwkv_clip.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError
from serve.config import S3Section, ServeFile
from serve.files import open_filesystem

logger = logging.getLogger(__name__)

_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


class ModelError(ValueError):
    """A model cannot be served; the message says why and what to do."""


@dataclass(frozen=True)
class ModelPlace:
    """Where the files of one version of a model are.

    Attributes:
        name: of the model, as answers give it.
        version: of the model; tells it from every other one.
        uri: of the folder that holds the files, or of the version in the registry.
        tracking_uri: of the registry, if it is there.
    """

    name: str
    version: str
    uri: str
    tracking_uri: str | None = None


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
            f"{asked} is not in the registry {uri} ({error.error_code}); train one "
            "with test_data, by which it becomes the champion, or set serve.model to "
            "models:/NAME/VERSION"
        ) from error
    return ModelPlace(name, str(version), f"models:/{name}/{version}", uri)


def load_model(place: ModelPlace, s3: S3Section) -> tuple[RWKVCLIP, str]:
    """The model in evaluation mode, on the CPU, and the SHA-256 of its weights' file.

    Raises:
        ModelError: it cannot be fetched, is no model of this program, or its folder holds another
            version by now.
    """
    try:
        with _fetched(place, s3) as folder:
            with (folder / WEIGHTS_FILE).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if place.tracking_uri is None and not digest.startswith(place.version):
                raise ModelError(f"{place.uri} holds other weights now than {place.version}")
            return load_checkpoint(folder).eval(), digest
    except (CheckpointError, MlflowException, OSError) as error:
        raise ModelError(f"{place.uri} cannot be loaded: {error}") from error


def check_model(model: RWKVCLIP) -> None:
    """Embed an image and a text.

    Raises:
        ModelError: what comes out is no embedding.
    """
    config = model.config
    pixels = torch.linspace(-1, 1, 3 * config.image_size**2)
    device = next(model.parameters()).device
    tokens = torch.zeros(1, config.context_length, dtype=torch.int64)
    tokens[0, :2] = torch.tensor([config.vocab_size - 2, config.vocab_size - 1])
    with torch.inference_mode():
        image = model.encode_image(
            pixels.view(1, 3, config.image_size, config.image_size).to(device)
        )
        text = model.encode_text(tokens.to(device))
    for told, vectors in (("image", image), ("text", text)):
        check_vectors(vectors.float().cpu().numpy(), config.embed_dim, told)


def check_vectors(vectors: npt.NDArray[np.float32], dimensions: int, told: str) -> None:
    """Raise ModelError where vectors [n, dimensions] are of another size or not of length one."""
    if vectors.ndim != 2 or vectors.shape[1] != dimensions:
        raise ModelError(
            f"the model's {told} embeddings have the shape {list(vectors.shape)}, not "
            f"[n, {dimensions}]"
        )
    if not np.isfinite(vectors).all():
        raise ModelError(f"the model's {told} embeddings are not finite; train it anew")
    if np.abs(np.linalg.norm(vectors, axis=1) - 1).max(initial=0) > 1e-3:
        raise ModelError(f"the model's {told} embeddings are not of length one")


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


@contextmanager
def _fetched(place: ModelPlace, s3: S3Section) -> Iterator[Path]:
    """A local folder with the files, for as long as the block goes on."""
    if place.tracking_uri is None and "://" not in place.uri:
        yield Path(place.uri)
        return
    with tempfile.TemporaryDirectory(prefix="rwkv-clip-") as folder:
        if place.tracking_uri is None:
            filesystem, path = open_filesystem(place.uri, s3)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                pafs.copy_files(f"{path}/{file}", f"{folder}/{file}", source_filesystem=filesystem)
            yield Path(folder)
            return
        # The functions that download look nowhere but in the current store.
        mlflow.set_tracking_uri(place.tracking_uri)
        fetched = mlflow.artifacts.download_artifacts(place.uri, dst_path=folder)
        found = sorted(Path(fetched).rglob(WEIGHTS_FILE))
        if not found:
            raise ModelError(f"{place.uri} has no {WEIGHTS_FILE}; it is no model of this program")
        yield found[0].parent
