"""Parquet files, plain or as Hugging Face publishes images.

Choices:
- A unit is a run of whole row groups, or a part of a large one, of about `unit_rows` rows. Footers
  are read when listing, so a missing column or a file that is no Parquet is found before any work.
- An image column holds bytes, or the struct {bytes, path} of the `datasets` library; which of the
  two is seen in the file. A column of another type than it should be is told when listing, as its
  values would be no texts, and that of no row.
- A column may hold several texts of a pair, as a list: of strings, or of token ids of CLIP's
  tokenizer, 77 a text. The data set Kaichengalex/YFCC15M of RWKV-CLIP's authors is of the latter
  kind, with the image in `images` and 77 numbers in `texts`, the generated description:
      kind: hf_parquet
      columns: {image: images}
      texts: {column: texts, are: [description]}
- Texts may also lie beside the files, in a NumPy array with a row for each row of the files in the
  order of their names. The raw texts and captions of that data set do, [15061515, 154]:
      beside: {path: texts.npy, are: [web_text, caption]}
"""

import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any, ClassVar, Literal, Self, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from pydantic import Field, PositiveInt

from ray_jobs.pairs import RejectedRowError, clean_text, is_text, printable
from ray_jobs.sources.arrays import ArrayFile
from ray_jobs.sources.base import (
    ColumnsConfig,
    FilesConfig,
    Raw,
    Rejected,
    SourceError,
    Unit,
    UnreachableError,
    require_text,
)
from ray_jobs.sources.files import HIDDEN, File, WatchedFile, find_files
from ray_jobs.storage import S3Config
from rwkv_clip.config import BaseConfig

logger = logging.getLogger(__name__)

_BATCH_ROWS = 64  # in memory at once: encoded images are large
_UUID_BYTES = 16
_HEX = "hex:"  # begins ids of bytes that are no text
_TOKENS = 77  # a text, in columns of token ids
_SMALL_GROUP_BYTES = 64_000_000
_BUFFER_BYTES = 8_000_000  # a column
_PAUSES = (1.0, 4.0)  # seconds, when a file cannot be reached; the file system had its own before

TextName = Literal["web_text", "caption", "description"]


class ParquetColumnsConfig(ColumnsConfig):
    """Columns of a Parquet file of pairs."""

    image: str = Field("image", description="column of encoded images")
    description_source: str | None = Field(
        "description_source", description="column of where descriptions are from"
    )


class HfColumnsConfig(ParquetColumnsConfig):
    """Columns as Hugging Face's data sets usually call them."""

    web_text: str | None = Field("text", description="column of what the web said")


class TextListConfig(BaseConfig):
    """A column that holds several texts of a pair."""

    column: str = Field(description="a list of strings, or of token ids, 77 a text")
    are: tuple[TextName, ...] = Field(
        min_length=1, description="what the texts are, in order: web_text, caption, description"
    )


class BesideConfig(BaseConfig):
    """An array of texts beside the files."""

    path: str = Field(description="a .npy file of token ids, 77 a text, with a row a pair")
    are: tuple[TextName, ...] = Field(
        min_length=1, description="what the texts are, in order: web_text, caption, description"
    )


class ParquetConfig(FilesConfig):
    """Parquet files with one pair a row."""

    kind: Literal["parquet"]
    columns: ParquetColumnsConfig = ParquetColumnsConfig()
    texts: TextListConfig | None = Field(None, description="a column with several texts")
    beside: BesideConfig | None = Field(
        None, description="an array of texts that belong to the files' rows, in order"
    )
    unit_bytes: PositiveInt = Field(512_000_000, description="a task reads at most, about")

    def all_paths(self) -> tuple[str, ...]:
        return (*self.paths, *([self.beside.path] if self.beside else []))


class HfParquetConfig(ParquetConfig):
    """Parquet files of the Hugging Face hub."""

    kind: Literal["hf_parquet"]  # type: ignore[assignment]
    columns: HfColumnsConfig = HfColumnsConfig()


