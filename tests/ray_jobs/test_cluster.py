"""What a connection to Ray does to this process."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from ray_jobs.cluster import RayConfig, connected, quieten, unwritable
from ray_jobs.storage import Storage
from rwkv_clip.cli import CommandError


def run_on_cluster(program: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, whose argument is the cluster's address."""
    return subprocess.run(
        [sys.executable, "-c", program, ray.get_runtime_context().gcs_address],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


def test_rays_own_words_are_kept_from_the_terminal_and_nobody_elses():
    own, shared = logging.StreamHandler(), logging.StreamHandler()
    module = logging.getLogger("ray.llm.a_module_with_a_handler")
    module.addHandler(own)
    module.addHandler(shared)
    logging.root.addHandler(shared)
    try:
        quieten()
        assert own.level == logging.ERROR
        assert shared.level == logging.NOTSET
    finally:
        logging.root.removeHandler(shared)
        module.handlers.clear()


def test_a_running_cluster_is_named_by_the_configuration_or_by_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert RayConfig().running() is None
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert RayConfig().running() == "127.0.0.1:6379"
    assert RayConfig(address="auto").running() == "auto"


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_that_is_terminated_tidies_up_and_says_so():
    program = """
import signal, sys
from ray_jobs.cluster import RayConfig, connected

with connected(RayConfig(address=sys.argv[1])):
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        print("tidied up")
"""
    answer = run_on_cluster(program)
    assert (answer.returncode, answer.stdout) == (143, "tidied up\n"), answer.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_that_is_terminated_while_it_waits_for_ray_says_so_too():
    program = """
import os, signal, sys, threading
import ray
from ray_jobs.cluster import RayConfig, connected

@ray.remote(num_cpus=0)
def end(process):
    os.kill(process, signal.SIGTERM)
    threading.Event().wait()

with connected(RayConfig(address=sys.argv[1])):
    ray.get(end.remote(os.getpid()))
"""
    answer = run_on_cluster(program)
    assert answer.returncode == 143, answer.stderr


def test_where_nobody_answers_that_is_told_and_signals_are_heeded_as_before(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(CommandError, match=r"RAY_ADDRESS: 127\.0\.0\.1:1 does not answer"),
        connected(RayConfig(address="127.0.0.1:1")),
    ):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_storage_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    storage = Storage.at(tmp_path / "file" / "folder")
    with pytest.raises(OSError, match="Not a directory") as caught:
        storage.write_json("run.json", {})
    told = unwritable(caught.value, storage)
    assert told is not None
    assert "storage.uri" in told
    assert unwritable(caught.value, Storage.at(tmp_path / "other")) is None
    assert unwritable(FileNotFoundError(f"no {storage.path()}"), storage) is None
