"""Lists of rows in files: JSON lines, CSV, TSV and Parquet, all read alike.

Choices:
- JSON lines and CSV are gone through once when listing, to note where every unit begins; a task
  then reads its own bytes only. Compressed files cannot be entered in the middle: a task unpacks
  what comes before its bytes too, which takes as long as its images once a file has ten million
  rows. A file with far too many is warned of.
- A line that cannot be read is a rejected row; the lines after it are not affected. So it is with
  a quote that nothing closes, which would take the lines after it into its field: many data sets
  are written as TSV without any quoting. Quoted fields of several lines are read, if they are
  closed as CSV closes them and are no longer than any text is.
- The lines of CSV end with LF, or CRLF. Where the header ends with a CR alone, as Excel's for the
  Macintosh do, they end with any of these: such a file may well have LF within its fields.
- What a file's beginning says of its rows is kept for its other units that the process reads, so
  each asks for its own bytes alone.
- A compressed file that breaks off gives the rows before the break; the break is one rejected row,
  of the last unit.
"""

import csv
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice, zip_longest
from types import NoneType
from typing import Any, get_args

import pyarrow as pa

from ray_jobs.pairs import TextColumn, clean_text
from ray_jobs.sources.base import (
    ColumnsConfig,
    FilesConfig,
    Raw,
    Rejected,
    SourceError,
    Unit,
    require_text,
)
from ray_jobs.sources.files import HIDDEN, File, WatchedFile, find_files, open_file
from ray_jobs.sources.parquet import (
    check_columns,
    check_single,
    read_footer,
    read_rows,
    row_group_units,
)
from ray_jobs.storage import S3Config

logger = logging.getLogger(__name__)

_PACKED = (".gz", ".zst", ".bz2")
_LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
LIST_SUFFIXES = (*_LINES, *(kind + packed for packed in _PACKED for kind in _LINES), ".parquet")
_LINE_BYTES = 64_000_000  # a longer line is cut, and then is no JSON
_RECORD_LINES = 1000  # at most that quotes hold together
_RECORD_BYTES = 10_000_000  # of them after the first
_BLOCK_BYTES = 1 << 20
_SAMPLE_ROWS = 1000  # looked at for the names of columns
_ANY_SIZE = 1 << 62
_MANY_UNITS = 1000  # of a packed file
_KEPT_FILES = 64  # of whose beginnings is known what they are; several are listed at a time
# With their ends, where a CR is one. Several, also before an LF, are the end of one line: so some
# write CRLF on Windows.
_CR_LINES = re.compile(rb"[^\r\n]*+(?:\r+\n?|\n)|[^\r\n]+")


def list_units(
    config: FilesConfig, check: Callable[[Unit], object], usual: Sequence[str] = ()
) -> list[Unit]:
    """The units of all list files that `path` means.

    Args:
        config: the source's configuration.
        check: is called with a unit of each file, several at a time.
        usual: what such lists are called in their folder; see `find_files`.

    Raises:
        SourceError: there are none, or what `check` raises.
    """
    files = find_files(config, LIST_SUFFIXES, usual=usual, hidden=HIDDEN)
    # Whoever lists wants what is there now, whatever was there a moment ago.
    _head.cache_clear()
    _sampled.cache_clear()
    for file in files:
        _check_suffix(file.uri)

    def checked(file: File) -> list[Unit]:
        units = _units_of(file, config)
        if units:
            check(units[0])
        return units

    with ThreadPoolExecutor(16) as pool:
        return [unit for some in pool.map(checked, files) for unit in some]


def present_columns(
    unit: Unit, columns: ColumnsConfig, required: str, s3: S3Config, *, warn: bool = False
) -> dict[str, str]:
    """Our names to those of a unit's file, as far as they are there.

    Any row of JSON lines may be the first with a key. So where a file has more than are looked at,
    these say only that there is what it takes, and whether there are ids.

    Args:
        unit: of the file.
        columns: what ours are called.
        required: the one of ours that must be there.
        s3: where the file is on S3.
        warn: of a given name that is not among those looked at, as it may be misspelt, and of
            values that are not taken whole.

    Raises:
        SourceError: a column is missing or there twice, there is no text among them, or a given one
            holds none.
    """
    schema = read_footer(unit.path, s3)[1] if _kind(unit.path) == "parquet" else None
    names = _names(unit, s3) if schema is None else schema.names
    seen, whole = (
        _sampled(_beginning(unit), s3) if names is None else ({name: set() for name in names}, True)
    )
    where = unit.path if whole else f"the beginning of {unit.path}"
    present = columns.present(seen, where, required, whole=whole)
    later = {name: theirs for name, theirs in present.items() if theirs not in seen}
    require_text(present.keys() - later, seen, where)
    if schema is not None:
        check_columns(schema, present, where)
    else:
        for ours, theirs in present.items():
            check_single(names or (), theirs, f"source.columns.{ours}", where)
    told = _check_values(seen, present, columns.model_fields_set, where)
    for name in sorted(later.keys() & columns.model_fields_set):
        told.append(f"source.columns.{name}: {where} has no {later[name]!r}; its later rows may")
    if warn and told:
        logger.warning("%s", "; ".join(told))
    return present


