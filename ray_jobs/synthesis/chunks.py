"""Chunks: the rows that are described together, redone together, and published together.

A chunk is a run of rows of one part. Its descriptions are a file whose name follows from part and
position, so a chunk that was done twice is there once. When all chunks of a part are there they
become one table beside the part, with the same rows in the same order:

    descriptions/NAME/part-00000/chunk-00003.parquet     while the part is in work
    descriptions/NAME/part-00000.parquet                 when it is done
    descriptions/NAME/manifest.json                      when all are done
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.ingest import Manifest, Part
from ray_jobs.storage import Storage

DESCRIPTION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("description", pa.string()),
        pa.field("description_source", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("seed", pa.int64()),
        pa.field("guard_reason", pa.string()),
        pa.field("guard_unsupported", pa.list_(pa.string())),
        pa.field("refused_text", pa.string()),
    ]
)
_SOURCES = ["id", "web_text", "caption", "tags", "description", "description_source"]


@dataclass(frozen=True)
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

    def file(self, name: str) -> str:
        """Where its descriptions go, for the data set of that name."""
        return f"{part_folder(name, self.part)}/chunk-{self.index:05d}.parquet"


def part_folder(name: str, part: str) -> str:
    """Where the chunks of a part are while it is in work."""
    return f"descriptions/{name}/{part}"


def part_file(name: str, part: str) -> str:
    """The table beside a part."""
    return f"descriptions/{name}/{part}.parquet"


def manifest_file(name: str) -> str:
    """What says that all parts are done."""
    return f"descriptions/{name}/manifest.json"


def chunks_of(part: Part, rows: int) -> list[Chunk]:
    """A part in chunks of so many rows, the last one shorter."""
    return [
        Chunk(part.name, part.path, index, first, min(rows, part.rows - first))
        for index, first in enumerate(range(0, part.rows, rows))
    ]


def open_work(
    storage: Storage, manifest: Manifest, rows: int
) -> tuple[list[Chunk], dict[str, list[Chunk]]]:
    """The chunks that are still to be done, and all chunks of the parts that are not sealed."""
    folder = f"descriptions/{manifest.name}"
    there = set(storage.names(folder, suffix=".parquet", recursive=True))
    unsealed = {
        part.name: chunks_of(part, rows)
        for part in manifest.parts
        if part_file(manifest.name, part.name) not in there
    }
    todo = [
        chunk
        for chunks in unsealed.values()
        for chunk in chunks
        if chunk.file(manifest.name) not in there
    ]
    return todo, unsealed


def read_sources(storage: Storage, chunk: Chunk) -> list[dict[str, Any]]:
    """The chunk's rows, without their images."""
    with storage.filesystem.open_input_file(storage.path(chunk.path)) as stream:
        file = pq.ParquetFile(stream, pre_buffer=True)
        tables, begin = [], 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if begin < chunk.first + chunk.rows and end > chunk.first:
                table = file.read_row_group(group, columns=_SOURCES)
                start = max(chunk.first - begin, 0)
                tables.append(table.slice(start, chunk.first + chunk.rows - begin - start))
            begin = end
    return list(pa.concat_tables(tables).to_pylist())


def write_chunk(
    storage: Storage, name: str, chunk: Chunk, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Publish a chunk's descriptions."""
    table = pa.Table.from_pylist(list(rows), schema=DESCRIPTION_SCHEMA)
    storage.write_table(chunk.file(name), table)


def seal(storage: Storage, name: str, chunks: Sequence[Chunk]) -> None:
    """Make one table of all chunks of a part, and remove them."""
    part = chunks[0].part
    table = pa.concat_tables(storage.read_table(chunk.file(name)) for chunk in chunks)
    storage.write_table(part_file(name, part), table)
    storage.delete(part_folder(name, part))


def tables(storage: Storage, manifest: Manifest, columns: list[str]) -> Iterator[pa.Table]:
    """The sealed descriptions, part by part."""
    for part in manifest.parts:
        yield storage.read_table(part_file(manifest.name, part.name), columns=columns)