class ParquetSource:
    """See ParquetConfig and HfParquetConfig."""

    def __init__(self, config: ParquetConfig) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        files = find_files(self.config, (".parquet", ".pq"), hidden=HIDDEN)

        def units_of(file: File) -> list[Unit]:
            metadata, schema = read_footer(file.uri, self.config.s3)
            self._present(schema, file.uri)
            return row_group_units(file, metadata, self.config.unit_rows, self.config.unit_bytes)

        with ThreadPoolExecutor(16) as pool:
            units = [unit for units in pool.map(units_of, files) for unit in units]
        return self._placed(units, self.config.beside) if self.config.beside else units

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        _, schema = read_footer(unit.path, self.config.s3)
        present = self._present(schema, unit.path)
        columns = list(present.values())
        if self.config.texts:
            columns.append(self.config.texts.column)
        name = unit.label
        texts = self._texts_beside(unit)
        for number, row in read_rows(unit, columns, self.config.s3):
            beside = next(texts, ())
            origin = f"{name} row {number}"
            if isinstance(row, str):
                yield Rejected("", origin, "unreadable", row)
                continue
            raw = {ours: row[theirs] for ours, theirs in present.items()}
            raw["image"] = image_bytes(raw["image"])
            identity = id_text(raw.get("id", f"{name}:{number}"))
            try:
                raw.update(self._split(row, beside))
            except RejectedRowError as error:
                yield Rejected(str(identity or ""), origin, error.reason, error.detail)
                continue
            yield {**raw, "id": identity, "origin": origin}

    def _split(self, row: Mapping[str, Any], beside: Sequence[float]) -> dict[str, str]:
        """The texts of a row's list column and of its row beside; raises RejectedRowError."""
        config = self.config
        found: dict[str, str] = {}
        if config.texts:
            key = f"source.texts.column {config.texts.column!r}"
            found.update(split_texts(row[config.texts.column], config.texts.are, key))
        if config.beside:
            found.update(split_texts(beside, config.beside.are, "source.beside"))
        return found

    def _placed(self, units: Sequence[Unit], beside: BesideConfig) -> list[Unit]:
        """Units with their place among the rows of all files; raises SourceError."""
        array = self._array(beside)
        rows = [unit.rows or 0 for unit in units]
        starts = list(accumulate(rows, initial=0))
        if array.rows != starts[-1]:
            raise SourceError(
                f"source.beside.path: {array.uri} has {array.rows:,} rows and the files of "
                f"source.path have {starts[-1]:,}; give all files that the array belongs to"
            )
        return [
            replace(unit, before=at - unit.first, beside=array.sample)
            for unit, at in zip(units, starts[:-1], strict=True)
        ]

    def _array(self, beside: BesideConfig) -> ArrayFile:
        """The array beside the files; raises SourceError."""
        array = ArrayFile.open(beside.path, self.config.s3)
        if array.width != _TOKENS * len(beside.are):
            raise SourceError(
                f"source.beside.are: names {len(beside.are)} texts of {_TOKENS} numbers, and "
                f"{array.uri} has {array.width} in a row"
            )
        return array

    def _texts_beside(self, unit: Unit) -> Iterator[Sequence[float]]:
        """What lies beside a unit's rows, a row each, if anything does."""
        beside = self.config.beside
        if beside is None or unit.before is None:
            return iter(())
        array = self._array(beside)
        if array.sample != unit.beside:
            raise OSError(f"{array.uri} was changed since it was listed")
        return array.read(unit.before + unit.first, self.config.s3)

    def _present(self, schema: pa.Schema, where: str) -> dict[str, str]:
        """Our columns to the file's; raises SourceError."""
        present = self.config.columns.present(schema.names, where, "image")
        _check_image_column(_field(schema, present["image"], "source.columns.image", where), where)
        texts = self.config.texts
        if texts is not None:
            # Theirs may be called as one of ours is by default.
            several = {name for name in get_args(TextName) if present.get(name) == texts.column}
            present = {name: theirs for name, theirs in present.items() if name not in several}
        others = {name: theirs for name, theirs in present.items() if name != "image"}
        check_columns(schema, others, where, may_be_several=True)
        if texts is None and self.config.beside is None:
            require_text(present, schema.names, where)
        elif texts is not None and texts.column not in schema.names:
            raise SourceError(
                f"source.texts.column: {where} has no column {texts.column!r}; it has "
                f"{', '.join(schema.names)}"
            )
        if texts is not None:
            field = _field(schema, texts.column, "source.texts.column", where)
            _check_texts_column(field, where)
        return present


