"""The element-wise steps of a block are what their definitions say, forwards and backwards."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_clip.ops import _library, fused
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
    a = torch.randn(B, T, n * 2, dtype=torch.float64, generator=generator)
    b = torch.randn(n, 2, C, dtype=torch.float64, generator=generator)
    delta = torch.einsum("btnr,nrc->nbtc", a.view(B, T, n, 2), b) if has_delta else None
    got = fused.token_shift_mix(x, mix, (a, b) if has_delta else None, shift=shift)
    torch.testing.assert_close(torch.stack(got), _mix_by_loop(x, mix, delta, shift))


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
    low_rank = (_leaf(2, T, 6), _leaf(2, 3, 8)) if has_delta else ()
    torch.autograd.gradcheck(
        lambda x, mix, *low_rank: fused.token_shift_mix(x, mix, low_rank or None, shift=shift),
        (_leaf(2, T, 8), _leaf(2, 8), *low_rank),
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
    assert fused.relu_square_(a).tolist() == [0.0, 0.0, 9.0]


def test_relu_square_has_exact_gradients():
    torch.manual_seed(0)
    torch.autograd.gradcheck(fused.relu_square_, (_leaf(2, 3, 4),))


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
        got = fused.token_shift_mix(x, mix, shift=shift)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


needs_kernels = pytest.mark.skipif(not _library.is_loaded(), reason="the library is not built")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Each instruction set; one that the processor lacks runs as the best that it has."""
    monkeypatch.setenv("RWKV_CLIP_ISA", request.param)


def _check_kernel(kernel, statement, *inputs, error=2e-6):
    """Values and every gradient in float32 against the statement in float64, and without autograd.

    Errors are relative to the largest element, as sums are made of elements of that size.
    """
    singles = [x.clone().requires_grad_() for x in inputs]
    doubles = [x.double().requires_grad_() for x in inputs]
    outs, expected = kernel(*singles), statement(*doubles)
    with torch.inference_mode():
        inferred = kernel(*(x.clone() for x in inputs))
    if isinstance(outs, torch.Tensor):
        outs, expected, inferred = (outs,), (expected,), (inferred,)
    gouts = [torch.randn_like(out) for out in outs]
    gradients = torch.autograd.grad(outs, singles, gouts)
    expected_gradients = torch.autograd.grad(expected, doubles, [g.double() for g in gouts])
    for out, same in zip(outs, inferred, strict=True):
        assert torch.equal(out, same)
    got, want = (*outs, *gradients), (*expected, *expected_gradients)
    for have, exact in zip(got, want, strict=True):
        assert have.dtype == torch.float32
        assert have.shape == exact.shape
        largest = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(have.double(), exact, rtol=0, atol=error * max(largest, 1e-30))


KERNEL_SHIFTS = [
    (TokenShift(8), 7, 16),
    (TokenShift(64), 1, 128),
    (TokenShift(64), 77, 128),
    (TokenShift(12), 5, 36),
    (TokenShift(80, (7, 7)), 49, 160),
    (TokenShift(80, (3, 5), has_class_token=True), 16, 160),
    (TokenShift(128, (1, 4)), 4, 128),
    (TokenShift(64, (5, 1)), 5, 64),
    (TokenShift(24, (2, 3)), 6, 48),
    (TokenShift(16, (1, 1), has_class_token=True), 2, 16),
    (TokenShift(4, (4, 3)), 12, 20),
]


@needs_kernels
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("shift", "T", "C"), KERNEL_SHIFTS)
@pytest.mark.parametrize(("n", "rank"), [(1, 0), (2, 0), (5, 32), (3, 5)])
def test_the_mix_kernel_is_exact(shift, T, C, n, rank):
    torch.manual_seed(T * C + n)
    inputs = [torch.randn(3, T, C), torch.randn(n, C)]
    if rank:
        inputs += [torch.randn(3, T, n * rank), torch.randn(n, rank, C) / rank**0.5]
    _check_kernel(
        lambda x, mix, *ab: fused.token_shift_mix(x, mix, ab or None, shift=shift),
        lambda x, mix, *ab: fused.token_shift_mix_statement(x, mix, ab or None, shift=shift),
        *inputs,
    )


@needs_kernels
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("T", "heads", "N"), [(49, 8, 80), (1, 1, 8), (9, 2, 24), (5, 3, 7)])
def test_the_norm_and_gate_kernel_is_exact(T, heads, N):
    torch.manual_seed(T)
    C = heads * N
    _check_kernel(
        lambda *args: fused.group_norm_gate(*args, heads, 1e-5),
        lambda *args: fused.group_norm_gate_statement(*args, heads, 1e-5),
        *(3 * torch.randn(2, T, C) + 1, 4 * torch.randn(2, T, C), torch.randn(C), torch.randn(C)),
        error=4e-6,
    )


