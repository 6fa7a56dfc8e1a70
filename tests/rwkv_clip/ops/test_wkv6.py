"""The operator on the CPU: values and gradients, against the reference and published values."""

import itertools
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rwkv_clip.ops import build_info, reference, wkv6

NAMES = ("y", "gr", "gk", "gv", "gw", "gu")
CAPABILITIES = {"portable": "portable", "avx2": "AVX2", "avx512": "AVX512"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}

Tensors = list[torch.Tensor]

pytestmark = pytest.mark.skipif(
    build_info()["library"] is None, reason="the compiled library was not built"
)


@pytest.fixture(params=CAPABILITIES)
def isa(request, monkeypatch) -> str:
    """Each instruction set that this processor has, in force for one test."""
    monkeypatch.setenv("RWKV_CLIP_ISA", request.param)
    if build_info()["cpu_capability"] != CAPABILITIES[request.param]:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def random_inputs(
    B: int,
    T: int,
    H: int,
    N: int,
    dtype: torch.dtype = torch.float32,
    decays: tuple[float, float] = (-6.0, 1.5),
    seed: int = 0,
) -> Tensors:
    """r, k, v, w, u and gy, with w uniform over `decays`."""
    generator = torch.Generator().manual_seed(seed)
    r, k, v, gy = (torch.randn(B, T, H * N, generator=generator).to(dtype) for _ in range(4))
    low, high = decays
    w = (low + (high - low) * torch.rand(B, T, H * N, generator=generator)).to(dtype)
    return [r, k, v, w, torch.randn(H, N, generator=generator), gy]


def differentiate(operator: Callable[..., torch.Tensor], inputs: Tensors) -> Tensors:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:5]]
    y = operator(*leaves)
    gradients = torch.autograd.grad(y, leaves, inputs[5], materialize_grads=True)
    return [y.detach(), *gradients]


def poison() -> None:
    """Leave NaN in the memory that the next allocations reuse."""
    for size in (1 << 10, 1 << 14, 1 << 18):
        torch.full((size,), torch.nan)


def run(inputs: Tensors) -> Tensors:
    poison()
    return differentiate(wkv6, inputs)


def truth(inputs: Tensors) -> Tensors:
    """By the formulas of the reference; a test below holds them to the published values."""
    r, k, v, w, u, gy = (x.double() for x in inputs)
    return [reference.wkv6(r, k, v, w, u), *reference.wkv6_backward(gy, r, k, v, w, u)]


@cache
def case(
    B: int, T: int, H: int, N: int, decays: tuple[float, float] = (-6.0, 1.5)
) -> tuple[Tensors, Tensors]:
    """Inputs and the truth about them, once for all instruction sets."""
    inputs = random_inputs(B, T, H, N, decays=decays)
    return inputs, truth(inputs)


