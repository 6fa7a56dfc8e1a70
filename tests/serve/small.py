"""A small model, a registry of such, and pictures for them."""

import base64
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from mlflow import MlflowClient
from PIL import Image
from ray import serve

from ray_jobs.training.config import ModelConfig
from rwkv_clip.model import RWKVCLIP, create_model
from rwkv_clip.model.config import CLIPConfig
from serve.app import director_deployment
from serve.config import ServeFile
from serve.registry import find_model
from tests.ray_jobs.small import TRAIN


def small_config() -> CLIPConfig:
    return ModelConfig.model_validate(TRAIN["model"]).clip_config()


def drawn_model() -> RWKVCLIP:
    """One whose every parameter says something: a fresh block gives zeros."""
    torch.manual_seed(0)
    model = create_model(small_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def director_alone(config: dict[str, object]) -> serve.Application:
    """What a file of Serve's may deploy: the director, of the endpoint's configuration."""
    read = ServeFile.model_validate(config)
    return director_deployment().bind(read, find_model(read))


class Registry:
    """MLflow's, with versions of the model `small`.

    Args:
        uri: of its store.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self.client.create_registered_model("small")

    def add(self, folder: Path) -> str:
        """A folder as a new version."""
        return str(self.client.create_model_version("small", str(folder)).version)

    def champion(self, version: str) -> None:
        """Point the alias at a version."""
        self.client.set_registered_model_alias("small", "champion", version)


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}
