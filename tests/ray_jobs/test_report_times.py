"""The report's times: of work that was done, and not of looking whether it was."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.ingest import IngestConfig
from ray_jobs.ingestion.manifest import Manifest, Part
from ray_jobs.pipeline import PipelineConfig, run_stage
from ray_jobs.report import StageTime, StageTimes, times
from ray_jobs.stages import Stages
from ray_jobs.storage import Storage, digest_of_json
from tests.ray_jobs.killing import wait_until

SECONDS = 8.0


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage; each look at the clock is this many seconds after the one before."""
    clock = itertools.count(0.0, SECONDS)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    return Storage.at(tmp_path)


def work(storage: Storage, *, of: object = "data", resumed: bool = False) -> float:
    with StageTimes(storage).measured("embed", of) as one:
        one.resumed = resumed
    return one.seconds


def fail(storage: Storage) -> None:
    with pytest.raises(RuntimeError), StageTimes(storage).measured("embed", "data"):
        raise RuntimeError("the network is away")


def test_a_stage_that_is_skipped_keeps_the_time_that_it_took(storage):
    assert work(storage, resumed=True) == 0.0, "nobody knows what it took"
    assert work(storage) == SECONDS
    assert work(storage, resumed=True) == SECONDS


def test_attempts_that_failed_count(storage):
    fail(storage)
    fail(storage)
    assert work(storage) == 3 * SECONDS
    fail(storage)  # to look whether it is done
    assert work(storage, resumed=True) == 3 * SECONDS


def test_work_that_is_done_anew_has_its_own_time(storage):
    fail(storage)
    assert work(storage) == 2 * SECONDS
    assert work(storage) == SECONDS
    assert work(storage, of="other data") == SECONDS


def test_a_time_that_cannot_be_noted_does_not_hide_what_went_wrong(storage, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "write_json", full)
    fail(storage)


def test_what_a_killed_attempt_took_so_far_counts(storage, monkeypatch):
    monkeypatch.setattr(times, "_NOTE_SECONDS", 0.0)
    file = f"times/embed/{digest_of_json('data')[:16]}.json"
    with StageTimes(storage).measured("embed", "data") as one:
        wait_until(lambda: storage.exists(file), "a note")
        killed = storage.read_json(file)
        assert killed["unfinished"] >= SECONDS
        one.resumed = True
    monkeypatch.undo()
    storage.write_json(file, killed)
    with StageTimes(storage).measured("embed", "data") as again:
        pass
    assert again.seconds > killed["unfinished"]


def test_stages_that_end_at_the_same_time_lose_no_note_of_each_other(storage, monkeypatch):
    write, ends = storage.write_json, iter([partial(work, Storage(storage.config), of="other")])

    def write_after_another(*note: Any) -> None:
        next(ends, lambda: None)()
        write(*note)

    monkeypatch.setattr(storage, "write_json", write_after_another)
    assert work(storage) > 0
    assert work(storage, of="other", resumed=True) == SECONDS


def test_what_older_releases_noted_counts_unless_a_stage_may_have_been_skipped(storage):
    older = {digest_of_json("data"): {"seconds": 3.0, "unfinished": 2.0}}
    storage.write_json("times.json", {"ingest": 0.02, "embed": older})
    assert work(storage, resumed=True) == 3.0
    assert work(storage) == 2.0 + SECONDS
    assert work(storage, resumed=True) == 2.0 + SECONDS
    assert work(storage, of="other data", resumed=True) == 0.0
    storage.write_json("times.json", {"ingest": 0.02, "embed": 0.1})
    assert work(storage, of="other data", resumed=True) == 0.0


def ingest_100(config: IngestConfig, storage: Storage, name: str) -> Manifest:
    """Stands in for ingestion."""
    part = Part("part-00000", f"pairs/{name}/part-00000.parquet", 100, (100,), 1000, "0")
    manifest = Manifest(name, (part,), {}, {"id": 0, "image": 0, "text": 0}, config.digest(), "0")
    manifest.save(storage)
    return manifest


def test_the_time_of_ingestion_is_that_of_each_data_set_when_it_was_read(storage, monkeypatch):
    monkeypatch.setattr("ray_jobs.stages.ingest", ingest_100)
    monkeypatch.setattr("ray_jobs.stages.check_texts", lambda *_: None)
    source = {"source": {"kind": "emoji"}}
    config = PipelineConfig.model_validate(
        {"storage": {"uri": storage.uri}, "tracking": None, "train_data": source}
    )
    run_stage(config, storage, "ingest")
    with_test = config.model_copy(update={"test_data": config.train_data})
    run_stage(with_test, storage, "ingest")
    later = Stages(with_test, storage, None)
    later.ingest()
    assert later.took == [StageTime("ingest", 2 * SECONDS, 200, "pairs")]
    storage.delete("times")
    unknown = Stages(with_test, storage, None)
    unknown.ingest()
    assert unknown.took == []
