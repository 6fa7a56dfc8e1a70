"""A small model, and pictures for it."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image

from ray_jobs.training.config import ModelConfig
from rwkv_clip.model.config import CLIPConfig
from tests.ray_jobs.small import TRAIN


def small_config() -> CLIPConfig:
    return ModelConfig.model_validate(TRAIN["model"]).clip_config()


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}
