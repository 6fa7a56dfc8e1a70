"""The WKV6 operator in plain PyTorch: the ground truth that every kernel is compared with.

    y[t] = sum over s != t of (r[t] * prod of d strictly between s and t) . k[s]  v[s]
         + (r[t] * u) . k[t]  v[t]                       with d = exp(-exp(w))

It scans the tokens once in each direction with a state [B, H, N, N], so it works for every T, and
divides nothing: no decay is too fast for it.

Source: RWKV-CLIP (arXiv 2406.06973), equations 5 to 7.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Above, d is 0 in float32 long since, and an infinite exp(w) would make its gradient NaN.
LARGEST_DECAY = 88.0


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Bidirectional WKV6, differentiable, on any device.

    Computes in float64 if r is float64 and in float32 otherwise.

    Args:
        r: [B, T, C] receptance, with C = H * N.
        k: [B, T, C] key.
        v: [B, T, C] value.
        w: [B, T, C] raw decay: a channel keeps exp(-exp(w)) of its state at each token.
        u: [H, N] bonus, the weight of the own token.

    Returns:
        [B, T, C] in r's type.
    """
    r_, k_, v_, w_ = _by_head(u, r, k, v, w)
    own = (r_ * u.to(r_.dtype) * k_).sum(-1, keepdim=True) * v_
    # A sum of nothing, whose gradient is zero: of one token alone, nothing else depends on w.
    own = own + w_[:, :0].sum()
    y = list(own.unbind(1))
    for order in _orders(r_):
        for t, state in _states(order, k_, v_, _decay(w_)):
            y[t] = y[t] + torch.einsum("bhj,bhji->bhi", r_[:, t], state)
    return torch.stack(y, dim=1).reshape(r.shape).to(r.dtype)


def wkv6_backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of r, k, v, w and u, in their types, by hand: what the kernels compute.

    The state S of key-value pairs on one side of a token meets the state G of receptance-gradient
    pairs on its other side, and a token's decay scales exactly the pairs that enclose it.

    Args:
        gy: [B, T, C], the gradient of the output.
        r: and k, v, w, u: the arguments of `wkv6`.

    Returns:
        gr, gk, gv, gw [B, T, C] and gu [H, N].
    """
    gy_, r_, k_, v_, w_ = _by_head(u, gy, r, k, v, w)
    u_ = u.to(r_.dtype)
    decay = _decay(w_)
    g_own = (gy_ * v_).sum(-1, keepdim=True)
    gr, gk, gv = g_own * u_ * k_, g_own * u_ * r_, (r_ * u_ * k_).sum(-1, keepdim=True) * gy_
    g_log_decay = torch.zeros_like(w_)
    for order in _orders(r_):
        states = dict(_states(order, k_, v_, decay))
        for t, G in _states(order[::-1], r_, gy_, decay):
            S = states.pop(t)
            gr[:, t] += torch.einsum("bhji,bhi->bhj", S, gy_[:, t])
            gk[:, t] += torch.einsum("bhji,bhi->bhj", G, v_[:, t])
            gv[:, t] += torch.einsum("bhji,bhj->bhi", G, k_[:, t])
            g_log_decay[:, t] += decay[:, t] * (S * G).sum(-1)
    gw = -g_log_decay * torch.exp(w_.clamp(max=LARGEST_DECAY))
    gu = (g_own * r_ * k_).sum((0, 1)).to(u.dtype)
    g = [x.reshape(r.shape).contiguous() for x in (gr, gk, gv, gw)]
    return g[0].to(r.dtype), g[1].to(k.dtype), g[2].to(v.dtype), g[3].to(w.dtype), gu.contiguous()


def _by_head(u: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    """[B, T, C] -> [B, T, H, N], in the type of computation."""
    computing = torch.promote_types(arguments[-1].dtype, torch.float32)
    return tuple(x.to(computing).reshape(*x.shape[:2], *u.shape) for x in arguments)


def _decay(w: Tensor) -> Tensor:
    return torch.exp(-torch.exp(w.clamp(max=LARGEST_DECAY)))


def _orders(r: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    tokens = range(r.shape[1])
    return tokens, tokens[::-1]


def _states(
    order: Sequence[int], k: Tensor, v: Tensor, decay: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Each token and the sum of k v over those before it in `order`, [B, H, N, N], decayed."""
    B, _, H, N = k.shape
    state = k.new_zeros(B, H, N, N)
    for t in order:
        yield t, state
        new = torch.einsum("bhj,bhi->bhji", k[:, t], v[:, t])
        state = decay[:, t, :, :, None] * state + new
