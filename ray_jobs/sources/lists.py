"""Lists of rows in files: JSON lines, CSV, TSV and Parquet, all read alike.

Choices:
- JSON lines and CSV are gone through once when listing, to note where every unit begins; a task
  then reads its own bytes only. Compressed files cannot be entered in the middle: one unit each.
- A line that cannot be read is a rejected row; the lines after it are not affected.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ray_jobs.sources.base import FilesConfig, Raw, Rejected, SourceError, Unit
from ray_jobs.sources.files import File, find_files, locate
from ray_jobs.sources.parquet import read_footer, read_rows, row_group_units
from ray_jobs.storage import S3Config

_PACKED = (".gz", ".zst", ".bz2")
_LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
LIST_SUFFIXES = (*_LINES, *(kind + packed for packed in _PACKED for kind in _LINES), ".parquet")
_LINE_BYTES = 64_000_000  # a longer line is cut, and then is no JSON
_SAMPLE_ROWS = 1000  # looked at for the names of columns
_ANY_SIZE = 1 << 62


def list_units(config: FilesConfig, suffixes: Sequence[str] = LIST_SUFFIXES) -> list[Unit]:
    """The units of all list files that `path` means; raises SourceError."""
    files = find_files(config, suffixes)
    for file in files:
        _check_suffix(file.uri)
    with ThreadPoolExecutor(8) as pool:
        units = pool.map(lambda file: _units_of(file, config), files)
        return [unit for some in units for unit in some]


def column_names(unit: Unit, s3: S3Config) -> list[str]:
    """The columns of a unit's file; for JSON lines, the keys of the file's first lines."""
    if _kind(unit.path) == "parquet":
        return list(read_footer(unit.path, s3)[1].names)
    # From the file's beginning, so that all its units are read alike.
    whole = Unit(unit.path)
    names: dict[str, None] = {}
    for (_, row), _ in zip(read_list(whole, None, s3), range(_SAMPLE_ROWS), strict=False):
        if not isinstance(row, Rejected):
            names.update(dict.fromkeys(row))
    return list(names)


def read_list(
    unit: Unit, columns: Sequence[str] | None, s3: S3Config
) -> Iterator[tuple[str, Raw | Rejected]]:
    """A unit's rows, each with its origin; Parquet files are read by `columns` only."""
    kind = _kind(unit.path)
    if kind == "parquet":
        for number, row in read_rows(unit, columns or [], s3):
            origin = f"{unit.label} row {number}"
            yield origin, Rejected("", origin, "unreadable", row) if isinstance(row, str) else row
        return
    read = _read_json if kind in ("jsonl", "ndjson") else _read_csv
    for number, content in read(unit, s3):
        origin = f"{unit.label} row {number}"
        if isinstance(content, str):
            yield origin, Rejected("", origin, "bad_row", content)
        else:
            yield origin, content


def _read_json(unit: Unit, s3: S3Config) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    number = unit.first
    for line in _lines(unit, s3):
        if unit.rows is not None and number >= unit.first + unit.rows:
            return
        if line.strip():
            yield number, _parse(line)
        number += 1


def _parse(line: bytes) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"takes a JSON object, got {type(row).__name__}"


def _read_csv(unit: Unit, s3: S3Config) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    header = next(_records(_lines(unit, s3, 0), unit.path), None)
    if not isinstance(header, list):
        return
    records = _records(_lines(unit, s3), unit.path)
    if not unit.offset:
        next(records, None)
    for number, record in enumerate(records, unit.first):
        if unit.rows is not None and number >= unit.first + unit.rows:
            return
        if isinstance(record, str):
            yield number, record
        elif len(record) != len(header):
            yield number, f"{len(record)} fields, but the header has {len(header)}"
        else:
            yield number, dict(zip(header, record, strict=True))


def _records(lines: Iterator[bytes], path: str) -> Iterator[list[str] | str]:
    """CSV records without empty lines; for one that cannot be read, what is wrong."""
    csv.field_size_limit(_LINE_BYTES)
    delimiter = "\t" if _kind(path) == "tsv" else ","
    reader = csv.reader(
        (line.decode("utf-8-sig", "replace") for line in lines), delimiter=delimiter
    )
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"not CSV: {error}"
            continue
        if record:
            yield record


def _units_of(file: File, config: FilesConfig) -> list[Unit]:
    if _kind(file.uri) == "parquet":
        metadata, _ = read_footer(file.uri, config.s3)
        return row_group_units(file, metadata, config.unit_rows, _ANY_SIZE)
    whole = Unit(file.uri, file.label, size=file.size)
    if file.size == 0:
        return []
    if file.uri.endswith(_PACKED):
        return [whole]
    starts = _row_starts(whole, config)
    return [
        Unit(file.uri, file.label, first, rows, offset, file.size) for first, rows, offset in starts
    ]


def _row_starts(whole: Unit, config: FilesConfig) -> list[tuple[int, int, int]]:
    """First row, rows, and offset in bytes of each unit of a file."""
    position = 0

    def counted() -> Iterator[bytes]:
        nonlocal position
        for line in _lines(whole, config.s3):
            position += len(line)
            yield line

    is_json = _kind(whole.path) in ("jsonl", "ndjson")
    rows = counted() if is_json else _records(counted(), whole.path)
    if not is_json:
        next(rows, None)  # the header
    starts: list[tuple[int, int, int]] = []
    start, count = position, 0
    for _ in rows:
        count += 1
        if count == config.unit_rows:
            starts.append((len(starts) * config.unit_rows, count, start))
            start, count = position, 0
    return [*starts, (len(starts) * config.unit_rows, count, start)] if count else starts


def _lines(unit: Unit, s3: S3Config, offset: int | None = None) -> Iterator[bytes]:
    """Lines from the unit's offset on, or from another."""
    filesystem, path = locate(unit.path, s3)
    start = (unit.offset or 0) if offset is None else offset
    with _open(filesystem, path, packed=unit.path.endswith(_PACKED)) as stream:
        if start:
            stream.seek(start)
        rest = b""
        while block := stream.read(1 << 20):
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
            if len(rest) > _LINE_BYTES:
                yield rest
                rest = b""
        if rest:
            yield rest


def _open(filesystem: pafs.FileSystem, path: str, packed: bool) -> pa.NativeFile:
    if packed:
        return filesystem.open_input_stream(path, compression="detect")
    return filesystem.open_input_file(path)


def _kind(path: str) -> str:
    for ending in _PACKED:
        path = path.removesuffix(ending)
    return path.rpartition(".")[2].lower()


def _check_suffix(path: str) -> None:
    if not path.endswith(LIST_SUFFIXES):
        raise SourceError(
            f"source.path: {path} is no list that can be read; takes files ending in "
            f"{', '.join(LIST_SUFFIXES)}"
        )
