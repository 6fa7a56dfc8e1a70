"""Jobs in processes of their own, which tests end without warning."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 300  # seconds, on a busy machine

_JOB = """
import sys
from ray_jobs.cluster import RayConfig, connected
from ray_jobs.storage import Storage
{imports}

with connected(RayConfig(num_cpus=2, object_store_gb=0.2)):
    {call}({config}.model_validate_json(sys.argv[2]), Storage.at(sys.argv[1]))
"""


def start_job(module: str, call: str, config: str, storage: str, settings: str) -> Any:
    """`call(config, storage)` in a process and a Ray cluster of its own."""
    home = "ray_jobs.training.config" if config == "TrainConfig" else module
    imports = f"from {module} import {call}\nfrom {home} import {config}"
    program = _JOB.format(imports=imports, call=call, config=config)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-c", program, storage, settings],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a job and its whole cluster, as a machine that loses power."""
    parent = psutil.Process(process.pid)
    for one in [*parent.children(recursive=True), parent]:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


def processes_named(part: str) -> list[psutil.Process]:
    """Processes below this one, Ray's workers among them, with this in their name or command."""
    return _named(psutil.Process(), part)


def below(process: "subprocess.Popen[bytes]", part: str) -> list[psutil.Process]:
    """The same below another process, such as a node."""
    return _named(psutil.Process(process.pid), part)


def _named(parent: psutil.Process, part: str) -> list[psutil.Process]:
    found = []
    for child in parent.children(recursive=True):
        try:
            if part in " ".join([child.name(), *child.cmdline()]):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll a condition; its value, once it is true."""
    deadline = time.monotonic() + PATIENCE
    waiting = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        waiting.wait(0.05)
    return value
