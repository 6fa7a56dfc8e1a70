"""Chunks as items of work, one or many to an item."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.beside import DESCRIPTIONS, Beside
from ray_jobs.storage import Storage
from ray_jobs.synthesis.chunks import Chunk, chunks_in, open_work, seal, work_of, write_chunk
from ray_jobs.synthesis.turns import Turn
from ray_jobs.synthesis.worker import ChunkWorker, Patience, Work


def chunks(*counts: int) -> list[Chunk]:
    """So many of each part."""
    return [
        Chunk(f"part-{part}", f"pairs/part-{part}.parquet", at, 8 * at, 8)
        for part, count in enumerate(counts)
        for at in range(count)
    ]


def batches(items: list[dict[str, str]]) -> list[dict[str, Any]]:
    """As Ray Data hands them over."""
    return [{name: np.array([value]) for name, value in item.items()} for item in items]


@pytest.mark.parametrize(
    ("counts", "least", "lengths"),
    [
        ((3, 2), 250, [1, 1, 1, 1, 1]),  # of few, each by itself
        ((5, 1, 4), 5, [2, 2, 1, 1, 2, 2]),  # of many, runs that end with their part
        ((200,), 1, [64, 64, 64, 8]),
        ((), 250, []),
    ],
)
def test_items_hold_every_chunk_once_and_in_order(counts, least, lengths):
    todo = chunks(*counts)
    held = [chunks_in(batch) for batch in batches(work_of(todo, least))]
    assert [len(one) for one in held] == lengths
    assert [chunk for one in held for chunk in one] == todo


def test_chunks_of_an_item_that_were_done_before_its_engine_ended_are_not_done_again(tmp_path):
    class Begun:
        careful, poison = False, frozenset[str]()

    async def begin(file: str, _worker: str) -> type[Begun]:
        begun.append(file)
        return Begun

    async def begins(_file: str) -> int:
        return 0

    async def end(_file: str) -> None:
        return None

    async def together(rows: Any, _turn: Turn) -> Any:
        return rows

    begun: list[str] = []
    watch: Any = SimpleNamespace(start=lambda: 1, begins=begins, begin=begin, end=end)
    task: Any = SimpleNamespace(kind=DESCRIPTIONS)
    storage = Storage.at(tmp_path)
    work = Work(storage, "train", (), task, watch, Patience(60.0, 600.0), 1, 1)
    first, second = chunks(2)
    beside = Beside(DESCRIPTIONS, "train")
    storage.write_bytes(first.file(beside), b"done")
    worker = ChunkWorker(SimpleWork(work))  # type: ignore[arg-type]
    (batch,) = batches(work_of([first, second], 1))
    counts = asyncio.run(worker.do(batch, together))
    assert (counts["index"], counts["rows"]) == ([0, 1], [8, 8])
    assert begun == [second.file(beside)]
    assert storage.read_bytes(first.file(beside)) == b"done"


def test_what_a_kill_leaves_of_chunks_that_were_sealed_is_removed_by_the_next_run(
    tmp_path, monkeypatch
):
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    storage, beside = Storage.at(tmp_path), Beside(DESCRIPTIONS, "train")
    ids = pa.schema([pa.field("id", pa.string())])
    made = chunks(2, 1)
    for at, chunk in enumerate(made):
        write_chunk(storage, beside, chunk, [{"id": str(at)}], ids)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            seal(storage, beside, made[:2])
    parts = [SimpleNamespace(name=f"part-{at}", path="", rows=8 * (2 - at)) for at in range(2)]
    manifest: Any = SimpleNamespace(parts=parts)
    todo, unsealed = open_work(storage, manifest, beside, 8)
    assert (todo, list(unsealed)) == ([], ["part-1"])
    left = storage.names(beside.folder, suffix=".parquet", recursive=True)
    assert sorted(left) == [beside.part_file("part-0"), made[2].file(beside)]


def test_runs_at_the_same_time_seal_a_part_once(tmp_path, monkeypatch):
    def overtaken(storage: Storage, name: str, **_: Any) -> pa.Table:
        monkeypatch.setattr(Storage, "read_table", read)
        seal(storage, beside, made)
        return read(storage, name)

    read, storage, beside = Storage.read_table, Storage.at(tmp_path), Beside(DESCRIPTIONS, "train")
    ids = pa.schema([pa.field("id", pa.string())])
    made = chunks(2)
    for chunk in made:
        write_chunk(storage, beside, chunk, [{"id": "first"}], ids)
    monkeypatch.setattr(Storage, "read_table", overtaken)
    seal(storage, beside, made)
    write_chunk(storage, beside, made[1], [{"id": "late"}], ids)
    seal(storage, beside, made)
    assert storage.read_table(beside.part_file("part-0"))["id"].to_pylist() == ["first"] * 2
    assert storage.names(beside.folder, recursive=True) == [beside.part_file("part-0")]
    with pytest.raises(FileNotFoundError):
        seal(storage, beside, [Chunk("part-1", "", 0, 0, 8)])


class SimpleWork:
    """Reads and writes nothing; everything else is the work's."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)

    def read(self, chunk: Chunk) -> list[dict[str, Any]]:
        return [{"id": str(at)} for at in range(chunk.rows)]

    def write(self, chunk: Chunk, rows: Any) -> None:
        assert len(rows) == chunk.rows
