"""What a process that runs a model is started with has an effect, and yields to who says more."""

import os
import platform
import subprocess
import sys

import pytest

from rwkv_clip.heap import kept_memory

# Faults of a process that takes and leaves 32 MiB ten times over.
FAULTS = """
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(1 << 25)
before = faults()
for _ in range(10):
    bytearray(1 << 25)
print(faults() - before)
"""


def faults(variables: dict[str, str]) -> int:
    answer = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**os.environ, "GLIBC_TUNABLES": "", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(answer.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_left_is_there_when_it_is_taken_again() -> None:
    assert faults(kept_memory(environment={})) < 100 < faults({})


def test_the_environments_own_setting_holds() -> None:
    assert kept_memory(environment={"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}) == {}


def test_a_model_on_a_gpu_needs_none_of_it() -> None:
    assert kept_memory(gpus=0.5, environment={}) == {}
