"""The golden metrics, and random embeddings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Golden = Callable[[str], Path]


@pytest.fixture(scope="session")
def values(golden: Golden) -> dict[str, Any]:
    """What the published code's metrics are, exact logits ranked."""
    content: dict[str, Any] = json.loads(golden("metrics.json").read_text())["values"]
    return content


@pytest.fixture(scope="session")
def tensors(golden: Golden) -> dict[str, Tensor]:
    return load_file(golden("metrics.safetensors"))


@pytest.fixture(scope="session")
def random() -> Callable[..., Tensor]:
    """Normal numbers of a shape, the same ones for the same seed."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return draw
