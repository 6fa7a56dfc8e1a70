"""What a process has freed goes back to the system when it is told to."""

import os
import platform
import subprocess
import sys

import pytest

# Bytes that 120 MB of small blocks take, freed but for one in sixteen: before and after the trim.
HELD = """
import os
from pathlib import Path
from rwkv_clip.memory import trim_freed_memory
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
start = held()
blocks = [bytearray(60_000) for _ in range(2_000)]
del blocks[:: 2], blocks[:: 2], blocks[:: 2], blocks[:: 2]
before = held()
assert trim_freed_memory()
print(before - start, held() - start, len(blocks))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_between_blocks_in_use_is_returned() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELD],
        env={**os.environ, "GLIBC_TUNABLES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, blocks = map(int, done.stdout.split())
    assert before > 100e6
    assert after < 30e6
    assert blocks == 125
