"""The bidirectional WKV6 operator: `torch.ops.rwkv_clip.wkv6`, and what makes it a full one.

The kernels are registered by the compiled library (or the reference, see _library.py); here are
the shapes for tracing, the gradient, the types under autocast, and the checks. docs/wkv6.md has the
mathematics.

Shapes: B batch, T tokens, C = H * N channels, H heads, N head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad

from rwkv_clip.ops import reference

LARGEST_HEAD = 128
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_DEVICES = ("cpu", "cuda")  # whose autocast the operator has

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Let every token attend to all others through decays that the tokens themselves set.

        y[t] = sum over s != t of (r[t] * prod of d strictly between s and t) . k[s]  v[s]
             + (r[t] * u) . k[t]  v[t]                       with d = exp(-exp(w))

    On the CPU in float32, bfloat16, float16 or float64, on CUDA in the first three; sums are
    float32 (float64 for float64). Under autocast r, k and v come in autocast's type. Under
    `torch.func` and forward-mode differentiation the reference computes.

    Args:
        r: [B, T, C] receptance, C = H * N, T at least 1.
        k: [B, T, C] key.
        v: [B, T, C] value.
        w: [B, T, C] raw decay; of r's type or float32.
        u: [H, N] bonus of the own token; N a multiple of 8 up to 128. Of any of the four types.

    Returns:
        [B, T, C] in r's type.

    Raises:
        ValueError: a shape does not fit, with the shape and the limit.
        TypeError: a type does not fit, or a tensor is sparse.

    Source: RWKV-CLIP (arXiv 2406.06973), equations 5 to 7.
    """
    if is_autocast_enabled(r.device.type):
        check_shapes(r, k, v, w, u)  # r, k, v and w will be cast
        check_bonus(u)
    else:
        check_arguments(r, k, v, w, u)
    if is_transformed():
        return _differentiable(r, k, v, w, u)
    y: Tensor = torch.ops.rwkv_clip.wkv6(r, k, v, w, u)
    return y


