"""One block of either encoder: a time mix across tokens, then a channel mix within each.

The paper's equations (arXiv 2406.06973, section 3), with the published weights' names. Encoders
differ in which tokens are neighbours (`TokenShift`), in the channel mix's parameters and in how
they are regularised; the rest is shared.

Shapes: B batch, T tokens, C = H * N channels, H heads, N head size.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_clip.ops import fused, wkv6
from rwkv_clip.ops.fused import TokenShift
from rwkv_clip.ops.operator import is_transformed

LAYER_NORM_EPS = 1e-5
MIX_RANK = 32  # of each of the five data-dependent mixes
DECAY_RANK = 64  # of the data-dependent decay
MIXES = 5  # of decay, key, value, receptance and gate, in this order

# SplitMix64's, as signed numbers.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


class GatedGroupNorm(nn.GroupNorm):
    """A group norm whose output a gate multiplies, in one step: GroupNorm(y) * silu(g)."""

    def forward(self, y: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]  # has a gate
        """[B, T, C] each -> [B, T, C]; each token has norms of its own."""
        return fused.group_norm_gate(y, g, self.weight, self.bias, self.num_groups, self.eps)


class TimeMix(nn.Module):
    """Mix information across tokens by the bidirectional WKV6 operator.

    What decay w, key k, value v, receptance r and gate g see of a token is mixed with its
    neighbours; then output(GroupNorm(wkv6(r, k, v, w, u)) * silu(g)), the norm by head.

    Parameters keep their published names: `time_maa_*` the neighbours' shares and `_w1`, `_w2`
    what a token adds to them; `time_decay*` the same for the decay; `time_faaaa` u, the weight
    of a token's own key and value.

    Args:
        channels: C.
        heads: H.
        norm_eps: of the norm over each head's output.
    """

    def __init__(self, channels: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.time_maa_x = _parameter(1, 1, channels)
        self.time_maa_w = _parameter(1, 1, channels)
        self.time_maa_k = _parameter(1, 1, channels)
        self.time_maa_v = _parameter(1, 1, channels)
        self.time_maa_r = _parameter(1, 1, channels)
        self.time_maa_g = _parameter(1, 1, channels)
        self.time_maa_w1 = _parameter(channels, MIXES * MIX_RANK)
        self.time_maa_w2 = _parameter(MIXES, MIX_RANK, channels)
        self.time_decay = _parameter(1, 1, channels)
        self.time_decay_w1 = _parameter(channels, DECAY_RANK)
        self.time_decay_w2 = _parameter(DECAY_RANK, channels)
        self.time_faaaa = _parameter(heads, channels // heads)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)
        self.gate = nn.Linear(channels, channels, bias=False)
        self.ln_x = GatedGroupNorm(heads, channels, eps=norm_eps)

    def forward(self, x: Tensor, shift: TokenShift) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        xw, xk, xv, xr, xg = self._mix_with_neighbours(x, shift)
        r, k, v, g = self.receptance(xr), self.key(xk), self.value(xv), self.gate(xg)
        w = torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        # A sum, not addmm: under autocast it leaves the decay in float32.
        in_place = w.dtype == self.time_decay.dtype and _may_overwrite()
        w = w.add_(self.time_decay) if in_place else w + self.time_decay
        y = wkv6(r, k, v, w, self.time_faaaa)
        out: Tensor = self.output(self.ln_x(y, g))
        return out

    def _mix_with_neighbours(self, x: Tensor, shift: TokenShift) -> tuple[Tensor, ...]:
        """What decay, key, value, receptance and gate each see: five of [B, T, C].

        Each has its own share of the neighbours: a learned one by channel, plus one of low rank
        that depends on the token itself.
        """
        C = x.shape[-1]
        (mixed,) = fused.token_shift_mix(x, self.time_maa_x.view(1, C), shift=shift)
        low_rank = torch.tanh(mixed @ self.time_maa_w1), self.time_maa_w2
        maa = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        return fused.token_shift_mix(x, torch.cat(maa).view(MIXES, C), low_rank, shift=shift)


class ChannelMix(nn.Module, ABC):
    """Mix channels within a token: sigmoid(r) * v, v = value(relu(key(x_k))^2).

    Args:
        channels: C.
        hidden: channels between key and value.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.key = nn.Linear(channels, hidden, bias=False)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(hidden, channels, bias=False)

    @abstractmethod
    def neighbours_share(self) -> Tensor:
        """By channel, for key and receptance: [2, C]."""

    def forward(self, x: Tensor, shift: TokenShift) -> tuple[Tensor, Tensor]:
        """[B, T, C] -> r and v of [B, T, C]; gating waits until they meet the residual stream."""
        xk, xr = fused.token_shift_mix(x, self.neighbours_share(), shift=shift)
        square = fused.relu_square_ if _gives_away(self.key) else fused.relu_square
        return self.receptance(xr), self.value(square(self.key(xk)))


