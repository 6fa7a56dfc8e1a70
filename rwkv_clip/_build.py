"""Builds the compiled operators of csrc/ into one shared library, with ninja.

    python -m rwkv_clip._build          # in place, into rwkv_clip/_C.so

The library uses PyTorch's stable ABI and nothing of Python's, so one build serves several versions
of both. torch.utils.cpp_extension is not used: it refuses CUDA sources where PyTorch is a CPU
build, although nvcc needs no PyTorch at all. setup.py loads this file by its path, before the
package can be imported, so it imports nothing of the package.

RWKV_CLIP_CUDA=0 leaves the CUDA kernels out, 1 insists on them; otherwise they are built where
PyTorch has CUDA and nvcc is found (CUDA_HOME, the path, /usr/local/cuda).
"""

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "_C.so"
# What those are told who lack the library; installed packages have no sources.
BUILD = "python -m rwkv_clip._build (in a checkout), or pip install . again"
SOURCES = Path(__file__).resolve().parent.parent / "csrc"

# The oldest PyTorch that the library must load in: 2.11, as its headers write it.
TORCH_TARGET = "0x020b000000000000"
WARNINGS = (
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"),
    # GCC 12 warns of its own AVX-512 headers, in thousands of lines that would hide an error.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
# A product and a sum may become one instruction; nothing else may change a result.
ARITHMETIC = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
INSTRUCTIONS = {
    "_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "_avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
}
# Machine code for these, and code for the newest that later GPUs translate.
ARCHITECTURES = ("80", "90", "100")
X86 = ("x86_64", "AMD64")
CUDA_RUNTIME = "libcudart_static.a"


LAUNCHERS = ("ccache", "sccache", "distcc", "icecc", "env")  # which CXX may put before a compiler


class BuildError(RuntimeError):
    """The library could not be built; the text holds what the compiler said, or what to do."""


@dataclass(frozen=True)
class Toolchain:
    """The programs of one build: the C++ compiler, ninja, and nvcc where CUDA is built."""

    cxx: str
    ninja: str
    nvcc: str | None


def build(
    output_dir: Path,
    *,
    cuda: bool | None = None,
    work_dir: Path | None = None,
    verbose: bool = False,
) -> Path:
    """Compile csrc/ and put the library into `output_dir`, atomically.

    Args:
        output_dir: the folder that gets `_C.so`; one that is there is replaced only by a whole one.
        cuda: with or without the CUDA kernels; None decides by RWKV_CLIP_CUDA, then by what is
            there.
        work_dir: where object files stay for the next build; None uses a temporary folder.
        verbose: show the compilers' commands and output.

    Returns:
        The library's path.

    Raises:
        BuildError: sources or tools are missing, or a compiler failed.
    """
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise BuildError(f"the sources are not at {SOURCES}: build in a checkout, or pip install")
    tools = _toolchain(_wants_cuda() if cuda is None else cuda)
    if tools.nvcc:
        sources += sorted(SOURCES.glob("*.cu"))
    output_dir.mkdir(parents=True, exist_ok=True)
    with _folder(work_dir) as folder, _locked(folder):
        (folder / "build.ninja").write_text(_ninja_file(tools, sources))
        _run_ninja(tools.ninja, folder, verbose)
        return _put(folder / LIBRARY, output_dir / LIBRARY)


def _wants_cuda() -> bool | None:
    value = os.environ.get("RWKV_CLIP_CUDA", "")
    if value not in ("", "0", "1"):
        raise BuildError(f"RWKV_CLIP_CUDA is {value!r}; it takes 0 (without CUDA) or 1 (with it)")
    return bool(int(value)) if value else None


def _toolchain(cuda: bool | None) -> Toolchain:
    cxx = find_compiler()
    if not cxx:
        raise BuildError("no C++ compiler: install g++ (build-essential), or name one in CXX")
    wanted = _torch_has_cuda() if cuda is None else cuda
    nvcc = find_nvcc() if wanted else None
    if cuda and not nvcc:
        raise BuildError("CUDA was asked for, and nvcc is not found: set CUDA_HOME")
    ninja = find_ninja()
    if not ninja:
        raise BuildError("ninja is not installed: pip install ninja")
    return Toolchain(cxx, ninja, nvcc)


def find_compiler() -> str | None:
    """The command of the C++ compiler: CXX, which may hold arguments, or what is on the path."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def find_nvcc() -> str | None:
    """The CUDA compiler's path."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in filter(None, homes):
        if found := shutil.which("nvcc", path=str(Path(home) / "bin")):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_ninja() -> str | None:
    """Ninja's path: that of the package, or of the system."""
    try:
        import ninja

        packaged = Path(ninja.BIN_DIR) / "ninja"
        if packaged.is_file():
            return str(packaged)
    except ImportError:
        pass
    return shutil.which("ninja")


def _torch() -> Path:
    """Where PyTorch is, without importing it: that would take seconds."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        raise BuildError("PyTorch is not installed: its headers are needed to build")
    return Path(spec.origin).parent


def _torch_has_cuda() -> bool:
    version = (_torch() / "version.py").read_text()
    return re.search(r"^cuda\b[^=]*= *['\"]", version, re.MULTILINE) is not None


def _ninja_file(tools: Toolchain, sources: Sequence[Path]) -> str:
    include, libraries = _torch() / "include", _torch() / "lib"
    torch_flags = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {_argument(include)}"
    flags = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread"]
    flags += [*WARNINGS, *ARITHMETIC, torch_flags]
    link = ["-shared", "-pthread", f"-L{_argument(libraries)}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if sys.platform == "linux":
        link.append("-Wl,--as-needed")
    if tools.nvcc:
        flags.append("-DRWKV_CLIP_WITH_CUDA")
        link += [
            f"-L{_argument(_cuda_libraries(tools.nvcc, tools.cxx))}",
            "-lcudart_static",
            "-lrt",
            "-ldl",
        ]
    lines = [
        "ninja_required_version = 1.8",
        f"cxx = {tools.cxx}",
        f"flags = {' '.join(flags)}",
        f"nvcc = {_argument(tools.nvcc or 'nvcc')}",
        f"nvcc_flags = {' '.join(_nvcc_flags(tools.cxx, tools.nvcc)) if tools.nvcc else ''}",
        f"link = {' '.join(link)}",
        "rule cpp",
        "  description = compile $out",
        "  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cu",
        "  description = compile $out, which takes minutes (RWKV_CLIP_CUDA=0 leaves it out)",
        "  command = $nvcc -MD -MF $out.d $nvcc_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule library",
        "  description = link $out",
        "  command = $cxx $in $link -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {source.suffix[1:]} {_escape(source)}")
        lines.append(f"  isa = {' '.join(_instructions(source))}")
    lines += [f"build {LIBRARY}: library {' '.join(objects)}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def _instructions(source: Path) -> tuple[str, ...]:
    if platform.machine() not in X86:
        return ()
    suffix = next((suffix for suffix in INSTRUCTIONS if source.stem.endswith(suffix)), None)
    return INSTRUCTIONS[suffix] if suffix else ()


def _nvcc_flags(cxx: str, nvcc: str) -> list[str]:
    # nvcc takes one program.
    compiler = next((one for one in shlex.split(cxx) if Path(one).name not in LAUNCHERS), cxx)
    flags = [
        "-O3",
        "-std=c++17",
        "-ccbin",
        _argument(compiler),
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
    ]
    flags += ["-cudart", "static", "--threads", "0"]
    architectures = _architectures(nvcc)
    for number in architectures:
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    newest = architectures[-1]
    return [*flags, "-gencode", f"arch=compute_{newest},code=compute_{newest}"]


def _architectures(nvcc: str) -> list[str]:
    """Those of ours that the compiler knows; an old one does not know the newest."""
    told = subprocess.run([nvcc, "--list-gpu-arch"], check=False, capture_output=True, text=True)
    known = set(re.findall(r"compute_(\d+)", told.stdout))
    found = [number for number in ARCHITECTURES if number in known]
    if not found:
        raise BuildError(
            f"{nvcc} compiles for none of sm_{', sm_'.join(ARCHITECTURES)}: install CUDA 12 or 13, "
            "or set RWKV_CLIP_CUDA=0"
        )
    return found


def _cuda_libraries(nvcc: str, cxx: str) -> Path:
    """The folder of the CUDA runtime; nvcc itself may be a script somewhere else."""
    command = [nvcc, "-dryrun", "-E", "-x", "cu", os.devnull]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", told.stdout + told.stderr, re.MULTILINE)
    root = Path(top[1].strip() if top else Path(nvcc).parent.parent).resolve()
    machine = platform.machine()
    names = ["lib64", "lib", f"lib/{machine}-linux-gnu", f"targets/{machine}-linux/lib"]
    if machine == "aarch64":
        names.append("targets/sbsa-linux/lib")
    for name in names:
        if (root / name / CUDA_RUNTIME).is_file():
            return root / name
    # Debian's nvcc may name a root of its own, and its libraries are where the linker looks.
    command = [*shlex.split(cxx), f"-print-file-name={CUDA_RUNTIME}"]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    found = Path(told.stdout.strip())
    if found.is_absolute() and found.is_file():
        return found.parent.resolve()
    raise BuildError(
        f"{CUDA_RUNTIME} is not under {root}: install the CUDA runtime's files, or set "
        "RWKV_CLIP_CUDA=0 to build without the CUDA kernels"
    )


def _argument(path: Path | str) -> str:
    """A path for a variable, which reaches the shell as it stands."""
    return shlex.quote(str(path)).replace("$", "$$")


def _escape(path: Path) -> str:
    """A path for a build line; ninja itself quotes those for the shell."""
    text = str(path)
    for character in ("$", " ", ":"):
        text = text.replace(character, f"${character}")
    return text


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rwkv-clip-build-") as temporary:
        yield Path(temporary)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two builds in one folder take turns; the second finds everything built."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_ninja(ninja: str, folder: Path, verbose: bool) -> None:
    """Show what ninja says as it comes, because it may take minutes; the error holds a failure."""
    command = [ninja, "-C", str(folder), *(["-v"] if verbose else [])]
    failure: list[str] = []
    failed = False
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            if line.startswith(("[", "FAILED")):  # of the next step, and of one that failed
                failed = line.startswith("FAILED")
            if failed:
                failure.append(line)
            else:
                print(line, end="", flush=True)
    if process.returncode != 0:
        raise BuildError("the compiler failed:\n" + "".join(failure))


def _put(built: Path, target: Path) -> Path:
    """Replaces the file, never its contents: a process may have the old one mapped."""
    handle, temporary = tempfile.mkstemp(prefix=f"{LIBRARY}.", dir=target.parent)
    os.close(handle)
    try:
        shutil.copyfile(built, temporary)
        Path(temporary).chmod(0o755)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def main() -> int:
    """Build in place, and say where."""
    try:
        work = SOURCES.parent / "build" / "operator" if SOURCES.is_dir() else None
        library = build(Path(__file__).resolve().parent, work_dir=work, verbose="-v" in sys.argv)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built {library}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
