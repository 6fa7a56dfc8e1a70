"""WKV6 as a PyTorch operator: checks, tracing, types, and what happens without the library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rwkv_clip.ops
from rwkv_clip.ops import build_info, reference, wkv6

ROOT = Path(__file__).parents[3]
OPERATOR = torch.ops.rwkv_clip.wkv6.default
BACKWARD = torch.ops.rwkv_clip.wkv6_backward.default

Tensors = list[torch.Tensor]


def arguments(
    B: int = 2, T: int = 9, H: int = 2, N: int = 16, dtype: torch.dtype = torch.float32
) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randn(B, T, H * N, generator=generator).to(dtype) for _ in range(4)]
    sequences[3] -= 2
    return [*sequences, torch.randn(H, N, generator=generator).to(dtype)]


def leaves(*args: int, **kwargs: torch.dtype) -> Tensors:
    return [x.requires_grad_() for x in arguments(*args, **kwargs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("T", [1, 9, 230])
def test_pytorch_finds_nothing_wrong_with_the_operators(T, dtype):
    torch.library.opcheck(OPERATOR, leaves(1, T, 1, 8, dtype=dtype))
    inputs = arguments(1, T, 1, 8, dtype=dtype)
    torch.library.opcheck(BACKWARD, [torch.ones_like(inputs[0]), *inputs])


def permuted(*args: int) -> Tensors:
    """Each with its second dimension outermost in memory."""
    return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments(*args)]


@pytest.mark.parametrize("backward", [reference.wkv6_backward, BACKWARD])
def test_gradients_lie_in_memory_as_tracing_says(backward):
    inputs = permuted()
    assert not any(x.is_contiguous() for x in inputs)
    assert all(g.is_contiguous() for g in backward(inputs[0], *inputs))


def tangent_by_differences(inputs: Tensors, position: int) -> torch.Tensor:
    inputs = [x.double() for x in inputs]
    step = 1e-5 * torch.ones_like(inputs[position])
    ahead, behind = (
        wkv6(*inputs[:position], inputs[position] + s, *inputs[position + 1 :])
        for s in (step, -step)
    )
    return (ahead - behind) / 2e-5


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("position", range(5))
def test_forward_mode_has_every_tangent(position, compiles):
    inputs = arguments()
    expected = tangent_by_differences(inputs, position).float()

    def derivative(x):
        def function(x):
            return wkv6(*inputs[:position], x, *inputs[position + 1 :])

        return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    if compiles:
        derivative = torch.compile(derivative, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(derivative(inputs[position]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dual_numbers_have_tangents_where_it_was_compiled_before(backend):
    torch._dynamo.reset()
    inputs = arguments()
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    compiled = torch.compile(wkv6, fullgraph=True, backend=count)

    def tangent(function):
        with forward_ad.dual_level():
            r = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
            return forward_ad.unpack_dual(function(r, *inputs[1:])).tangent

    for _ in range(2):
        compiled(*inputs)
        torch.testing.assert_close(tangent(compiled), tangent(wkv6))
    assert len(graphs) == 2


def test_the_gradient_has_tangents():
    inputs = leaves(1, 3, 1, 8)
    y = wkv6(*inputs)

    def gradients(scale):
        return torch.autograd.grad(y, inputs, scale * torch.ones_like(y), retain_graph=True)

    tangents = torch.func.jacfwd(gradients)(torch.tensor(2.0))
    for tangent, expected in zip(tangents, gradients(1.0), strict=True):  # it is linear
        torch.testing.assert_close(tangent, expected)


def test_dual_numbers_have_tangents_under_autocast_too():
    inputs = arguments()
    with forward_ad.dual_level(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = wkv6(forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), *inputs[1:])
        assert y.dtype == torch.bfloat16
        tangent = forward_ad.unpack_dual(y).tangent
    expected = tangent_by_differences(inputs, 0)
    assert (tangent - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_second_derivative_by_forward_over_reverse_is_right():
    inputs = arguments(1, 3, 1, 8, dtype=torch.float64)

    def hessian(function):
        def loss(w):
            return function(*inputs[:3], w, inputs[4]).square().sum()

        return torch.func.jacfwd(torch.func.grad(loss))(inputs[3])

    torch.testing.assert_close(hessian(wkv6), hessian(reference.wkv6))


@pytest.mark.parametrize(("B", "T", "H", "N"), [(2, 5, 2, 8), (1, 1, 1, 8), (1, 19, 1, 16)])
def test_gradients_are_those_of_finite_differences(B, T, H, N):
    assert torch.autograd.gradcheck(wkv6, leaves(B, T, H, N, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_every_length(backend):
    def layer(r, k, v, w, u):
        return wkv6(r.tanh(), k, v, w, u).sin()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for T in (4, 9, 30):
        inputs = leaves(2, T, 2, 8)
        results = []
        for function in (layer, compiled):
            y = function(*inputs)
            results.append([y, *torch.autograd.grad(y.sum(), inputs)])
        for x, y in zip(*results, strict=True):
            assert torch.allclose(x, y, atol=1e-5)


def test_exports_with_a_dynamic_batch_and_length():
    class Layer(torch.nn.Module):
        def forward(self, r, k, v, w, u):
            return wkv6(r, k, v, w, u)

    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = dict.fromkeys("rkvw", sizes) | {"u": None}
    program = torch.export.export(Layer(), tuple(arguments()), dynamic_shapes=shapes)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"][-1] == OPERATOR
    other = arguments(3, 21)
    assert torch.equal(program.module()(*other), wkv6(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_all_but_the_decay(dtype):
    r, k, v, w, u = arguments()
    with torch.autocast("cpu", dtype=dtype):
        y = wkv6(r, k.to(dtype), v, w, u)
    assert y.dtype == dtype
    assert torch.equal(y, wkv6(r.to(dtype), k.to(dtype), v.to(dtype), w, u))


def test_autocast_gives_gradients_in_the_inputs_types():
    inputs = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wkv6(*inputs)
    gradients = torch.autograd.grad(y.float().sum(), inputs)
    assert [g.dtype for g in gradients] == [torch.float32] * 5
    expected = torch.autograd.grad(reference.wkv6(*inputs).sum(), inputs)
    for x, y in zip(gradients, expected, strict=True):
        assert (x - y).abs().max() <= 0.02 * y.abs().max()


def test_autocast_leaves_double_precision_alone():
    inputs = arguments(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wkv6(*inputs), wkv6(*inputs))
        assert wkv6(*inputs).dtype == torch.float64


def test_autocast_compiles():
    inputs = leaves()
    compiled = torch.compile(wkv6, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(*inputs), wkv6(*inputs))


def test_only_wanted_gradients_are_needed():
    inputs = arguments()
    inputs[1].requires_grad_()
    wkv6(*inputs).sum().backward()
    assert [x.grad is not None for x in inputs] == [False, True, False, False, False]


def test_modes_of_pytorch_are_respected():
    inputs = arguments()
    expected = wkv6(*inputs)
    with torch.inference_mode():
        assert torch.equal(wkv6(*inputs), expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(wkv6(*inputs), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    again = leaves()
    checkpoint(wkv6, *again, use_reentrant=False).sum().backward()
    assert all(x.grad is not None for x in again)


def test_a_second_derivative_is_refused_with_the_way_out():
    inputs = leaves()
    (gr,) = torch.autograd.grad(wkv6(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        gr.sum().backward()


def resized(position: int, *shape: int) -> Tensors:
    inputs = arguments()
    inputs[position] = torch.zeros(shape)
    return inputs


def cast(position: int, dtype: torch.dtype) -> Tensors:
    inputs = arguments()
    inputs[position] = inputs[position].to(dtype)
    return inputs


WRONG_SHAPES = {
    "r has 2 dimensions": (resized(0, 9, 32), r"\[B, T, C\]"),
    "u has 1 dimension": (resized(4, 32), r"\[H, N\]"),
    "C is not H * N": (resized(4, 2, 8), r"32 channels.*\[2, 8\]"),
    "no heads": (resized(4, 0, 8), "H \\* N"),
    "N is no multiple of 8": (arguments(1, 3, 1, 12), "12.*multiple of 8.*128"),
    "N is too large": (arguments(1, 3, 1, 136), "136.*multiple of 8.*128"),
    "no tokens": (arguments(2, 0), r"\[2, 0, 32\].*at least one"),
    "k is shorter": (resized(1, 2, 8, 32), r"k .*\[2, 9, 32\]"),
    "v has another batch": (resized(2, 3, 9, 32), r"v .*\[2, 9, 32\]"),
    "w has 2 dimensions": (resized(3, 9, 32), r"w .*\[2, 9, 32\]"),
}
WRONG_TYPES = {
    "r is integer": ([x.int() for x in arguments()], "r "),
    "k is of another type": (cast(1, torch.float64), "k "),
    "v is of another type": (cast(2, torch.bfloat16), "v "),
    "w is narrower": (cast(3, torch.float16), "w "),
    "u is integer": (cast(4, torch.int64), "u "),
    "u is of eight bits": (cast(4, torch.float8_e4m3fn), "u "),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_a_wrong_shape_is_told_with_its_limit(name):
    inputs, told = WRONG_SHAPES[name]
    for function in (wkv6, torch.compile(wkv6, backend="eager")):
        with pytest.raises((ValueError, torch._dynamo.exc.TorchRuntimeError), match=told):
            function(*inputs)
    with pytest.raises((RuntimeError, ValueError), match=told):
        OPERATOR(*inputs)


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_wrong_type_is_told(name):
    inputs, told = WRONG_TYPES[name]
    with pytest.raises(TypeError, match=told):
        wkv6(*inputs)
    with pytest.raises((RuntimeError, TypeError), match=told):
        OPERATOR(*inputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_autocast_leaves_the_bonus_as_it_is(dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="u is"):
        wkv6(*cast(4, dtype))


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("autocast", [False, True])
def test_a_sparse_tensor_is_refused_with_its_layout(position, autocast, caplog):
    inputs = arguments()
    inputs[position] = inputs[position].to_sparse()
    told = rf"'{'rkvwu'[position]}': torch.sparse_coo"
    with torch.autocast("cpu", torch.bfloat16, autocast), pytest.raises(TypeError, match=told):
        wkv6(*inputs)
    assert not caplog.records


def test_devices_must_agree():
    inputs = arguments()
    inputs[1] = inputs[1].to("meta")
    with pytest.raises(ValueError, match="k is on meta"):
        wkv6(*inputs)


def test_the_gradient_given_must_fit():
    inputs = arguments()
    with pytest.raises(RuntimeError, match="gradient of y"):
        BACKWARD(torch.ones(2, 8, 32), *inputs)
    with pytest.raises((RuntimeError, ValueError), match="gradient of y"):
        BACKWARD(torch.ones(2, 8, 32, device="meta"), *(x.to("meta") for x in inputs))


def test_shapes_are_known_without_data():
    inputs = [x.to("meta") for x in arguments()]
    y = wkv6(*inputs)
    assert (y.shape, y.device.type) == (inputs[0].shape, "meta")
    gradients = BACKWARD(y, *inputs)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]


def python(program: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_without_the_library_the_reference_stands_in_under_the_same_names():
    program = f"""
