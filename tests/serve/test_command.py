"""`rwkv-clip serve`, and the file for Ray Serve's own command."""

import http.client
import inspect
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from resource import RLIM_INFINITY

import httpx
import psutil
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from ray.serve._private import constants
from ray.serve.schema import ServeDeploySchema

from rwkv_clip.cli import main
from rwkv_clip.config import load_config
from serve import app, command
from serve.command import FEWER_HOPS
from serve.config import ServeConfig, ServeFile
from tests.machine import free_port
from tests.ray_jobs.killing import wait_until

ROOT = Path(__file__).parents[2]


def config_file(folder: Path, **settings: object) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"serve": settings}))
    return file


@contextmanager
def collector() -> Iterator[tuple[str, "queue.Queue[Span]"]]:
    """A server for OpenTelemetry's spans: its address, and what it gets."""
    spans: queue.Queue[Span] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        spans.put(span)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()


def _answer(response: http.client.HTTPResponse) -> tuple[int, str]:
    """The status, and the error's code."""
    return response.status, json.loads(response.read()).get("error", {}).get("code", "")


def _until_nobody_listens(address: str, headers: dict[str, str]) -> Iterator[str]:
    """The codes of the errors that a request gets, one after the other."""
    with suppress(httpx.TransportError):
        while True:
            refused = httpx.post(address, json={"input": "x"}, headers=headers, timeout=60)
            yield refused.json()["error"]["code"]


