"""Ingest: from a source to pairs in the storage, with a manifest that later stages build on.

A unit of the source becomes a part, by one task:
    pairs/NAME/part-00000.parquet      the pairs, in row groups of at most `row_group_rows`; ends
                                       with the digest of what was dropped, if anything was
    rejected/NAME/part-00000.parquet   the rows that could not be used, each with its reason
    keys/NAME/part-00000.parquet       64-bit hashes of ids, images and texts, to find duplicates
    pairs/NAME/part-00000.json         the part's record, written last
and when all parts are there and their duplicates found, `pairs/NAME/manifest.json`.

Choices:
- A part with a record is done. So a run may be killed at any moment and started again; it writes
  the same bytes to the same names. A record knows what it was made from, and a run with another
  configuration is refused instead of mixed in.
- A duplicate id loses to the first row with that id, in the order of the units. Duplicates' parts
  are written anew without them, to names of their own, so that whoever still reads a unit, in
  another run or on a node that was given up, changes nothing of what is done.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy.typing as npt
import ray
import ray.data
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from ray.data.exceptions import ExecutionTimeoutError

from ray_jobs import job
from ray_jobs.execution import arrange, work_items
from ray_jobs.ingestion.duplicates import Drop, DuplicateSearch, digest_of
from ray_jobs.ingestion.manifest import IngestError, Manifest, Part, manifest_name, part_name
from ray_jobs.ingestion.parts import DUPLICATES, PartWriter, Record
from ray_jobs.pairs import RowLimits
from ray_jobs.progress import Progress
from ray_jobs.room import Need, warn_without_room
from ray_jobs.sources import Source, SourceConfig, SourceError, Unit, open_source
from ray_jobs.sources.base import shortened
from ray_jobs.storage import Storage, digest_of_json
from rwkv_clip.config import BaseConfig

logger = logging.getLogger(__name__)

_EARLY_ROWS = 1000  # from here on a share of rejected rows means something
_EARLY_PARTS = 3  # with too many of them; one may be a broken file, whichever comes first
_ATTEMPTS = 3  # to read a unit whose file cannot be reached
# Fields of the configuration that decide how a run goes, but not which rows come out.
_RUNTIME = frozenset({"max_rejected_share", "cpus_per_task", "hang_seconds"})
_REQUESTS = 16  # at a time, for small files of which there are as many as parts
_REASONS = 3  # that an error names
_TOLD_CHARACTERS = 1000  # of an error, which may quote a name of any length
# What is looked for, in this order: the column of the keys, the reason, and the configuration's
# switch for dropping it.
_DUPLICATES: dict[str, tuple[str, str | None]] = {
    "id": ("duplicate_id", None),
    "image": ("duplicate_image", "drop_duplicate_images"),
    "text": ("near_duplicate_text", "drop_near_duplicate_texts"),
}
SUMMARY = "read a source's pairs into the storage, setting aside what cannot be used"
configure = job.configure
run = partial(job.run_stage, "ingest")


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
        return self._digest(lambda path: path.rstrip("/") or path)

    def digests(self) -> frozenset[str]:
        """Those of older releases too, to which a slash at a folder's end was another folder."""
        spellings = (lambda path: path, lambda path: f"{path.rstrip('/')}/")
        return frozenset({self.digest(), *map(self._digest, spellings)})

    def _digest(self, spelt: Callable[[str], str]) -> str:
        source = self.source.model_dump(mode="json", exclude=set(self.source.runtime))
        path = source.get("path")
        if path is not None:
            source["path"] = spelt(path) if isinstance(path, str) else [spelt(one) for one in path]
        chosen = self.model_dump(mode="json", exclude={"source", *_RUNTIME})
        return digest_of_json({"format": self.source.format, "source": source, **chosen})


def ingest(config: IngestConfig, storage: Storage, name: str = "train") -> Manifest:
    """Bring a source's pairs into the storage; goes on where an earlier run stopped.

    Ray must be initialised. Returns at once if the manifest is there and fits the configuration.

    Raises:
        SourceError: the source cannot be used.
        IngestError: too many rows cannot be used, or the storage holds the data set from another
            configuration.
    """
    if not storage.exists(manifest_name(name)):
        return _Ingestion(config, storage, name).run()
    manifest = Manifest.from_storage(storage, name)
    if manifest.config_digest not in config.digests():
        raise _mismatch(storage, name, "was ingested with another configuration or version")
    return manifest


