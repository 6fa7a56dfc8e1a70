"""A real MLflow server that is away while a run is written."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ray_jobs.storage import Storage
from ray_jobs.tracking import Tracker, TrackingConfig
from tests.ray_jobs.clusters import free_port, responds
from tests.ray_jobs.figures import AddFigures, Figures
from tests.ray_jobs.killing import kill_all, wait_until

RECORDS = [{"step": float(step), "loss": 5.0 - step, "seconds": 1.0} for step in range(1, 6)]


def serve(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_until(
        lambda: process.poll() is not None or responds(f"http://127.0.0.1:{port}/health"), "MLflow"
    )
    assert process.poll() is None, (folder / "server.log").read_text()
    return process


@pytest.mark.chaos
def test_mlflow_is_away_for_a_while_and_gets_every_step_once(
    tmp_path: Path, figures: AddFigures, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    config = TrackingConfig(uri=f"http://127.0.0.1:{port}", system_metrics_seconds=None)
    storage = Storage.at(tmp_path / "storage")
    server = serve(tmp_path, port)
    try:
        with Tracker(config, storage, {}, "a run") as tracked, tracked.stage("train") as run:
            run.step(RECORDS[0])
            kill_all(server)
            for record in RECORDS[1:4]:
                run.step(record)  # nothing fails
            server = serve(tmp_path, port)
            back = time.monotonic()
            run.history(RECORDS)
            seconds = time.monotonic() - back
            run_id = run.run_id
        client = MlflowClient(tracking_uri=config.uri)
        assert run_id is not None
        steps = [metric.step for metric in client.get_metric_history(run_id, "loss")]
        assert client.get_run(run_id).info.status == "FINISHED"
    finally:
        kill_all(server)
    assert "training goes on, and they are logged when it is back" in caplog.text
    lost, twice = len(set(range(1, 6)) - set(steps)), len(steps) - len(set(steps))
    figures(
        Figures("MLflow away during training", lost, twice, "no work; 4 steps came later", seconds)
    )
    assert (lost, twice) == (0, 0)
