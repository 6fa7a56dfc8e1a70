"""The operator on a real GPU: values, gradients, streams, devices, graphs and the compiler."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rwkv_clip.ops
from rwkv_clip.ops import reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMES = ("y", "gr", "gk", "gv", "gw", "gu")
# The largest error over the largest value. A bfloat16 result is rounded, as are both operands of
# what it sums, by up to 2^-8 each; a single pair of tokens may have all three at once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 1e-3}
# The error's norm over the values' norm: over many sums, roundings do not come together.
NORM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
TYPES = list(TOLERANCE)

Tensors = list[torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _built_with_cuda() -> None:
    info = rwkv_clip.ops.build_info()
    assert info["cuda"], f"a GPU is here, but the operator is built without CUDA: {info}"


def random_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype | None = None,
    decays: tuple[float, float] = (-6.0, 1.5),
    device: str = "cuda",
) -> Tensors:
    """r, k, v, w, u, gy of a shape (B, T, H, N), with w uniform over `decays`."""
    B, T, H, N = shape
    r, k, v, gy = (torch.randn(B, T, H * N, device=device).to(dtype) for _ in range(4))
    low, high = decays
    w = (low + (high - low) * torch.rand(B, T, H * N, device=device)).to(w_dtype or dtype)
    u = torch.randn(H, N, device=device)
    return [r, k, v, w, u, gy]


def poison(device: torch.device) -> None:
    """Leaves NaN in the memory that the next allocations reuse."""
    torch.full((1 << 24,), torch.nan, device=device)


def run(inputs: Tensors) -> Tensors:
    """Output and gradients through the operator."""
    poison(inputs[0].device)
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:5]]
    y = torch.ops.rwkv_clip.wkv6(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[5])]


def expected(inputs: Tensors) -> Tensors:
    leaves = [x.detach().double().cpu().requires_grad_() for x in inputs[:5]]
    y = reference.wkv6(*leaves)
    gy = inputs[5].double().cpu()
    # A single token has no neighbours, and no gradient of w.
    gradients = torch.autograd.grad(y, leaves, gy, allow_unused=True, materialize_grads=True)
    return [y.detach(), *gradients]


def check(actual: Tensors, inputs: Tensors) -> None:
    limit, norm_limit = TOLERANCE[inputs[0].dtype], NORM_TOLERANCE[inputs[0].dtype]
    for name, got, want in zip(NAMES, actual, expected(inputs), strict=True):
        assert got.isfinite().all(), name
        error = got.cpu().double() - want
        worst, largest = error.abs().max(), want.abs().max()
        assert worst <= limit * largest + 1e-10, (name, worst, largest)
        assert error.norm() <= norm_limit * want.norm() + 1e-10, (name, error.norm(), want.norm())
    assert (actual[4][:, [0, -1]] == 0).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 15, 16, 17, 49, 64, 65, 77, 196, 197, 300, 1024])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_length_and_type_agrees(dtype: torch.dtype, tokens: int) -> None:
    inputs = random_inputs((2, tokens, 2, 80), dtype)
    check(run(inputs), inputs)


@pytest.mark.parametrize("size", range(8, 129, 8))
@pytest.mark.parametrize("dtype", TYPES)
def test_every_head_size_agrees(dtype: torch.dtype, size: int) -> None:
    inputs = random_inputs((2, 77, 3, size), dtype)
    check(run(inputs), inputs)


@pytest.mark.parametrize("decays", [(-20.0, -10.0), (-20.0, 6.5), (1.0, 3.0), (4.0, 6.5)])
@pytest.mark.parametrize("tokens", [49, 300])
@pytest.mark.parametrize("dtype", TYPES)
def test_extreme_decays_agree(dtype: torch.dtype, tokens: int, decays: tuple[float, float]) -> None:
    inputs = random_inputs((1, tokens, 2, 64), dtype, torch.float32, decays)
    check(run(inputs), inputs)


@pytest.mark.parametrize("tokens", [49, 130, 300])
def test_gradients_are_as_exact_in_any_scale(tokens: int) -> None:
    inputs = random_inputs((1, tokens, 2, 64), torch.bfloat16, torch.float32, (-2.0, 4.0))
    scaled = run([*inputs[:5], inputs[5] * 2.0**-27])
    for name, got, want in zip(NAMES[1:], scaled[1:], run(inputs)[1:], strict=True):
        difference = got.double() * 2.0**27 - want.double()
        assert difference.norm() <= 1e-3 * want.double().norm(), name


def test_golden_values(golden: Callable[[str], Path]) -> None:
    values = load_file(golden("wkv6.safetensors"), device="cuda")
    for case in sorted({key.split("/")[0] for key in values}):
        inputs = [values[f"{case}/{name}"] for name in ("r", "k", "v", "w", "u", "gy")]
        for name, got in zip(NAMES, run(inputs), strict=True):
            want = values[f"{case}/{name}"].reshape(got.shape)
            limit = (2e-4 if name == "gw" else 1e-5) * want.abs().max()
            assert (got - want).abs().max() <= limit + 1e-30, (case, name)


@pytest.mark.parametrize("tokens", [49, 400])
def test_results_are_the_same_every_time(tokens: int) -> None:
    inputs = random_inputs((64, tokens, 8, 80), torch.bfloat16)
    first = run(inputs)
    for _ in range(5):
        for one, other in zip(first, run(inputs), strict=True):
            assert torch.equal(one, other)


def test_it_runs_on_the_current_stream() -> None:
    inputs = random_inputs((256, 196, 8, 80))
    want = run(inputs)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work on this stream alone makes the inputs; a launch on another would read them early.
        moved = [torch.zeros_like(x) for x in inputs[:5]]
        torch.cuda._sleep(20_000_000)
        for target, source in zip(moved, inputs, strict=False):
            target.copy_(source)
        got = torch.ops.rwkv_clip.wkv6(*moved)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_it_runs_on_the_device_of_its_inputs() -> None:
    inputs = random_inputs((2, 300, 2, 80), device="cuda:1")
    check(run(inputs), inputs)


@pytest.mark.parametrize("tokens", [49, 400])
def test_a_captured_graph_replays_on_new_inputs(tokens: int) -> None:
    shape = (2, tokens, 2, 80)
    held = random_inputs(shape)
    run(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.rwkv_clip.wkv6(*held[:5])
        gradients = torch.ops.rwkv_clip.wkv6_backward(held[5], *held[:5])
    fresh = random_inputs(shape)
    for target, source in zip(held, fresh, strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    check([y, *gradients], fresh)


def test_it_compiles_without_a_graph_break() -> None:
    inputs = random_inputs((2, 49, 2, 80))

    def doubled(*tensors: torch.Tensor) -> torch.Tensor:
        return rwkv_clip.ops.wkv6(*tensors) * 2

    compiled = torch.compile(doubled, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs[:5]), doubled(*inputs[:5]))


def test_autocast_brings_mixed_inputs_together() -> None:
    r, k, v, w, u, _ = random_inputs((2, 49, 2, 80))
    with torch.autocast("cuda", torch.bfloat16):
        y = rwkv_clip.ops.wkv6(r.bfloat16(), k, v.bfloat16(), w, u)
    assert y.dtype == torch.bfloat16
    want = reference.wkv6(*(x.double() for x in (r.bfloat16(), k.bfloat16(), v.bfloat16(), w, u)))
    assert (y - want).abs().max() <= TOLERANCE[torch.bfloat16] * want.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in random_inputs((2, 17, 2, 16), dtype)[:5]]
    torch.library.opcheck(torch.ops.rwkv_clip.wkv6.default, tuple(inputs))


def test_non_contiguous_and_odd_views_agree() -> None:
    inputs = random_inputs((2, 49, 2, 80), torch.bfloat16)
    want = run(inputs)[0]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:4]]
    assert torch.equal(torch.ops.rwkv_clip.wkv6(*strided, inputs[4]), want)
    shifted = []
    for x in inputs[:4]:
        buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        shifted.append(buffer[1:].view(x.shape).copy_(x))
    assert torch.equal(torch.ops.rwkv_clip.wkv6(*shifted, inputs[4]), want)


def test_an_empty_batch_gives_empty_outputs_and_zero_for_u() -> None:
    outputs = run(random_inputs((0, 5, 3, 16)))
    assert [tuple(x.shape) for x in outputs[:5]] == [(0, 5, 48)] * 5
    assert (outputs[5] == 0).all()
