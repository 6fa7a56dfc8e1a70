"""Ray clusters of several nodes on this machine, whose nodes are ended as machines are.

Every node is a `ray start` of its own, with its own raylet and object store. Ports and folders are
a cluster's own, so that it disturbs no other Ray on the machine.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions

from tests.machine import free_port
from tests.ray_jobs.killing import kill_all, wait_until

ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_STORE_BYTES = 80_000_000


@dataclass
class Cluster:
    """A cluster whose head does the book-keeping; nodes are added and killed.

    Attributes:
        address: of the GCS.
        dashboard: URL of the job server, if there is one.
        environment: of its processes, and of those that connect to it.
        folder: of its sockets and logs.
        nodes: their processes.
        agents: ports of all nodes' agents, which start jobs.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    folder: Path
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    agents: list[int] = field(default_factory=list)

    def node(self, cpus: float = 1, **resources: float) -> subprocess.Popen[bytes]:
        """Add a node, and wait until the cluster counts it."""
        before = self.alive()
        process = self.start_node([f"--address={self.address}"], cpus, resources)
        wait_until(lambda: self.alive() > before or process.poll() is not None, "a node")
        assert process.poll() is None
        return process

    def start_node(
        self, options: Sequence[str], cpus: float, resources: dict[str, float]
    ) -> subprocess.Popen[bytes]:
        """A node's processes, all below the one that is returned."""
        # Ray's default is one port for all nodes of a machine, and the second has no agent then.
        self.agents.append(free_port())
        command = [
            str(_BIN / "ray"), "start", "--block", "--disable-usage-stats", *options,
            f"--num-cpus={cpus}", "--num-gpus=0", f"--resources={json.dumps(resources)}",
            f"--object-store-memory={_STORE_BYTES}", f"--temp-dir={self.folder}",
            "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={self.agents[-1]}",
        ]  # fmt: skip
        log = (self.folder / f"node-{len(self.nodes)}.log").open("wb")
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.nodes.append(process)
        return process

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """End a node with everything on it at once, as a machine that loses power."""
        if node.poll() is None:
            kill_all(node)
        self.nodes.remove(node)

    def alive(self) -> int:
        """Nodes that the cluster counts."""
        state = GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(
                self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
            )
        )
        return sum(one["Alive"] for one in state.node_table())

    def start(self, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """A Python program that connects to this cluster."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env={**self.environment, "RAY_ADDRESS": self.address},
                cwd=ROOT,
                stdout=stream,
                stderr=stream,
            )


@contextmanager
def cluster(cpus: float = 0, *, token: str | None = None, jobs: bool = False) -> Iterator[Cluster]:
    """A cluster of a head alone.

    Args:
        cpus: of the head.
        token: that it asks for.
        jobs: whether it has a job server.
    """
    folder = Path(tempfile.mkdtemp(prefix="rc-"))  # short, for the sockets' sake
    port, dashboard = free_port(), free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{_BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token" if token else "disabled",
        "RAY_health_check_initial_delay_ms": "1000",
    }
    if token:
        environment["RAY_AUTH_TOKEN"] = token
    made = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment, folder)
    options = [
        "--head", "--node-ip-address=127.0.0.1", f"--port={port}",
        f"--dashboard-port={dashboard}", f"--include-dashboard={str(jobs).lower()}",
        f"--ray-client-server-port={free_port()}",
    ]  # fmt: skip
    try:
        head = made.start_node(options, cpus, {})
        wait_until(lambda: head.poll() is not None or _is_up(made, jobs), "the head")
        assert head.poll() is None, (folder / "node-0.log").read_text()
        yield made
    finally:
        for node in list(made.nodes):
            made.kill(node)
        shutil.rmtree(folder, ignore_errors=True)


def _is_up(made: Cluster, jobs: bool) -> bool:
    if jobs:
        agent = f"http://127.0.0.1:{made.agents[0]}/api/healthz"
        return responds(f"{made.dashboard}/api/version") and responds(agent)
    with socket.socket() as one:
        host, _, port = made.address.partition(":")
        return one.connect_ex((host, int(port))) == 0 and made.alive() > 0


def responds(url: str) -> bool:
    """Whether anything answers there, if only that it wants a token."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
