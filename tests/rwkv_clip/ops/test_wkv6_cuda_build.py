"""nvcc turns the CUDA kernels into machine code for every architecture we name, without spills.

Runs where the CUDA compiler is, with or without a GPU. What needs neither is here too: that the
code around the kernels compiles, and that the operator takes what the tests on a GPU give it.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rwkv_clip import _build
from tests.rwkv_clip.ops import test_wkv6_cuda as on_a_gpu

ROOT = Path(__file__).parents[3]
# Bytes a thread. The compiler may park a loop-invariant address, never part of an accumulator.
MAX_STACK = 48
LEVELS = ("forward", "backward", "state", "carry")
DENSE = ("dense_forward", "dense_backward", "dense_side", "dense_state", "dense_carry")


def find_nvcc() -> str | None:
    """The CUDA compiler: on the path, under CUDA_HOME, or in its usual place."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(home / "bin"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "architecture", "kinds"),
    # By default the head sizes of the published models alone: all of them take two minutes.
    [
        ("tests/csrc/wkv6_cuda_published.cu", "90", LEVELS + DENSE),
        *(
            pytest.param(f"csrc/wkv6_cuda_{name}.cu", architecture, kinds, marks=pytest.mark.chaos)
            for architecture in _build.ARCHITECTURES
            for name, kinds in (("bf16", DENSE), ("fp16", LEVELS), ("fp32", LEVELS))
        ),
    ],
)
def test_kernels_compile_and_stay_in_registers(source, architecture, kinds, tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("the CUDA compiler (nvcc) is not installed")
    command = [nvcc, "-O3", "-std=c++17", "-c", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += [str(ROOT / source), "-o", str(tmp_path / "wkv6_cuda.o")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = result.stderr  # what ptxas says of the kernels
    kernels = re.findall(
        rf"Compiling entry function '\S*kernel\S*' for 'sm_{architecture}'\s*"
        r"ptxas info\s*: Function properties for (\S*kernel\S*)\s+(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores",
        report,
    )
    for kind in (*kinds, "bonus"):
        # A mangled name begins with its length.
        assert any(re.search(rf"\d{kind}_kernel", name) for name, *_ in kernels), f"no {kind}"
    spilled = [kernel for kernel in kernels if max(int(kernel[1]), int(kernel[2])) > MAX_STACK]
    assert not spilled, spilled


def test_the_code_around_the_kernels_compiles():
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    include = Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror"]
    command += ["-DRWKV_CLIP_WITH_CUDA", f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET}"]
    command += ["-isystem", str(include), str(ROOT / "csrc" / "wkv6_cuda_register.cpp")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_the_tests_on_a_gpu_ask_for_is_what_the_operator_takes():
    inputs = on_a_gpu.random_inputs((2, 17, 3, 16), device="cpu")
    on_a_gpu.check(on_a_gpu.run(inputs), inputs)
    on_a_gpu.run(on_a_gpu.random_inputs((0, 5, 3, 16), device="cpu"))


def test_a_compiler_that_knows_no_newer_gpus_compiles_for_those_it_knows(tmp_path):
    nvcc = tmp_path / "nvcc"
    for known, expected in (("compute_80\ncompute_90\ncompute_90a", ["80", "90"]), ("", None)):
        nvcc.write_text(f"#!/bin/sh\nprintf '{known}\\n'\n")
        nvcc.chmod(0o755)
        if expected is None:
            with pytest.raises(_build.BuildError, match="CUDA 12 or 13"):
                _build._architectures(str(nvcc))
        else:
            assert _build._architectures(str(nvcc)) == expected
