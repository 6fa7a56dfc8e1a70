"""Ingest: from a source to pairs in the storage, with a manifest that later stages build on.

A unit of the source becomes a part, by one task:
    pairs/NAME/part-00000.parquet      the pairs, in row groups of at most `row_group_rows`
    rejected/NAME/part-00000.parquet   the rows that could not be used, each with its reason
    keys/NAME/part-00000.parquet       64-bit hashes of ids, images and texts, to find duplicates
    pairs/NAME/part-00000.json         the part's record, written last
and when all parts are there and their duplicates found, `pairs/NAME/manifest.json`.

Choices:
- A part with a record is done. So a run may be killed at any moment and started again; it writes
  the same bytes to the same names. A record knows what it was made from, and a run with another
  configuration is refused instead of mixed in.
- A duplicate id loses to the first row with that id, in the order of the units. Equality is that
  of 64-bit hashes, 16 bytes a row in the driver: among 400 million ids the chance that a single
  row is dropped wrongly is 0.4 %. Duplicates' parts are rewritten without them; dropping is by id,
  so to do it twice changes nothing.
- Two texts are near duplicates when they have the same set of words, whatever the order, case,
  punctuation and numbers; texts of fewer than four words are not compared.
"""

import hashlib
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from ray.data.exceptions import ExecutionTimeoutError

from ray_jobs import job
from ray_jobs.execution import arrange, work_items
from ray_jobs.pairs import (
    PAIR_SCHEMA,
    RejectedRowError,
    RowLimits,
    clean_text,
    make_pair,
    pair_table,
    rejected_table,
)
from ray_jobs.progress import Progress
from ray_jobs.room import Need, warn_without_room
from ray_jobs.sources import (
    Raw,
    Rejected,
    Source,
    SourceConfig,
    SourceError,
    Unit,
    open_source,
)
from ray_jobs.storage import Storage, digest_of_json
from rwkv_clip.config import BaseConfig
from rwkv_clip.descriptions.words import UNSPACED

logger = logging.getLogger(__name__)

_TEXTS = [name for name in PAIR_SCHEMA.names if name != "image"]
# Of images: a row group of large ones ends before `row_group_rows`, because whoever reads or writes
# one holds all of it, and Arrow joins no more than 2 GB of a column.
_GROUP_BYTES = 64_000_000
_EARLY_ROWS = 1000  # from here on a share of rejected rows means something
_EARLY_PARTS = 3  # with too many of them; one may be a broken file, whichever comes first
_EXAMPLES = 3  # a reason
_TOLD = 500  # characters, of what was wrong with a row
_ATTEMPTS = 3  # to read a unit whose file cannot be reached
_MIN_WORDS = 4
_WORD = re.compile(rf"([{UNSPACED}]+)|([^\W\d_{UNSPACED}]+)")
# Fields of the configuration that decide how a run goes, but not which rows come out.
_RUNTIME = frozenset({"max_rejected_share", "cpus_per_task", "hang_seconds"})
_REASONS = 3  # that an error names
_CHUNK = 1 << 24
# What is looked for, in this order: the column of the keys, the reason, and the configuration's
# switch for dropping it.
_DUPLICATES: dict[str, tuple[str, str | None]] = {
    "id": ("duplicate_id", None),
    "image": ("duplicate_image", "drop_duplicate_images"),
    "text": ("near_duplicate_text", "drop_near_duplicate_texts"),
}
_KEYS_SCHEMA = pa.schema([(name, pa.uint64()) for name in ("id", "image", "text")])

Hashes = npt.NDArray[np.uint64]

SUMMARY = "read a source's pairs into the storage, setting aside what cannot be used"
configure = job.configure
run = partial(job.run_stage, "ingest")


class IngestError(RuntimeError):
    """Ingestion cannot go on, or what it made cannot be used."""


class LimitsConfig(BaseConfig):
    """What a row may be at most; see RowLimits."""

    image_bytes: PositiveInt = Field(RowLimits.image_bytes, description="of the encoded file")
    image_pixels: PositiveInt = Field(RowLimits.image_pixels, description="width times height")
    text_characters: PositiveInt = Field(
        RowLimits.text_characters, description="of a text; a longer one is cut"
    )
    min_side: PositiveInt = Field(RowLimits.min_side, description="shorter side in pixels")
    decode: bool = Field(RowLimits.decode, description="decode images in full, not headers only")

    def row_limits(self) -> RowLimits:
        """As `make_pair` takes them."""
        return RowLimits(**self.model_dump())


