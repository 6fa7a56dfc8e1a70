"""Loads the compiled library, or puts the reference in its place under the same operator names.

Either way `torch.ops.rwkv_clip.wkv6` and `.wkv6_backward` exist afterwards, with the same schemas.
RWKV_CLIP_NO_LIBRARY=1 leaves the library alone, to compare or to rule it out.
"""

import logging
import os
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from rwkv_clip.ops import reference

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"
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


_reason: str | None = None
_fallback: torch.library.Library | None = None  # its registrations live as long as it does


def load() -> None:
    """Make the operators exist. Called once, when rwkv_clip.ops is imported."""
    global _reason
    _reason = _try_library()
    if _reason is not None:
        _define_fallback()
        logger.warning(
            "WKV6 runs through its reference, correct but slow: %s. To build it: "
            "python -m rwkv_clip._build",
            _reason,
        )


def is_loaded() -> bool:
    """Whether the compiled library is in use."""
    return _fallback is None


def build_info() -> BuildInfo:
    """What stands behind the operators here."""
    if not is_loaded():
        return BuildInfo(library=None, cpu=False, cuda=False, cpu_capability=None, reason=_reason)
    capability = CAPABILITIES[torch.ops.rwkv_clip.cpu_isa()]
    cuda = bool(torch.ops.rwkv_clip.has_cuda())
    return BuildInfo(
        library=str(LIBRARY), cpu=True, cuda=cuda, cpu_capability=capability, reason=None
    )


def _try_library() -> str | None:
    """None once the library is loaded, otherwise why it is not."""
    if os.environ.get("RWKV_CLIP_NO_LIBRARY") == "1":
        return "RWKV_CLIP_NO_LIBRARY is 1"
    if not LIBRARY.is_file():
        return f"{LIBRARY} was not built"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} cannot be loaded ({error})"
    return None


def _define_fallback() -> None:
    global _fallback
    _fallback = torch.library.Library("rwkv_clip", "DEF")
    for schema, kernel in ((FORWARD, _wkv6), (BACKWARD, _wkv6_backward)):
        _fallback.define(schema)
        _fallback.impl(schema.partition("(")[0], kernel, "CompositeExplicitAutograd")


def _wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    from rwkv_clip.ops.operator import check_arguments

    check_arguments(r, k, v, w, u)
    with torch.no_grad():
        return reference.wkv6(r, k, v, w, u)


def _wkv6_backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return reference.wkv6_backward(gy, r, k, v, w, u)
