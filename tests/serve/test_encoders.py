"""A tower's replica: what it computes in, and when its GPU is gone or never was there."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rwkv_clip import tokenize
from rwkv_clip.model import save_checkpoint
from serve.config import EncoderConfig, ServeFile
from serve.encoders import Encoder, _device
from serve.messages import ModelPlace
from tests.serve.small import drawn_model


def failing(error: Exception) -> Any:
    """A model that cannot compute."""

    def encode_text(_: torch.Tensor) -> torch.Tensor:
        raise error

    return SimpleNamespace(model=SimpleNamespace(encode_text=encode_text))


@pytest.mark.parametrize(
    ("error", "healthy"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (ValueError("a token that the model does not have"), True),
    ],
)
def test_it_is_replaced_when_its_gpu_fails_and_not_for_one_request(error, healthy):
    async def check() -> None:
        replica = SimpleNamespace(
            tower="text",
            device=torch.device("cpu"),
            precision="float32",
            broken=None,
            follower=asyncio.get_running_loop().create_future(),
        )
        await Encoder.check_health(replica)
        with pytest.raises(type(error)):
            Encoder._forward(replica, failing(error), torch.zeros(1, 8, dtype=torch.long))
        if healthy:
            await Encoder.check_health(replica)
        else:
            with pytest.raises(RuntimeError, match="uncorrectable ECC error"):
                await Encoder.check_health(replica)

    asyncio.run(check())


def test_a_gpu_that_pytorch_does_not_see_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _device("text", EncoderConfig(gpus=0)).type == "cpu"
    with pytest.raises(ValueError, match=r"serve\.text\.gpus: is 0\.3, and PyTorch sees no GPU"):
        _device("text", EncoderConfig(gpus=0.3))


@pytest.mark.parametrize("tower", ["text", "image"])
def test_products_are_of_the_precision_that_a_tower_is_to_have(tmp_path, tower):
    save_checkpoint(drawn_model(), tmp_path)
    config = ServeFile.model_validate({"serve": {"model": str(tmp_path)}})
    vectors = {}
    for precision in ("float32", "bfloat16"):
        replica = SimpleNamespace(
            tower=tower,
            device=torch.device("cpu"),
            precision=precision,
            config=config,
            held={},
            serving=None,
        )
        held = Encoder._loaded(replica, ModelPlace("small", "", str(tmp_path)))
        shape = held.model.config
        pixels = torch.linspace(-1, 1, 3 * shape.image_size**2)
        inputs = {
            "text": tokenize(["a heart"], shape.context_length),
            "image": pixels.view(1, 3, shape.image_size, shape.image_size),
        }
        vectors[precision] = Encoder._forward(replica, held, inputs[tower])
    assert 0 < np.linalg.norm(vectors["float32"] - vectors["bfloat16"]) < 0.02