class IngestConfig(BaseConfig):
    """What is ingested, and how."""

    source: SourceConfig = Field(description="where the pairs come from")
    limits: LimitsConfig = LimitsConfig()
    max_rejected_share: float = Field(
        0.2, ge=0, le=1, description="with a larger share of unusable rows the job stops"
    )
    row_group_rows: PositiveInt = Field(
        256, description="rows in a Parquet row group; fewer where images are large"
    )
    drop_duplicate_images: bool = Field(False, description="keep one pair of those of one image")
    drop_near_duplicate_texts: bool = Field(
        False, description="keep one pair of those whose web texts have the same words"
    )
    cpus_per_task: NonNegativeFloat = Field(1.0, description="CPUs that a task holds")
    hang_seconds: PositiveFloat = Field(
        7200.0, description="without any part done for so long the job stops"
    )

    def digest(self) -> str:
        """Over everything that decides which rows come out."""
        source = self.source.model_dump(mode="json", exclude=set(self.source.runtime))
        chosen = self.model_dump(mode="json", exclude={"source", *_RUNTIME})
        return digest_of_json({"format": self.source.format, "source": source, **chosen})


@dataclass(frozen=True)
class Part:
    """A file of pairs.

    Attributes:
        name: its stem, which every later stage keeps: `part-00000`.
        path: the Parquet file's name in the storage.
        row_groups: rows in each row group, in order.
        bytes: the Parquet file's size.
        digest: over all that is in it, in its order.
    """

    name: str
    path: str
    rows: int
    row_groups: tuple[int, ...]
    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The pairs of a data set.

    Attributes:
        name: the data set's, such as `train`.
        parts: in the order of the units; a part without a row is left out.
        rejected: rows that could not be used, by reason, dropped duplicates included.
        duplicates: rows that repeat an earlier one's `id`, `image` or (nearly) `text`, whether or
            not they were dropped.
        config_digest: of the configuration that made it.
        data_digest: over all pairs in their order: ids, images and texts.
    """

    name: str
    parts: tuple[Part, ...]
    rejected: dict[str, int]
    duplicates: dict[str, int]
    config_digest: str
    data_digest: str

    @classmethod
    def from_storage(cls, storage: Storage, name: str = "train") -> "Manifest":
        """Read the manifest of a data set; raises IngestError if there is none."""
        try:
            value = storage.read_json(_manifest_name(name))
        except FileNotFoundError as error:
            raise IngestError(
                f"{storage.child_uri(_manifest_name(name))} does not exist: the data set {name!r} "
                "was not ingested to its end; run ingest"
            ) from error
        parts = tuple(
            Part(**{**part, "row_groups": tuple(part["row_groups"])}) for part in value.pop("parts")
        )
        value.pop("rows"), value.pop("bytes")
        return cls(parts=parts, **value)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def save(self, storage: Storage) -> None:
        """Write it where `from_storage` finds it."""
        value = {**asdict(self), "rows": self.rows, "bytes": self.bytes}
        storage.write_json(_manifest_name(self.name), value)


def ingest(config: IngestConfig, storage: Storage, name: str = "train") -> Manifest:
    """Bring a source's pairs into the storage; goes on where an earlier run stopped.

    Ray must be initialised. Returns at once if the manifest is there and fits the configuration.

    Raises:
        SourceError: the source cannot be used.
        IngestError: too many rows cannot be used, or the storage holds the data set from another
            configuration.
    """
    if not storage.exists(_manifest_name(name)):
        return _Ingestion(config, storage, name).run()
    manifest = Manifest.from_storage(storage, name)
    if manifest.config_digest != config.digest():
        raise _mismatch(storage, name, "was ingested with another configuration or version")
    return manifest


@dataclass
class _Record:
    """What is known of a part without opening it; a small JSON document.

    Attributes:
        config: digest of the configuration that the part was made with.
        unit: what it was made from.
        rows, row_groups, bytes, digest: as in Part.
        rejected: rows of the unit that could not be used, by reason.
        examples: a few of them, by reason.
        dropped: rows taken out when all parts were there, because they repeat others.
        drop_digest: over these; empty if there are none.
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

    @property
    def accepted(self) -> int:
        """Rows before duplicates were taken out: those of the keys."""
        return self.rows + sum(self.dropped.values())

    @property
    def seen(self) -> int:
        return self.accepted + sum(self.rejected.values())


