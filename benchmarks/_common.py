"""What the benchmarks of whole models share: the machine, timing in turn, and the verdicts."""

import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

import rwkv_clip
from rwkv_clip.model import RWKVCLIP, blocks
from rwkv_clip.ops import build_info, fused, reference

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
MATMUL_SIDE = 3072


def machine() -> str:
    """The machine and the software, on one line."""
    info = build_info()
    kernels = info["cpu_capability"] if info["library"] else "no compiled operator"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {kernels}, "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each work, all of them timed in turn after one run to warm up."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: statistics.median(all_of_it) for name, all_of_it in times.items()}


def matmul() -> Callable[[], object]:
    """A large float32 product, the machine's own rate: 2 * MATMUL_SIDE**3 operations."""
    a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE)
    return lambda: a @ b


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def header(*names: str) -> None:
    """The first two lines of a table, as benchmarks/README.md has it."""
    row(*names)
    print("|" + "---|" * len(names))


def row(*cells: str) -> None:
    """One more line of the table, at once, because the next one may take minutes."""
    print("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|", flush=True)


@contextmanager
def statements() -> Iterator[None]:
    """The operator and the element-wise steps as their definitions in PyTorch, without kernels."""
    with (
        mock.patch.object(fused, "_has_kernel", return_value=False),
        mock.patch.object(blocks, "wkv6", reference.wkv6),
    ):
        yield


def relative_error(got: Tensor, expected: Tensor) -> float:
    difference = (got.detach().double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def refuse_unless(name: str, error: float, limit: float) -> None:
    """End the program, with no time told, if a result is wrong."""
    if not error <= limit:
        raise SystemExit(f"{name} is wrong by {error:.1e} (at most {limit:.0e}); nothing was timed")
    print(f"verified: {name}, error {error:.1e}")


def published_b32() -> RWKVCLIP:
    """B/32 with the weights of the golden values, in evaluation mode, compared with them."""
    recipe = _recipe()
    model = rwkv_clip.create_model("RWKV-CLIP-B-32", device="meta").to_empty(device="cpu").eval()
    parameters = dict(model.named_parameters())
    entries = json.loads((GOLDEN / "b32.json").read_text())["state_dict"]
    expected = load_file(GOLDEN / "b32.safetensors")
    with torch.inference_mode():
        for entry in entries:
            values = recipe.fill(entry["key"], entry["shape"], entry["dtype"])
            parameters[entry["key"]].copy_(torch.from_numpy(values))
        image, text, _ = model(expected["image"], expected["text"])
    for name, got in (("image_embedding", image), ("text_embedding", text)):
        error = relative_error(got, expected[name])
        refuse_unless(f"B/32 {name.replace('_', ' ')} against the published", error, 1e-5)
    return model


def _recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
