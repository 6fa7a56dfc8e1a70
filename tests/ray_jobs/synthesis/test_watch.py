"""What is remembered of engines that ended, and what follows from it."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ray_jobs.beside import Beside
from ray_jobs.storage import Storage
from ray_jobs.synthesis import run
from ray_jobs.synthesis.watch import (
    ALONE_BEGIN,
    CAREFUL_BEGIN,
    MAX_FINDING_DEATHS,
    MAX_ROW_DEATHS,
    MAX_STARTS,
    Watch,
    _Watch,
)
from ray_jobs.synthesis.worker import ChunkWorker, Patience, _Pulse

CHUNK = "descriptions/train/part-00000/chunk-00000.parquet"


def test_a_chunk_that_is_begun_again_was_lost_once():
    watch = _Watch()
    watch.begin(CHUNK, "first")
    assert watch.incidents() == []
    watch.begin(CHUNK, "second")
    (incident,) = watch.incidents()
    assert (incident["kind"], incident["chunk"]) == ("engine_lost", CHUNK)


def test_an_engine_that_ends_itself_says_why():
    watch = _Watch()
    watch.begin(CHUNK, "first")
    watch.last_words("first", "engine_hung", "no answer in 300 s")
    watch.begin(CHUNK, "second")
    assert watch.incidents()[0]["kind"] == "engine_hung"
    assert watch.incidents()[0]["detail"] == "no answer in 300 s"


def test_a_finished_chunk_leaves_nothing_behind():
    watch = _Watch()
    watch.start()
    watch.begin(CHUNK, "first")
    watch.end(CHUNK)
    assert watch.start() == 1
    assert not watch.begin(CHUNK, "second").careful
    assert watch.incidents() == []


def test_the_row_that_kills_engines_is_found_and_given_up():
    watch = _Watch()
    for death in range(CAREFUL_BEGIN - 1):
        assert not watch.begin(CHUNK, f"careless {death}").careful
    for death in range(MAX_ROW_DEATHS):
        begun = watch.begin(CHUNK, f"careful {death}")
        assert begun.careful
        assert not begun.poison
        watch.row(CHUNK, f"careful {death}", "harmless")
        watch.row(CHUNK, f"careful {death}", None)
        watch.row(CHUNK, f"careful {death}", "deadly")
    assert watch.begin(CHUNK, "last").poison == {"deadly"}


def test_a_watch_that_has_forgotten_a_chunk_is_told_of_it_anew():
    watch = _Watch()
    for death in range(MAX_ROW_DEATHS):
        watch.row(CHUNK, f"careful {death}", "deadly")
        begun = watch.begin(CHUNK, f"careful {death + 1}")
        assert begun.careful
    assert begun.poison == {"deadly"}
    assert len(watch.incidents()) == MAX_ROW_DEATHS


def test_a_watch_whose_process_ends_goes_on_and_the_driver_forgets_nothing(ray_cluster):
    watch = Watch()

    async def lose(worker: str) -> None:
        await watch.begin(CHUNK, worker)
        await watch.begin(CHUNK, worker)

    asyncio.run(lose("first"))
    assert len(watch.incidents()) == 1
    ray.kill(watch._actor, no_restart=False)
    asyncio.run(watch.row(CHUNK, "first", "a row"))
    asyncio.run(watch.end(CHUNK))
    assert watch.start() == 1
    asyncio.run(lose("second"))
    assert len(watch.incidents()) == 2
    watch.close()


def starting(seconds: float, ended: threading.Event, monkeypatch) -> Any:
    """A worker whose engine may start for so long; what befell it, and `ended` when it is over."""
    worker: Any = ChunkWorker.__new__(ChunkWorker)
    worker.work, worker.watch = SimpleNamespace(patience=Patience(1, seconds)), _Watch()
    monkeypatch.setattr("ray_jobs.synthesis.worker.end_process", ended.set)
    return worker


def test_an_engine_that_does_not_start_is_ended_and_told(monkeypatch):
    ended = threading.Event()
    worker = starting(0.05, ended, monkeypatch)
    with worker.starting():
        assert ended.wait(30)
    (incident,) = worker.watch.incidents()
    assert (incident["kind"], incident["detail"]) == ("engine_hung", "did not start in 0 s")


def test_an_engine_that_has_started_may_work_for_longer(monkeypatch):
    ended = threading.Event()
    with starting(0.2, ended, monkeypatch).starting():
        pass
    assert not ended.wait(0.5)


def test_a_table_that_cannot_be_written_is_told_while_chunks_are_left(monkeypatch, tmp_path):
    failed = threading.Event()
    done: list[int] = []

    def seal(*_: object) -> None:
        failed.set()
        raise OSError("SLOW_DOWN")

    def counts(*_: object) -> Iterator[dict[str, Any]]:
        for index in range(1000):
            done.append(index)
            yield {"part": f"part {index}", "rows": 1, "began": 0.0, "worker": "", "ahead": 0}
            assert failed.wait(30)

    for name, value in (
        ("seal", seal),
        ("work_items", list),
        ("arrange", lambda items, **_: items),
    ):
        monkeypatch.setattr(run, name, value)
    chunks = [SimpleNamespace(part=f"part {index}", rows=1) for index in range(1000)]
    task: Any = SimpleNamespace(
        manifest=SimpleNamespace(rows=1000, name="train"),
        beside=Beside("descriptions", "train"),
        storage=Storage.at(tmp_path),
        task=None,
        verb="describe",
        patience=Patience(1, 1),
        engines=1,
        _counts=counts,
    )
    task._sealed = partial(run.TaskRun._sealed, task)
    monkeypatch.setattr(run, "work_of", lambda chunks, least: chunks)
    watch: Any = _Watch()
    parts = {chunk.part: [chunk] for chunk in chunks}
    stream: Any = lambda items, work: nullcontext(items)  # noqa: E731
    with pytest.raises(run.SynthesisError, match=r"descriptions/train cannot be made: SLOW_DOWN"):
        list(run.TaskRun._do(task, stream, watch, chunks, parts, Counter([*parts])))
    assert len(done) < 1000


def test_rows_that_are_ahead_go_with_the_worker_that_has_died():
    ahead = run._Ahead(2)
    told = (("a", 3), ("b", 5), ("a", 4), ("c", 1))
    assert [ahead.of({"worker": worker, "ahead": rows}) for worker, rows in told] == [3, 8, 9, 5]


def starts_of(deadly: dict[str, str], watch: _Watch) -> int:
    """How often one engine is started until no chunk is lost, at most; by chunks' deadly rows."""
    left = dict(deadly)
    for started in range(100):
        if watch.start() > MAX_STARTS:
            return started
        engine = f"engine {started}"
        if together := [chunk for chunk in left if watch.begins(chunk) < ALONE_BEGIN - 1]:
            for chunk in together:
                watch.begin(chunk, engine)
            continue
        for chunk, row in list(left.items()):
            begun = watch.begin(chunk, engine)
            if row not in begun.poison:
                if begun.careful:
                    watch.row(chunk, engine, row)
                break
            watch.end(chunk)
            del left[chunk]
        if not left:
            return 100
    raise AssertionError("it never ends")


def test_one_engine_outlives_a_deadly_row_in_each_chunk_it_has_in_work():
    assert starts_of({f"chunk {at}": f"row {at}" for at in range(4)}, _Watch()) == 100


def test_an_engine_that_dies_of_every_row_is_given_up():
    watch = _Watch()
    for started in range(100):
        if watch.start() > MAX_STARTS:
            break
        watch.begin(CHUNK, f"engine {started}")
        watch.row(CHUNK, f"engine {started}", f"row {started // MAX_ROW_DEATHS}")
    assert started == MAX_STARTS + MAX_FINDING_DEATHS


def test_silence_while_somebody_waits_is_a_hang():
    hung = threading.Event()
    pulse = _Pulse(0.2, lambda silent: hung.set())
    with pulse:
        assert hung.wait(30)


def test_silence_while_nobody_waits_is_none():
    hung = threading.Event()
    pulse = _Pulse(0.05, lambda silent: hung.set())
    with pulse:
        pass
    assert not hung.wait(0.5)
