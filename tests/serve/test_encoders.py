"""A tower's replica whose GPU is gone, or never was there."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve.config import EncoderConfig
from serve.encoders import Encoder, _device


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