class ImageChannelMix(ChannelMix):
    """With each token's own share as parameter: x * m + shift(x) * (1 - m)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(channels, hidden)
        self.spatial_mix_k = _parameter(1, 1, channels)
        self.spatial_mix_r = _parameter(1, 1, channels)

    def neighbours_share(self) -> Tensor:
        return 1 - torch.cat([self.spatial_mix_k, self.spatial_mix_r]).squeeze(1)


class TextChannelMix(ChannelMix):
    """With the neighbours' share as parameter: x + (shift(x) - x) * m."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(channels, hidden)
        self.time_maa_k = _parameter(1, 1, channels)
        self.time_maa_r = _parameter(1, 1, channels)

    def neighbours_share(self) -> Tensor:
        return torch.cat([self.time_maa_k, self.time_maa_r]).squeeze(1)


class Block(nn.Module):
    """A residual block: x += att(ln1(x)), then x += ffn(ln2(x)).

    Args:
        att: the time mix.
        ffn: the channel mix.
        first: whether it is an encoder's first block, which normalises its input, residual
            stream included.
        drop_path: chance of dropping each branch, for each sample.
        dropout: chance of zeroing an element of the residual stream after each branch.
    """

    def __init__(
        self,
        att: TimeMix,
        ffn: ChannelMix,
        *,
        first: bool,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels = att.ln_x.num_channels
        self.drop_path = drop_path
        self.dropout = dropout
        if first:
            self.ln0 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.first = first
        self.ln1 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.ln2 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.att = att
        self.ffn = ffn

    def forward(self, x: Tensor, shift: TokenShift, noise: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C].

        Args:
            x: [B, T, C].
            shift: the neighbours.
            noise: [2, B], uniform in 0..1, by which the two branches are dropped; drawn here if
                absent.
        """
        if self.first:
            x = self.ln0(x)
        branch = self.att(self.ln1(x), shift)
        scale = self._branch_scale(x, None if noise is None else noise[0])
        x = x + branch if scale is None else torch.addcmul(x, branch, scale[:, None, None])
        x = F.dropout(x, self.dropout, self.training)
        r, v = self.ffn(self.ln2(x), shift)
        scale = self._branch_scale(x, None if noise is None else noise[1])
        x = fused.gated_residual(x, r, v, scale)
        return F.dropout(x, self.dropout, self.training)

    def _branch_scale(self, x: Tensor, noise: Tensor | None) -> Tensor | None:
        if not self.training or self.drop_path == 0:
            return None
        return drop_path_scale(x, self.drop_path, noise)


def drop_path_scale(x: Tensor, rate: float, noise: Tensor | None) -> Tensor:
    """Stochastic depth: [B], 0 with that chance, else what keeps the expectation.

    Source: arXiv 1603.09382.
    """
    keep = 1 - rate
    if noise is None:
        return torch.bernoulli(x.new_full((x.shape[0],), keep)) / keep
    return (noise >= rate).to(x.dtype) / keep


def sample_noise(seeds: Tensor, count: int) -> Tensor:
    """Uniform numbers in 0..1 of each sample's own: float32 [count, B].

    They depend on the sample's seed alone, and not on which others are in its batch, so a global
    batch gets the same ones however it is spread over processes. Source: SplitMix64
    (doi:10.1145/2660193.2660195), of which the upper 24 bits are used.

    Args:
        seeds: int64 [B].
        count: of numbers for each.
    """
    at = torch.arange(1, count + 1, device=seeds.device)[:, None]
    z = seeds + at * _GOLDEN_GAMMA
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return _shifted(z ^ _shifted(z, 31), 40).float() * 2**-24


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right as if it had no sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    shift: TokenShift,
    *,
    recompute: bool,
    noise: Tensor | None = None,
) -> Tensor:
    """Apply the blocks in turn: [B, T, C] -> [B, T, C].

    Args:
        blocks: of class Block.
        x: [B, T, C].
        shift: the neighbours, the same in every block.
        recompute: keep only each block's input for the backward pass, and compute the rest again.
        noise: [2 * len(blocks), B]; see `Block`.
    """
    for at, block in enumerate(blocks):
        own = None if noise is None else noise[2 * at : 2 * at + 2]
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, shift, own, use_reentrant=False)
        else:
            x = block(x, shift, own)
    return x


def _gives_away(module: nn.Module) -> bool:
    """Whether nobody else holds what the module returns, so that its memory may be reused.

    Known of a plain linear layer without hooks; what replaces or wraps one may keep it.
    """
    if torch.compiler.is_compiling():  # which reuses memory by itself
        return True
    return (
        type(module) is nn.Linear
        and _may_overwrite()
        and not (
            module._forward_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__  # replaced on this layer alone
            or nn.modules.module._has_any_global_hook()
        )
    )


def _may_overwrite() -> bool:
    """Whether a step may write over what a product returned, where nothing needs that later.

    Not where a mode sees each step or function and may keep what it returned, as selective
    activation checkpointing does; nor under torch.func, which may map over the other operand alone.
    A compiler reuses memory by itself.

    What autograd keeps must not depend on the answer: a mode may see a pass, and not its repetition
    under activation checkpointing.
    """
    if torch.compiler.is_compiling():
        return False
    is_seen = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return not (is_seen or is_transformed())


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))
