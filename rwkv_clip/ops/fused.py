"""The element-wise steps of a block, each one function so that one kernel can stand behind it.

Each `*_statement` says in plain PyTorch what its step computes: the definition that its kernel is
tested against, and what runs wherever there is none (other devices and types, tracing, torch.func,
forward-mode differentiation, no compiled library). A kernel passes over memory once, and keeps for
the backward pass only what it was given or what it returned. Batched gradients, and those that
have tangents, are made by the statement.

Shapes: B batch, T tokens, C = H * N channels, H heads, N head size, n mixtures, R rank.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_clip.ops import _library
from rwkv_clip.ops.operator import is_autocast_enabled, is_transformed

# Limits of the kernels: on n, and on C where there is a product to vectorise.
_MOST_MIXTURES = 8
_CHANNELS_STEP = 16


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
    x: Tensor,
    mix: Tensor,
    low_rank: tuple[Tensor, Tensor] | None = None,
    *,
    shift: TokenShift,
) -> tuple[Tensor, ...]:
    """Mix every token with its neighbours, in n ways: x + (shift(x) - x) * (mix_n + a_n b_n).

    Args:
        x: [B, T, C].
        mix: [n, C], the neighbours' share by channel.
        low_rank: a [B, T, n * R] and b [n, R, C], whose products are added to the share of each
            token; None for zero.
        shift: the neighbours.

    Returns:
        n of [B, T, C].

    Raises:
        ValueError: if the shift does not fit x.
    """
    _check_shift(x, shift)
    a, b = low_rank if low_rank is not None else (None, None)
    fits = len(mix) <= _MOST_MIXTURES and (b is None or x.shape[-1] % _CHANNELS_STEP == 0)
    if not fits or not _has_kernel(x, mix, a, b):
        return token_shift_mix_statement(x, mix, low_rank, shift=shift)
    if _is_differentiated(x, mix, a, b):
        outs: tuple[Tensor, ...] = _apply(_TokenShiftMix, x, mix, a, b, shift)
        return outs
    return tuple(torch.ops.rwkv_clip.token_shift_mix(x, mix, a, b, *_plain(shift)))


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
    if not _has_kernel(y, g, weight, bias):
        return group_norm_gate_statement(y, g, weight, bias, heads, eps)
    out: Tensor
    if _is_differentiated(y, g, weight, bias):
        out = _apply(_GroupNormGate, y, g, weight, bias, heads, eps)
    else:
        out = torch.ops.rwkv_clip.group_norm_gate(y, g, weight, bias, heads, eps)
    return out


def relu_square_(a: Tensor) -> Tensor:
    """max(a, 0)^2, of any shape, in the memory of a where there is a kernel.

    a must be the output of a step that does not need it on the way back, as a linear layer's, and
    must not be used again.
    """
    has_kernel = _has_kernel(a)
    if _is_differentiated(a) and (has_kernel or _is_compiled()):
        out: Tensor = _apply(_ReluSquare if has_kernel else _CompiledReluSquare, a)
        return out
    if not has_kernel:
        return relu_square_statement(a)
    torch.ops.rwkv_clip.relu_square_(a)
    return a


def relu_square(a: Tensor) -> Tensor:
    """The same, of an a that others hold.

    Keeps as much for the backward pass: which of the two runs may differ between a pass and its
    repetition under activation checkpointing.
    """
    if not (_has_kernel(a) and _is_differentiated(a)):
        return relu_square_statement(a)
    out: Tensor = _apply(_ReluSquareApart, a)
    return out


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
    if not _has_kernel(x, r, v, scale) or _is_differentiated(scale):
        return gated_residual_statement(x, r, v, scale)
    out: Tensor
    if _is_differentiated(x, r, v):
        out = _apply(_GatedResidual, x, r, v, scale)
    else:
        out = torch.ops.rwkv_clip.gated_residual(x, r, v, scale)
    return out


def shift_statement(x: Tensor, shift: TokenShift) -> Tensor:
    """The neighbours of every token, [B, T, C] -> [B, T, C]."""
    if shift.grid is None:
        return _shift_text(x, shift.head_size)
    if not shift.has_class_token:
        return _shift_image(x, shift.head_size, shift.grid)
    patches, class_token = x[:, :-1], x[:, -1:]
    return torch.cat([_shift_image(patches, shift.head_size, shift.grid), class_token], dim=1)


def token_shift_mix_statement(
    x: Tensor,
    mix: Tensor,
    low_rank: tuple[Tensor, Tensor] | None = None,
    *,
    shift: TokenShift,
) -> tuple[Tensor, ...]:
    """What `token_shift_mix` computes.

    Under autocast in its type, which is that of the layers behind. Mixtures and their products are
    steps of their own: of one step for all, a compiler makes one gradient for all, to be written
    before it is used.
    """
    device = x.device.type
    if is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    change = shift_statement(x, shift) - x
    shares: Iterable[Tensor] = mix.unbind()
    if low_rank is not None:
        a, b = low_rank
        pairs = zip(a.chunk(len(b), dim=-1), b, strict=True)
        shares = [share + a_n @ b_n for share, (a_n, b_n) in zip(shares, pairs, strict=True)]
    return tuple(torch.addcmul(x, change, share.to(x.dtype)) for share in shares)


def group_norm_gate_statement(
    y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> Tensor:
    """What `group_norm_gate` computes."""
    # Heads as rows: a compiler has the gradient of a layer norm in one pass, a group norm's in two.
    rows = y.reshape(-1, heads, y.shape[-1] // heads)
    normed = F.layer_norm(rows, rows.shape[-1:], eps=eps).view(y.shape)
    return torch.addcmul(bias, normed, weight) * F.silu(g)


def relu_square_statement(a: Tensor) -> Tensor:
    """What `relu_square_` computes."""
    return torch.relu(a).square()


def gated_residual_statement(
    x: Tensor, r: Tensor, v: Tensor, scale: Tensor | None = None
) -> Tensor:
    """What `gated_residual` computes."""
    gate = torch.sigmoid(r)
    if scale is not None:
        gate = gate * scale[:, None, None]
    return torch.addcmul(x, gate, v)


class _TokenShiftMix(torch.autograd.Function):
    """Computes the shift and the products again on the way back, which costs less than memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mix: Tensor, a: Tensor | None, b: Tensor | None, shift: TokenShift
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, mix, a, b)
        ctx.shift = shift
        return tuple(torch.ops.rwkv_clip.token_shift_mix(x, mix, a, b, *_plain(shift)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gouts: Tensor) -> tuple[Tensor | None, ...]:
        x, mix, a, b = ctx.saved_tensors
        if _takes_the_statement(*gouts):

            def mixed(x: Tensor, mix: Tensor, *low_rank: Tensor) -> tuple[Tensor, ...]:
                pair = (low_rank[0], low_rank[1]) if low_rank else None
                return token_shift_mix_statement(x, mix, pair, shift=ctx.shift)

            return *_differentiate(mixed, gouts, x, mix, a, b), None
        gouts = tuple(gout.contiguous() for gout in gouts)
        gx, gmix, *gproducts = torch.ops.rwkv_clip.token_shift_mix_backward(
            gouts, x, mix, a, b, *_plain(ctx.shift)
        )
        ga = gb = None
        if a is not None:
            (gproduct,) = gproducts
            ga = torch.bmm(gproduct, b.transpose(1, 2)).transpose(0, 1).reshape(a.shape)
            gb = torch.bmm(_by_mixture(a, b).transpose(1, 2), gproduct)
        return gx, gmix, ga, gb, None


class _GroupNormGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(y, g, weight, bias)
        ctx.constants = heads, eps
        out: Tensor = torch.ops.rwkv_clip.group_norm_gate(y, g, weight, bias, heads, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor) -> tuple[Tensor | None, ...]:
        if _takes_the_statement(gout):

            def gated(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return group_norm_gate_statement(y, g, weight, bias, *ctx.constants)

            return *_differentiate(gated, gout, *ctx.saved_tensors), None, None
        gy, gg, gaffine = torch.ops.rwkv_clip.group_norm_gate_backward(
            gout.contiguous(), *ctx.saved_tensors, *ctx.constants
        )
        return gy, gg, gaffine[0], gaffine[1], None, None


class _ReluSquare(torch.autograd.Function):
    """Keeps its output alone, which the layer behind it keeps too: the slope is 2 sqrt(out)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        torch.ops.rwkv_clip.relu_square_(a)
        ctx.mark_dirty(a)
        ctx.save_for_backward(a)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        ga: Tensor
        if _takes_the_statement(gout):
            ga = gout * (2 * out.sqrt())
        else:
            ga = torch.ops.rwkv_clip.relu_square_backward(gout.contiguous(), out)
        return ga


class _ReluSquareApart(_ReluSquare):
    """The same in memory of its own."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        out = relu_square_statement(a)
        ctx.save_for_backward(out)
        return out


class _CompiledReluSquare(torch.autograd.Function):
    """The same of the statement, of whose own gradient a compiler keeps the input as well."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        out = relu_square_statement(a)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gout: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        ga: Tensor = gout * (2 * out.sqrt())
        return ga


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, v: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(r, v, scale)
        out: Tensor = torch.ops.rwkv_clip.gated_residual(x, r, v, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor) -> tuple[Tensor | None, ...]:
        r, v, scale = ctx.saved_tensors
        if _takes_the_statement(gout):

            def branch(r: Tensor, v: Tensor) -> Tensor:
                return gated_residual_statement(torch.zeros_like(v), r, v, scale)

            return gout, *_differentiate(branch, gout, r, v), None
        gr, gv = torch.ops.rwkv_clip.gated_residual_backward(gout.contiguous(), r, v, scale)
        return gout, gr, gv, None


def _has_kernel(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these. A compiler fuses the statements itself."""
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    if not _library.is_loaded() or traced or is_transformed():
        return False
    return all(
        type(x) in (Tensor, nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        for x in tensors
        if x is not None
    )


def _is_compiled() -> bool:
    """Whether a compiler traces this for itself; an exported program is read by others too."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and not is_transformed()


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _takes_the_statement(*gouts: Tensor) -> bool:
    """Whether gradients are of a kind that kernels do not know: batched, or with tangents.

    `is_grads_batched` makes batched ones that are not of `torch.func`.
    """
    return is_transformed() or any(map(torch._C._functorch.is_legacy_batchedtensor, gouts))


def _differentiate(
    statement: Callable[..., Any], gouts: Tensor | tuple[Tensor, ...], *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that are given, for the others None."""
    given = [x.detach() for x in inputs if x is not None]
    with torch.enable_grad():  # without, PyTorch takes formulas that have no tangents
        gradients = iter(torch.func.vjp(statement, *given)[1](gouts))
    return tuple(None if x is None else next(gradients) for x in inputs)


def _apply(function: Any, *args: object) -> Any:
    return function.apply(*args)


def _plain(shift: TokenShift) -> tuple[int, int, int, bool]:
    """The shift as the kernels take it: head size, rows, columns (0 for a text), class token."""
    rows, columns = shift.grid or (0, 0)
    return shift.head_size, rows, columns, shift.has_class_token


def _by_mixture(a: Tensor, b: Tensor) -> Tensor:
    """[B, T, n * R] -> [n, B * T, R]."""
    n, R = b.shape[:2]
    return a.view(-1, n, R).transpose(0, 1)


# Negative padding cuts: a slice of T - 1 tokens would have an exported program refuse T = 2, the
# one length at which they are one.


def _shift_text(x: Tensor, head_size: int) -> Tensor:
    B, T, C = x.shape
    halves = x.view(B, T, C // head_size, 2, head_size // 2)
    before = F.pad(halves[:, :, :, 0], (0, 0, 0, 0, 1, -1))
    after = F.pad(halves[:, :, :, 1], (0, 0, 0, 0, -1, 1))
    return torch.stack([before, after], dim=3).view(B, T, C)


def _shift_image(x: Tensor, head_size: int, grid: tuple[int, int]) -> Tensor:
    B, T, C = x.shape
    rows, columns = grid
    quarters = x.view(B, rows, columns, C // head_size, 4, head_size // 4)
    left = F.pad(quarters[:, :, :, :, 0], (0, 0, 0, 0, 1, -1))
    right = F.pad(quarters[:, :, :, :, 1], (0, 0, 0, 0, -1, 1))
    upper = F.pad(quarters[:, :, :, :, 2], (0, 0, 0, 0, 0, 0, 1, -1))
    lower = F.pad(quarters[:, :, :, :, 3], (0, 0, 0, 0, 0, 0, -1, 1))
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