@dataclass(frozen=True)
class _Drop:
    """Rows of a part that repeat earlier ones: hashes of their ids, and the earlier ones' parts."""

    reason: str
    ids: Hashes
    owners: npt.NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        return {"reason": self.reason, "ids": self.ids.tolist(), "owners": self.owners.tolist()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "_Drop":
        ids, owners = value["ids"], value["owners"]
        return cls(value["reason"], np.array(ids, np.uint64), np.array(owners, np.int64))


class _Ingestion:
    """One run of `ingest`."""

    def __init__(self, config: IngestConfig, storage: Storage, name: str) -> None:
        self.config, self.storage, self.name = config, storage, name
        self.config_digest = config.digest()
        self.source = open_source(config.source)
        self.records: dict[int, _Record] = {}
        # Kept up to date, because counting the records anew after each would take their square.
        self.seen = 0
        self.rejected: Counter[str] = Counter()
        self.bad_parts = 0
        self.writer = _PartWriter(
            storage, name, config.limits.row_limits(), config.row_group_rows, self.config_digest
        )

    def run(self) -> Manifest:
        if not ray.is_initialized():
            raise IngestError("Ray is not initialised; call ray.init() first")
        warn_without_room(Need(f"{self.name}_data.cpus_per_task", self.config.cpus_per_task))
        for kind in ("pairs", "rejected", "keys"):
            self.storage.delete_unfinished(f"{kind}/{self.name}")
        units = self._units()
        if not units:
            raise IngestError(f"the {self.config.source.kind} source is empty: it lists no units")
        for index, record in self._find_records(units).items():
            self._add(index, record)
        self._read(units)
        duplicates = self._drop_duplicates()
        manifest = self._manifest(duplicates)
        if manifest.rows == 0:
            raise IngestError(f"no row could be used. {self._reasons()}")
        manifest.save(self.storage)
        logger.info(
            "%s: %s pairs in %d parts, rejected %s, duplicates %s",
            *(self.name, f"{manifest.rows:,}", len(manifest.parts)),
            *(manifest.rejected, manifest.duplicates),
        )
        return manifest

    def _units(self) -> list[Unit]:
        """The source's; raises IngestError where it cannot be reached, SourceError as it does."""
        try:
            return self.source.units()
        except SourceError:
            raise
        except OSError as error:
            raise IngestError(
                f"the {self.config.source.kind} source cannot be listed ({error}). What is done is "
                "kept; when it can be reached, start the same command again"
            ) from error

    def _find_records(self, units: Sequence[Unit]) -> dict[int, _Record]:
        """The records of parts that are complete; raises IngestError if they do not fit."""
        there = {
            name for kind in ("pairs", "keys") for name in self.storage.names(f"{kind}/{self.name}")
        }
        done = [
            index
            for index in range(max(len(units), len(there)))
            if {
                self.writer.path("pairs", index, ".json"),
                self.writer.path("pairs", index),
                self.writer.path("keys", index),
            }
            <= there
        ]
        with ThreadPoolExecutor(16) as pool:
            paths = [self.writer.path("pairs", index, ".json") for index in done]
            found = [_Record(**value) for value in pool.map(self.storage.read_json, paths)]
        for index, record in zip(done, found, strict=True):
            if record.config != self.config_digest:
                problem = "was begun with another configuration or version"
            elif index >= len(units) or Unit(**record.unit) != units[index]:
                problem = f"was begun when the source was another ({Unit(**record.unit).name})"
            else:
                continue
            raise _mismatch(self.storage, self.name, problem)
        return dict(zip(done, found, strict=True))

    def _add(self, index: int, record: _Record) -> None:
        self.records[index] = record
        self.seen += record.seen
        self.rejected.update(record.rejected)
        bad = sum(record.rejected.values())
        self.bad_parts += bad > self.config.max_rejected_share * record.seen

    def _read(self, units: Sequence[Unit]) -> None:
        missing = [index for index in range(len(units)) if index not in self.records]
        sizes = [unit.rows for unit in units]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        items = [{"index": index, "unit": json.dumps(units[index].as_dict())} for index in missing]
        task = partial(_read_unit, source=self.source, writer=self.writer)
        few = min(_EARLY_PARTS, len(units))
        if missing:
            self._check_share(few)
        with Progress(f"ingest {self.name}", total, done=self.seen) as progress:
            for index, record in self._run(items, task):
                self._add(index, record)
                progress.update(record.seen, f"{self.rejected.total():,} rejected")
                self._check_share(few)
        self._check_share()

    def _drop_duplicates(self) -> dict[str, int]:
        """Take out duplicates across parts; how many rows repeat an earlier one, by kind."""
        search = _DuplicateSearch(self.storage, self.name, self.records)
        counts: dict[str, int] = {}
        drops: dict[int, list[_Drop]] = {}
        for column, (reason, switch) in _DUPLICATES.items():
            drop = switch is None or getattr(self.config, switch)
            counts[column], found = search.find(column, reason, drop)
            for one, part_drop in found.items():
                drops.setdefault(one, []).append(part_drop)
        self._check_share(duplicate_ids=counts["id"])
        counts["id"] += self.rejected["duplicate_id"]
        self._rewrite(drops)
        return counts

    def _rewrite(self, drops: Mapping[int, Sequence[_Drop]]) -> None:
        items = [
            {"index": index, "drops": json.dumps([drop.to_dict() for drop in found])}
            for index, found in drops.items()
            if self.records[index].drop_digest != _drop_digest(found)
        ]
        if not items:
            return
        with Progress(f"duplicates {self.name}", len(items), "parts") as progress:
            for index, record in self._run(items, partial(_drop_rows, writer=self.writer)):
                self.records[index] = record
                progress.update(1)

    def _run(
        self, items: Sequence[Mapping[str, Any]], task: Callable[[Any], dict[str, Any]]
    ) -> Iterator[tuple[int, _Record]]:
        """Work on the cluster, an item a task; records in the order in which they are done."""
        if not items:
            return
        dataset = work_items(items).map_batches(
            task, batch_size=1, num_cpus=self.config.cpus_per_task
        )
        arrange(dataset).context.execution_no_progress_timeout_s = self.config.hang_seconds
        try:
            for row in dataset.iter_rows():
                if row["error"]:
                    raise IngestError(row["error"])
                yield int(row["index"]), _Record(**json.loads(row["record"]))
        except ExecutionTimeoutError as error:
            raise IngestError(
                f"no part was done in {self.config.hang_seconds:g} s. What is done is kept: free "
                "CPUs, take fewer (cpus_per_task) or wait longer (hang_seconds), and start again; "
                f"or begin with {self.config.source.less_at_once} in another storage"
            ) from error

    def _check_share(self, parts: int = 0, duplicate_ids: int = 0) -> None:
        """Raises IngestError if too many rows cannot be used.

        Before all are there, that takes rows enough, and so many `parts` with too many of them.
        """
        seen, bad = self.seen, self.rejected.total() + duplicate_ids
        share = self.config.max_rejected_share
        too_early = parts and (seen < _EARLY_ROWS or self.bad_parts < parts)
        if too_early or bad <= share * seen:
            return
        raise IngestError(
            f"{bad:,} of {seen:,} rows ({100 * bad / seen:.1f} %) cannot be used, over "
            f"max_rejected_share ({100 * share:.1f} %). {self._reasons(duplicate_ids)}"
        )

    def _reasons(self, duplicate_ids: int = 0) -> str:
        """The commonest reasons with examples."""
        counts = self.rejected.copy()
        counts["duplicate_id"] += duplicate_ids
        lines = []
        for reason, count in (+counts).most_common(_REASONS):
            examples = [
                example
                for record in self.records.values()
                for example in record.examples.get(reason, [])
            ]
            told = f", such as {'; '.join(examples[:2])}" if examples else ""
            lines.append(f"{reason} ({count:,}{told})")
        if not lines:
            return "The source has no rows."
        told = f"Commonest reasons: {', '.join(lines)}."
        where = self.storage.child_uri(f"rejected/{self.name}")
        return f"{told} Each row's is in {where}" if self.rejected else told

    def _manifest(self, duplicates: dict[str, int]) -> Manifest:
        rejected = self.rejected.copy()
        for record in self.records.values():
            rejected.update(record.dropped)
        parts = tuple(
            Part(
                name=_part_name(index),
                path=self.writer.path("pairs", index),
                rows=record.rows,
                row_groups=tuple(record.row_groups),
                bytes=record.bytes,
                digest=record.digest,
            )
            for index, record in sorted(self.records.items())
            if record.rows
        )
        return Manifest(
            name=self.name,
            parts=parts,
            rejected=dict(rejected.most_common()),
            duplicates=duplicates,
            config_digest=self.config_digest,
            data_digest=digest_of_json([part.digest for part in parts]),
        )


@dataclass(frozen=True)
class _PartWriter:
    """Writes parts; what a task needs to know besides its unit."""

    storage: Storage
    name: str
    limits: RowLimits
    row_group_rows: int
    config_digest: str

    def path(self, folder: str, index: int, end: str = ".parquet") -> str:
        return f"{folder}/{self.name}/{_part_name(index)}{end}"

    def write(self, index: int, unit: Unit, source: Source) -> _Record:
        """Read a unit and write its part, the record last."""
        for end in (".parquet", "-duplicates.parquet"):
            # What is rejected may be that of another configuration whose pairs were deleted.
            self.storage.delete(self.path("rejected", index, end))
        reading = _Reading(self.limits)
        pairs = reading.pairs(source.read(unit))
        row_groups = self._write_pairs(
            self.path("pairs", index), _tables(pairs, self.row_group_rows)
        )
        if reading.rejected:
            table = rejected_table([asdict(row) for row in reading.rejected])
            self.storage.write_table(self.path("rejected", index), table)
        self.storage.write_table(self.path("keys", index), reading.keys())
        record = _Record(
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

    def drop(self, index: int, drops: Sequence[_Drop]) -> _Record:
        """Take duplicates out of a part. May be repeated after a crash between any two writes."""
        path = self.path("pairs", index)
        explained = self.path("rejected", index, "-duplicates.parquet")
        if not self.storage.exists(explained):
            # Before the part is rewritten, because afterwards nobody knows the ids.
            ids = self.storage.read_table(path, ["id"])["id"].to_pylist()
            self.storage.write_table(explained, _explain(index, ids, drops))
        dropped = {key for one in drops for key in one.ids.tolist()}
        content = _Content()

        def kept() -> Iterator[dict[str, Any]]:
            for pair in self.storage.rows(path):
                if hash_of(pair["id"].encode()) not in dropped:
                    content.add(pair, hash_of(pair["image"]))
                    yield pair

        row_groups = self._write_pairs(path, _tables(kept(), self.row_group_rows))
        record = replace(
            _Record(**self.storage.read_json(self.path("pairs", index, ".json"))),
            rows=sum(row_groups),
            row_groups=row_groups,
            bytes=self.storage.size(path),
            digest=content.hexdigest(),
            dropped={one.reason: len(one.ids) for one in drops},
            drop_digest=_drop_digest(drops),
        )
        self.storage.write_json(self.path("pairs", index, ".json"), asdict(record))
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


class _Reading:
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
        return pa.table([pa.array(column) for column in columns], schema=_KEYS_SCHEMA)

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


class _DuplicateSearch:
    """Looks for rows that repeat an earlier one, a column of the keys at a time."""

    def __init__(self, storage: Storage, name: str, records: Mapping[int, _Record]) -> None:
        self.storage, self.name = storage, name
        self.parts = np.array(sorted(records), np.int64)
        sizes = [records[part].accepted for part in self.parts.tolist()]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.left = np.ones(self.starts[-1], bool)  # rows that are not dropped yet

    def find(self, column: str, reason: str, drop: bool) -> tuple[int, dict[int, _Drop]]:
        """How many rows repeat an earlier one, and if they shall be dropped, which, by part."""
        hashes = self._load(column)
        later, first = later_duplicates(hashes, self.left)
        if not drop or len(later) == 0:
            return len(later), {}
        self.left[later] = False
        del hashes
        ids = self._load("id")[later]
        places, owners = (np.searchsorted(self.starts, at, "right") - 1 for at in (later, first))
        found = {}
        there, begins = np.unique(places, return_index=True)  # `later`, and so they, go up
        for place, begin, end in zip(there, begins, [*begins[1:], len(places)], strict=True):
            here = slice(begin, end)
            found[int(self.parts[place])] = _Drop(reason, ids[here], self.parts[owners[here]])
        return len(later), found

    def _load(self, column: str) -> Hashes:
        hashes = np.empty(self.starts[-1], np.uint64)

        def read(place: int) -> None:
            path = f"keys/{self.name}/{_part_name(int(self.parts[place]))}.parquet"
            rows = slice(self.starts[place], self.starts[place + 1])
            hashes[rows] = self.storage.read_table(path, [column])[column].to_numpy()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(len(self.parts))))
        return hashes