def error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the largest value."""
    scale = expected.abs().max().clamp_min(1e-30)
    return float((x.double() - expected.double()).abs().max() / scale)


def errors(results: Tensors, expected: Tensors) -> dict[str, float]:
    """For each of NAMES."""
    return {n: error(x, y) for n, x, y in zip(NAMES, results, expected, strict=True)}


def assert_close(results: Tensors, expected: Tensors, tolerance: float) -> None:
    wrong = {name: e for name, e in errors(results, expected).items() if not e <= tolerance}
    assert not wrong, wrong


def golden_cases(file: Path) -> Iterator[tuple[str, Tensors, Tensors]]:
    tensors = load_file(file)
    for case in sorted({key.partition("/")[0] for key in tensors}):
        yield (
            case,
            [tensors[f"{case}/{name}"] for name in ("r", "k", "v", "w", "u", "gy")],
            [tensors[f"{case}/{name}"] for name in NAMES],
        )


def test_golden_values(isa, golden):
    for case, inputs, expected in golden_cases(golden("wkv6.safetensors")):
        found = errors(run(inputs), expected)
        assert max(found.values()) <= 2e-6, (case, found)


def test_the_reference_has_the_golden_values(golden):
    for case, inputs, expected in golden_cases(golden("wkv6.safetensors")):
        by_autograd = differentiate(reference.wkv6, [x.double() for x in inputs])
        for results in (truth(inputs), by_autograd):
            found = errors(results, expected)
            assert max(found.values()) <= 1e-7, (case, found)


def test_the_reference_is_the_definition():
    r, k, v, w, u, _ = (x.double() for x in random_inputs(2, 6, 1, 8))
    d = torch.exp(-torch.exp(w))
    y = torch.zeros_like(r)
    for b, t, s in itertools.product(range(2), range(6), range(6)):
        between = d[b, min(s, t) + 1 : max(s, t)].prod(0)
        weight = u[0] if s == t else between
        y[b, t] += (r[b, t] * weight * k[b, s]).sum() * v[b, s]
    assert torch.allclose(reference.wkv6(r, k, v, w, u), y, rtol=1e-12, atol=1e-12)


# About a vector's width, a tile of 16, a chunk of 64 and the longest single chunk of 224.
@pytest.mark.parametrize(
    "T", [1, 2, 3, 5, 7, 9, 15, 16, 17, 31, 33, 49, 64, 65, 77, 129, 196, 197, 224, 225, 257]
)
def test_every_length(isa, T):
    inputs, expected = case(2, T, 1, 16)
    assert_close(run(inputs), expected, 2e-6)


@pytest.mark.parametrize("N", [8, 16, 24, 40, 48, 72, 80, 88, 104, 112, 128])
def test_every_head_size(isa, N):
    inputs, expected = case(1, 37, 2, N)
    assert_close(run(inputs), expected, 2e-6)


@pytest.mark.parametrize("N", [8, 24, 80, 128])
def test_long_sequences_of_every_kind_of_head(isa, N):
    inputs, expected = case(1, 300, 1, N, (-7.0, -2.0))
    assert_close(run(inputs), expected, 3e-6)


def test_a_thousand_tokens():
    inputs = random_inputs(1, 1024, 1, 64, decays=(-9.0, -3.0))
    assert_close(run(inputs), truth(inputs), 5e-6)


@settings(max_examples=50, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 90),
    H=st.integers(1, 3),
    N=st.integers(1, 5).map(lambda n: 8 * n),
    dtype=st.sampled_from(list(TOLERANCE)),
    low=st.floats(-20, 4),
    width=st.floats(0, 10),
    isa=st.sampled_from(list(CAPABILITIES)),
    seed=st.integers(0, 1000),
)
def test_any_shape_type_and_decay(B, T, H, N, dtype, low, width, isa, seed):
    inputs = random_inputs(B, T, H, N, dtype, (low, low + width), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_CLIP_ISA", isa)
        results = run(inputs)
    assert [x.dtype for x in results] == [dtype] * 5 + [torch.float32]
    *expected, gu = truth(inputs)
    # Gradients of fast decays can be smaller than what the type, or float32 on the way, can hold.
    step = 6e-8 if dtype == torch.float16 else 1e-34
    for name, x, y in zip(NAMES[:5], results[:5], expected, strict=True):
        allowed = TOLERANCE[dtype] * y.abs().max() + step
        assert (x.double() - y).abs().max() <= allowed, name
    assert error(results[5], gu) <= max(TOLERANCE[dtype], 2e-6)


@pytest.mark.parametrize("w", [-1e4, -100.0, -20.0, 0.0, 4.4, 5.0, 20.0, 88.0, 100.0, 1e4])
def test_extreme_decays_are_finite_and_right(isa, w):
    inputs = random_inputs(1, 50, 2, 16)
    inputs[3][..., ::2] = w
    results = run(inputs)
    assert all(x.isfinite().all() for x in results)
    assert_close(results, truth(inputs), 2e-6)


def test_the_first_and_last_decay_have_no_gradient(isa):
    for T in (1, 2, 17, 49, 300):
        gw = run(random_inputs(2, T, 2, 8))[4]
        assert not gw[:, 0].any()
        assert not gw[:, -1].any()


def test_a_decay_beyond_all_measure_cuts_the_sequence(isa):
    inputs = random_inputs(1, 40, 1, 16)
    inputs[3][:, 20] = 50.0
    results = run(inputs)
    changed = [x.clone() for x in inputs]
    for x in changed[:3]:
        x[:, 21:] += 1.0
    again = run(changed)
    assert torch.equal(results[0][:, :20], again[0][:, :20])


def test_a_nan_stays_in_its_sequence_and_head(isa):
    inputs = random_inputs(2, 33, 3, 16)
    clean = run(inputs)
    for position in range(4):
        dirty = [x.clone() for x in inputs]
        dirty[position][1, 20, 16] = torch.nan
        results = run(dirty)
        assert results[0][1, :, 16:32].isnan().any()
        for x, y in zip(results[:5], clean[:5], strict=True):
            x, y = x.view(2, 33, 3, 16), y.view(2, 33, 3, 16)
            assert torch.equal(x[0], y[0])
            assert torch.equal(x[:, :, [0, 2]], y[:, :, [0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_only_at_the_end(isa, dtype):
    inputs = random_inputs(2, 49, 2, 24, dtype)
    inputs[3] = inputs[3].float()
    results, expected = run(inputs), truth(inputs)
    assert results[4].dtype == torch.float32
    assert error(results[4], expected[4]) <= 2e-6
    for x, y in zip(results[:4], expected[:4], strict=True):
        step = torch.finfo(dtype).eps
        assert ((x.double() - y).abs() <= 0.51 * step * y.abs() + 1e-5 * y.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_half_precision_is_read_and_written_as_it_is(isa, dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    # A number that is subnormal in float32 as well may come back as zero.
    v = every[(every == 0) | (every.float().abs() > 2e-38) | every.isnan()]
    v = v[: len(v) // 8 * 8].view(-1, 1, 8)
    r = torch.ones_like(v)
    u = torch.zeros(1, 8)
    u[0, 0] = 1.0  # y = v
    y = wkv6(r, r, v, r, u)
    assert torch.equal(y.isnan(), v.isnan())
    assert torch.equal(y[~v.isnan()], v[~v.isnan()])


def test_results_do_not_depend_on_threads_or_company(isa):
    inputs = random_inputs(5, 70, 3, 24)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(inputs)
        torch.set_num_threads(2)
        together = run(inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))
    one = run([x if i == 4 else x[2:3] for i, x in enumerate(inputs)])
    assert all(torch.equal(x[0], y[2]) for x, y in zip(one[:5], alone[:5], strict=True))


def test_an_empty_batch_has_empty_results_and_no_gradient():
    results = run(random_inputs(0, 9, 2, 16))
    assert [list(x.shape) for x in results] == [[0, 9, 32]] * 5 + [[2, 16]]
    assert not results[5].any()


def test_inputs_may_lie_in_memory_in_any_way():
    inputs = random_inputs(2, 21, 2, 16)
    expected = run(inputs)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    padded = [torch.nn.functional.pad(x, (3, 5))[..., 3:-5] for x in inputs]
    for other in (strided, padded):
        leaves = [x.requires_grad_() for x in other[:5]]
        y = wkv6(*leaves)
        results = [y.detach(), *torch.autograd.grad(y, leaves, other[5])]
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_an_expanded_gradient_is_taken():
    inputs = random_inputs(2, 21, 2, 16)
    leaves = [x.requires_grad_() for x in inputs[:5]]
    (gr,) = torch.autograd.grad(wkv6(*leaves).sum(), leaves[:1])
    inputs[5] = torch.ones_like(inputs[5])
    assert error(gr, truth(inputs)[1]) <= 2e-6


def test_the_bonus_may_have_any_floating_type():
    inputs = random_inputs(1, 9, 2, 16)
    for dtype in TOLERANCE:
        u = inputs[4].to(dtype)
        results = run([*inputs[:4], u, inputs[5]])
        assert results[5].dtype == dtype
        assert torch.equal(results[0], wkv6(*inputs[:4], u.float()))


def test_an_unknown_instruction_set_means_the_best(monkeypatch):
    best = build_info()["cpu_capability"]
    monkeypatch.setenv("RWKV_CLIP_ISA", "sse9")
    assert build_info()["cpu_capability"] == best
    monkeypatch.setenv("RWKV_CLIP_ISA", "portable")
    assert build_info()["cpu_capability"] == "portable"
    assert "RWKV_CLIP_ISA" in os.environ


def test_of_one_token_the_decays_gradient_is_zero_in_the_reference_too():
    leaves = [x.requires_grad_() for x in random_inputs(2, 1, 2, 16)[:5]]
    for operator in (wkv6, reference.wkv6):
        (gradient,) = torch.autograd.grad(operator(*leaves).sum(), leaves[3])
        assert torch.equal(gradient, torch.zeros_like(leaves[3]))
