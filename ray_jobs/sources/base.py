"""What a source of pairs is: it lists units of work, and reads each unit's rows.

Choices:
- Listing is cheap and its order fixed: a unit's place in the list names what is made of it, so a
  run that starts again finds what is done.
- What is wrong with the whole source raises SourceError before work starts. What is wrong with one
  row, or with a part of a file, is yielded as a Rejected and counted.
- Rows are raw: whether they are pairs is for `make_pair` to say, for every source alike.
"""

import difflib
import hashlib
import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol

from pydantic import Field, PositiveInt, field_validator

from ray_jobs.pairs import printable
from ray_jobs.storage import S3Config
from rwkv_clip.config import BaseConfig

# No larger file is read into memory, whatever the limits of a pair say.
MAX_FILE_BYTES = 100_000_000
# Of units: what older releases did not take note of, and not every file system or list tells.
_NOT_ALWAYS_KNOWN = frozenset({"modified", "end"})
_KEYS = re.compile("(s3|gs|gcs)://(.+)")  # URIs whose slashes part a key, and no folders


class SourceError(ValueError):
    """A source that cannot be used; says which key or file, what was found, and what to do."""


class UnreachableError(SourceError, OSError):
    """A file of a source that cannot be reached now; what it holds is not to blame.

    Before work starts it is the source that cannot be used; in a task it is an outage, after which
    the unit may be read again.
    """


class BaseSourceConfig(BaseConfig):
    """The base of the sources' configurations.

    Attributes:
        runtime: the fields that change how fast rows are read but not which; a run may go on with
            other values of these.
        less_at_once: what gives a task less to read, for errors.
        format: of ids and units; another number refuses to go on with what an older one wrote.
    """

    runtime: ClassVar[frozenset[str]] = frozenset()
    less_at_once: ClassVar[str] = "smaller units (source.unit_rows)"
    format: ClassVar[int] = 1