@needs_kernels
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(2, 9, 320), (1, 1, 1), (3, 70001), (5,)])
def test_the_relu_square_kernel_is_exact(shape):
    torch.manual_seed(0)
    _check_kernel(
        lambda a: fused.relu_square_(a * 1),  # a leaf's memory may not be reused
        fused.relu_square_statement,
        torch.randn(shape),
    )


@needs_kernels
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scale", [None, torch.tensor([0.0, 1.25, 2.0])])
@pytest.mark.parametrize(("T", "C"), [(49, 640), (1, 1), (7, 19)])
def test_the_residual_kernel_is_exact(scale, T, C):
    torch.manual_seed(0)
    wide = scale if scale is None else scale.double()
    _check_kernel(
        lambda x, r, v: fused.gated_residual(x, r, v, scale),
        lambda x, r, v: fused.gated_residual_statement(x, r, v, wide),
        *(torch.randn(3, T, C), 5 * torch.randn(3, T, C), torch.randn(3, T, C)),
    )


@needs_kernels
@pytest.mark.usefixtures("isa")
def test_gates_saturate_without_an_overflow():
    extremes = torch.tensor([-1e30, -1e4, -100.0, -88.5, 88.5, 100.0, 1e4, 1e30]).view(1, 1, 8)
    x, v = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    got = fused.gated_residual(x, extremes, v)
    torch.testing.assert_close(got, torch.sigmoid(extremes), rtol=1e-6, atol=1e-37)


@needs_kernels
@pytest.mark.usefixtures("isa")
def test_a_number_that_is_none_is_not_hidden():
    nan = torch.full((1, 2, 16), torch.nan)
    one, C = torch.ones(1, 2, 16), torch.ones(16)
    (mixed,) = fused.token_shift_mix(nan, C[None], shift=TokenShift(8))
    assert mixed.isnan().all()
    assert fused.group_norm_gate(one, nan, C, C, 2, 1e-5).isnan().all()
    assert fused.group_norm_gate(nan, one, C, C, 2, 1e-5).isnan().all()
    assert fused.gated_residual(one, nan, one).isnan().all()
    assert fused.relu_square_(nan.clone()).isnan().all()


@needs_kernels
def test_what_is_empty_stays_empty():
    empty = torch.empty(0, 4, 16)
    C = torch.ones(16)
    assert fused.token_shift_mix(empty, C[None], shift=TokenShift(8))[0].shape == empty.shape
    assert fused.group_norm_gate(empty, empty, C, C, 2, 1e-5).shape == empty.shape
    assert fused.gated_residual(empty, empty, empty).shape == empty.shape
    assert fused.relu_square_(empty.clone()).shape == empty.shape


@needs_kernels
def test_sums_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, mix = torch.randn(8, 77, 64), torch.randn(2, 64, requires_grad=True)

    def gradient(threads):
        torch.set_num_threads(threads)
        outs = fused.token_shift_mix(x, mix, shift=TokenShift(64))
        return torch.autograd.grad(outs, mix, [x, x])[0]

    threads = torch.get_num_threads()
    try:
        assert torch.equal(gradient(1), gradient(3))
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_relu_square_works_in_place_where_nothing_else_needs_its_input():
    layer = torch.nn.Linear(8, 16)
    hidden = layer(torch.randn(3, 8))
    out = fused.relu_square_(hidden)
    assert out.data_ptr() == hidden.data_ptr()
    out.sum().backward()
    assert layer.weight.grad is not None


