"""The memory of processes that run a model, for whoever starts one; no Ray.

A model's steps take and leave the same memory over and over. By itself the C library hands it back
to the system in between, and gets it as pages of 4 KiB, of which the processor keeps the places of
few at a time. Kept, and in large pages where the system has them for who asks, the same memory is
there at once. The measure of it is in benchmarks/README.md.
"""

import os
import sys
from collections.abc import Mapping

_VARIABLE = "GLIBC_TUNABLES"  # read as a process begins; other C libraries ignore it
_SETTINGS = {
    "hugetlb": 1,
    "mmap_threshold": 1 << 30,
    "trim_threshold": 1 << 32,
    # Arenas of other threads than the main one are cut into pieces of 64 MiB, and of large blocks
    # freed there little is taken again: a training step would need 1.7 times the memory.
    "arena_max": 1,
}


def kept_memory(gpus: float = 0, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a process is started with whose model is in the memory of the CPU.

    Args:
        gpus: that it holds; there are no variables if it has any.
        environment: whose own setting holds.
    """
    if gpus or _VARIABLE in environment:
        return {}
    settings = (f"glibc.malloc.{name}={value}" for name, value in _SETTINGS.items())
    return {_VARIABLE: ":".join(settings)}


if __name__ == "__main__":
    for name, value in kept_memory(environment={}).items():
        sys.stdout.write(f"{name}={value}\n")