class FilesConfig(BaseSourceConfig):
    """Files that a source reads."""

    path: str | tuple[str, ...] = Field(
        description="a file, a folder, a pattern with * and **, or several of these; s3:// too"
    )
    s3: S3Config = Field(S3Config(), description="in a pipeline, storage.s3 if absent")
    unit_rows: PositiveInt = Field(4096, description="rows a task reads, about")

    @field_validator("path")
    @classmethod
    def _can_be_named(cls, path: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for one in (path,) if isinstance(path, str) else path:
            key = _KEYS.fullmatch(one)
            if key and "" in key[2].rstrip("/").split("/"):
                raise ValueError(
                    f"{one} has two slashes where one belongs; keys with an empty part cannot be "
                    "read, so rename such objects"
                )
        return path

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    def all_paths(self) -> tuple[str, ...]:
        """Everything that is read by way of `s3`."""
        return self.paths


def on_server(value: Any, s3: S3Config) -> Any:
    """A configuration whose files are on this S3 server, where it names no other for them."""
    if isinstance(value, tuple):
        filled = tuple(on_server(one, s3) for one in value)
        same = all(new is old for new, old in zip(filled, value, strict=True))
        return value if same else filled
    if not isinstance(value, BaseConfig):
        return value
    changes = {name: new for name, one in value if (new := on_server(one, s3)) is not one}
    # What a source is made of tells runs apart, and a server that it does not use is no part of it.
    if (
        isinstance(value, FilesConfig)
        and "s3" not in value.model_fields_set
        and any(path.startswith("s3://") for path in value.all_paths())
    ):
        changes["s3"] = s3
    return value.model_copy(update=changes) if changes else value


class ColumnsConfig(BaseConfig):
    """What our columns are called in a source.

    A name that is given must be there; a default is used where it is there.
    """

    id: str | None = Field(
        "id",
        description="column of unique ids; null, or a file without it, makes them of the file's "
        "name and the row's number",
    )
    web_text: str | None = Field("web_text", description="column of what the web said")
    caption: str | None = Field("caption", description="column of synthetic captions")
    tags: str | None = Field("tags", description="column of tags: a list, or text with commas")
    description: str | None = Field("description", description="column of generated descriptions")

    def present(
        self, found: Collection[str], where: str, required: str, *, whole: bool = True
    ) -> dict[str, str]:
        """Our names to theirs, as far as they are there.

        Args:
            found: the columns that are there.
            where: the file, for the error.
            required: the column of ours that must be there besides the given ones.
            whole: whether these are all; if not, any but the id and the required one, on which
                all rows must agree, may come later and counts as there.

        Raises:
            SourceError: a column is missing.
        """
        wanted = {name: theirs for name, theirs in self.model_dump().items() if theirs is not None}
        decided = wanted if whole else {"id", required}
        for name, theirs in wanted.items():
            needed = name == required or name in self.model_fields_set
            if theirs not in found and needed and name in decided:
                folded = {name.casefold(): name for name in found}
                close = difflib.get_close_matches(theirs.casefold(), folded, n=1)
                meant = f" (did you mean {folded[close[0]]!r}?)" if close else ""
                raise SourceError(
                    f"source.columns.{name}: {where} has no column {theirs!r}{meant}; it has "
                    f"{', '.join(sorted(found)) or 'none'}"
                )
        return {
            name: theirs
            for name, theirs in wanted.items()
            if theirs in found or name not in decided
        }


def require_text(present: Collection[str], found: Collection[str], where: str) -> None:
    """Raises SourceError unless one of our texts is among a source's columns."""
    if not {"web_text", "caption", "tags", "description"} & set(present):
        raise SourceError(
            f"source.columns: {where} has none of the texts; name at least one of web_text, "
            f"caption, tags and description. Its columns are {', '.join(sorted(found)) or 'none'}"
        )


def digest_of(name: str, raw: Mapping[str, Any]) -> str:
    """Tells a row of a list from those of the same image with other texts, in 32 digits.

    Args:
        name: of its image.
        raw: its other columns by our names. An empty one is as one that is not there, so what kind
            of file the list is makes no difference.
    """
    told = sorted((ours, value) for ours, value in raw.items() if value)
    return hashlib.sha256(json.dumps([name, told], default=str).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Unit:
    """What one task reads. JSON-able by `as_dict`.

    Attributes:
        path: a file or folder, as path or URI.
        label: its name below what the configuration names, for ids and for people.
        first: the first row of it, in the source's own counting.
        rows: how many rows from there; None for all.
        offset: where the first row begins, in bytes (unpacked ones), for files of lines.
        size: the file's bytes when it was listed, so that a changed file is noticed.
        before: how many rows of other files come before the first one.
        beside: a digest of what lay beside the file when it was listed.
        modified: when the file had been, in seconds since 1970. Some tools copy no fractions of
            one, and S3 does not always tell them.
        end: where the last row ends, as `offset`; there is no need to read further than that.
    """

    path: str
    label: str = ""
    first: int = 0
    rows: int | None = None
    offset: int | None = None
    size: int | None = None
    before: int | None = None
    beside: str | None = None
    modified: int | None = None
    end: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        if self.rows is None:
            return self.path
        return f"{self.path} rows {self.first:,} to {self.first + self.rows - 1:,}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it; `Unit(**unit.as_dict())` is the unit again."""
        return asdict(self)

    def is_still(self, now: "Unit") -> bool:
        """Whether a later listing's unit is the same rows of a file that was not changed."""
        return all(
            now_known == known or (name in _NOT_ALWAYS_KNOWN and None in (now_known, known))
            for (name, known), now_known in zip(
                asdict(self).items(), asdict(now).values(), strict=True
            )
        )

    def change_to(self, now: "Unit | None") -> str:
        """What became of the file until a later listing, for a person; as far as it is known."""
        if now is None or now.path != self.path:
            return ""
        if now.size != self.size:
            return f" had {self.size or 0:,} bytes and has {now.size or 0:,}"
        if now.modified == self.modified or None in (now.modified, self.modified):
            return ""
        then = _time_of(self.modified)
        told = f" was written anew, with as many bytes, at {_time_of(now.modified)}, after {then}"
        if "://" in self.path:
            return f"{told}; the same content sent anew cannot be told from another"
        again = f"touch -d {then} {shlex.quote(self.path)}"
        return f"{told}; if it holds what it held, `{again}` lets this go on"


def _time_of(seconds: int | None) -> str:
    return datetime.fromtimestamp(seconds or 0, UTC).isoformat()


def shortened(text: str, most: int) -> str:
    """At most so many characters of a text: its beginning and its end."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


@dataclass(frozen=True)
class Rejected:
    """A row that could not even be read; the columns of REJECTED_SCHEMA, printable all."""

    id: str
    origin: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        # Errors quote them on people's terminals, and they are whoever's wrote the data.
        for field in fields(self):
            object.__setattr__(self, field.name, printable(getattr(self, field.name)))


# A raw row has the columns of a pair by name, as far as the source knows them, and `origin`: where
# it was read, for a person.
Raw = Mapping[str, Any]


class Source(Protocol):
    """Where pairs come from. Safe to send to other processes."""

    def units(self) -> list[Unit]:
        """All there is to read, always in the same order; raises SourceError."""
        ...

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        """A unit's rows, always in the same order.

        Raises:
            OSError: the file cannot be reached now; reading the unit again may succeed.
        """
        ...
