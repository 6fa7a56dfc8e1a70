"""The whole pipeline, submitted to a cluster that asks for a token, on an S3 server that fails."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs.storage import S3Config, Storage, StorageConfig
from ray_jobs.train import trained
from tests.ray_jobs.chaos.runs import missing_and_double, pair_ids, written_ids
from tests.ray_jobs.clusters import Cluster, cluster
from tests.ray_jobs.figures import AddFigures, Figures
from tests.ray_jobs.killing import below, wait_until
from tests.ray_jobs.s3_server import BUCKET, CREDENTIALS, Server, s3_server
from tests.ray_jobs.small import TRAIN
from tests.ray_jobs.synthesis.llm_server import ANSWER, chat, server

ROWS, CHUNK_ROWS, STEPS_BETWEEN = 128, 8, 4
REFUSED = 12  # requests
TOKEN = "a-token-of-this-test-alone-0123456789"
COMMAND = Path(sys.executable).with_name("rwkv-clip")


def config_file(folder: Path, s3: Server, llm: str) -> Path:
    source = {"kind": "emoji", "limit": ROWS, "unit_rows": ROWS}
    engine = {"kind": "http", "url": llm, "model": "m", "cpus": 0.2, "requests_in_flight": 2}
    config = {
        "storage": {"uri": f"s3://{BUCKET}/run", "s3": {"endpoint": s3.endpoint}},
        "train_data": {"source": source, "cpus_per_task": 0.2},
        "test_data": {"source": {**source, "vendor": "twemoji"}, "cpus_per_task": 0.2},
        "synthesis": {"engine": engine, "chunk_rows": CHUNK_ROWS},
        "train": {**TRAIN, "epochs": 8, "checkpoint_steps": STEPS_BETWEEN},
        "evaluation": {"cpus_per_worker": 0.2},
        "embed": {"cpus_per_worker": 0.2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def submit(made: Cluster, config: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [COMMAND, "submit", "pipeline", "--config", config, "--address", made.dashboard]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [str(part) for part in command], env=made.environment, stdout=stream, stderr=stream
        )


def running(job: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert job.poll() is None, log.read_text()[-6000:]
    return True


@pytest.mark.chaos
def test_a_pipeline_on_s3_outlives_503_and_a_killed_driver(
    tmp_path: Path, figures: AddFigures, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**CREDENTIALS, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    answer = (200, {}, chat(ANSWER))
    with (
        s3_server() as s3,
        server(lambda *_: answer) as llm,
        cluster(2, token=TOKEN, jobs=True) as made,
    ):
        storage = Storage(
            StorageConfig(uri=f"s3://{BUCKET}/run", s3=S3Config(endpoint=s3.endpoint))
        )
        config, log = config_file(tmp_path, s3, llm), tmp_path / "first.log"
        job = submit(made, config, log)

        def there(part: str) -> int:
            running(job, log)
            return sum(part in key for key in s3.objects())

        wait_until(lambda: there("/chunk-"), "a chunk")
        before = there("/chunk-")
        s3.refuses = lambda method, path: s3.refused < REFUSED and path.startswith(f"/{BUCKET}/run")
        wait_until(lambda: running(job, log) and s3.refused >= REFUSED, "refused requests")
        well = time.monotonic()
        wait_until(
            lambda: there("/chunk-") > before or there("descriptions/train/part-00000.parquet"),
            "what comes after",
        )
        seconds = time.monotonic() - well
        wait_until(lambda: there("/training.json"), "a checkpoint")
        for driver in below(made.nodes[0], "ray_jobs.pipeline"):
            driver.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: job.poll() is not None, "the end of what was killed")
        assert job.returncode != 0
        assert not storage.exists("train/result.json")
        log = tmp_path / "second.log"
        job = submit(made, config, log)
        wait_until(lambda: there("train/result.json") or job.poll() is not None, "the training")
        resumed = time.monotonic() - killed
        wait_until(lambda: job.poll() is not None, "the end")
        assert job.returncode == 0, log.read_text()[-6000:]
        lost, twice = missing_and_double(written_ids(storage), pair_ids(storage))
        redone = f"nothing; {s3.refused} requests were asked again"
        figures(Figures("S3 answers 503", lost, twice, redone, seconds))
        assert (lost, twice) == (0, 0)
        history: Any = trained(storage).history
        steps = [int(record["step"]) for record in history]
        missing, double = missing_and_double(
            [str(one) for one in steps], [str(one) for one in range(1, max(steps) + 1)]
        )
        redone = f"at most {STEPS_BETWEEN} steps, from the last checkpoint to the end"
        figures(Figures("job's driver killed, submitted again", missing, double, redone, resumed))
        assert (missing, double) == (0, 0)
        assert max(steps) == 8 * (ROWS // 32)
        assert "were done already" in log.read_text()
        keys = s3.objects()
    assert "run/report.html" in keys
    assert [
        key
        for key in keys
        if key.startswith("run/mlflow/artifacts/models/") and key.endswith(".safetensors")
    ]
    assert [key for key in keys if key.startswith("run/vectors/test/part-")]
