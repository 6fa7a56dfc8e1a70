"""What the C library does with freed memory, and Python with what it imports.

By default glibc returns every large block to the system when it is freed, and each new one is
filled with zeros again, page by page: for activations of tens of megabytes that costs more than
the arithmetic done on them. Kept in the process, freed memory is used again as it is.

What counts as large, glibc decides anew with each block that is freed. Once some megabytes came and
went, it keeps the room of all below that, which for a server is the room of its busiest moment.
"""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_LARGE = 256 << 10  # bytes


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its own next use; worth a quarter of a CPU step.

    Call it once, before the work. The process's size then stays at its peak.

    Returns:
        Whether the C library took it; False where it is not glibc.
    """
    return _set(_M_MMAP_MAX, 0) and _set(_M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> bool:
    """Let this process return every block of 256 kB or more when it is freed.

    Returns:
        Whether the C library took it; False where it is not glibc.
    """
    return _set(_M_MMAP_THRESHOLD, _LARGE)


def trim_freed_memory() -> bool:
    """Return what this process has freed among blocks that are in use; takes milliseconds.

    Of small blocks the C library returns those at the end of its room by itself. Between others
    they stay, and a busy moment leaves as much of them as it had at once.

    Returns:
        Whether anything was returned; False where the C library is not glibc.
    """
    trim = _function("malloc_trim")
    return trim is not None and bool(trim(0))


@contextmanager
def importing() -> Iterator[None]:
    """Imports in the block are not searched for garbage, neither now nor later.

    Python looks for cycles again and again while modules come by the thousand and none of them
    goes, which is a quarter of the time that Ray and PyTorch take to be imported.
    """
    modules, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if enabled:
            gc.enable()


def _set(parameter: int, value: int) -> bool:
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(parameter, value))


def _function(name: str) -> Callable[..., int] | None:
    """One of the C library's; None where it has none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