# The columns of a file, and the types of their values, if several are possible.
_Seen = dict[str, set[type]]


def _names(unit: Unit, s3: S3Config) -> list[str] | None:
    """The names of the columns of a unit's CSV file, some perhaps twice; None if it is no CSV.

    Raises:
        SourceError: it cannot be unpacked.
    """
    if _kind(unit.path) not in ("csv", "tsv"):
        return None
    try:
        return _head(_beginning(unit), s3).names
    except _BrokenFileError as error:
        raise SourceError(f"source.path: {unit.path} {error}") from error


def _beginning(unit: Unit) -> Unit:
    """The unit of all of a unit's file, the same for all of the file's units."""
    return Unit(unit.path, size=unit.size, modified=unit.modified)


@lru_cache(maxsize=_KEPT_FILES)
def _sampled(beginning: Unit, s3: S3Config) -> tuple[_Seen, bool]:
    """The columns of the beginning of a file of JSON lines; and whether these are all.

    Raises:
        SourceError: none of its rows can be read.
    """
    rows = read_list(beginning, None, s3)
    seen: _Seen = {}
    problems = []
    for _, row in islice(rows, _SAMPLE_ROWS):
        if isinstance(row, Rejected):
            problems.append(row.detail)
            continue
        for name, value in row.items():
            seen.setdefault(name, set()).add(type(value))
    if problems and not seen:
        raise SourceError(
            f"source.path: no row of {beginning.path} can be read, the first one: {problems[0]}. "
            "Takes lines of UTF-8, each a JSON object"
        )
    return seen, next(rows, None) is None


def _check_values(
    seen: _Seen, present: Mapping[str, str], given: Collection[str], where: str
) -> list[str]:
    """What is not taken of texts; raises SourceError if it is all of a given column."""
    told = []
    for ours in get_args(TextColumn):
        theirs = present.get(ours, "")
        kinds = seen.get(theirs, set()) - {NoneType}
        column = f"source.columns.{ours}: {theirs!r} of {where}"
        if list in kinds:
            told.append(f"{column} has lists, of which the first text is taken")
        elif kinds and kinds <= {dict, bool}:
            if ours in given:
                raise SourceError(f"{column} is no text. Name another column, or null for none")
            told.append(f"{column} is no text, and left out")
    return told


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
    try:
        for number, content in read(unit, s3):
            origin = f"{unit.label} row {number}"
            if isinstance(content, str):
                yield origin, Rejected("", origin, "bad_row", content)
            else:
                yield origin, content
    except _BrokenFileError as error:
        yield unit.label, Rejected("", unit.label, "unreadable", str(error))


def name_text(value: object) -> str:
    """A file's name or a URL, which Parquet may hold as plain bytes."""
    return clean_text(value, len(value)) if isinstance(value, bytes) else str(value or "")


class _BrokenFileError(Exception):
    """A compressed file that cannot be unpacked from here on."""


class _UnclosedQuoteError(Exception):
    """A quoted field that goes on for longer than any does."""


def _read_json(unit: Unit, s3: S3Config) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    # Without a look at the line after the last, which may have to be asked for.
    for number, line in enumerate(islice(_lines(unit, s3), unit.rows), unit.first):
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> Mapping[str, Any] | str:
    try:
        row = json.loads(_text(line))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"takes a JSON object, got {type(row).__name__}"


def _read_csv(unit: Unit, s3: S3Config) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    head = _head(_beginning(unit), s3)
    header = head.names
    records = iter(_Records(_lines(unit, s3, has_cr=head.has_cr), unit.path, len(header)))
    if not unit.offset:
        next(records, None)
    for number, record in enumerate(islice(records, unit.rows), unit.first):
        if isinstance(record, str):
            yield number, record
        elif len(record) != len(header):
            yield number, f"{len(record)} fields, but the header has {len(header)}"
        else:
            yield number, dict(zip(header, record, strict=True))


