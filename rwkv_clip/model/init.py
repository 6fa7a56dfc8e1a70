"""Fresh weights, by the published code's formulas.

The encoders start differently: the image encoder from PyTorch's defaults, the text encoder from
orthogonal matrices and from branches that begin at zero. What depends on a block's depth: i is
its index of L, `depth` runs from 0 at the first block to 1 at the last, `remaining` from 1 to 1/L.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rwkv_clip.model.blocks import Block, ImageChannelMix, TextChannelMix, TimeMix
    from rwkv_clip.model.clip import RWKVCLIP
    from rwkv_clip.model.image import ImageEncoder
    from rwkv_clip.model.text import TextEncoder

SMALL = 1e-4
LOW_RANK = 0.01
GATES_GAIN = 0.1
CLASS_TOKEN = 0.02
FIRST_TEMPERATURE = 0.07  # of the similarities


@torch.no_grad()
def initialise(model: "RWKVCLIP") -> None:
    """Fill every parameter, from PyTorch's default generator."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
    model.logit_scale.fill_(math.log(1 / FIRST_TEMPERATURE))
    _initialise_text(model.text_model)
    _initialise_image(model.image_model)


def _initialise_image(encoder: "ImageEncoder") -> None:
    encoder.patch_embed.projection.reset_parameters()
    encoder.pos_embed.zero_()
    if encoder.config.class_token:  # of a zero token every branch is zero, and it learns nothing
        encoder.cls_token.normal_(std=CLASS_TOKEN)
    for i, block in enumerate(cast("Sequence[Block]", encoder.layers)):
        remaining = _time_mix(block.att, i, len(encoder.layers))
        att, ffn = block.att, cast("ImageChannelMix", block.ffn)
        for low_rank in (att.time_maa_w1, att.time_maa_w2, att.time_decay_w1, att.time_decay_w2):
            low_rank.uniform_(-SMALL, SMALL)
        for linear in (*_linears(att), *_linears(ffn)):
            linear.reset_parameters()
        own_share = _ramp(ffn.spatial_mix_k) ** remaining
        ffn.spatial_mix_k.copy_(own_share)
        ffn.spatial_mix_r.copy_(own_share)


def _initialise_text(encoder: "TextEncoder") -> None:
    encoder.emb.weight.uniform_(-SMALL, SMALL)
    L = len(encoder.blocks)
    for i, block in enumerate(cast("Sequence[Block]", encoder.blocks)):
        remaining = _time_mix(block.att, i, L)
        att, ffn = block.att, cast("TextChannelMix", block.ffn)
        att.time_maa_w1.zero_()
        att.time_maa_w2.uniform_(-LOW_RANK, LOW_RANK)
        att.time_decay_w1.zero_()
        att.time_decay_w2.uniform_(-LOW_RANK, LOW_RANK)
        for linear, gain in (
            (att.receptance, 1.0),
            (att.value, 1.0),
            (att.key, GATES_GAIN),
            (att.gate, GATES_GAIN),
            (ffn.key, 0.5 * math.sqrt(ffn.key.out_features / ffn.key.in_features)),
        ):
            nn.init.orthogonal_(linear.weight, gain)
        for linear in (att.output, ffn.receptance, ffn.value):
            linear.weight.zero_()
        att.ln_x.weight.fill_(((1 + i) / L) ** 0.7)
        neighbours_share = 1 - _ramp(ffn.time_maa_k) ** remaining
        ffn.time_maa_k.copy_(neighbours_share)
        ffn.time_maa_r.copy_(neighbours_share)


def _time_mix(att: "TimeMix", i: int, L: int) -> float:
    """Fill what both encoders' time mixes share; returns `remaining`."""
    depth, remaining = i / max(L - 1, 1), 1 - i / L
    own_share = _ramp(att.time_maa_x) ** remaining
    for mix in (att.time_maa_x, att.time_maa_w, att.time_maa_k):
        mix.copy_(1 - own_share)
    att.time_maa_v.copy_(1 - (own_share + 0.3 * depth))
    for mix in (att.time_maa_r, att.time_maa_g):
        mix.copy_(1 - _ramp(mix) ** (0.5 * remaining))

    n = _count(att.time_decay)
    ratio = n / (len(n) - 1)
    decay = -6 + 5 * ratio ** (0.7 + 1.3 * depth)
    att.time_decay.copy_(decay.view_as(att.time_decay))
    zigzag = 0.1 * ((n + 1) % 3 - 1)
    bonus = depth * (1 - ratio) + zigzag
    att.time_faaaa.copy_(bonus.view_as(att.time_faaaa))
    return remaining


def _ramp(like: Tensor) -> Tensor:
    """0 to almost 1 over the channels, in the parameter's shape."""
    n = _count(like)
    return (n / len(n)).view_as(like)


def _count(like: Tensor) -> Tensor:
    """0, 1, 2 and so on, one for each element; where that is, whatever PyTorch's default device."""
    return torch.arange(like.numel(), dtype=torch.float64, device=like.device)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [child for child in module.children() if isinstance(child, nn.Linear)]
