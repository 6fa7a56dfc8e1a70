"""The paper's optimization recipe (arXiv 2406.06973, section 4), without its code's slips.

AdamW with beta2 0.98, one-cycle cosine with 10 % warm-up, gradient clipping, the logit scale at
most log 100. Weight decay is for matrices alone: not for norms, biases, embeddings, the vectors of
the token shift and the decay, nor the logit scale. The schedule moves the rate and nothing else.
"""

import math

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from rwkv_clip.config import BaseConfig

MAX_LOGIT_SCALE = math.log(100)
_LOW_RANK = ("_w1", "_w2")  # matrices that are parameters of their own


class RecipeConfig(BaseConfig):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = Field(1e-3, description="peak of the schedule")
    weight_decay: NonNegativeFloat = Field(0.2, description="of matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's, for gradients")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW's, for their squares")
    epsilon: PositiveFloat = Field(1e-6, description="AdamW's")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="of the steps")
    clip_norm: PositiveFloat = Field(1.0, description="of the whole gradient")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for this parameter."""
    if name.endswith(_LOW_RANK):
        return True
    return name.endswith(".weight") and parameter.ndim >= 2 and not name.endswith("emb.weight")


def create_optimizer(model: nn.Module, config: RecipeConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters, in two groups."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(step: int, steps: int, config: RecipeConfig) -> float:
    """The rate of a step (counted from 0): a cosine up from a 25th, then one down to nearly 0."""
    warmup = max(1.0, config.warmup_share * steps)
    peak = config.learning_rate
    if step < warmup:
        return _cosine(peak / 25, peak, step / warmup)
    return _cosine(peak, peak / 250_000, (step - warmup) / max(steps - 1 - warmup, 1.0))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
