"""nvcc turns the CUDA kernels into machine code for every architecture we name, without spills.

Runs where the CUDA compiler is, with or without a GPU.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ("80", "90", "100")
# Bytes a thread. The compiler may park a loop-invariant address, never part of an accumulator.
MAX_STACK = 48


def find_nvcc() -> str | None:
    """The CUDA compiler: on the path, under CUDA_HOME, or in its usual place."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(home / "bin"))


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="the CUDA compiler (nvcc) is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_and_stay_in_registers(architecture: str, tmp_path: Path) -> None:
    command = [find_nvcc() or "", "-O3", "-std=c++17", "-c", "-Xptxas", "-v"]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += [str(ROOT / "csrc" / "wkv6_cuda.cu"), "-o", str(tmp_path / "wkv6_cuda.o")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = re.findall(
        r"Function properties for (\S*kernel\S*)\s+(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores",
        result.stderr,
    )
    for kind in ("forward", "backward", "state", "carry", "bonus"):
        assert any(f"{kind}_kernel" in name for name, *_ in kernels), f"no {kind} kernel"
    spilled = [kernel for kernel in kernels if max(int(kernel[1]), int(kernel[2])) > MAX_STACK]
    assert not spilled, spilled
