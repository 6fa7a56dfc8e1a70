"""The element-wise steps of a block, each one function so that one kernel can stand behind it.

Each `*_statement` says in plain PyTorch what its step computes: the definition that a kernel is
tested against, and what runs wherever there is none (other devices and types, tracing).

Shapes: B batch, T tokens, C = H * N channels, H heads, N head size, n mixtures.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenShift(NamedTuple):
    """Which neighbours a token looks at: each head's channels are split among them.

    A text gives the first half of every head the token before, the second half the token after.
    An image gives the quarters of every head the left, right, upper and lower neighbour. Beyond
    the border there are zeros.

    Attributes:
        head_size: N; a multiple of 2 for texts, of 4 for images.
        grid: rows and columns of an image's tokens, which run row by row; None for a text.
        has_class_token: whether one more token follows the grid, which is its own neighbour.
    """

    head_size: int
    grid: tuple[int, int] | None = None
    has_class_token: bool = False


def token_shift_mix(
    x: Tensor, mix: Tensor, delta: Tensor | None = None, *, shift: TokenShift
) -> Tensor:
    """Mix every token with its neighbours, in n ways: x + (shift(x) - x) * (mix_n + delta_n).

    Args:
        x: [B, T, C].
        mix: [n, C], the neighbours' share by channel.
        delta: [n, B, T, C], added to the share of each token; None for zero.
        shift: the neighbours.

    Returns:
        [n, B, T, C].

    Raises:
        ValueError: if the shift does not fit x.
    """
    _check_shift(x, shift)
    return token_shift_mix_statement(x, mix, delta, shift=shift)


def group_norm_gate(
    y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> Tensor:
    """Normalise each token's heads one by one, then gate: GroupNorm(y) * silu(g).

    Args:
        y: [B, T, C], the operator's output.
        g: [B, T, C], the gate before its activation.
        weight: [C], the norm's scale.
        bias: [C], the norm's offset.
        heads: H.
        eps: added to each head's variance.

    Returns:
        [B, T, C].
    """
    return group_norm_gate_statement(y, g, weight, bias, heads, eps)


def relu_square(a: Tensor) -> Tensor:
    """max(a, 0)^2, of any shape."""
    return relu_square_statement(a)


def gated_residual(x: Tensor, r: Tensor, v: Tensor, scale: Tensor | None = None) -> Tensor:
    """Add a gated branch: x + sigmoid(r) * v * scale.

    Args:
        x: [B, T, C], the residual stream.
        r: [B, T, C], the gate before its activation.
        v: [B, T, C], the branch.
        scale: [B], a factor for each sample; None for one.

    Returns:
        [B, T, C].
    """
    return gated_residual_statement(x, r, v, scale)


def shift_statement(x: Tensor, shift: TokenShift) -> Tensor:
    """The neighbours of every token, [B, T, C] -> [B, T, C]."""
    if shift.grid is None:
        return _shift_text(x, shift.head_size)
    if not shift.has_class_token:
        return _shift_image(x, shift.head_size, shift.grid)
    patches, class_token = x[:, :-1], x[:, -1:]
    return torch.cat([_shift_image(patches, shift.head_size, shift.grid), class_token], dim=1)


def token_shift_mix_statement(
    x: Tensor, mix: Tensor, delta: Tensor | None = None, *, shift: TokenShift
) -> Tensor:
    """What `token_shift_mix` computes."""
    share = mix[:, None, None]
    if delta is not None:
        share = share + delta
    return torch.addcmul(x, shift_statement(x, shift) - x, share)


def group_norm_gate_statement(
    y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> Tensor:
    """What `group_norm_gate` computes."""
    tokens = y.reshape(-1, y.shape[-1])  # a token is a sample of its own to the norm
    return F.group_norm(tokens, heads, weight, bias, eps).view(y.shape) * F.silu(g)


def relu_square_statement(a: Tensor) -> Tensor:
    """What `relu_square` computes."""
    return torch.relu(a).square()


def gated_residual_statement(
    x: Tensor, r: Tensor, v: Tensor, scale: Tensor | None = None
) -> Tensor:
    """What `gated_residual` computes."""
    gate = torch.sigmoid(r)
    if scale is not None:
        gate = gate * scale[:, None, None]
    return torch.addcmul(x, gate, v)


def _shift_text(x: Tensor, head_size: int) -> Tensor:
    B, T, C = x.shape
    halves = x.view(B, T, C // head_size, 2, head_size // 2)
    before = F.pad(halves[:, :-1, :, 0], (0, 0, 0, 0, 1, 0))
    after = F.pad(halves[:, 1:, :, 1], (0, 0, 0, 0, 0, 1))
    return torch.stack([before, after], dim=3).view(B, T, C)


def _shift_image(x: Tensor, head_size: int, grid: tuple[int, int]) -> Tensor:
    B, T, C = x.shape
    rows, columns = grid
    quarters = x.view(B, rows, columns, C // head_size, 4, head_size // 4)
    left = F.pad(quarters[:, :, :-1, :, 0], (0, 0, 0, 0, 1, 0))
    right = F.pad(quarters[:, :, 1:, :, 1], (0, 0, 0, 0, 0, 1))
    upper = F.pad(quarters[:, :-1, :, :, 2], (0, 0, 0, 0, 0, 0, 1, 0))
    lower = F.pad(quarters[:, 1:, :, :, 3], (0, 0, 0, 0, 0, 0, 0, 1))
    return torch.stack([left, right, upper, lower], dim=4).view(B, T, C)


def _check_shift(x: Tensor, shift: TokenShift) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {list(x.shape)}; takes [B, T, C]")
    T, C = x.shape[1:]
    parts = 2 if shift.grid is None else 4
    if C % shift.head_size or shift.head_size % parts:
        raise ValueError(
            f"{C} channels with heads of {shift.head_size}: takes whole heads, "
            f"each a multiple of {parts}"
        )
    if shift.grid is not None:
        rows, columns = shift.grid
        tokens = rows * columns + shift.has_class_token
        if tokens != T:
            raise ValueError(f"{T} tokens with {shift}: takes {tokens}")