@dataclass(frozen=True)
class _Head:
    """What a CSV file's header tells.

    Attributes:
        names: of the columns, some perhaps twice; none if the first line is no header.
        has_cr: whether it ends with a CR alone, and so all lines may.
    """

    names: list[str]
    has_cr: bool


@lru_cache(maxsize=_KEPT_FILES)
def _head(beginning: Unit, s3: S3Config) -> _Head:
    """A CSV file's; raises _BrokenFileError."""
    records = _Records(_lines(beginning, s3, has_cr=True), beginning.path)
    first = next(iter(records), None)
    has_cr = records.ends_with_cr
    if not has_cr:  # a CR within it is no end then
        first = next(iter(_Records(_lines(beginning, s3), beginning.path)), None)
    return _Head(first if isinstance(first, list) else [], has_cr)


class _Records:
    """The CSV records of some lines, without empty ones; for what is none, what is wrong.

    Args:
        lines: with their ends.
        path: of their file.
        fields: of each record; those of the first one if absent.

    Attributes:
        position: in bytes, where the lines of the next record begin.
    """

    def __init__(self, lines: Iterator[bytes], path: str, fields: int | None = None) -> None:
        self.position = 0
        self._lines, self._fields = lines, fields
        self._delimiter = "\t" if _kind(path) == "tsv" else ","
        self._held: list[bytes] = []  # the lines of the record that is being read
        self._again: deque[bytes] = deque()  # lines that were read for a record, and are not its

    @property
    def ends_with_cr(self) -> bool:
        """Whether the record that was read last does, and no LF comes after it."""
        return bool(self._held) and self._held[-1].endswith(b"\r")

    def __iter__(self) -> Iterator[list[str] | str]:
        csv.field_size_limit(_LINE_BYTES)
        held, reader = self._held, self._reader()
        while True:
            held.clear()
            problem = None
            try:
                record = next(reader)
            except StopIteration:
                return
            except (csv.Error, _UnclosedQuoteError) as error:
                problem = f"not CSV: {error}"
            if len(held) > 1:
                problem = problem or self._not_one(record)
                if problem is not None:
                    self._again.extendleft(reversed(held[1:]))
                    del held[1:]
                    reader = self._reader()
            for line in held:
                self.position += len(line)
            if problem is not None:
                yield problem
            elif record:
                self._fields = self._fields or len(record)
                yield record

    def _reader(self) -> Iterator[list[str]]:
        return csv.reader(self._fed(), delimiter=self._delimiter)

    def _fed(self) -> Iterator[str]:
        """The lines, taken note of; raises _UnclosedQuoteError where a record has too many."""
        held, size = self._held, 0
        for line in chain(_drained(self._again), self._lines):
            size = size + len(line) if held else 0
            held.append(line)
            if size > _RECORD_BYTES or len(held) > _RECORD_LINES:
                raise _UnclosedQuoteError(f"a quote that {len(held) - 1:,} lines do not close")
            yield _text(line)

    def _not_one(self, record: Sequence[str]) -> str | None:
        """Why the lines that were read for a record are none, if they are not."""
        told = f"not CSV: a quote that takes in {len(self._held) - 1:,} lines, but"
        try:
            list(csv.reader(map(_text, self._held), delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            return f"{told} {error}"
        if self._fields is None:
            return None
        if len(record) != self._fields:
            return f"{told} then there are {len(record)} fields, and the header has {self._fields}"
        if self._delimiter == "\t" and any(self._holds_rows(field) for field in record):
            return f"{told} these are rows of their own"
        return None

    def _holds_rows(self, field: str) -> bool:
        """Whether a line of a field, after its first, looks like a whole row.

        Commas are in many texts; a tab is in few, and as many as a row has, between words, in none.
        """
        end = "\r" if self._held[0].endswith(b"\r") else "\n"
        rows = (line.split("\t") for line in field.split(end)[1:])
        return any(1 < len(row) == self._fields and all(map(str.strip, row)) for row in rows)


def _drained(lines: deque[bytes]) -> Iterator[bytes]:
    while lines:
        yield lines.popleft()


def _text(line: bytes) -> str:
    """As the codec utf-8-sig reads it, which is slow."""
    return line.decode("utf-8", "replace").removeprefix("\ufeff")


def _units_of(file: File, config: FilesConfig) -> list[Unit]:
    if _kind(file.uri) == "parquet":
        metadata, _ = read_footer(file.uri, config.s3)
        return row_group_units(file, metadata, config.unit_rows, _ANY_SIZE)
    whole = Unit(file.uri, file.label, size=file.size, modified=file.modified)
    if file.size == 0:
        return []
    starts = _row_starts(whole, config)
    if _is_packed(file.uri) and len(starts) > _MANY_UNITS:
        logger.warning(
            "%s is packed and has some %s rows; each of its %s tasks unpacks what comes before its "
            "own, so it is better unpacked, or cut",
            *(file.label, f"{len(starts) * config.unit_rows:,}", f"{len(starts):,}"),
        )
    ends = [offset for _, _, offset in starts[1:]]
    return [
        replace(whole, first=first, rows=rows, offset=offset, end=end)
        for (first, rows, offset), end in zip_longest(starts, ends)
    ]


def _row_starts(whole: Unit, config: FilesConfig) -> list[tuple[int, int | None, int]]:
    """First row, rows, and offset in bytes of each unit of a file.

    The last unit of a file that breaks off has no number of rows: it takes the break too.
    """
    is_json = _kind(whole.path) in ("jsonl", "ndjson")
    starts: list[tuple[int, int | None, int]] = []
    start = count = 0
    try:
        has_cr = not is_json and _head(_beginning(whole), config.s3).has_cr
        lines = _lines(whole, config.s3, has_cr=has_cr)
        counted = _Counted(lines) if is_json else _Records(lines, whole.path)
        rows = iter(counted)
        if not is_json:
            next(rows, None)  # the header
        start = counted.position
        for _ in rows:
            count += 1
            if count == config.unit_rows:
                starts.append((len(starts) * config.unit_rows, count, start))
                start, count = counted.position, 0
    except _BrokenFileError:
        return [*starts, (len(starts) * config.unit_rows, None, start)]
    if isinstance(counted, _Counted) and counted.blank:
        return []
    return [*starts, (len(starts) * config.unit_rows, count, start)] if count else starts


class _Counted:
    """Lines; as `position` where the next one begins, in bytes; whether all were `blank`."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self.position = 0
        self.blank = True
        self._lines = lines

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            self.position += len(line)
            self.blank = self.blank and not _text(line).strip()
            yield line


def _lines(unit: Unit, s3: S3Config, *, has_cr: bool = False) -> Iterator[bytes]:
    """Lines with their ends, from the unit's offset on; as many as are asked for.

    Args:
        unit: of the file.
        s3: where the file is on S3.
        has_cr: whether lines end with a CR too; only with an LF if not.

    Raises:
        _BrokenFileError: the file cannot be unpacked from there on.
        OSError: it does not come.
    """
    blocks = _unpacked if _is_packed(unit.path) else _blocks
    rest = b""
    for block in blocks(unit, s3):
        if has_cr:
            *lines, rest = _CR_LINES.findall(rest + block)
            yield from lines
        else:
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if len(rest) > _LINE_BYTES:
            yield rest
            rest = b""
    if rest:
        yield rest


def _blocks(unit: Unit, s3: S3Config) -> Iterator[bytes]:
    """The content of a unit's file from its offset on.

    Also what is behind the unit, if it is asked for: a quote that nothing closes is told by that.
    """
    with open_file(unit.path, s3, unit.size) as stream:
        stream.seek(unit.offset or 0)
        left = (unit.end or 0) - stream.tell()
        while block := stream.read(min(left, _BLOCK_BYTES) if left > 0 else _BLOCK_BYTES):
            yield block
            left -= len(block)


def _unpacked(unit: Unit, s3: S3Config) -> Iterator[bytes]:
    """The content of a unit's compressed file from its offset on.

    Raises:
        _BrokenFileError: it cannot be unpacked.
        OSError: it does not come.
    """
    codec = pa.Codec.detect(unit.path.lower()).name
    start = unit.offset or 0
    with (
        WatchedFile(unit.path, s3, unit.size) as file,
        pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec) as stream,
    ):
        while True:
            try:
                block = stream.read(_BLOCK_BYTES)
            except (pa.ArrowException, OSError) as error:
                if file.outage:
                    raise file.outage from error
                raise _BrokenFileError(f"breaks off: {type(error).__name__}: {error}") from error
            if not block:
                return
            if start < len(block):
                yield block[start:]
            start = max(0, start - len(block))


def _is_packed(path: str) -> bool:
    return path.lower().endswith(_PACKED)


def _kind(path: str) -> str:
    path = path.lower()
    for ending in _PACKED:
        path = path.removesuffix(ending)
    return path.rpartition(".")[2]


def _check_suffix(path: str) -> None:
    if not path.lower().endswith(LIST_SUFFIXES):
        raise SourceError(
            f"source.path: {path} is no list that can be read; takes files ending in "
            f"{', '.join(LIST_SUFFIXES)}"
        )
