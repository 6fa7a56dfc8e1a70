"""A folder of image files, with a list of their names and texts beside them.

Choices:
- The list is JSON lines, CSV, TSV or Parquet, and names images relative to itself, as the
  `imagefolder` of Hugging Face's data sets does: `metadata.jsonl` with `file_name` and texts.
- A list is data, and data may be hostile: a name that leads out of the list's folder, also by a
  symbolic link, is refused and not read.
- An image that may not be read costs its pair. S3 says the same of one object and of credentials
  that have run out, so it counts only while the list itself can be read.
"""

import errno
import math
import posixpath
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

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
)
from ray_jobs.sources.files import locate, open_file
from ray_jobs.sources.lists import list_units, present_columns, read_list
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


class FolderSource:
    """See FolderConfig."""

    def __init__(self, config: FolderConfig) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        units = list_units(self.config)
        for unit in {unit.path: unit for unit in units}.values():
            self._present(unit, warn=True)
        self._check_rights(units)
        return units

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        present = self._present(unit)
        folder = posixpath.dirname(unit.path)
        for origin, row in read_list(unit, list(present.values()), self.config.s3):
            if isinstance(row, Rejected):
                yield row
                continue
            raw = {ours: row.get(theirs) for ours, theirs in present.items()}
            name = str(raw.pop("image") or "")
            identity = str(id_text(raw["id"] if "id" in raw else _made_up(unit, name, raw)) or "")
            problem, image = self._image(folder, name)
            if problem == "image_forbidden":
                problem, image = self._image_again(unit, folder, name)
            if problem:
                yield Rejected(identity, origin, problem, f"{name!r}: {_EXPLAINED[problem]}")
            else:
                yield {**raw, "id": identity, "image": image, "origin": origin}

    def _present(self, unit: Unit, *, warn: bool = False) -> dict[str, str]:
        return present_columns(unit, self.config.columns, "image", self.config.s3, warn=warn)

    def _image(self, folder: str, name: str) -> tuple[str, bytes]:
        """Why the image cannot be had, or its bytes."""
        inside = posixpath.normpath(name)
        if not name or "\x00" in name:
            return "no_image", b""
        if inside.startswith(("/", "../")) or inside in (".", "..") or "\\" in name:
            return "outside_folder", b""
        try:
            return self._inside(folder, inside)
        except (ValueError, RuntimeError):  # no name of a file, or links that lead in a circle
            return "no_image", b""
        except OSError as error:
            if error.errno in _NEVER:
                return "no_image", b""
            if _is_forbidden(error):
                return "image_forbidden", b""
            raise

    def _image_again(self, unit: Unit, folder: str, name: str) -> tuple[str, bytes]:
        """As `_image`, if the list can be read now; raises OSError if not."""
        with open_file(unit.path, self.config.s3) as stream:
            stream.read(1)
        return self._image(folder, name)

    def _check_rights(self, units: Sequence[Unit]) -> None:
        """Raises SourceError if no image that is looked at, here and there, may be read."""
        checked = units[:: math.ceil(len(units) / _CHECKED_UNITS) or 1]
        forbidden = 0
        for unit in checked:
            for row in islice(self.read(unit), _CHECKED_ROWS // len(checked)):
                if not isinstance(row, Rejected) or row.reason != "image_forbidden":
                    return
                forbidden += 1
        if forbidden:
            raise SourceError(
                f"source.path: none of {forbidden} images of {checked[0].path} and others that "
                "were tried may be read; whoever runs this needs the right to read them (on S3, "
                "s3:GetObject)"
            )

    def _inside(self, folder: str, inside: str) -> tuple[str, bytes]:
        """Why an image below the folder cannot be had, or its bytes."""
        filesystem, path = locate(f"{folder}/{inside}", self.config.s3)
        if isinstance(filesystem, pafs.LocalFileSystem) and not _leads_inside(path, folder):
            return "outside_folder", b""
        info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            return "no_image", b""
        if info.size > MAX_FILE_BYTES:
            return "image_too_large", b""
        with filesystem.open_input_stream(path) as stream:
            return "", bytes(stream.read(MAX_FILE_BYTES))


def _made_up(unit: Unit, name: str, raw: Raw) -> str:
    """An id for a person to find the image by; one image may be listed with several texts."""
    path = posixpath.join(posixpath.dirname(unit.label), name)
    # The end of a long one, as ids have a limit; the digest is over all of it.
    return f"{path[-_NAME_CHARACTERS:]}:{digest_of(path, raw)[:_DIGITS]}"


_NAME_CHARACTERS, _DIGITS = 400, 12
# What will not be otherwise the next time.
_NEVER = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ})
_CHECKED_UNITS = 10  # before work starts
_CHECKED_ROWS = 200  # of all these
# Arrow has S3's own codes in its words only; the others are an archived object's.
# Arrow has no name for that one, so there are the server's words.
_S3_FORBIDDEN = re.compile(
    "AWS Error ACCESS_DENIED|InvalidObjectState|INVALID_OBJECT_STATE|not valid for the object's|"
    "not valid for the current state of the object"
)
_EXPLAINED = {
    "no_image": "there is no such file",
    "image_forbidden": "may not be read",
    "outside_folder": "leads out of the folder of the list",
    "image_too_large": f"over {MAX_FILE_BYTES:,} bytes",
}


def _is_forbidden(error: OSError) -> bool:
    return error.errno == errno.EACCES or _S3_FORBIDDEN.search(str(error)) is not None


def _leads_inside(path: str, folder: str) -> bool:
    _, root = locate(folder, S3Config())
    return Path(path).resolve().is_relative_to(Path(root).resolve())
