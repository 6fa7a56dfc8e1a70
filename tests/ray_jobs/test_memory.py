"""The peak of memory is that of all processes, and stays when they are gone."""

import subprocess
import sys

from ray_jobs.memory import PeakMemory, memory_of_tree

MEGABYTES = 200
PROGRAM = f"""
import subprocess, sys
held = bytearray({MEGABYTES} * 10**6)
held[::4096] = b"x" * len(held[::4096])
print("holds it", flush=True)
sys.stdin.read()
"""


def test_the_peak_counts_what_a_process_further_down_held():
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PROGRAM!r}])"
    with PeakMemory() as memory:
        before = memory_of_tree()
        command = [sys.executable, "-c", nested]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "holds it\n"
            during = memory.peak
            child.communicate()
        after = memory_of_tree()
    assert during > before + 0.9 * MEGABYTES * 10**6
    assert after < during - 0.9 * MEGABYTES * 10**6
    assert memory.peak == during
