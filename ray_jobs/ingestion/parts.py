"""A part of a data set: made from a unit of the source, and rid of its duplicates later."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.ingestion.duplicates import (
    KEYS_SCHEMA,
    Drop,
    digest_of,
    explain,
    hash_of,
    hash_of_words,
)
from ray_jobs.ingestion.manifest import part_name
from ray_jobs.pairs import (
    PAIR_SCHEMA,
    RejectedRowError,
    RowLimits,
    clean_text,
    make_pair,
    pair_table,
    rejected_table,
)
from ray_jobs.sources import Raw, Rejected, Source, Unit
from ray_jobs.storage import Storage

_TEXTS = [name for name in PAIR_SCHEMA.names if name != "image"]
# Of images: a row group of large ones ends before `row_group_rows`, because whoever reads or writes
# one holds all of it, and Arrow joins no more than 2 GB of a column.
_GROUP_BYTES = 64_000_000
_EXAMPLES = 3  # a reason
DUPLICATES = "-duplicates.parquet"  # ends the name of a part's rows that were taken out
_TOLD = 500  # characters, of what was wrong with a row


@dataclass
class Record:
    """What is known of a part without opening it; a small JSON document.

    Attributes:
        config: digest of the configuration that the part was made with.
        unit: what it was made from.
        rows, row_groups, bytes, digest: as in Part.
        rejected: rows of the unit that could not be used, by reason.
        examples: a few of them, by reason.
        dropped: rows taken out when all parts were there, because they repeat others.
        drop_digest: over these; empty if there are none.
        path: of the pairs' file; empty for the one that the unit was read into.
    """

    config: str
    unit: dict[str, Any]
    rows: int
    row_groups: list[int]
    bytes: int
    digest: str
    rejected: dict[str, int]
    examples: dict[str, list[str]]
    dropped: dict[str, int] = field(default_factory=dict)
    drop_digest: str = ""
    path: str = ""

    @property
    def accepted(self) -> int:
        """Rows before duplicates were taken out: those of the keys."""
        return self.rows + sum(self.dropped.values())

    @property
    def seen(self) -> int:
        return self.accepted + sum(self.rejected.values())


@dataclass(frozen=True)
class PartWriter:
    """Writes parts; what a task needs to know besides its unit."""

    storage: Storage
    name: str
    limits: RowLimits
    row_group_rows: int
    config_digest: str

    def path(self, folder: str, index: int, end: str = ".parquet") -> str:
        return f"{folder}/{self.name}/{part_name(index)}{end}"

    def write(self, index: int, unit: Unit, source: Source) -> Record:
        """Read a unit and write its part, the record last."""
        reading = Reading(self.limits)
        pairs = reading.pairs(source.read(unit))
        row_groups = self._write_pairs(
            self.path("pairs", index), _tables(pairs, self.row_group_rows)
        )
        if reading.rejected:
            table = rejected_table([asdict(row) for row in reading.rejected])
            self.storage.write_table(self.path("rejected", index), table)
        else:  # there may be those of another configuration whose pairs were deleted
            self.storage.delete(self.path("rejected", index))
        self.storage.write_table(self.path("keys", index), reading.keys())
        record = Record(
            config=self.config_digest,
            unit=unit.as_dict(),
            rows=sum(row_groups),
            row_groups=row_groups,
            bytes=self.storage.size(self.path("pairs", index)),
            digest=reading.content.hexdigest(),
            rejected=reading.reasons(),
            examples=reading.examples(),
        )
        self.storage.write_json(self.path("pairs", index, ".json"), asdict(record))
        return record

    def drop(self, index: int, drops: Sequence[Drop]) -> Record:
        """Write a part anew without duplicates, in a file of its own, and remove the other.

        May be repeated after a crash between any two writes. What another run still does with the
        part's unit changes nothing of the file that is made here.
        """
        digest = digest_of(drops)
        record = Record(**self.storage.read_json(self.path("pairs", index, ".json")))
        if record.drop_digest == digest:
            return record
        source = record.path or self.path("pairs", index)
        dropped = {key for one in drops for key in one.ids.tolist()}
        content = _Content()
        ids: list[str] = []  # of all

        def kept() -> Iterator[dict[str, Any]]:
            for pair in self.storage.rows(source):
                ids.append(pair["id"])
                if hash_of(pair["id"].encode()) not in dropped:
                    content.add(pair, hash_of(pair["image"]))
                    yield pair

        path = self.path("pairs", index, f"-{digest[:12]}.parquet")
        row_groups = self._write_pairs(path, _tables(kept(), self.row_group_rows))
        explained = self.path("rejected", index, DUPLICATES)
        self.storage.write_table(explained, explain(index, ids, drops))
        record = replace(
            record,
            path=path,
            rows=sum(row_groups),
            row_groups=row_groups,
            bytes=self.storage.size(path),
            digest=content.hexdigest(),
            dropped={one.reason: len(one.ids) for one in drops},
            drop_digest=digest,
        )
        self.storage.write_json(self.path("pairs", index, ".json"), asdict(record))
        self.storage.delete(source)
        return record

    def _write_pairs(self, path: str, tables: Iterable[pa.Table]) -> list[int]:
        """Write a file of pairs, each table a row group; how many rows each has."""
        row_groups = []
        with (
            self.storage.writing(path) as stream,
            # A dictionary of images would be built in vain.
            pq.ParquetWriter(stream, PAIR_SCHEMA, compression="zstd", use_dictionary=False) as file,
        ):
            for table in tables:
                file.write_table(table, row_group_size=self.row_group_rows)
                row_groups.append(len(table))
        return row_groups


class Reading:
    """A unit while it is read: what became of its rows."""

    def __init__(self, limits: RowLimits) -> None:
        self.limits = limits
        self.content = _Content()
        self.rejected: list[Rejected] = []
        self._seen: set[int] = set()
        self._keys: list[tuple[int, int, int]] = []

    def pairs(self, rows: Iterable[Raw | Rejected]) -> Iterator[dict[str, Any]]:
        """The pairs among the rows; the others are taken note of."""
        for row in rows:
            if isinstance(row, Rejected):
                self._reject(row.id, row.origin, row.reason, row.detail)
                continue
            try:
                yield self._pair(row)
            except RejectedRowError as error:
                self._reject(row.get("id"), row.get("origin"), error.reason, error.detail)

    def keys(self) -> pa.Table:
        """Hashes of the pairs' ids, images and texts."""
        columns = np.array(self._keys, np.uint64).reshape(-1, 3).T
        return pa.table([pa.array(column) for column in columns], schema=KEYS_SCHEMA)

    def reasons(self) -> dict[str, int]:
        return dict(Counter(row.reason for row in self.rejected).most_common())

    def examples(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for row in self.rejected:
            examples = found.setdefault(row.reason, [])
            if len(examples) < _EXAMPLES:
                examples.append(": ".join(filter(None, (row.origin or row.id, row.detail))))
        return found

    def _reject(self, *values: object) -> None:
        # What was found may be as broken as it likes; Arrow takes whole strings only.
        self.rejected.append(Rejected(*(clean_text(value, _TOLD) for value in values)))

    def _pair(self, raw: Raw) -> dict[str, Any]:
        pair = make_pair(raw, self.limits)
        key = hash_of(pair["id"].encode())
        if key in self._seen:
            raise RejectedRowError("duplicate_id", "the first one is in the same part")
        self._seen.add(key)
        image = hash_of(pair["image"])
        self.content.add(pair, image)
        self._keys.append((key, image, hash_of_words(pair["web_text"])))
        return pair


class _Content:
    """A digest over pairs, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, pair: Mapping[str, Any], image: int) -> None:
        """Take up a pair; `image` is the hash of its image."""
        self._hash.update(json.dumps([image, *(pair[name] for name in _TEXTS)]).encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _tables(pairs: Iterable[dict[str, Any]], rows: int) -> Iterator[pa.Table]:
    """Tables of so many rows, or with about _GROUP_BYTES of images; the last of what is left."""
    some: list[dict[str, Any]] = []
    size = 0
    for pair in pairs:
        some.append(pair)
        size += len(pair["image"])
        if len(some) == rows or size >= _GROUP_BYTES:
            yield pair_table(some)
            some, size = [], 0
    if some:
        yield pair_table(some)