import logging, sys
logging.basicConfig()
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_operator import BACKWARD, OPERATOR, arguments, leaves, permuted
import torch
from rwkv_clip.ops import build_info, reference, wkv6
torch.library.opcheck(OPERATOR, leaves())
inputs = permuted()
torch.library.opcheck(BACKWARD, [inputs[0], *inputs])
inputs = arguments()
assert torch.equal(wkv6(*inputs), reference.wkv6(*inputs))
assert build_info()["library"] is None
try:
    OPERATOR(*arguments(1, 3, 1, 12))
except ValueError as error:
    assert "12" in str(error)
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert wkv6(*inputs).dtype == torch.bfloat16
torch.compile(wkv6, fullgraph=True, backend="aot_eager")(*leaves()).sum().backward()
print(OPERATOR._schema, BACKWARD._schema, sep="|")
"""
    answer = python(program, RWKV_CLIP_NO_LIBRARY="1")
    assert answer.stderr.count("RWKV_CLIP_NO_LIBRARY is 1. Unset that") == 1
    assert answer.stdout.strip() == f"{OPERATOR._schema}|{BACKWARD._schema}"


def test_a_device_without_kernels_is_served_by_the_reference(caplog):
    if not build_info()["library"] or build_info()["cuda"]:
        pytest.skip("needs a library without CUDA kernels")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    inputs = arguments()
    for _ in range(2):
        y = OPERATOR.redispatch(cuda, *inputs)
        assert torch.equal(y, reference.wkv6(*inputs))
    assert caplog.text.count("rwkv_clip._build") == 1


def test_a_library_that_cannot_be_loaded_is_said_and_passed_over(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "rwkv_clip", tmp_path / "rwkv_clip", ignore=ignore)
    (tmp_path / "rwkv_clip" / "_C.so").write_text("not a library")
    program = """
