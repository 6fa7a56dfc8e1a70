"""A model's weights, and what they must be able to do before they serve anybody."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.fs as pafs
import torch
from mlflow.exceptions import MlflowException
from torch import Tensor

from rwkv_clip.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from rwkv_clip.model import RWKVCLIP, load_checkpoint
from rwkv_clip.model.checkpoint import CheckpointError
from rwkv_clip.model.config import CLIPConfig
from serve.config import S3Section
from serve.files import open_filesystem
from serve.messages import ModelPlace, Tower, Vectors
from serve.registry import ModelError


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


def check_model(model: RWKVCLIP, tower: Tower) -> None:
    """Embed an image, or a text, and look at the scale that classifying takes.

    Raises:
        ModelError: what comes out is no embedding, or the scale is no number.
    """
    device = next(model.parameters()).device
    encode = model.encode_image if tower == "image" else model.encode_text
    with torch.inference_mode():
        vectors = encode(sample_input(model.config, tower).to(device))
    if not model.logit_scale.exp().isfinite():
        raise ModelError("the model's scale (logit_scale) is not finite; train it anew")
    check_vectors(vectors.float().cpu().numpy(), model.config.embed_dim, tower)


def sample_input(config: CLIPConfig, tower: Tower) -> Tensor:
    """An image, [1, 3, S, S], or a text of no words, [1, T]."""
    if tower == "image":
        side = config.image_size
        return torch.linspace(-1, 1, 3 * side**2).view(1, 3, side, side)
    tokens = torch.zeros(1, config.context_length, dtype=torch.int64)
    tokens[0, :2] = torch.tensor([config.vocab_size - 2, config.vocab_size - 1])
    return tokens


def check_vectors(vectors: Vectors, dimensions: int, told: str) -> None:
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
