"""The golden tiny model and B/32, and the published code's values for them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rwkv_clip.model import RWKVCLIP, CLIPConfig, ImageConfig, TextConfig, create_model

Golden = Callable[[str], Path]


def _tiny_config(**image: object) -> CLIPConfig:
    fields = {"depth": 3, "heads": 4, "embed_dim": 64, "hidden_dim": 320} | image
    return CLIPConfig(
        ImageConfig(patch_size=16, image_size=64, **fields),
        TextConfig(
            depth=2, heads=4, embed_dim=64, hidden_dim=224, context_length=16, vocab_size=512
        ),
        name="tiny",
    )


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., CLIPConfig]:
    """The golden tiny model's configuration; image fields may be given."""
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_state(golden: Golden) -> dict[str, Tensor]:
    return load_file(golden("tiny_state.safetensors"))


@pytest.fixture(scope="session")
def tiny_io(golden: Golden) -> dict[str, Tensor]:
    """Inputs, outputs, gradients and activations of the published code on the tiny model."""
    return load_file(golden("tiny_io.safetensors"))


@pytest.fixture
def tiny(tiny_state: dict[str, Tensor]) -> RWKVCLIP:
    """The golden tiny model, in evaluation mode."""
    model = create_model(_tiny_config())
    model.load_state_dict(tiny_state)
    return model.eval()


@pytest.fixture(scope="session")
def b32_facts(golden: Golden) -> dict[str, object]:
    facts: dict[str, object] = json.loads(golden("b32.json").read_text())
    return facts


@pytest.fixture(scope="session")
def recipe(golden: Golden) -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", golden("recipe.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """The largest difference over the largest expected magnitude."""

    def error(got: Tensor, expected: Tensor) -> float:
        assert got.shape == expected.shape
        difference = (got.detach().double() - expected.double()).abs().max()
        return float(difference / expected.double().abs().max().clamp_min(1e-30))

    return error


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
