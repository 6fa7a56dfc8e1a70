"""A folder of image files, with a list of their names and texts beside them.

Choices:
- The list is JSON lines, CSV, TSV or Parquet, and names images relative to itself, as the
  `imagefolder` of Hugging Face's data sets does: `metadata.jsonl` with `file_name` and texts. A
  folder that has one of such a name is not searched for more, among millions of images.
- A list is data, and data may be hostile: a name that leads out of the list's folder, also by a
  symbolic link, is refused and not read.
- An image that may not be read costs its pair, as does one whose name the server refuses. S3 says
  the same of one object and of credentials that have run out, so it counts only while the list
  itself can be read.
"""

import errno
import math
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow.fs as pafs
from pydantic import Field

from ray_jobs.sources.base import (
    MAX_FILE_BYTES,
    ColumnsConfig,
    FilesConfig,
    Raw,
    Rejected,
    SourceError,
    Unit,
    digest_of,
    shortened,
)
from ray_jobs.sources.files import done_ahead, is_forbidden, locate, name_below, open_file
from ray_jobs.sources.lists import list_units, name_text, present_columns, read_list
from ray_jobs.sources.parquet import id_text
from ray_jobs.storage import S3Config


class FolderColumnsConfig(ColumnsConfig):
    """Columns of the list beside the images."""

    id: str | None = Field(
        "id",
        description="column of unique ids; null, or a list without it, makes them of the image's "
        "name and a digest of the texts",
    )
    image: str = Field("file_name", description="column of image files, relative to the list")
    web_text: str | None = Field("text", description="column of what the web said")


class FolderConfig(FilesConfig):
    """Image files, and lists that name them."""

    format: ClassVar[int] = 2  # from here on ids are of the texts too

    kind: Literal["folder"]
    columns: FolderColumnsConfig = FolderColumnsConfig()


@dataclass(frozen=True)
class _Row:
    """A row of the list, and the name of its image."""

    name: str
    raw: dict[str, Any]


_Found = tuple[str, bytes]  # why an image cannot be had, or its bytes