def read_footer(
    uri: str, s3: S3Config, key: str = "source.path"
) -> tuple[pq.FileMetaData, pa.Schema]:
    """A Parquet file's metadata and schema.

    Args:
        uri: of the file.
        s3: where it is on S3.
        key: of the configuration, that names it; for errors.

    Raises:
        UnreachableError: the file cannot be reached.
        SourceError: it is no Parquet file.
    """
    try:
        with WatchedFile(uri, s3) as stream:
            try:
                file = pq.ParquetFile(stream)
                return file.metadata, file.schema_arrow
            except (pa.ArrowException, OSError) as error:
                if stream.outage:
                    raise stream.outage from error
                raise SourceError(
                    f"{key}: {uri} cannot be read as Parquet: {error}. Fetch the file again, "
                    f"or leave it out of {key}"
                ) from error
    except OSError as error:
        raise UnreachableError(f"{key}: {uri} cannot be reached: {error}") from error


def row_group_units(
    file: File, metadata: pq.FileMetaData, unit_rows: int, unit_bytes: int
) -> list[Unit]:
    """A file's row groups: small neighbours put together, large ones cut into equal pieces."""
    unit = partial(Unit, file.uri, file.label, size=file.size, modified=file.modified)
    units: list[Unit] = []
    first = rows = size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if rows and (
            rows + group.num_rows > unit_rows or size + group.total_byte_size > unit_bytes
        ):
            units.append(unit(first, rows))
            first, rows, size = first + rows, 0, 0
        pieces = math.ceil(max(group.num_rows / unit_rows, group.total_byte_size / unit_bytes))
        if pieces > 1:
            ends = [group.num_rows * at // pieces for at in range(pieces + 1)]
            units += [
                unit(first + begin, end - begin) for begin, end in pairwise(ends) if end > begin
            ]
            first += group.num_rows
            continue
        rows += group.num_rows
        size += group.total_byte_size
    return [*units, unit(first, rows)] if rows else units


def read_rows(
    unit: Unit, columns: Sequence[str], s3: S3Config
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """A unit's rows by number; for rows that cannot be read, what is wrong, as a string.

    A broken page loses the rest of its row group, and no more. An outage loses nothing: after a
    pause the reading goes on at the next row.

    Raises:
        OSError: the file still cannot be reached after all pauses.
    """
    at, outages = unit.first, 0  # the next row, and how often in vain
    while True:
        try:
            for number, row in _rows_from(at, unit, columns, s3):
                yield number, row
                at, outages = number + 1, 0
            return
        except OSError as error:
            if outages == len(_PAUSES):
                raise
            logger.warning("%s cannot be reached before row %d: %s", unit.path, at, error)
            time.sleep(_PAUSES[outages])
            outages += 1


def _rows_from(
    at: int, unit: Unit, columns: Sequence[str], s3: S3Config
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """As `read_rows`, from one row of the unit on; raises OSError at the first outage."""
    with _Reader.taken(unit, columns, s3) as file:
        end = file.rows if unit.rows is None else unit.first + unit.rows
        for group, (first, after) in enumerate(pairwise(accumulate(file.sizes, initial=0))):
            number, stop, tried_at = max(first, at), min(after, end), -1
            while number < stop:
                try:
                    for row in file.read(group, number - first, stop - first):
                        yield number, row
                        number += 1
                except (pa.ArrowException, OSError) as error:
                    if file.outage:
                        raise file.outage from error
                    # What came may have been spoilt on its way; what fails twice is broken.
                    if tried_at < number:
                        tried_at = number
                        continue
                    for lost in range(number, stop):
                        yield lost, f"{type(error).__name__}: {error}"
                    number = stop


class _Reader:
    """A Parquet file while it is read: a context that keeps its place for the next unit.

    Pages can only be read from the beginning of their row group. So whoever reads a piece of a
    large one stays where it ends, and the same process's next piece, which is a later one, goes on
    from there.

    Attributes:
        rows: of the file.
        sizes: rows in each row group.
    """

    _kept: ClassVar[deque["_Reader"]] = deque(maxlen=1)

    def __init__(self, unit: Unit, columns: Sequence[str], s3: S3Config) -> None:
        """Open it; raises OSError."""
        self._made_for = _place(unit, columns, s3)
        self._columns = list(columns)
        self._stream = WatchedFile(unit.path, s3, unit.size)
        try:
            self._metadata = pq.read_metadata(self._stream)
        except BaseException:
            self._stream.close()
            raise
        self.rows = self._metadata.num_rows
        groups = range(self._metadata.num_row_groups)
        self.sizes = [self._metadata.row_group(group).num_rows for group in groups]
        self._group: int | None = None  # that is being read
        self._at = 0  # the row of it that comes next
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None  # of the batch that is being read

    @classmethod
    def taken(cls, unit: Unit, columns: Sequence[str], s3: S3Config) -> "_Reader":
        """The one that was kept, if it is of the unit's file; otherwise a new one."""
        try:
            kept = cls._kept.pop()
        except IndexError:
            return cls(unit, columns, s3)
        if kept._made_for == _place(unit, columns, s3):
            return kept
        kept._stream.close()
        return cls(unit, columns, s3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._group is not None and self._at < self.sizes[self._group]:
            self._kept.append(self)
        else:
            self._stream.close()

    @property
    def outage(self) -> OSError | None:
        """Why the file could not be read; None if what failed is in what it holds."""
        return self._stream.outage

    def read(self, group: int, begin: int, stop: int) -> Iterator[Mapping[str, Any]]:
        """The rows of a row group from one to before another, counted within it."""
        if self._group != group or begin < self._at:
            self._start(group)
        try:
            while self._at < stop:
                self._rest = self._rest or next(self._batches, None)
                if self._rest is None:
                    raise pa.ArrowInvalid(f"the row group ends before its row {self._at:,}")
                skipped = min(max(0, begin - self._at), len(self._rest))
                taken = min(stop - self._at, len(self._rest)) - skipped
                wanted = self._rest.slice(skipped, max(0, taken))
                yield from _rows_of(wanted)
                self._at += skipped + len(wanted)
                self._rest = self._rest.slice(skipped + len(wanted))
        except BaseException:
            self._group = None  # where it stands is not known
            raise

    def _start(self, group: int) -> None:
        # A small group comes by one request; of a large one no more is held, nor asked for, than
        # is decoded next.
        small = self._metadata.row_group(group).total_byte_size <= _SMALL_GROUP_BYTES
        file = pq.ParquetFile(
            self._stream,
            metadata=self._metadata,
            pre_buffer=small,
            buffer_size=0 if small else _BUFFER_BYTES,
        )
        self._group, self._at, self._rest = group, 0, None
        self._batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=self._columns)


def _place(unit: Unit, columns: Sequence[str], s3: S3Config) -> tuple[object, ...]:
    """What one _Reader can read."""
    return unit.path, unit.size, unit.modified, tuple(columns), s3


def image_bytes(value: object) -> object:
    """An image's bytes, out of the struct if there are some: one with a path alone is told so."""
    inner = value.get("bytes") if isinstance(value, Mapping) else None
    return value if inner is None else inner


def id_text(value: object) -> object:
    """Ids may be numbers, which come as fractions where some are missing, or bytes."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float | Decimal) and math.isfinite(value):
        whole = int(value)
        return str(whole) if whole == value else value
    if isinstance(value, int | uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        return _id_of_bytes(value)
    return value


def _id_of_bytes(value: bytes) -> str:
    """The text, the UUID, or hexadecimal digits; these also of a text that looks like such."""
    text = clean_text(value, len(value))
    is_whole = text.encode() == value.strip() and printable(text) == text
    if len(value) == _UUID_BYTES and not is_whole:
        return str(uuid.UUID(bytes=value))
    return text if is_text(value) and not text.startswith(_HEX) else f"{_HEX}{value.hex()}"


def split_texts(values: object, names: Sequence[str], key: str) -> dict[str, str]:
    """The texts of a list column by their names.

    Args:
        values: strings, or token ids of CLIP's tokenizer, 77 a text.
        names: what the texts are, in order.
        key: of the configuration, where they are from; for errors.

    Raises:
        RejectedRowError: some are no token ids.
    """
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values:
        return {}
    if isinstance(next((one for one in values if one is not None), None), str | None):
        return {name: text for name, text in zip(names, values, strict=False) if text}
    from rwkv_clip.tokenizer import decode

    numbers = iter(values)
    try:
        rows = {name: [int(token) for token in islice(numbers, _TOKENS)] for name in names}
        return {name: decode(tokens) for name, tokens in rows.items() if any(tokens)}
    except (TypeError, ValueError, OverflowError) as error:  # null, NaN, infinite, or unknown
        raise RejectedRowError("bad_row", f"{key}: no token ids: {error}") from error


def _rows_of(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any]]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # some writers do not check their strings
        columns = [[_value(scalar) for scalar in column] for column in batch.columns]
        names = batch.schema.names
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    yield from rows


def _value(scalar: pa.Scalar) -> Any:
    """As `as_py`, with replacement characters for what is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pa.ListScalar):
            return [_value(one) for one in scalar.values]
        if isinstance(scalar, pa.StructScalar):
            return {name: _value(scalar[name]) for name in scalar}
        if isinstance(scalar, pa.DictionaryScalar | pa.ExtensionScalar):
            return _value(scalar.value)
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")


def _check_image_column(field: pa.Field, where: str) -> None:
    kind = field.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not is_bytes(kind):
        raise SourceError(
            f"source.columns.image: {field.name!r} of {where} is {field.type}; takes binary, or a "
            "struct {bytes, path}. For a column of URLs use kind: urls"
        )


def check_columns(
    schema: pa.Schema, present: Mapping[str, str], where: str, *, may_be_several: bool = False
) -> None:
    """Raises SourceError if a column's values are of a type that ours are not made of.

    Args:
        schema: of a file.
        present: our names to its columns.
        where: the file, for errors.
        may_be_several: whether the configuration takes columns of several texts.
    """
    for ours, theirs in present.items():
        key = f"source.columns.{ours}"
        told = _field(schema, theirs, key, where).type
        if _fits(ours, _plain(told)):
            continue
        takes = {"id": "text or whole numbers", "tags": "text, or a list of texts"}.get(
            ours, "text"
        )
        several = f"{{column: {theirs}, are: [{ours}]}}"
        hint = (
            f"Several texts of a pair are given by source.texts: {several}. "
            if may_be_several and item_type(told) is not None and ours in get_args(TextName)
            else ""
        )
        raise SourceError(
            f"{key}: {theirs!r} of {where} is {told}; takes {takes}. {hint}Name another column, or "
            "null for none"
        )


def _fits(ours: str, kind: pa.DataType) -> bool:
    if pt.is_null(kind) or is_string(kind) or is_bytes(kind):
        return True
    if ours == "id":
        return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind))
    items = item_type(kind)
    return ours == "tags" and items is not None and _fits("tag", _plain(items))


