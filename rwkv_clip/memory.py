"""What the C library does with freed memory, which decides a CPU training step's speed.

By default glibc returns every large block to the system when it is freed, and each new one is
filled with zeros again, page by page: for activations of tens of megabytes that costs more than
the arithmetic done on them. Kept in the process, freed memory is used again as it is.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its own next use; worth a quarter of a CPU step.

    Call it once, before the work. The process's size then stays at its peak.

    Returns:
        Whether the C library took it; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