import torch
from rwkv_clip.ops import build_info, wkv6
wkv6(*(torch.ones(1, 2, 8) for _ in range(4)), torch.ones(1, 8))
print(build_info()["reason"])
"""
    answer = python(program, tmp_path)
    assert "_C.so cannot be loaded" in answer.stdout
    assert answer.stderr.count("rwkv_clip._build") == 1


def test_code_without_a_library_takes_that_of_the_package_it_hides(tmp_path):
    if not build_info()["library"]:
        pytest.skip("the library is not built")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "rwkv_clip", tmp_path / "rwkv_clip", ignore=ignore)
    installed = tmp_path / "installed" / "rwkv_clip"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise ImportError('this is the hidden one')")
    shutil.copy(str(build_info()["library"]), installed / "_C.so")
    program = f"""
import sys
sys.path.append({str(installed.parent)!r})
from rwkv_clip.ops import build_info
import rwkv_clip
print(rwkv_clip.__file__, build_info()["library"], build_info()["cpu"])
"""
    told = python(program, tmp_path).stdout.split()
    assert told == [str(tmp_path / "rwkv_clip/__init__.py"), str(installed / "_C.so"), "True"]


def test_importing_the_operators_is_enough_for_torch_ops():
    assert rwkv_clip.ops.wkv6 is wkv6
    program = "import torch, rwkv_clip.ops; print(torch.ops.rwkv_clip.wkv6.default._schema)"
    assert python(program).stdout.strip() == str(OPERATOR._schema)


def test_the_build_is_described():
    info = build_info()
    assert set(info) == {"library", "cpu", "cuda", "cpu_capability", "reason"}
    if info["library"] is not None:
        assert Path(info["library"]).name == "_C.so"
        assert info["reason"] is None
