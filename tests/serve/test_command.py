"""`rwkv-clip serve`, and the file for Ray Serve's own command."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rwkv_clip.cli import main
from rwkv_clip.config import load_config
from serve import app
from serve.config import ServeFile
from tests.machine import free_port

ROOT = Path(__file__).parents[2]


def config_file(folder: Path, **settings: object) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"serve": settings}))
    return file


def test_it_serves_until_it_is_interrupted(checkpoint, tmp_path):
    port = free_port()
    tower = {"cpus": 0.1}
    file = config_file(tmp_path, model=str(checkpoint), port=port, image=tower, text=tower)
    command = [sys.executable, "-m", "rwkv_clip.cli", "serve", "--config", str(file)]
    environment = {**os.environ, "RWKV_CLIP_API_KEYS": "a-key"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "serving at" in line:
                break
        processes = psutil.Process(process.pid).children(recursive=True)
        address = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{address}/readyz", timeout=60).status_code == 200
        body = {"input": "a heart"}
        refused = httpx.post(f"{address}/v1/embeddings", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        headers = {"Authorization": "Bearer a-key"}
        assert httpx.post(f"{address}/v1/embeddings", json=body, headers=headers).is_success
        listening = [
            one for one in psutil.net_connections() if one.laddr and one.laddr.port == port
        ]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait() == 0, told
    assert "those that came are answered" in told
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


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


def test_a_port_that_is_taken_is_told(checkpoint, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        file = config_file(tmp_path, model=str(checkpoint), port=taken.getsockname()[1])
        assert main(["serve", "--config", str(file)]) == 2
    assert "choose another one" in capsys.readouterr().err


def test_haproxy_listens_everywhere_or_not_at_all(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    file = config_file(tmp_path, model=str(checkpoint), port=free_port())
    assert main(["serve", "--config", str(file)]) == 2
    assert "serve.host to 0.0.0.0" in capsys.readouterr().err


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
