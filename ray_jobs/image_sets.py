"""Sets of images with labels or captions, as evaluations read them, and their embeddings.

A set is a folder whose folders are the classes, or Parquet files with a column of encoded images
and one of what goes with them.
"""

import logging
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as pt
from pydantic import Field
from ray.exceptions import RayTaskError

from ray_jobs.encoding import EncoderConfig, ImageEncoder, fetch_checkpoint, vectors
from ray_jobs.sources import SourceError
from ray_jobs.sources.base import MAX_FILE_BYTES, FilesConfig, Unit
from ray_jobs.sources.files import done_ahead, find_files, is_forbidden, open_file
from ray_jobs.sources.parquet import (
    image_bytes,
    is_string,
    item_type,
    read_footer,
    read_rows,
    row_group_units,
)
from ray_jobs.storage import Storage, digest_of_json

logger = logging.getLogger(__name__)

_PARQUET = (".parquet", ".pq")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SET_NAME = r"^[\w.-][\w. -]*$"  # what MLflow takes in a metric's name, and files in theirs
_UNIT_BYTES = 1 << 29  # a task reads at most, about
_AHEAD_BYTES = 100_000_000  # of image files that are read ahead


class ImageSetConfig(FilesConfig):
    """Images with something that goes with each."""

    image: str = Field("image", description="column of encoded images, in Parquet files")


class ImageSet:
    """Where the images are; safe to send to other processes.

    Args:
        config: of the files.
        column: what goes with the images, in Parquet files.
        key: of the configuration, for errors.
        field: of the configuration, that names the column.
        labels: whether that is a class, a word or a number, for which class folders will do in
            place of Parquet files; otherwise it is captions, a text or a list of them.

    Raises:
        SourceError: there are none, or they cannot be read.
    """

    def __init__(
        self, config: ImageSetConfig, column: str, key: str, field: str, *, labels: bool
    ) -> None:
        self.config, self.column, self.key, self.field = config, column, key, field
        self.labels = labels
        self.schema: pa.Schema | None = None
        files = find_files(config, (*_PARQUET, *_IMAGES) if labels else _PARQUET)
        self.units: list[list[Unit]] = []
        rows = config.unit_rows
        parquet = [file for file in files if file.uri.lower().endswith(_PARQUET)]
        for file in parquet:
            metadata, schema = read_footer(file.uri, config.s3, f"{key}.path")
            self._check(schema, file.uri)
            self.schema = self.schema or schema
            self.units += [[one] for one in row_group_units(file, metadata, rows, _UNIT_BYTES)]
        if parquet:
            return
        single = [Unit(file.uri, file.label, 0, 1, size=file.size) for file in files]
        for unit in single:
            if "/" not in unit.label:
                raise SourceError(
                    f"{key}.path: {unit.path} is in no folder of a class; each class is a folder "
                    "of its images"
                )
        self.units = [single[at : at + rows] for at in range(0, len(single), rows)]

    @property
    def rows(self) -> int:
        """How many images there are."""
        return sum(unit.rows or 0 for units in self.units for unit in units)

    @property
    def digest(self) -> str:
        """Tells what is read from anything else, as long as a file that changes changes its size.

        Where the files are, and how many rows a task reads, is no part of it.
        """
        flat = [unit for units in self.units for unit in units]
        rows: Counter[str] = Counter()
        for unit in flat:
            rows[unit.path] += unit.rows or 0
        files = {unit.path: [unit.label, rows[unit.path], unit.size] for unit in flat}
        config = self.config.model_dump(mode="json", exclude={"path", "s3", "unit_rows"})
        told = [config, *files.values()]
        return digest_of_json(told)

    def read(self, units: Sequence[Unit]) -> Iterator[tuple[str, list[str], bytes]]:
        """Name, label or captions, and encoded image of each; empty if it is too large.

        What is gone, or may not be read, is left out with a warning.

        Raises:
            SourceError: a file cannot be reached.
        """
        if self.schema is not None:
            for unit in units:
                yield from self._rows(unit)
            return
        # Images are on their way while those before them are used.
        for unit, begun in done_ahead(
            self._image, units, lambda unit: unit.size or 0, _AHEAD_BYTES
        ):
            if (image := begun.result()) is not None:
                yield unit.label, [posixpath.dirname(unit.label).partition("/")[0]], image

    def _image(self, unit: Unit) -> bytes | None:
        """An image file; None if it is gone, or may not be read."""
        if (unit.size or 0) > MAX_FILE_BYTES:
            return b""
        try:
            with open_file(unit.path, self.config.s3) as file:
                return bytes(file.read(file.size()))
        except OSError as error:
            if isinstance(error, FileNotFoundError) or is_forbidden(error):
                logger.warning("left out: %s: %s", unit.label, error)
                return None
            raise SourceError(f"{self.key}.path: {unit.path} cannot be read: {error}") from error

    def images_of(self, names: Collection[str]) -> dict[str, bytes]:
        """The encoded images of these names; no unit that holds none of them is read."""
        units = [
            unit
            for units in self.units
            for unit in units
            if any(self._holds(unit, name) for name in names)
        ]
        return {name: image for name, _, image in self.read(units) if name in names}

    def _holds(self, unit: Unit, name: str) -> bool:
        if self.schema is None:
            return name == unit.label
        label, _, number = name.rpartition(":")
        return label == unit.label and 0 <= int(number) - unit.first < (unit.rows or 0)

    def _rows(self, unit: Unit) -> Iterator[tuple[str, list[str], bytes]]:
        for number, row in read_rows(unit, [self.config.image, self.column], self.config.s3):
            name = f"{unit.label}:{number}"
            if isinstance(row, str):
                logger.warning("left out: %s: %s", name, row)
                continue
            image, value = image_bytes(row[self.config.image]), row[self.column]
            values = value if isinstance(value, list) else [value]
            found = image if isinstance(image, bytes) else b""
            # Who searches by nothing finds anything, and it is no name of a class either.
            told = [str(one) for one in values if one is not None]
            yield name, [one for one in told if one.strip()], found

    def _check(self, schema: pa.Schema, where: str) -> None:
        for field, column in (("image", self.config.image), (self.field, self.column)):
            if column not in schema.names:
                raise SourceError(
                    f"{self.key}.{field}: {where} has no column {column!r}; it has "
                    f"{', '.join(schema.names)}"
                )
        told = schema.field(self.column).type
        if not (_is_label(told) if self.labels else _is_text(told)):
            wanted = "a text or a whole number" if self.labels else "a text or a list of texts"
            raise SourceError(
                f"{self.key}.{self.field}: column {self.column!r} of {where} is of type {told}; "
                f"each row takes {wanted}"
            )