class FolderSource:
    """See FolderConfig."""

    def __init__(self, config: FolderConfig) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        units = list_units(self.config, partial(self._present, warn=True), _USUAL)
        self._check_rights(units)
        return units

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        folder = posixpath.dirname(unit.path)

        def image(row: _Row | Rejected) -> _Found:
            name = "" if isinstance(row, Rejected) else row.name
            return self._image(folder, name, _AHEAD_BYTES)

        # A server is far from a task.
        for row, begun in done_ahead(image, self._rows(unit)):
            yield self._with_image(unit, row, begun)

    def _rows(self, unit: Unit) -> Iterator[_Row | Rejected]:
        """A unit's rows without their images."""
        present = self._present(unit)
        for origin, row in read_list(unit, list(present.values()), self.config.s3):
            if isinstance(row, Rejected):
                yield row
                continue
            raw = {ours: row.get(theirs) for ours, theirs in present.items()}
            name = name_text(raw.pop("image"))
            identity = str(id_text(raw["id"] if "id" in raw else _made_up(unit, name, raw)) or "")
            yield _Row(name, {**raw, "id": identity, "origin": origin})

    def _with_image(
        self, unit: Unit, row: _Row | Rejected, begun: Future[_Found]
    ) -> Raw | Rejected:
        if isinstance(row, Rejected):
            return row
        problem, image = begun.result()
        folder = posixpath.dirname(unit.path)
        if problem in _PERHAPS:
            problem, image = self._image_again(unit, folder, row.name)
        elif problem == _LATER:
            problem, image = self._image(folder, row.name)
        if not problem:
            return {**row.raw, "image": image}
        told = f"{shortened(row.name, _TOLD_CHARACTERS)!r}: {_EXPLAINED[problem]}"
        return Rejected(row.raw["id"], row.raw["origin"], problem, told)

    def _present(self, unit: Unit, *, warn: bool = False) -> dict[str, str]:
        return present_columns(unit, self.config.columns, "image", self.config.s3, warn=warn)

    def _image(self, folder: str, name: str, most: int = MAX_FILE_BYTES) -> _Found:
        """Why the image cannot be had, or its bytes; nothing of one that has more than `most`."""
        inside = posixpath.normpath(name)
        if not name or "\x00" in name:
            return "no_image", b""
        if _URI.match(name):
            return "image_is_uri", b""
        if inside.startswith(("/", "../")) or inside in (".", "..") or "\\" in name:
            return "outside_folder", b""
        try:
            return self._inside(folder, inside, most)
        except (ValueError, RuntimeError, FileNotFoundError):
            # There is none, it is no name of a file, or has links that lead in a circle.
            return "no_image", b""
        except OSError as error:
            if error.errno in _NEVER:
                return "no_image", b""
            if is_forbidden(error):
                return "image_forbidden", b""
            if _S3_BAD_REQUEST in str(error):
                return "refused_name", b""
            raise

    def _image_again(self, unit: Unit, folder: str, name: str) -> _Found:
        """As `_image`, if the list can be read now; raises OSError if not."""
        with open_file(unit.path, self.config.s3) as stream:
            stream.read(1)
        return self._image(folder, name)

    def _check_rights(self, units: Sequence[Unit]) -> None:
        """Raises SourceError if no image that is looked at, here and there, may be read."""
        checked = units[:: math.ceil(len(units) / _CHECKED_UNITS) or 1]
        forbidden = 0
        for unit in checked:
            folder = posixpath.dirname(unit.path)
            for row in islice(self._rows(unit), _CHECKED_ROWS // len(checked)):
                problem = "" if isinstance(row, Rejected) else self._image(folder, row.name)[0]
                if problem != "image_forbidden":
                    return
                forbidden += 1
        if forbidden:
            raise SourceError(
                f"source.path: none of {forbidden} images of {checked[0].path} and others that "
                "were tried may be read; whoever runs this needs the right to read them (on S3, "
                "s3:GetObject)"
            )

    def _inside(self, folder: str, inside: str, most: int) -> _Found:
        """As `_image`, of one below the folder."""
        filesystem, path = locate(name_below(folder, inside), self.config.s3)
        # Which no object has; the server says no more than that the request is a bad one.
        if filesystem.type_name == "s3" and _key_bytes(path) > _MOST_KEY_BYTES:
            return "no_image", b""
        if isinstance(filesystem, pafs.LocalFileSystem):
            if not _leads_inside(path, folder):
                return "outside_folder", b""
            # Opening a pipe would wait for somebody who writes; a server has files alone.
            if filesystem.get_file_info(path).type != pafs.FileType.File:
                return "no_image", b""
        with filesystem.open_input_file(path) as stream:
            size = stream.size()
            if size > MAX_FILE_BYTES:
                return "image_too_large", b""
            if size > most:
                return _LATER, b""
            return "", bytes(stream.read(size))


def _made_up(unit: Unit, name: str, raw: Raw) -> str:
    """An id for a person to find the image by; one image may be listed with several texts."""
    path = posixpath.join(posixpath.dirname(unit.label), name)
    # The end of a long one, as ids have a limit; the digest is over all of it.
    return f"{path[-_NAME_CHARACTERS:]}:{digest_of(path, raw)[:_DIGITS]}"


# What the `imagefolder` of Hugging Face's data sets takes.
_USUAL = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NAME_CHARACTERS, _DIGITS = 400, 12
# What will not be otherwise the next time.
_NEVER = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ})
_AHEAD_BYTES = 16_000_000  # a larger image is read when its turn has come
_LATER = "later"
_CHECKED_UNITS = 10  # before work starts
_CHECKED_ROWS = 200  # of all these
_S3_BAD_REQUEST = "(HTTP status 400)"  # also of credentials that have run out
_MOST_KEY_BYTES = 1024
_URI = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")
_TOLD_CHARACTERS = 200  # of a name
_PERHAPS = ("image_forbidden", "refused_name")  # if it is not that nothing can be read any more
_EXPLAINED = {
    "no_image": "there is no such file",
    "image_is_uri": "is a URI; takes names relative to the list's folder (or kind: urls, of http)",
    "image_forbidden": "may not be read",
    "refused_name": "the server takes no such name",
    "outside_folder": "is no name below the folder of the list with forward slashes, or a link out",
    "image_too_large": f"over {MAX_FILE_BYTES:,} bytes",
}


def _key_bytes(path: str) -> int:
    """How long the key of an object of S3 is; its path begins with the bucket."""
    return len(path.partition("/")[2].encode("utf-8", "replace"))


def _leads_inside(path: str, folder: str) -> bool:
    _, root = locate(folder, S3Config())
    return Path(path).resolve().is_relative_to(Path(root).resolve())
