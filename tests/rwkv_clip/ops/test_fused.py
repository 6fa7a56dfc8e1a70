"""The element-wise steps of a block are what their definitions say, forwards and backwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_clip.ops import fused
from rwkv_clip.ops.fused import TokenShift


def _neighbour(t: int, part: int, T: int, shift: TokenShift) -> int | None:
    """Where a token's part of a head comes from, by the definition; None beyond the border."""
    if shift.grid is None:
        source = t + (-1, 1)[part]
        return source if 0 <= source < T else None
    rows, columns = shift.grid
    if t == rows * columns:
        return t
    row, column = divmod(t, columns)
    row += (0, 0, -1, 1)[part]
    column += (-1, 1, 0, 0)[part]
    return row * columns + column if 0 <= row < rows and 0 <= column < columns else None


def _mix_by_loop(x, mix, delta, shift):
    B, T, C = x.shape
    N = shift.head_size
    parts = 2 if shift.grid is None else 4
    out = torch.empty(len(mix), B, T, C, dtype=x.dtype)
    for t in range(T):
        for c in range(C):
            source = _neighbour(t, (c % N) // (N // parts), T, shift)
            neighbour = x[:, source, c] if source is not None else torch.zeros(B, dtype=x.dtype)
            share = mix[:, None, c] + (delta[:, :, t, c] if delta is not None else 0)
            out[:, :, t, c] = x[:, t, c] + (neighbour - x[:, t, c]) * share
    return out


@st.composite
def _shifts(draw):
    """A shift and the number of its tokens."""
    head_size = 4 * draw(st.integers(1, 3))
    if draw(st.booleans()):
        return TokenShift(head_size), draw(st.integers(1, 6))
    grid = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    has_class_token = draw(st.booleans())
    return TokenShift(head_size, grid, has_class_token), grid[0] * grid[1] + has_class_token


@settings(deadline=None, max_examples=60)
@given(_shifts(), st.integers(0, 2), st.integers(1, 2), st.integers(1, 5), st.booleans())
def test_token_shift_mix_equals_a_loop_over_tokens_and_channels(
    shift_and_T, B, heads, n, has_delta
):
    shift, T = shift_and_T
    C = heads * shift.head_size
    generator = torch.Generator().manual_seed(T + C + n)
    x = torch.randn(B, T, C, dtype=torch.float64, generator=generator)
    mix = torch.randn(n, C, dtype=torch.float64, generator=generator)
    delta = torch.randn(n, B, T, C, dtype=torch.float64, generator=generator)
    delta = delta if has_delta else None
    got = fused.token_shift_mix(x, mix, delta, shift=shift)
    torch.testing.assert_close(got, _mix_by_loop(x, mix, delta, shift))


SHIFTS = [
    (TokenShift(4), 3),
    (TokenShift(8, (2, 3)), 6),
    (TokenShift(4, (2, 2), has_class_token=True), 5),
]


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("shift", "T"), SHIFTS)
@pytest.mark.parametrize("has_delta", [True, False])
def test_token_shift_mix_has_exact_gradients(shift, T, has_delta):
    torch.manual_seed(0)
    delta = _leaf(2, 2, T, 8) if has_delta else None
    torch.autograd.gradcheck(
        lambda x, mix, delta: fused.token_shift_mix(x, mix, delta, shift=shift),
        (_leaf(2, T, 8), _leaf(2, 8), delta),
    )


def test_group_norm_gate_normalises_each_head_of_each_token():
    torch.manual_seed(0)
    y, g = torch.randn(2, 3, 8) * 5 + 1, torch.randn(2, 3, 8)
    weight, bias = torch.randn(8), torch.randn(8)
    heads = y.view(2, 3, 2, 4)
    centred = heads - heads.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    expected = (normed.view(2, 3, 8) * weight + bias) * g * torch.sigmoid(g)
    got = fused.group_norm_gate(y, g, weight, bias, 2, 0.1)
    torch.testing.assert_close(got, expected)


def test_group_norm_gate_has_exact_gradients():
    torch.manual_seed(0)
    inputs = _leaf(2, 3, 8), _leaf(2, 3, 8), _leaf(8), _leaf(8)
    torch.autograd.gradcheck(lambda *args: fused.group_norm_gate(*args, 2, 1e-5), inputs)


def test_relu_square_is_zero_below_zero():
    a = torch.tensor([-2.0, 0.0, 3.0])
    assert fused.relu_square(a).tolist() == [0.0, 0.0, 9.0]


def test_relu_square_has_exact_gradients():
    torch.manual_seed(0)
    torch.autograd.gradcheck(fused.relu_square, (_leaf(2, 3, 4),))


@pytest.mark.parametrize("has_scale", [True, False])
def test_gated_residual_adds_the_gated_branch(has_scale):
    torch.manual_seed(0)
    x, r, v = torch.randn(3, 2, 3, 4)
    scale = torch.tensor([0.0, 1.5]) if has_scale else None
    factor = scale.view(2, 1, 1) if has_scale else 1
    got = fused.gated_residual(x, r, v, scale)
    torch.testing.assert_close(got, x + torch.sigmoid(r) * v * factor)
    if has_scale:
        assert torch.equal(got[0], x[0])


@pytest.mark.parametrize("has_scale", [True, False])
def test_gated_residual_has_exact_gradients(has_scale):
    torch.manual_seed(0)
    scale = _leaf(2) if has_scale else None
    inputs = _leaf(2, 3, 4), _leaf(2, 3, 4), _leaf(2, 3, 4), scale
    torch.autograd.gradcheck(fused.gated_residual, inputs)


@pytest.mark.parametrize(
    ("shape", "shift", "says"),
    [
        ((3, 8), TokenShift(4), r"x has shape \[3, 8\]; takes \[B, T, C\]"),
        ((1, 3, 10), TokenShift(4), "10 channels with heads of 4"),
        ((1, 3, 9), TokenShift(3), "each a multiple of 2"),
        ((1, 4, 12), TokenShift(6, (2, 2)), "each a multiple of 4"),
        ((1, 4, 8), TokenShift(4, (2, 2), has_class_token=True), "4 tokens with .* takes 5"),
    ],
)
def test_a_shift_that_does_not_fit_is_refused(shape, shift, says):
    with pytest.raises(ValueError, match=says):
        fused.token_shift_mix(torch.zeros(shape), torch.zeros(1, shape[-1]), shift=shift)


@pytest.mark.parametrize(("shift", "T"), SHIFTS)
def test_views_that_are_not_contiguous_are_taken(shift, T):
    torch.manual_seed(0)
    wide, tall = torch.randn(2, T, 16), torch.randn(2, 8, T)
    for x in (wide[..., :8], wide[..., ::2], tall.transpose(1, 2)):
        mix = torch.rand(1, 8)
        expected = fused.token_shift_mix(x.contiguous(), mix, shift=shift)
        assert torch.equal(fused.token_shift_mix(x, mix, shift=shift), expected)
