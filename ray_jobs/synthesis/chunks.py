"""Chunks: the rows that are worked on together, redone together, and published together.

A chunk is a run of rows of one part. What is written for it is a file whose name follows from part
and position, so a chunk that was done twice is there once. When all chunks of a part are there they
become one table beside the part, with the same rows in the same order:

    descriptions/NAME/part-00000/chunk-00003.parquet     while the part is in work
    descriptions/NAME/part-00000.parquet                 when it is done
    descriptions/NAME/manifest.json                      when all are done
"""

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from ray_jobs.beside import Beside, lay_over
from ray_jobs.ingestion.manifest import Manifest, Part
from ray_jobs.storage import Storage

_ROW_GROUP = 4096  # of a sealed table: what a reader of a few rows reads at least
_MOST_CHUNKS = 64  # of an item of work
_CHUNKS = "chunks"  # the column of an item's
_READERS = 16  # of tables, which an object store takes its time to give


@dataclass(frozen=True, slots=True)  # there are millions of them
class Chunk:
    """Rows first .. first + rows of a part.

    Attributes:
        part: the part's name.
        path: the part's file in the storage.
        index: the chunk's position in the part.
    """

    part: str
    path: str
    index: int
    first: int
    rows: int

    def file(self, beside: Beside) -> str:
        """Where what is written for it goes."""
        return f"{beside.part_folder(self.part)}/chunk-{self.index:05d}.parquet"


def chunks_of(part: Part, rows: int) -> list[Chunk]:
    """A part in chunks of so many rows, the last one shorter."""
    return [
        Chunk(part.name, part.path, index, first, min(rows, part.rows - first))
        for index, first in enumerate(range(0, part.rows, rows))
    ]


def work_of(chunks: Sequence[Chunk], least: int) -> list[dict[str, str]]:
    """Chunks as items of work: each one by itself, or runs of a part where there are very many.

    An item costs the driver a millisecond or two before the first can start, and memory.

    Args:
        chunks: in the order of their parts.
        least: items that there shall be, so that all who work have some until the end.
    """
    most = max(1, min(_MOST_CHUNKS, len(chunks) // least))
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        if runs and len(runs[-1]) < most and runs[-1][0].part == chunk.part:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return [{_CHUNKS: json.dumps([asdict(chunk) for chunk in run])} for run in runs]


def chunks_in(batch: Mapping[str, Any]) -> list[Chunk]:
    """The chunks of a batch of one item."""
    return [Chunk(**fields) for fields in json.loads(batch[_CHUNKS][0])]


def counts_of(done: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What was counted of an item's chunks, as a batch."""
    return {name: [counts[name] for counts in done] for name in done[0]}


def open_work(
    storage: Storage, manifest: Manifest, beside: Beside, rows: int
) -> tuple[list[Chunk], dict[str, list[Chunk]]]:
    """The chunks that are still to be done, and all chunks of the parts that are not sealed.

    What a kill left of a sealed part's chunks is removed.
    """
    there = tidy(storage, manifest, beside)
    unsealed = {
        part.name: chunks_of(part, rows)
        for part in manifest.parts
        if beside.part_file(part.name) not in there
    }
    todo = [
        chunk for chunks in unsealed.values() for chunk in chunks if chunk.file(beside) not in there
    ]
    return todo, unsealed


def tidy(storage: Storage, manifest: Manifest, beside: Beside) -> set[str]:
    """Remove chunks of sealed parts, whose rows whoever reads the whole folder would find twice.

    Returns:
        The tables that are there, with those chunks.
    """
    there = set(storage.names(beside.folder, suffix=".parquet", recursive=True))
    folders = {posixpath.dirname(name) for name in there}
    for part in manifest.parts:
        folder = beside.part_folder(part.name)
        if folder in folders and beside.part_file(part.name) in there:
            storage.delete(folder)
    return there


def read_chunk(
    storage: Storage, chunk: Chunk, columns: Sequence[str], others: Sequence[Beside] = ()
) -> list[dict[str, Any]]:
    """Columns of the chunk's rows, with what other stages wrote beside them."""
    pairs = storage.read_rows(chunk.path, ["id", *columns], chunk.first, chunk.rows)
    pairs = lay_over(storage, pairs, others, chunk.part, chunk.first, columns)
    return list(pairs.to_pylist())


def write_chunk(
    storage: Storage,
    beside: Beside,
    chunk: Chunk,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
) -> None:
    """Publish what was written for a chunk."""
    storage.write_table(chunk.file(beside), pa.Table.from_pylist(list(rows), schema=schema))


def seal(storage: Storage, beside: Beside, chunks: Sequence[Chunk]) -> None:
    """Make one table of all chunks of a part, unless another run has, and remove them.

    Raises:
        FileNotFoundError: a chunk is not there.
    """
    part = chunks[0].part
    sealed = beside.part_file(part)
    try:
        if not storage.exists(sealed):
            table = pa.concat_tables(storage.read_table(chunk.file(beside)) for chunk in chunks)
            storage.write_table(sealed, table, row_group_size=_ROW_GROUP)
    except FileNotFoundError:
        if not storage.exists(sealed):
            raise
    storage.delete(beside.part_folder(part))


def tables(
    storage: Storage, manifest: Manifest, beside: Beside, columns: list[str]
) -> Iterator[pa.Table]:
    """The sealed tables, part by part."""

    def read(part: Part) -> pa.Table:
        return storage.read_table(beside.part_file(part.name), columns=columns)

    with ThreadPoolExecutor(_READERS) as pool:
        for at in range(0, len(manifest.parts), _READERS):
            yield from pool.map(read, manifest.parts[at : at + _READERS])