@needs_kernels
def test_relu_square_may_leave_its_input_and_keeps_as_much():
    def kept(square):
        layer = torch.nn.Linear(8, 16)
        saved = []

        def keep(tensor):
            saved.append((tensor.shape, tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = layer(torch.ones(3, 8))
            copy = hidden.detach().clone()
            out = square(hidden)
        if square is fused.relu_square:
            assert torch.equal(hidden, copy)
        (gradient,) = torch.autograd.grad(out.sum(), layer.bias)
        torch.testing.assert_close(gradient, 3 * 2 * copy[0].relu())
        return saved

    assert kept(fused.relu_square) == kept(fused.relu_square_)


def _batched_at_once(gradients, gouts):
    return gradients(gouts, is_grads_batched=True)


def _batched_by_vmap(gradients, gouts):
    return torch.vmap(gradients)(gouts)


def _as_tangents(gradients, gouts):
    """Of a gradient that is linear in its argument."""

    def along(shares):
        return gradients(torch.einsum("n,n...->...", shares, gouts))

    rows = torch.func.jacfwd(along)(torch.ones(len(gouts)))
    return [row.movedim(-1, 0) for row in rows]


@needs_kernels  # without, some of PyTorch's own gradients have no tangents
@pytest.mark.parametrize("way", [_batched_at_once, _batched_by_vmap, _as_tangents])
@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_may_be_batched_and_have_tangents(way, rank):
    torch.manual_seed(0)
    shift = TokenShift(8, (2, 3))
    x, g, v = (torch.randn(2, 6, 16, requires_grad=True) for _ in range(3))
    mix, (weight, bias) = torch.rand(2, 16, requires_grad=True), torch.randn(2, 16)
    weight.requires_grad_()
    low_rank = [torch.randn(s, requires_grad=True) for s in ((2, 6, 2 * rank), (2, rank, 16))]
    mixed = fused.token_shift_mix(x, mix, tuple(low_rank) if rank else None, shift=shift)
    steps = [
        torch.stack(mixed).sum(0),
        fused.group_norm_gate(x, g, weight, bias, 2, 1e-5),
        fused.relu_square_(x * 1),
        fused.relu_square(x * 1),
        fused.gated_residual(x, g, v),
        fused.gated_residual(x, g, v, torch.tensor([0.0, 1.25])),
    ]
    leaves = [[x, mix, *(low_rank if rank else ())], [x, g, weight], [x], [x], [x, g, v], [x, g, v]]
    gouts = torch.randn(3, 2, 6, 16)
    for out, inputs in zip(steps, leaves, strict=True):

        def gradients(gout, out=out, inputs=inputs, **options):
            return torch.autograd.grad(out, inputs, gout, retain_graph=True, **options)

        one_by_one = zip(*map(gradients, gouts), strict=True)
        for got, expected in zip(way(gradients, gouts), one_by_one, strict=True):
            torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_the_kernels_keep_only_what_they_took_or_gave():
    x = torch.randn(2, 49, 160, requires_grad=True)
    mix, a, b = torch.randn(5, 160), torch.randn(2, 49, 160), torch.randn(5, 32, 160)
    saved = []

    def keep(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused.token_shift_mix(x, mix, (a, b), shift=TokenShift(80, (7, 7)))
    assert set(saved) <= {t.data_ptr() for t in (x, mix, a, b)}


@needs_kernels
def test_other_types_take_the_statement():
    x = torch.randn(2, 6, 16, dtype=torch.bfloat16)
    mix = torch.randn(1, 16, dtype=torch.bfloat16)
    got = fused.token_shift_mix(x, mix, shift=TokenShift(8))
    expected = fused.token_shift_mix_statement(x, mix, shift=TokenShift(8))
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("rank", [None, 4])
def test_under_autocast_neighbours_are_mixed_in_its_type(rank):
    torch.manual_seed(0)
    x, mix = torch.randn(2, 6, 16), torch.rand(3, 16)
    low_rank = None if rank is None else (torch.randn(2, 6, 3 * rank), torch.randn(3, rank, 16))
    shift = TokenShift(8, (2, 3))

    with torch.autocast("cpu", torch.bfloat16):
        mixed = fused.token_shift_mix_statement(x, mix, low_rank, shift=shift)
        exact = fused.token_shift_mix_statement(x.double(), mix, low_rank, shift=shift)

    expected = fused.token_shift_mix_statement(x, mix, low_rank, shift=shift)
    assert {one.dtype for one in mixed} == {torch.bfloat16}
    assert {one.dtype for one in exact} == {torch.float64}  # which autocast leaves alone
    for got, one in zip(mixed, expected, strict=True):
        # Six numbers are rounded on the way, each by at most 2^-9 of itself.
        assert (got - one).abs().max() < 6 * 2**-9 * one.abs().max()


def test_a_device_without_autocast_takes_the_statement():
    x, mix = torch.empty(2, 6, 16, device="meta"), torch.empty(1, 16, device="meta")
    (mixed,) = fused.token_shift_mix(x, mix, shift=TokenShift(8))
    assert mixed.shape == x.shape


def test_without_the_library_the_statements_run():
    code = """
import torch
from rwkv_clip.ops import _library, fused
assert not _library.is_loaded()
x, C = torch.ones(1, 2, 8), torch.ones(8)
fused.token_shift_mix(x, C[None], shift=fused.TokenShift(8))
fused.group_norm_gate(x, x, C, C, 1, 1e-5)
fused.gated_residual(x, x, x)
fused.relu_square_(x)
"""
    environment = {"RWKV_CLIP_NO_LIBRARY": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
