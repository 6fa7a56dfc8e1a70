"""What a tower computes with, and when its GPU is gone or never was there."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Never

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkv_clip import tokenize
from serve.compute import Compute, Encode
from serve.config import EncoderConfig
from serve.encoders import Encoder
from serve.messages import TOWERS, Tower, Vectors
from serve.registry import ModelError
from tests.serve.small import drawn_model, small_config


def some_inputs(tower: Tower, count: int) -> Tensor:
    config = small_config()
    if tower == "text":
        return tokenize([f"{at} hearts" for at in range(count)], config.context_length)
    size = (count, 3, config.image_size, config.image_size)
    return torch.linspace(-1, 1, int(np.prod(size))).view(size)


def in_a_thread_of_its_own(compute: Compute, encode: Encode, inputs: Tensor) -> Vectors:
    """As the batcher has it."""
    with ThreadPoolExecutor(1, initializer=compute.take_threads) as thread:
        return thread.submit(compute.run, encode, inputs).result()


@pytest.mark.parametrize(
    ("error", "healthy"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (ValueError("a token that the model does not have"), True),
    ],
)
def test_it_is_replaced_when_its_gpu_fails_and_not_for_one_request(error, healthy):
    def failing(_: Tensor) -> Tensor:
        raise error

    async def check() -> None:
        compute = Compute("text", EncoderConfig())
        follower = asyncio.get_running_loop().create_future()
        replica = SimpleNamespace(compute=compute, follower=follower)
        await Encoder.check_health(replica)
        with pytest.raises(type(error)):
            compute.run(failing, torch.zeros(1, 8, dtype=torch.long))
        if healthy:
            await Encoder.check_health(replica)
        else:
            with pytest.raises(RuntimeError, match="uncorrectable ECC error"):
                await Encoder.check_health(replica)

    asyncio.run(check())


def test_a_gpu_that_pytorch_does_not_see_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Compute("text", EncoderConfig(gpus=0)).device.type == "cpu"
    with pytest.raises(ValueError, match=r"serve\.text\.gpus: is 0\.3, and PyTorch sees no GPU"):
        Compute("text", EncoderConfig(gpus=0.3))


@pytest.mark.parametrize("tower", TOWERS)
def test_products_are_of_the_precision_that_a_tower_is_to_have(tower):
    vectors = {}
    for precision in ("float32", "bfloat16"):
        compute = Compute(tower, EncoderConfig(precision=precision))
        vectors[precision] = compute.run(compute.ready(drawn_model().eval()), some_inputs(tower, 1))
    assert 0 < np.linalg.norm(vectors["float32"] - vectors["bfloat16"]) < 0.02


def test_a_compiled_model_waits_for_no_compiler_once_it_is_served():
    torch.compiler.reset()  # of what other tests compiled, which counts to a limit
    plain, compiled = (
        Compute("text", EncoderConfig(batch=8, compile=compile)) for compile in (False, True)
    )
    first = compiled.ready(drawn_model().eval())
    with torch.compiler.set_stance("fail_on_recompile"):
        # The model that follows is compiled by then.
        for encode in (first, compiled.ready(drawn_model().eval())):
            for count in (1, 2, 7, 8):
                inputs = some_inputs("text", count)
                np.testing.assert_allclose(
                    in_a_thread_of_its_own(compiled, encode, inputs),
                    plain.run(plain.ready(drawn_model().eval()), inputs),
                    atol=1e-5,
                )


def test_a_node_that_compiles_nothing_is_told(monkeypatch):
    def no_compiler(*_: object) -> Never:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    compute = Compute("text", EncoderConfig(compile=True))
    with pytest.raises(ModelError, match=r"text\.compile: .* \(No working C\+\+ compiler found\);"):
        compute.ready(drawn_model().eval())
