"""Loads the compiled library, and puts the reference wherever it has no kernels.

`torch.ops.rwkv_clip.wkv6` and `.wkv6_backward` exist afterwards, with the same schemas, whether the
library was built or not, and on every device, whether the library has kernels for it or not.
RWKV_CLIP_NO_LIBRARY=1 leaves the library alone, to compare or to rule it out.

Code that was sent to a cluster without its library, as in a job's working directory, hides the
package that is installed there; it takes that package's library, so that no worker ever compiles.
"""

import logging
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from rwkv_clip._build import BUILD
from rwkv_clip.ops import reference

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent.parent
NAME = "_C.so"
# What this version of the code expects of the library.
COMPILED = (
    *("wkv6", "wkv6_backward", "cpu_isa", "has_cuda"),
    *("token_shift_mix", "group_norm_gate", "relu_square_", "gated_residual", "resize_bicubic"),
)
CAPABILITIES = ("portable", "AVX2", "AVX512")
FORWARD = "wkv6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) -> Tensor"
BACKWARD = (
    "wkv6_backward(Tensor gy, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class BuildInfo(TypedDict):
    """What stands behind the operators here.

    `library` is the compiled library's path, None if the reference is used, for `reason`.
    `cpu_capability`: "AVX512", "AVX2" or "portable". `cuda`: it holds CUDA kernels.
    """

    library: str | None
    cpu: bool
    cuda: bool
    cpu_capability: str | None
    reason: str | None


_library = PACKAGE / NAME
_reason: str | None = None
_registrations: list[torch.library.Library] = []  # which live as long as these do
_devices_told: set[str] = set()


def load() -> None:
    """Make the operators exist. Called once, when rwkv_clip.ops is imported."""
    global _reason
    _reason = _try_library()
    _define_fallback()
    if _reason is not None:
        logger.warning(
            "WKV6 runs through its reference, correct but slow: %s. %s",
            _reason,
            "Unset that to use the compiled one" if _is_left_alone() else f"To have it: {BUILD}",
        )


def is_loaded() -> bool:
    """Whether the compiled library is in use."""
    return _reason is None


def build_info() -> BuildInfo:
    """What stands behind the operators here."""
    if not is_loaded():
        return BuildInfo(library=None, cpu=False, cuda=False, cpu_capability=None, reason=_reason)
    capability = CAPABILITIES[torch.ops.rwkv_clip.cpu_isa()]
    cuda = bool(torch.ops.rwkv_clip.has_cuda())
    return BuildInfo(
        library=str(_library), cpu=True, cuda=cuda, cpu_capability=capability, reason=None
    )


def _is_left_alone() -> bool:
    value = os.environ.get("RWKV_CLIP_NO_LIBRARY", "")
    if value not in ("", "0", "1"):
        raise ImportError(
            f"RWKV_CLIP_NO_LIBRARY is {value!r}; it takes 0 (the compiled library, where there is "
            "one) or 1 (its reference)"
        )
    return value == "1"


def _check_isa() -> None:
    value = os.environ.get("RWKV_CLIP_ISA", "")
    names = [name.lower() for name in CAPABILITIES]
    if value and value.lower() not in names:
        raise ImportError(f"RWKV_CLIP_ISA is {value!r}; it takes {', '.join(names)}")


def _try_library() -> str | None:
    """None once the library is loaded, otherwise why it is not."""
    global _library
    _check_isa()
    if _is_left_alone():
        return "RWKV_CLIP_NO_LIBRARY is 1"
    if not _library.is_file():
        _library = next(filter(Path.is_file, _hidden()), _library)
    if not _library.is_file():
        return f"{_library} was not built"
    try:
        torch.ops.load_library(str(_library))
    except OSError as error:
        return f"{_library} cannot be loaded ({error})"
    if absent := [name for name in COMPILED if not hasattr(torch.ops.rwkv_clip, name)]:
        raise ImportError(
            f"{_library} is of another version, without {', '.join(absent)}: "
            "build it again by python -m rwkv_clip._build"
        )
    return None


def _hidden() -> Iterator[Path]:
    """Where the libraries of installed packages would be that this code stands before."""
    for finder in sys.meta_path:
        # Python stops at the first entry that has the package; those behind it are meant here.
        places = [[entry] for entry in sys.path] if finder is PathFinder else [None]
        for place in places:
            spec = finder.find_spec(PACKAGE.name, place)
            if spec is not None and spec.origin is not None:
                yield Path(spec.origin).with_name(NAME)


def _define_fallback() -> None:
    library = torch.library.Library("rwkv_clip", "FRAGMENT" if is_loaded() else "DEF")
    _registrations.append(library)
    for schema, kernel in ((FORWARD, _wkv6), (BACKWARD, _wkv6_backward)):
        if not is_loaded():
            library.define(schema)
        library.impl(schema.partition("(")[0], kernel, "CompositeExplicitAutograd")


def _tell_once(device: str) -> None:
    if is_loaded() and device not in _devices_told:
        _devices_told.add(device)
        logger.warning(
            "WKV6 on %s runs through its reference, correct but slow: %s has no kernels for it. "
            "To have them: RWKV_CLIP_CUDA=1 %s",
            device,
            _library,
            BUILD,
        )


def _wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    from rwkv_clip.ops.operator import check_arguments

    check_arguments(r, k, v, w, u)
    _tell_once(r.device.type)
    with torch.no_grad():
        return reference.wkv6(r, k, v, w, u)


def _wkv6_backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return reference.wkv6_backward(gy, r, k, v, w, u)