@pytest.mark.parametrize(
    ("environment", "ending", "told_again"),
    [({}, signal.SIGINT, True), (FEWER_HOPS, signal.SIGTERM, False)],
    ids=["plain, twice", "as in a pod"],
)
def test_it_serves_until_it_is_interrupted(checkpoint, tmp_path, environment, ending, told_again):
    """A second interrupt ends it at once, whatever is under way; without it that is answered."""
    port = free_port()
    tower = {"cpus": 0.1}
    file = config_file(
        tmp_path, model=str(checkpoint), port=port, image=tower, text=tower, traces=1.0
    )
    program = [sys.executable, "-m", "rwkv_clip.cli", "serve", "--config", str(file)]
    with (
        collector() as (traces_to, spans),
        subprocess.Popen(
            program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **{key: value for key, value in os.environ.items() if key not in FEWER_HOPS},
                **environment,
                "RWKV_CLIP_API_KEYS": "a-key",
                "OTEL_EXPORTER_OTLP_ENDPOINT": traces_to,
                "OTEL_BSP_SCHEDULE_DELAY": "100",  # milliseconds between exports
            },
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        before = []
        for line in process.stderr:
            before.append(line)
            if "serving at" in line:
                break
        assert "serving at" in before[-1], before
        processes = psutil.Process(process.pid).children(recursive=True)
        address = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{address}/readyz", timeout=60).status_code == 200
        body = {"input": "a heart"}
        refused = httpx.post(f"{address}/v1/embeddings", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        headers = {"Authorization": "Bearer a-key"}
        assert httpx.post(f"{address}/v1/embeddings", json=body, headers=headers).is_success
        # One request is one trace, in the ingress and in the tower.
        served = {
            "replica_handle_request ingress __call__",
            "replica_handle_request text encode",
        }
        traces: dict[bytes, set[str]] = defaultdict(set)
        while not any(served <= names for names in traces.values()):
            span = spans.get(timeout=60)
            traces[span.trace_id].add(span.name)
        listening = [
            one for one in psutil.net_connections() if one.laddr and one.laddr.port == port
        ]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
        # When it is interrupted, what came is answered, and what comes later is told.
        many = json.dumps({"input": [f"text {at}" for at in range(100)]})
        asked = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(13)]
        slow, *others = asked
        slow.putrequest("POST", "/v1/embeddings")
        for name, value in {**headers, "Content-Length": str(len(many))}.items():
            slow.putheader(name, value)
        slow.endheaders(many[:100].encode())
        for one in others:
            one.request("POST", "/v1/embeddings", many, headers)
        select.select([one.sock for one in others], [], [], 60)
        if ending == signal.SIGTERM:  # all of its processes get it, as systemd sends it
            for one in processes:
                one.send_signal(ending)
        process.send_signal(ending)
        answers = Counter(_answer(one.getresponse()) for one in others)
        assert {*answers} <= {(200, ""), (503, "ending")}
        assert answers[200, ""] >= 1
        # Whoever sends requests here is told to stop, and one that is still being read is answered.
        probe = f"{address}/readyz"
        wait_until(lambda: httpx.get(probe, timeout=60).status_code == 503, "the probe's refusal")
        assert httpx.get(probe, timeout=60).json()["error"]["code"] == "ending"
        if told_again:
            process.send_signal(ending)
        else:
            slow.send(many[100:].encode())
            assert _answer(slow.getresponse()) == (200, "")
            assert {*_until_nobody_listens(f"{address}/v1/embeddings", headers)} == {"ending"}
        told = process.stderr.read()
        assert process.wait() == 0, told
        assert process.stdout.read() == "", "Ray's words belong into its files"
    assert "those that came are answered" in told
    assert ("ended at once" in told) == told_again
    assert "RuntimeError" not in told
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


@pytest.fixture
def kept_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the command in this process, whose end is not that of the tests' cluster."""
    monkeypatch.setattr("ray.shutdown", lambda: None)


@pytest.mark.parametrize("address", ["", "auto"])
def test_sigterm_while_ray_starts_ends_it(checkpoint, tmp_path, monkeypatch, kept_cluster, address):
    monkeypatch.setenv("RAY_ADDRESS", address)

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.init", init)
    before = signal.getsignal(signal.SIGTERM)
    file = config_file(tmp_path, model=str(checkpoint), port=free_port())
    assert main(["serve", "--config", str(file)]) == 0
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": "/nowhere"}, "/nowhere is no checkpoint"),
        ({"model": "models:/nothing"}, "write models:/NAME@ALIAS"),
        ({"prot": 1}, "did you mean 'port'?"),
        ({"image": {"replicas": 3, "max_replicas": 2}}, "fewer than replicas=3"),
        ({}, "set serve.model"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(tmp_path, capsys, settings, told):
    assert main(["serve", "--config", str(config_file(tmp_path, **settings))]) == 2
    assert told in capsys.readouterr().err


def test_a_machine_that_is_too_small_is_told(
    ray_cluster, checkpoint, tmp_path, capsys, monkeypatch, kept_cluster
):
    monkeypatch.setattr("ray.init", lambda **_: None)  # the cluster that is there
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = config_file(tmp_path, model=str(checkpoint), port=free_port(), image={"cpus": 1000})
    assert main(["serve", "--config", str(file)]) == 2
    assert "the replicas hold 1000.6 CPUs and this machine has 2" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(checkpoint, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        file = config_file(tmp_path, model=str(checkpoint), port=taken.getsockname()[1])
        assert main(["serve", "--config", str(file)]) == 2
    assert "choose another one" in capsys.readouterr().err


def test_a_port_of_a_server_that_is_coming_up_is_taken(checkpoint, tmp_path, capsys):
    config = ServeConfig(port=free_port(), host="localhost")
    file = config_file(tmp_path, model=str(checkpoint), port=config.port)
    with command._claimed(config):
        assert main(["serve", "--config", str(file)]) == 2
    assert f"serve.port: 127.0.0.1:{config.port} cannot be" in capsys.readouterr().err
    with command._claimed(config):
        pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no host", "a..name"])
def test_a_host_that_this_machine_does_not_have_is_told(checkpoint, tmp_path, capsys, host):
    file = config_file(tmp_path, model=str(checkpoint), port=free_port(), host=host)
    assert main(["serve", "--config", str(file)]) == 2
    assert f"serve.host: {host} is no address of this machine" in capsys.readouterr().err


def test_haproxy_listens_everywhere_or_not_at_all(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    file = config_file(tmp_path, model=str(checkpoint), port=free_port())
    assert main(["serve", "--config", str(file)]) == 2
    assert "serve.host to 0.0.0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "connections"),
    [(1 << 20, "16384"), (20_000, "6666"), (RLIM_INFINITY, "16384")],
)
def test_haproxy_keeps_no_silent_connection_for_an_hour(monkeypatch, files, connections):
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, files))
    config = ServeConfig(request_seconds=45.5)
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    assert command._haproxys(config) == {}
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    wanted = {
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "56",
        "RAY_SERVE_HAPROXY_MAXCONN": connections,
    }
    assert command._haproxys(config) == wanted
    read = inspect.getsource(constants)  # another release of Ray may have other names
    assert all(f'"{name}"' in read for name in wanted)


def test_the_file_for_serve_run_is_one(monkeypatch, checkpoint):
    written = yaml.safe_load((ROOT / "infra/serve/emoji.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(written).applications
    assert application.import_path == f"{app.__name__}:{app.application.__name__}"
    config = load_config(ServeFile, ROOT / application.args["config"])
    assert written["http_options"]["request_timeout_s"] > config.serve.request_seconds
    (director,) = application.deployments
    assert director.name == "director"
    arguments = {"config": str(ROOT / "configs/emoji.yaml"), "serve.model": str(checkpoint)}
    assert app.application(arguments) is not None
    monkeypatch.setattr(app, "build", lambda config: config)
    arguments |= {
        "serve.search": None,
        "serve.remote": {"hosts": ["a.example"]},
        "serve.docs": False,
    }
    read = app.application({**arguments, "serve.port": "9000"}).serve
    assert (read.search, read.remote.hosts, read.docs, read.port) == (
        None,
        ("a.example",),
        False,
        9000,
    )