def _is_label(told: pa.DataType) -> bool:
    return bool(pt.is_integer(told)) or is_string(told)


def _is_text(told: pa.DataType) -> bool:
    return is_string(item_type(told) or told)


class SetEncoder(ImageEncoder):
    """Embeds a set; one in each of Ray Data's actors.

    Args:
        storage: holds the checkpoint.
        checkpoint: its folder's name.
        images: where they are.
        config: how many are embedded at a time, and how.
        template: with {} for the text that goes with an image and is to be embedded; None if that
            is no text.
    """

    def __init__(
        self,
        storage: Storage,
        checkpoint: str,
        images: ImageSet,
        config: EncoderConfig,
        *,
        template: str | None,
    ) -> None:
        model = fetch_checkpoint(storage, checkpoint)
        super().__init__(model, config, gpus_key="evaluation.gpus_per_worker")
        self.images, self.batch, self.template = images, config.batch, template

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        """`name`, `values`, `image_embedding` and perhaps `text_embedding` of a unit's images."""
        (at,) = batch["unit"].tolist()
        waiting: list[tuple[str, list[str], bytes]] = []
        for row in self.images.read(self.images.units[at]):
            waiting.append(row)
            if len(waiting) == self.batch:
                yield self._table(waiting)
                waiting = []
        if waiting:
            yield self._table(waiting)

    def _table(self, rows: Sequence[tuple[str, list[str], bytes]]) -> pa.Table:
        names = [name for name, _, _ in rows]
        embedded, usable, _ = self.encode_images([image for _, _, image in rows], names)
        values = pa.array([rows[at][1] for at in usable], pa.list_(pa.string()))
        usable_names = pa.array([names[at] for at in usable], pa.string())
        columns = {
            "name": usable_names,
            "values": values,
            "image_embedding": vectors(embedded),
        }
        if self.template is not None:
            texts = [self.template.replace("{}", text) for text in values.flatten().to_pylist()]
            encoded = vectors(self.encode_texts(texts, self.batch))
            columns["text_embedding"] = pa.ListArray.from_arrays(values.offsets, encoded)
        return pa.table(columns)


def embed_set(
    told: str,
    images: ImageSet,
    config: EncoderConfig,
    storage: Storage,
    checkpoint: str,
    *,
    template: str | None = None,
) -> pa.Table:
    """What `SetEncoder` gives for all images that can be decoded, in order.

    Raises:
        SourceError: there are none, or a file cannot be reached.
    """
    work = [{"unit": at} for at in range(len(images.units))]
    arguments = (storage, checkpoint, images, config)
    try:
        table = config.gather(
            told, images.rows, "images", work, SetEncoder, *arguments, template=template
        )
    except RayTaskError as error:
        if isinstance(error.cause, SourceError):  # to whose words Ray adds lines of its own
            raise SourceError(str(error.cause).partition("\n")[0]) from error
        raise
    if not table.num_rows:
        raise SourceError(f"{images.key}.path: none of the images can be read and decoded")
    return table
