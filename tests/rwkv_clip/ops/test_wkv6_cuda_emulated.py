"""The CUDA kernels' arithmetic and synchronisation, without a GPU.

The very source that nvcc compiles is compiled for the host over tests/csrc/cuda_emulation.h, which
runs every CUDA thread as a fiber, starts shared memory as NaN and can reverse the order of warps
and lanes. Outputs start as NaN too. Results are compared with the definition in float64, and
ThreadSanitizer looks for accesses that no barrier puts in order.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAMES = ("y", "gr", "gk", "gv", "gw", "gu")
H200_SHARED = 232448
# Relative to the maximum: float32 to the last bits of its sums, the others to their rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}

Tensors = list[torch.Tensor]


def definition(
    r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """The operator as a masked sum over all token pairs, [B, T, H, N] and u [H, N]."""
    tokens = r.shape[1]
    ends = torch.cumsum(-torch.exp(w), 1)
    starts = ends + torch.exp(w)
    later = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1)[None, :, :, None, None]
    forward = (starts[:, :, None] - ends[:, None]).masked_fill(~later, -torch.inf).exp()
    reverse = forward.transpose(1, 2)
    own = torch.eye(tokens, dtype=r.dtype)[None, :, :, None, None] * u
    scores = torch.einsum("bthj,bshj,btshj->btsh", r, k, forward + reverse + own)
    return torch.einsum("btsh,bshi->bthi", scores, v)


def expected(inputs: Tensors) -> Tensors:
    """Output and gradients of r, k, v, w, u from float64 copies of r, k, v, w, u, gy."""
    leaves = [x.double().requires_grad_() for x in inputs[:5]]
    y = definition(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[5].double())]


def build(source: str, path: Path, *flags: str) -> None:
    """Compile a source of tests/csrc over the emulation."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no host C++ compiler")
    command = [compiler, "-std=c++17", "-U_FORTIFY_SOURCE", *flags]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'csrc'}"]
    command += [str(ROOT / "tests" / "csrc" / source), "-o", str(path)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The launchers over the emulation."""
    path = tmp_path_factory.mktemp("emulation") / "wkv6_cuda_emulated.so"
    build("wkv6_cuda_emulated.cpp", path, "-O2", "-shared", "-fPIC")
    loaded = ctypes.CDLL(str(path))
    for name in ("forward", "backward"):
        getattr(loaded, name).restype = ctypes.c_char_p
        getattr(loaded, f"{name}_workspace").restype = ctypes.c_size_t
    loaded.configure.argtypes = [ctypes.c_size_t, ctypes.c_int]
    return loaded


def pointers(tensors: Tensors) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


def run(
    library: ctypes.CDLL, inputs: Tensors, shared: int = H200_SHARED, *, reverse: bool = False
) -> Tensors:
    """y, gr, gk, gv, gw, gu from the emulated kernels, on poisoned buffers."""
    r, w, u = inputs[0], inputs[3], inputs[4]
    shape = (ctypes.c_int64 * 4)(*r.shape)
    types = (TYPES[r.dtype], TYPES[w.dtype])
    library.configure(shared, int(reverse))
    outputs = [torch.full_like(x, torch.nan) for x in (r, r, r, r, w, u)]
    for name, filled in (("forward", outputs[:1]), ("backward", outputs[1:])):
        size = getattr(library, f"{name}_workspace")(shape, *types)
        workspace = torch.full((size // 4 + 4,), torch.nan)
        error = getattr(library, name)(
            shape, *types, pointers(inputs), pointers(filled), ctypes.c_void_p(workspace.data_ptr())
        )
        assert error is None, error
    return outputs


def random_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype | None = None,
    decays: tuple[float, float] = (-6.0, 1.5),
    seed: int = 0,
) -> Tensors:
    """r, k, v, w, u, gy with w uniform over `decays`."""
    generator = torch.Generator().manual_seed(seed)
    r, k, v, gy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    low, high = decays
    w = (low + (high - low) * torch.rand(shape, generator=generator)).to(w_dtype or dtype)
    u = torch.randn(shape[2:], generator=generator)
    return [r, k, v, w, u, gy]


def check(actual: Tensors, inputs: Tensors, tolerance: float | None = None) -> None:
    limit = tolerance or TOLERANCE[inputs[0].dtype]
    for name, got, want in zip(NAMES, actual, expected(inputs), strict=True):
        assert got.isfinite().all(), f"{name} holds elements that nothing wrote, or overflows"
        error = (got.double() - want).abs().max().item()
        # The floor is the reference's own rounding, of logarithms that reach thousands.
        assert error <= limit * want.abs().max().item() + 1e-10, (name, error, want.abs().max())
    assert (actual[4][:, [0, -1]] == 0).all(), "gw at the ends is not exactly zero"


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 15, 16, 17, 49, 64, 65, 77])
def test_every_length_agrees_with_the_definition(library: ctypes.CDLL, tokens: int) -> None:
    inputs = random_inputs((2, tokens, 2, 16), seed=tokens)
    check(run(library, inputs), inputs)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 25, 49, 64, 65, 77])
def test_every_length_agrees_in_bfloat16(library: ctypes.CDLL, tokens: int) -> None:
    inputs = random_inputs((2, tokens, 2, 16), torch.bfloat16, torch.float32, seed=tokens)
    check(run(library, inputs), inputs)


@pytest.mark.parametrize("size", [8, 24, 32, 48, 64, 80, 96, 104, 128])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_every_head_size_and_type_agrees(
    library: ctypes.CDLL, dtype: torch.dtype, size: int
) -> None:
    inputs = random_inputs((1, 37, 1, size), dtype, seed=size)
    check(run(library, inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_decays_go_with_half_precision_inputs(
    library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    inputs = random_inputs((1, 49, 2, 80), dtype, torch.float32)
    outputs = run(library, inputs)
    assert outputs[4].dtype == torch.float32
    check(outputs, inputs)


@pytest.mark.parametrize("decays", [(-20.0, -10.0), (-20.0, 6.5), (1.0, 3.0), (4.0, 6.5)])
@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.float32, 49), (torch.bfloat16, 49), (torch.bfloat16, 300)]
)
def test_extreme_decays_neither_overflow_nor_lose_accuracy(
    library: ctypes.CDLL, dtype: torch.dtype, tokens: int, decays: tuple[float, float]
) -> None:
    inputs = random_inputs((1, tokens, 1, 32), dtype, decays=decays)
    check(run(library, inputs), inputs)


# The ends' decays lead nowhere; another one is between the tokens on its two sides.
@pytest.mark.parametrize("tokens", [20, 130, 201])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decay_that_is_no_number_is_seen_in_its_head_alone(
    library: ctypes.CDLL, dtype: torch.dtype, tokens: int
) -> None:
    inputs = random_inputs((1, tokens, 2, 16), dtype, torch.float32)
    inputs[3][0, 5, 0, 3] = torch.nan
    y, gr, gk, gv, gw, _ = run(library, inputs)
    for of, name in ((y, "y"), (gv, "gv")):
        assert of[0, [0, -1], 0].isnan().all(), name
    for of, name in ((gr, "gr"), (gk, "gk"), (gw, "gw")):
        assert of[0, :, 0, 3].isnan().any(), name
    assert not any(of[0, :, 1].isnan().any() for of in (y, gr, gk, gv, gw))


@pytest.mark.parametrize("tokens", [33, 300])
def test_quick_decays_keep_their_relative_gradient(library: ctypes.CDLL, tokens: int) -> None:
    inputs = random_inputs((1, tokens, 1, 16), torch.bfloat16, torch.float32, decays=(1.6, 1.7))
    got, want = run(library, inputs)[4].double(), expected(inputs)[4]
    assert (got - want).norm() <= 5e-3 * want.norm()


# In bfloat16 one kernel has the gradients of up to 96 tokens, three have those of up to 200; longer
# sequences are cut into chunks of up to 80, the last of which may be one token.
@pytest.mark.parametrize("tokens", [96, 97, 128, 176, 196, 197, 200, 201, 240, 241, 320, 321, 385])
@pytest.mark.parametrize("decays", [(-6.0, 1.5), (1.0, 3.0)])
def test_lengths_around_those_that_change_the_form_agree(
    library: ctypes.CDLL, tokens: int, decays: tuple[float, float]
) -> None:
    inputs = random_inputs((1, tokens, 1, 80), torch.bfloat16, torch.float32, decays)
    check(run(library, inputs), inputs)


@pytest.mark.parametrize("tokens", [49, 130, 300])
def test_large_numbers_under_the_fastest_decays_agree(library: ctypes.CDLL, tokens: int) -> None:
    inputs = random_inputs((1, tokens, 1, 64), torch.bfloat16, torch.float32, (0.0, 9.0))
    inputs = [x * 256 if i in (0, 1) else x for i, x in enumerate(inputs)]
    check(run(library, inputs), inputs)


# A mean over a large batch, or a scaled loss; one kernel, three, chunks.
@pytest.mark.parametrize("tokens", [49, 130, 300])
@pytest.mark.parametrize("exponent", [-27, 17])
def test_gradients_are_as_exact_in_any_scale(
    library: ctypes.CDLL, tokens: int, exponent: int
) -> None:
    inputs = random_inputs((1, tokens, 1, 16), torch.bfloat16, torch.float32, decays=(-2.0, 4.0))
    scaled = [*inputs[:5], inputs[5] * 2.0**exponent]
    for name, got, want in zip(
        NAMES[1:], run(library, scaled)[1:], run(library, inputs)[1:], strict=True
    ):
        assert torch.equal(got * 2.0**-exponent, want), name


# Their gw, ten thousand times smaller than other channels', is what large sums differ by.
@pytest.mark.parametrize("tokens", [49, 130, 300])
@pytest.mark.parametrize("decays", [(2.1, 2.7), (2.7, 3.2)])
def test_channels_that_forget_within_a_token_agree(
    library: ctypes.CDLL, tokens: int, decays: tuple[float, float]
) -> None:
    inputs = random_inputs((1, tokens, 1, 32), torch.bfloat16, torch.float32, decays)
    for name, got, want in zip(NAMES, run(library, inputs), expected(inputs), strict=True):
        assert (got.double() - want).norm() <= 6e-3 * want.norm(), name


@pytest.mark.parametrize("tokens", [33, 130, 300])
def test_numbers_far_from_one_agree_under_the_fastest_decays(
    library: ctypes.CDLL, tokens: int
) -> None:
    inputs = random_inputs((1, tokens, 1, 16), torch.bfloat16, torch.float32, (1.0, 6.0))
    inputs = [x * (1e5, 1e-6, 1e-5, 1, 1, 1e4)[i] for i, x in enumerate(inputs)]
    check(run(library, inputs), inputs)


@pytest.mark.parametrize(
    ("tokens", "size", "dtype", "shared"),
    [
        (300, 16, torch.float32, 60_000),
        (300, 64, torch.bfloat16, H200_SHARED),
        (33, 8, torch.float32, 24_000),
        (70, 128, torch.float32, 101_376),
        (100, 24, torch.float16, 50_000),
        (1024, 16, torch.bfloat16, H200_SHARED),
        (260, 80, torch.bfloat16, 166_912),
        (70, 128, torch.bfloat16, 101_376),
        (257, 24, torch.bfloat16, 60_000),
    ],
)
def test_long_sequences_are_cut_into_chunks_and_agree(
    library: ctypes.CDLL, tokens: int, size: int, dtype: torch.dtype, shared: int
) -> None:
    inputs = random_inputs((1, tokens, 2 if tokens < 1024 else 1, size), dtype, decays=(-8.0, 0.0))
    check(run(library, inputs, shared), inputs)


@pytest.mark.parametrize(
    ("tokens", "dtype", "shared"),
    [
        (77, torch.float32, H200_SHARED),
        (77, torch.float32, 60_000),
        (77, torch.bfloat16, H200_SHARED),
        (77, torch.bfloat16, 60_000),
        (400, torch.bfloat16, H200_SHARED),
    ],
)
def test_results_do_not_depend_on_the_order_of_threads(
    library: ctypes.CDLL, tokens: int, dtype: torch.dtype, shared: int
) -> None:
    inputs = random_inputs((2, tokens, 2, 32), dtype)
    for one, other in zip(
        run(library, inputs, shared), run(library, inputs, shared, reverse=True), strict=True
    ):
        assert torch.equal(one, other)


@pytest.fixture(scope="session")
def races(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, str]]:
    """Runs the kernels of one head size under ThreadSanitizer: exit code and output."""
    path = tmp_path_factory.mktemp("races") / "wkv6_cuda_races"
    build("wkv6_cuda_races.cpp", path, "-O1", "-g", "-fsanitize=thread")
    # It knows fewer places for memory than recent kernels choose from.
    fixed = ["setarch", "-R"]
    if shutil.which("setarch") is None or subprocess.run([*fixed, "true"], check=False).returncode:
        fixed = []

    def run(*arguments: object) -> tuple[int, str]:
        command = [*fixed, str(path), *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("ThreadSanitizer cannot run here: addresses are too random")
        return done.returncode, done.stdout + done.stderr

    return run


# One kernel, three, chunks; levels in one chunk and in several.
@pytest.mark.parametrize(
    ("dtype", "tokens", "shared"),
    [
        ("bfloat16", 49, H200_SHARED),
        ("bfloat16", 130, H200_SHARED),
        ("bfloat16", 300, H200_SHARED),
        ("bfloat16", 70, 20_000),
        ("float32", 49, H200_SHARED),
        ("float32", 70, 20_000),
        ("float16", 130, H200_SHARED),
    ],
)
def test_every_two_accesses_to_the_same_memory_have_a_barrier_between(
    races: Callable[..., tuple[int, str]], dtype: str, tokens: int, shared: int
) -> None:
    assert races(dtype, tokens, shared) == (0, "done\n")


def test_a_barrier_that_is_missing_is_seen(races: Callable[..., tuple[int, str]]) -> None:
    code, told = races("none", 1, H200_SHARED)
    assert code != 0
    assert "data race" in told
    assert "unordered_kernel" in told


def test_golden_values(library: ctypes.CDLL, golden: Callable[[str], Path]) -> None:
    values = load_file(golden("wkv6.safetensors"))
    for case in sorted({key.split("/")[0] for key in values}):
        heads, size = values[f"{case}/u"].shape
        inputs = [
            values[f"{case}/{name}"].reshape(*values[f"{case}/{name}"].shape[:2], heads, size)
            if name != "u"
            else values[f"{case}/u"]
            for name in ("r", "k", "v", "w", "u", "gy")
        ]
        for name, got in zip(NAMES, run(library, inputs), strict=True):
            want = values[f"{case}/{name}"].reshape(got.shape)
            limit = (2e-4 if name == "gw" else 1e-5) * want.abs().max()
            assert (got - want).abs().max() <= limit + 1e-30, (case, name)


def test_an_empty_batch_has_a_zero_gradient_of_u(library: ctypes.CDLL) -> None:
    inputs = random_inputs((0, 5, 3, 16))
    assert (run(library, inputs)[5] == 0).all()


@pytest.mark.parametrize(
    ("shape", "text"), [((1, 4, 1, 12), "multiple of 8"), ((1, 4, 1, 136), "multiple of 8")]
)
def test_what_is_not_supported_is_refused(
    library: ctypes.CDLL, shape: tuple[int, int, int, int], text: str
) -> None:
    with pytest.raises(AssertionError, match=text):
        run(library, random_inputs(shape))