class _Ingestion:
    """One run of `ingest`."""

    def __init__(self, config: IngestConfig, storage: Storage, name: str) -> None:
        self.config, self.storage, self.name = config, storage, name
        self.config_digest, self.config_digests = config.digest(), config.digests()
        self.source = open_source(config.source)
        self.records: dict[int, Record] = {}
        # Kept up to date, because counting the records anew after each would take their square.
        self.seen = 0
        self.rejected: Counter[str] = Counter()
        self.bad_parts = 0
        self.writer = PartWriter(
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
            raise IngestError(
                f"the {self.config.source.kind} source is empty: no file that {self.name}_data."
                "source.path means has a row"
            )
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

    def _find_records(self, units: Sequence[Unit]) -> dict[int, Record]:
        """The records of parts that are complete; raises IngestError if they do not fit."""
        there = {
            name for kind in ("pairs", "keys") for name in self.storage.names(f"{kind}/{self.name}")
        }
        done = [
            index
            for index in range(max(len(units), len(there)))
            if {self.writer.path("pairs", index, ".json"), self.writer.path("keys", index)} <= there
        ]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            paths = [self.writer.path("pairs", index, ".json") for index in done]
            found = [Record(**value) for value in pool.map(self.storage.read_json, paths)]
        for index, record in zip(done, found, strict=True):
            if record.config not in self.config_digests:
                problem = "was begun with another configuration or version"
                raise _mismatch(self.storage, self.name, problem)
            then, now = Unit(**record.unit), units[index] if index < len(units) else None
            if now is None or not then.is_still(now):
                told = f"{then.name}{then.change_to(now)}"
                problem = f"was begun when the source was another ({told})"
                raise _mismatch(self.storage, self.name, problem)
        return {
            index: record
            for index, record in zip(done, found, strict=True)
            if (record.path or self.writer.path("pairs", index)) in there
        }

    def _add(self, index: int, record: Record) -> None:
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
        rows = {index: record.accepted for index, record in self.records.items()}
        search = DuplicateSearch(self.storage, self.name, rows)
        counts: dict[str, int] = {}
        drops: dict[int, list[Drop]] = {}
        for column, (reason, switch) in _DUPLICATES.items():
            drop = switch is None or getattr(self.config, switch)
            counts[column], found = search.find(column, reason, drop)
            for one, part_drop in found.items():
                drops.setdefault(one, []).append(part_drop)
        self._check_share(duplicate_ids=counts["id"])
        counts["id"] += self.rejected["duplicate_id"]
        self._rewrite(drops)
        self._clear_away(drops)
        return counts

    def _clear_away(self, dropped: Collection[int]) -> None:
        """Remove what no record means: of a crash, or of an earlier ingestion."""
        # An older release took duplicates out in place; such a part has no other file.
        anew = (index for index in dropped if self.records[index].path)
        whole = {self.writer.path("pairs", index) for index in anew}
        explained = {self.writer.path("rejected", index, DUPLICATES) for index in dropped}
        left = whole.intersection(self.storage.names(f"pairs/{self.name}"))
        left |= {*self.storage.names(f"rejected/{self.name}", DUPLICATES)} - explained
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(self.storage.delete, left))

    def _rewrite(self, drops: Mapping[int, Sequence[Drop]]) -> None:
        items = [
            {"index": index, "drops": json.dumps([drop.to_dict() for drop in found])}
            for index, found in drops.items()
            if self.records[index].drop_digest != digest_of(found)
        ]
        if not items:
            return
        with Progress(f"duplicates {self.name}", len(items), "parts") as progress:
            for index, record in self._run(items, partial(_drop_rows, writer=self.writer)):
                self.records[index] = record
                progress.update(1)

    def _run(
        self, items: Sequence[Mapping[str, Any]], task: Callable[[Any], dict[str, Any]]
    ) -> Iterator[tuple[int, Record]]:
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
                yield int(row["index"]), Record(**json.loads(row["record"]))
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
                name=part_name(index),
                path=record.path or self.writer.path("pairs", index),
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


def _read_unit(
    batch: Mapping[str, npt.NDArray[Any]], source: Source, writer: PartWriter
) -> dict[str, Any]:
    """A task: make one part."""
    unit = Unit(**json.loads(str(batch["unit"][0])))
    return _answer(int(batch["index"][0]), unit.name, lambda at: writer.write(at, unit, source))


def _drop_rows(batch: Mapping[str, npt.NDArray[Any]], writer: PartWriter) -> dict[str, Any]:
    """A task: take duplicates out of one part."""
    drops = [Drop.from_dict(value) for value in json.loads(str(batch["drops"][0]))]
    index = int(batch["index"][0])
    return _answer(index, part_name(index), lambda at: writer.drop(at, drops))


def _answer(index: int, name: str, work: Callable[[int], Record]) -> dict[str, Any]:
    """The record of some work, or what went wrong, as a value: Ray would wrap an exception."""
    record, problem = "", ""
    for attempt in range(_ATTEMPTS):
        try:
            record, problem = json.dumps(asdict(work(index))), ""
            break
        except OSError as error:
            problem = (
                f"{name} cannot be read or written ({shortened(str(error), _TOLD_CHARACTERS)}). "
                "What is done is kept; when the file can be reached, start the same command again"
            )
            if attempt < _ATTEMPTS - 1:
                time.sleep(4**attempt)
        except SourceError as error:  # found when it was listed, had it been so then
            problem = f"{error}. What is done is kept"
            break
    return {"index": [index], "record": [record], "error": [problem]}


def _mismatch(storage: Storage, name: str, problem: str) -> IngestError:
    return IngestError(
        f"{storage.child_uri(f'pairs/{name}')} {problem}. Choose another storage, or delete "
        f"pairs/{name}, keys/{name} and rejected/{name} in {storage.uri}"
    )


if __name__ == "__main__":
    job.main("ingest")