def later_duplicates(
    hashes: Hashes, considered: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows whose hash an earlier considered row has too, and the first such row of each.

    A hash of 0 equals nothing. Besides a sorted copy of the hashes, only the duplicates' places
    are held.
    """
    values = hashes[considered]
    values.sort()
    repeated = np.unique(values[1:][values[1:] == values[:-1]])
    del values
    repeated = repeated[repeated != 0]
    chunks = []
    for start in range(0, len(hashes), _CHUNK) if len(repeated) else ():
        chunk = hashes[start : start + _CHUNK]
        place = np.minimum(np.searchsorted(repeated, chunk), len(repeated) - 1)
        hit = (repeated[place] == chunk) & considered[start : start + _CHUNK]
        chunks.append(start + np.flatnonzero(hit))
    rows = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
    _, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
    firsts = rows[first[group]]
    later = rows != firsts
    return rows[later], firsts[later]


def hash_of(data: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash_of_words(text: str) -> int:
    """64 bits over the set of the text's words; 0 if there are too few to compare.

    In scripts without spaces, pairs of neighbouring characters stand for words; two characters
    count as one.
    """
    found = _WORD.findall(text.casefold())
    runs = {run for run, _ in found if run}
    words = {word for _, word in found if word}
    if len(words) + len(set().union(*runs)) / 2 < _MIN_WORDS:
        return 0
    words.update(run[at : at + 2] for run in runs for at in range(max(1, len(run) - 1)))
    return hash_of(" ".join(sorted(words)).encode())


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


def _read_unit(
    batch: Mapping[str, npt.NDArray[Any]], source: Source, writer: _PartWriter
) -> dict[str, Any]:
    """A task: make one part."""
    unit = Unit(**json.loads(str(batch["unit"][0])))
    return _answer(int(batch["index"][0]), unit.name, lambda at: writer.write(at, unit, source))


def _drop_rows(batch: Mapping[str, npt.NDArray[Any]], writer: _PartWriter) -> dict[str, Any]:
    """A task: take duplicates out of one part."""
    drops = [_Drop.from_dict(value) for value in json.loads(str(batch["drops"][0]))]
    index = int(batch["index"][0])
    return _answer(index, _part_name(index), lambda at: writer.drop(at, drops))


def _answer(index: int, name: str, work: Callable[[int], _Record]) -> dict[str, Any]:
    """The record of some work, or what went wrong, as a value: Ray would wrap an exception."""
    record, problem = "", ""
    for attempt in range(_ATTEMPTS):
        try:
            record, problem = json.dumps(asdict(work(index))), ""
            break
        except OSError as error:
            problem = (
                f"{name} cannot be read or written ({error}). What is done is kept; when the file "
                "can be reached, start the same command again"
            )
            if attempt < _ATTEMPTS - 1:
                time.sleep(4**attempt)
        except SourceError as error:  # found when it was listed, had it been so then
            problem = f"{error}. What is done is kept"
            break
    return {"index": [index], "record": [record], "error": [problem]}


def _explain(index: int, ids: Iterable[str], drops: Sequence[_Drop]) -> pa.Table:
    """The rejected rows for what is dropped from a part."""
    keys = [(identity, hash_of(identity.encode())) for identity in ids]
    rows = []
    for one in drops:
        owners = dict(zip(one.ids.tolist(), one.owners.tolist(), strict=True))
        rows += [
            {
                "id": identity,
                "origin": _part_name(index),
                "reason": one.reason,
                "detail": f"the first one is in {_part_name(owners[key])}",
            }
            for identity, key in keys
            if key in owners
        ]
    return rejected_table(rows)


def _mismatch(storage: Storage, name: str, problem: str) -> IngestError:
    return IngestError(
        f"{storage.child_uri(f'pairs/{name}')} {problem}. Choose another storage or name, or "
        f"delete pairs/{name}, keys/{name} and rejected/{name} in {storage.uri}"
    )


def _manifest_name(name: str) -> str:
    return f"pairs/{name}/manifest.json"


def _part_name(index: int) -> str:
    return f"part-{index:05d}"


class _Content:
    """A digest over pairs, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, pair: Mapping[str, Any], image: int) -> None:
        """Take up a pair; `image` is the hash of its image."""
        self._hash.update(json.dumps([image, *(pair[name] for name in _TEXTS)]).encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _drop_digest(drops: Sequence[_Drop]) -> str:
    return digest_of_json([[one.reason, one.ids.tolist()] for one in drops])


if __name__ == "__main__":
    job.main("ingest")
