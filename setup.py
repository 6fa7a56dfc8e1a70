"""Builds the WKV6 operator ahead of time and puts it into the wheel.

The rest of the package's description is in pyproject.toml. The compiled library uses PyTorch's
stable ABI and no CPython API, so one wheel per platform serves every Python: py3-none-PLATFORM.
RWKV_CLIP_BUILD=0 asks for a wheel without it: py3-none-any. A compile that fails stops the
installation; it never leaves a package that is silently slow.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
WITHOUT = (
    "RWKV_CLIP_CUDA=0 builds without the CUDA kernels; "
    "RWKV_CLIP_BUILD=0 installs without the compiled operator (correct, but slow)"
)


def wants_library() -> bool:
    value = os.environ.get("RWKV_CLIP_BUILD", "1")
    if value not in ("0", "1"):
        raise SystemExit(f"RWKV_CLIP_BUILD is {value!r}; it takes 0 (without the operator) or 1")
    return value == "1"


def builder() -> ModuleType:
    """The build script, loaded by path: the package's own imports are not there at build time."""
    path = ROOT / "rwkv_clip" / "_build.py"
    spec = importlib.util.spec_from_file_location("rwkv_clip_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithLibrary(build_py):
    """Copies the Python files, then builds the operator's library beside them."""

    def run(self) -> None:
        super().run()
        target = ROOT / "rwkv_clip" if self.editable_mode else Path(self.build_lib) / "rwkv_clip"
        if not wants_library():
            if not self.editable_mode:
                # An earlier build may have left one where this wheel is assembled.
                (target / "_C.so").unlink(missing_ok=True)
            return
        try:
            builder().build(target.resolve())
        except Exception as error:
            message = f"rwkv-clip: building the operator failed. {error}\n{WITHOUT}"
            raise SystemExit(message) from error


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return wants_library()


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    cmdclass={"bdist_wheel": AnyPythonWheel, "build_py": BuildWithLibrary},
    distclass=PlatformDistribution,
)
