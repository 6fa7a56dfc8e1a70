"""The peak of memory is that of all processes, and stays when they are gone."""

import json
import subprocess
import sys
from pathlib import Path

from ray_jobs import memory
from ray_jobs.memory import PeakMemory

ROOT = Path(__file__).parents[2]

MEGABYTES = 200
HOLDER = f"""
import sys
held = bytearray({MEGABYTES} * 10**6)
held[::4096] = b"x" * len(held[::4096])
print("holds it", flush=True)
sys.stdin.read()
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDER!r}])"
# In a process of its own: beside the tests' cluster, other processes end while this one looks.
WATCHER = f"""
import json, subprocess, sys
from ray_jobs.memory import PeakMemory, memory_of_tree

with PeakMemory() as watched:
    before = memory_of_tree()
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", {PARENT!r}]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout.readline() == "holds it\\n"
        during = watched.peak
        child.communicate()
    after = memory_of_tree()
print(json.dumps([before, during, after, watched.peak]))
"""


def test_the_peak_counts_what_a_process_further_down_held():
    done = subprocess.run(
        [sys.executable, "-c", WATCHER], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, during, after, peak = json.loads(done.stdout)
    assert during > before + 0.9 * MEGABYTES * 10**6
    assert after < during - 0.9 * MEGABYTES * 10**6
    assert peak == during


def test_the_watcher_looks_exactly_when_there_is_more_than_before(monkeypatch):
    looks = []
    resident = iter([100, 101, 99, 150, 150])
    watched = PeakMemory(seconds=0.0)

    def look() -> int:
        looks.append(1)
        return 7

    def sizes(_process) -> int:
        try:
            return next(resident)
        except StopIteration:
            watched._ended.set()
            return 0

    monkeypatch.setattr(memory, "_tree", lambda: [None])
    monkeypatch.setattr(memory, "_resident", sizes)
    monkeypatch.setattr(memory, "memory_of_tree", look)
    with watched:
        watched._thread.join()
    assert len(looks) == 2
