"""Nodes and disks that fail while pairs are described."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from ray_jobs.storage import Storage
from tests.ray_jobs.chaos.conftest import Figures
from tests.ray_jobs.chaos.runs import make_pairs, missing_and_double, pair_ids, start, written_ids
from tests.ray_jobs.clusters import cluster
from tests.ray_jobs.killing import below, wait_until
from tests.ray_jobs.synthesis.test_http import ANSWER, chat, server

ROWS, PART_ROWS, CHUNK_ROWS = 320, 160, 8
ANSWER_SECONDS = 0.1  # what a model takes


def chunk_files(storage: Storage) -> list[str]:
    return storage.names("descriptions/train", ".parquet", recursive=True)


def test_a_node_dies_while_pairs_are_described(
    ray_cluster: None, tmp_path: Path, figures: list[Figures]
) -> None:
    storage = make_pairs(tmp_path, ROWS, PART_ROWS)
    thinking = threading.Event()

    def reply(turn: int, body: Any, headers: Any) -> tuple[int, dict[str, str], bytes]:
        thinking.wait(ANSWER_SECONDS)
        return 200, {}, chat(ANSWER)

    with server(reply) as url, cluster(cpus=0) as made:
        nodes = [made.node(cpus=2), made.node(cpus=2)]
        engine = {"kind": "http", "url": url, "model": "m", "clients": 2, "cpus": 0.9}
        engine["requests_in_flight"] = 4
        settings = {"engine": engine, "chunk_rows": CHUNK_ROWS}
        job = start(made, storage, "ray_jobs.synthesize", "synthesize", "SynthesisConfig", settings)
        wait_until(lambda: job.ended() or all(below(one, "HttpChunks") for one in nodes), "workers")
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
    figures.append(Figures("node dies during synthesis", lost, twice, redone, recovered))
    assert (lost, twice) == (0, 0)
    assert 1 <= len(chunks) <= 4, json.dumps(record)  # an engine has four at a time