def _plain(kind: pa.DataType) -> pa.DataType:
    """What an extension's values are stored as."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _field(schema: pa.Schema, name: str, key: str, where: str) -> pa.Field:
    """A column that is there; raises SourceError if there are several of its name."""
    check_single(schema.names, name, key, where)
    return schema.field(name)


def check_single(names: Sequence[str], name: str, key: str, where: str) -> None:
    """Raises SourceError if several columns of a file have one name.

    Args:
        names: of its columns.
        name: of the one that is asked for.
        key: of the configuration, that asks for it; for errors.
        where: the file, for errors.
    """
    if names.count(name) > 1:
        raise SourceError(f"{key}: {where} has several columns {name!r}; rename all but one")


def _check_texts_column(field: pa.Field, where: str) -> None:
    kind = item_type(field.type)
    if pt.is_null(field.type) or (kind is not None and pt.is_null(kind)):
        return  # as writers have it whose rows here have no texts
    if kind is None or not (is_string(kind) or pt.is_integer(kind) or pt.is_floating(kind)):
        raise SourceError(
            f"source.texts.column: {field.name!r} of {where} is {field.type}; takes a list of "
            "strings, or of token ids. For a column of single texts use source.columns"
        )


def item_type(kind: pa.DataType) -> pa.DataType | None:
    """What a list's items are; None if it is no list."""
    listed = (
        pt.is_list(kind)
        or pt.is_large_list(kind)
        or pt.is_fixed_size_list(kind)
        or pt.is_list_view(kind)
        or pt.is_large_list_view(kind)
    )
    return kind.value_type if listed else None


def is_string(kind: pa.DataType) -> bool:
    """Whether values are strings, in whichever of Arrow's forms."""
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes, in whichever of Arrow's forms."""
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pt.is_binary(kind)
        or pt.is_large_binary(kind)
        or pt.is_binary_view(kind)
        or pt.is_fixed_size_binary(kind)
    )