def is_autocast_enabled(device: str) -> bool:
    """Whether a device's autocast is on; PyTorch's own question is an error where there is none."""
    return device in _DEVICES and torch.is_autocast_enabled(device)


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work.

    The library's operators have no rule for the one, and drop the other's tangents unsaid.
    """
    if TracingContext.try_get() is not None:
        _guard_forward_mode()
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# The compiler takes one answer for each state of either. This is what
# `torch.compiler.assume_constant_result` sets; to call that imports the compiler: two seconds and
# 70 MB in every process, of which few compile.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _guard_forward_mode() -> None:
    """Have the compiler compile anew within and outside forward-mode differentiation.

    Of the two it watches `torch.func` alone by itself.
    """
    from torch._dynamo.guards import install_guard
    from torch._dynamo.variables.ctx_manager import DualLevelContextManager

    install_guard(DualLevelContextManager._guards_singleton)


def check_shapes(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> None:
    """Raise ValueError unless r, k, v, w are [B, T, H * N] and u is [H, N], TypeError if sparse."""
    if not r.layout == k.layout == v.layout == w.layout == u.layout == torch.strided:
        layouts = {name: x.layout for name, x in zip("rkvwu", (r, k, v, w, u), strict=True)}
        raise TypeError(f"wkv6: takes dense tensors, torch.strided; they are {layouts}")
    if r.ndim != 3 or u.ndim != 2:
        raise ValueError(
            f"wkv6: r must be [B, T, C] and u [H, N]; they are {list(r.shape)} and {list(u.shape)}"
        )
    H, N = u.shape
    if H < 1 or r.shape[2] != H * N:
        raise ValueError(
            f"wkv6: r has {r.shape[2]} channels, and u is {list(u.shape)}: C must be H * N"
        )
    if N % 8 or not 8 <= N <= LARGEST_HEAD:
        raise ValueError(
            f"wkv6: head size N is {N}; it must be a multiple of 8 from 8 to {LARGEST_HEAD}"
        )
    if r.shape[1] < 1:
        raise ValueError(f"wkv6: r is {list(r.shape)}; there must be at least one token")
    for name, x in (("k", k), ("v", v), ("w", w)):
        if x.shape != r.shape:
            raise ValueError(
                f"wkv6: {name} is {list(x.shape)}; it must have r's shape, {list(r.shape)}"
            )


def check_bonus(u: Tensor) -> None:
    """Raise TypeError unless u is of a type that the kernels read."""
    if u.dtype not in TYPES:
        raise TypeError(f"wkv6: u is {u.dtype}; it must be one of {', '.join(map(str, TYPES))}")


def check_arguments(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> None:
    """Check shapes, types and devices; raise ValueError or TypeError."""
    check_shapes(r, k, v, w, u)
    if r.dtype not in TYPES:
        raise TypeError(f"wkv6: r is {r.dtype}; it must be one of {', '.join(map(str, TYPES))}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != r.dtype:
            raise TypeError(f"wkv6: {name} is {x.dtype}; it must have r's type, {r.dtype}")
    if w.dtype != r.dtype and (w.dtype != torch.float32 or r.dtype == torch.float64):
        raise TypeError(f"wkv6: w is {w.dtype}; it must have r's type, {r.dtype}, or be float32")
    check_bonus(u)
    for name, x in (("k", k), ("v", v), ("w", w), ("u", u)):
        if x.device != r.device:
            raise ValueError(f"wkv6: {name} is on {x.device}; it must be with r on {r.device}")


def register() -> None:
    """Complete the operators that the library, or its fallback, has defined."""
    torch.library.register_fake("rwkv_clip::wkv6", _shape_of_output)
    torch.library.register_fake("rwkv_clip::wkv6_backward", _shapes_of_gradients)
    torch.library.register_autograd("rwkv_clip::wkv6", _backward, setup_context=_save)
    torch.library.register_autograd("rwkv_clip::wkv6_backward", _refuse_second_derivative)
    for device in _DEVICES:
        _register_autocast(device)


def _shape_of_output(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    check_arguments(r, k, v, w, u)
    return r.new_empty(r.shape)


def _shapes_of_gradients(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> Gradients:
    check_arguments(r, k, v, w, u)
    if gy.shape != r.shape or gy.dtype != r.dtype:
        raise ValueError(
            f"wkv6: the gradient of y is {list(gy.shape)} of {gy.dtype}; it must be as r, "
            f"{list(r.shape)} of {r.dtype}"
        )
    gr, gk, gv, gw, gu = (x.new_empty(x.shape) for x in (r, k, v, w, u))
    return gr, gk, gv, gw, gu


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gy: Tensor) -> Gradients:
    gradients: Gradients
    if forward_ad._current_level >= 0:  # the library's would drop the tangents of gy
        gradients = torch.func.vjp(reference.wkv6, *ctx.saved_tensors)[1](gy)
    else:
        gradients = torch.ops.rwkv_clip.wkv6_backward(gy, *ctx.saved_tensors)
    return gradients


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "wkv6 has no second derivative; rwkv_clip.ops.reference.wkv6 has every one"
    )


def _differentiable(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The reference, in the types that the operator has."""
    device = r.device.type
    if not is_autocast_enabled(device):
        return reference.wkv6(r, k, v, w, u)
    with torch.autocast(device, enabled=False):
        return reference.wkv6(*_cast(device, r, k, v, w), u)


def _cast(
    device: str, r: Tensor, k: Tensor, v: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """To the types of the device's autocast."""
    if r.dtype == torch.float64:
        return r, k, v, w
    dtype = torch.get_autocast_dtype(device)
    w = w if w.dtype in (dtype, torch.float32) else w.float()
    return r.to(dtype), k.to(dtype), v.to(dtype), w


def _register_autocast(device: str) -> None:
    """Behave as a linear layer does: r, k and v in autocast's type.

    w, whose exponent is taken twice, stays as exact as it comes.
    """
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    operator = torch.ops.rwkv_clip.wkv6.default

    def cast(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        r, k, v, w = _cast(device, r, k, v, w)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            y: Tensor = operator(r, k, v, w, u)
        return y

    operator.py_impl(key)(cast)
    _autocast_library.impl("wkv6", cast, f"Autocast{device.upper()}")


_autocast_library = torch.library.Library("rwkv_clip", "FRAGMENT")
