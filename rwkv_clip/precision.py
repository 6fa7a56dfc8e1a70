"""What a model computes its matrix products in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from rwkv_clip.config import Precision


def products_in(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Where a model on this device is called: its products are of a type, and its sums float32.

    What it returns is float32 either way, and so are its parameters and their gradients.
    """
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def round_weights(model: nn.Module, precision: Precision) -> None:
    """Round the weights of linear layers once, in place, where `products_in` does in every call.

    The model gives the same to the last bit, and takes less memory and time. It is then one to
    embed with: what trains it, or saves it, wants the weights as they were.
    """
    if precision == "float32":
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.to(torch.bfloat16)
