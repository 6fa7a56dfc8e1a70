"""WebDataset shards: tar files in which neighbours with one key are one sample.

Choices:
- Shards are read as streams, front to back, from any file system, and nothing is ever unpacked to
  a disk. Still a name that is absolute or climbs is refused: ids come from names, and later stages
  shall be able to trust them.
- A shard that breaks off gives the samples before the break; the break is one rejected row.
- `columns` says which file of a sample is which of our columns: `txt`, `cls`, or `json.KEY` for a
  key of the JSON file. The image is found by its ending: `jpg` before `depth.jpg`, and a sample
  with two of a kind is refused unless `columns.image` says which.
- Of a sample only the files that are asked for are read, and these are no more than one file may
  be, with headers that are no longer than names are.
"""

import difflib
import json
import logging
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import pyarrow as pa
from pydantic import Field, PositiveInt, field_validator

from ray_jobs.sources.base import MAX_FILE_BYTES, FilesConfig, Raw, Rejected, SourceError, Unit
from ray_jobs.sources.files import HIDDEN, find_files, open_file
from ray_jobs.sources.parquet import id_text
from rwkv_clip.config import BaseConfig

logger = logging.getLogger(__name__)

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_SKIPPED_BYTES = 10 << 30  # a member that claims more is not even passed over
_HEADER_BYTES = 1_000_000  # of a member, with what is said before it of its name
_READ_BYTES = 8_000_000  # by a request
_MOST_ENDINGS = 100  # of a sample that are taken note of
_CHECKED_SHARDS = 3  # before work starts
_BROKEN = (tarfile.TarError, EOFError, zlib.error, ValueError, RecursionError)
_EXTENDED = frozenset(
    {
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    }
)


class ShardColumnsConfig(BaseConfig):
    """Which file of a sample is which of our columns."""

    # Where it is absent it tells no runs apart: storages of before it was there go on.
    image: str | None = Field(
        None,
        min_length=1,
        description="ending of the image, such as jpg or left.png; the one that says so if absent",
        exclude_if=lambda image: image is None,
    )
    id: str | None = Field(None, description="of the id; shard and key if absent")
    web_text: str | None = Field("txt", description="of what the web said")
    caption: str | None = Field(None, description="of the synthetic caption")
    tags: str | None = Field(None, description="of the tags")
    description: str | None = Field(None, description="of the generated description")

    @property
    def texts(self) -> dict[str, str]:
        """Our columns but the image to the places that they are asked of."""
        return self.model_dump(exclude_none=True, exclude={"image"})

    @field_validator("id", "web_text", "caption", "tags", "description")
    @classmethod
    def _known(cls, place: str | None) -> str | None:
        kind, dot, key = (place or "txt").partition(".")
        if kind not in ("txt", "cls", "json") or (kind == "json") != bool(dot and key):
            raise ValueError("takes txt, cls, or json.KEY")
        return place


class WebdatasetConfig(FilesConfig):
    """Tar shards."""

    less_at_once: ClassVar[str] = "smaller shards"

    kind: Literal["webdataset"]
    columns: ShardColumnsConfig = ShardColumnsConfig()
    unit_rows: PositiveInt = Field(4096, description="has no effect: a task reads a shard")
    classes: tuple[str, ...] | None = Field(
        None, description="names of the classes, if `cls` files hold their numbers"
    )


class _Member(tarfile.TarInfo):
    """A member of a tar file that ends where it says so, and not where it becomes unreadable."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # the stubs lack it
            raise
        except tarfile.HeaderError as error:
            # Behind the first member, `tarfile` takes any broken header for the end.
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> "_Member":
        # `tarfile` reads headers whole, one within the other; the offset is still where they began.
        begin = archive.offset
        if self.type in _EXTENDED:
            read = archive.fileobj.tell() - begin + sum(map(len, archive.pax_headers.values()))
        if self.type in _EXTENDED and read + self.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of over {_HEADER_BYTES:,} bytes at byte {begin:,}")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"a sparse file at byte {begin:,}")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return] # as above

    def _proc_gnusparse_10(self, *_: object) -> None:
        # Its header has no end before a number in it says so.
        raise tarfile.ReadError("a sparse file")


@dataclass
class _Sample:
    """The files of one key.

    Attributes:
        files: those that are asked for, by ending; of images the first of the best.
        endings: of all of them.
        too_large: what of it is too large to be read, if anything is.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)
    too_large: str = ""

    def images(self) -> list[str]:
        """The endings that may be its image: several if it does not tell which is."""
        found = sorted(ending for ending in self.endings if ending.endswith(_IMAGES))
        return [ending for ending in found if ending in _IMAGES] or found


@dataclass(frozen=True)
class _File:
    """A file of a shard, that can be read until the next one is looked for."""

    shard: tarfile.TarFile
    member: tarfile.TarInfo

    @property
    def size(self) -> int:
        return self.member.size

    def read(self) -> bytes:
        content = self.shard.extractfile(self.member)
        return content.read() if content else b""


class WebdatasetSource:
    """See WebdatasetConfig."""

    def __init__(self, config: WebdatasetConfig) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        files = find_files(self.config, _SUFFIXES, hidden=HIDDEN)
        units = [Unit(file.uri, file.label, size=file.size) for file in files]
        self._check_first(units[:_CHECKED_SHARDS])
        return units

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        for sample in self._samples(unit):
            yield sample if isinstance(sample, Rejected) else self._row(sample, unit)

    def _row(self, sample: _Sample, unit: Unit) -> Raw | Rejected:
        shard = unit.label
        for suffix in sorted(_SUFFIXES, key=len, reverse=True):
            shard = shard.removesuffix(suffix)
        row: dict[str, Any] = {"id": f"{shard}/{sample.key}"}
        origin = f"{unit.label} {sample.key}"
        if sample.too_large:
            return Rejected(row["id"], origin, "sample_too_large", sample.too_large)
        images = [self.config.columns.image] if self.config.columns.image else sample.images()
        if len(images) > 1:
            return Rejected(row["id"], origin, "ambiguous_image", f"one of {', '.join(images)}?")
        document = _document(sample.files.get("json"))
        for ours, place in self.config.columns.texts.items():
            kind, _, key = place.partition(".")
            if kind == "json":
                row[ours] = document.get(key)
            elif kind == "cls":
                row[ours] = self._class_name(sample.files.get("cls"))
            else:
                row[ours] = sample.files.get("txt")
        row["id"] = id_text(row["id"])
        image = sample.files.get(images[0].lower()) if images else None
        return {**row, "image": image, "origin": origin}

    def _class_name(self, content: bytes | None) -> str | None:
        name = (content or b"").decode("utf-8", "replace").strip()
        classes = self.config.classes
        if classes and name.isdecimal() and int(name) < len(classes):
            return classes[int(name)]
        return name or None

    def _samples(self, unit: Unit) -> Iterator[_Sample | Rejected]:
        sample: _Sample | None = None
        usual: set[str] = set()  # endings of the sample before
        count = 0
        try:
            for name, member in self._files(unit):
                if isinstance(member, Rejected):
                    yield member
                    continue
                folder, _, base = name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample is not None and sample.key != key:
                    yield sample
                    usual = sample.endings
                    count += 1
                    sample = None
                sample = sample or _Sample(key)
                self._take(sample, ending.lower(), member)
        except _BROKEN as error:
            problem = f"breaks off after {count:,} samples: {type(error).__name__}: {error}"
            logger.warning("%s %s", unit.path, problem)
            yield Rejected("", unit.label, "unreadable", problem)
            # The sample at the break may lack files; then it is part of what is lost.
            if sample is not None and not usual <= sample.endings:
                return
        if sample is not None:
            yield sample

    def _take(self, sample: _Sample, ending: str, member: _File) -> None:
        """Read a file of a sample, if it is asked for."""
        worse = self._worse(sample, ending)
        if worse is not None and not sample.too_large:
            left = MAX_FILE_BYTES - sum(map(len, sample.files.values()))
            left += sum(len(sample.files[name]) for name in worse)
            if member.size > left:
                sample.files.clear()
                sample.too_large = f"{ending} of {member.size:,} bytes, over {left:,} that are left"
            else:
                content = member.read()
                for name in worse:
                    del sample.files[name]
                sample.files[ending] = content
        # Once it is read: a sample whose file breaks off lacks it.
        if len(sample.endings) < _MOST_ENDINGS:
            sample.endings.add(ending)

    def _worse(self, sample: _Sample, ending: str) -> list[str] | None:
        """The files of a sample that one is read in place of; None if it is not asked for."""
        if ending in sample.files:
            return None
        columns = self.config.columns
        if ending in {place.partition(".")[0] for place in columns.texts.values()}:
            return []
        if columns.image:
            return [] if ending == columns.image.lower() else None
        held = [name for name in sample.files if name.endswith(_IMAGES)]
        if not ending.endswith(_IMAGES) or any(name in _IMAGES for name in held):
            return None
        return held if ending in _IMAGES or not held else None

    def _files(self, unit: Unit) -> Iterator[tuple[str, _File | Rejected]]:
        with (
            open_file(unit.path, self.config.s3, unit.size) as file,
            pa.BufferedInputStream(file, _READ_BYTES) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar,
        ):
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined] # it would hold all of them
                if member.size > _SKIPPED_BYTES:
                    raise tarfile.ReadError(f"{member.name!r} claims {member.size:,} bytes")
                name = member.name.removeprefix("./")
                if not member.isreg() or name.rpartition("/")[2].startswith("."):
                    continue
                if name.startswith("/") or ".." in name.split("/") or "\\" in name:
                    told = f"{name!r}: a name must not lead out of the shard"
                    yield name, Rejected(name, unit.label, "unsafe_name", told)
                else:
                    yield name, _File(tar, member)

    def _check_first(self, units: list[Unit]) -> None:
        """Raises SourceError if the first samples have nothing of what is asked for."""
        for unit in units:
            first = [one for one in islice(self._samples(unit), 20) if isinstance(one, _Sample)]
            if first:
                break
        else:
            raise SourceError(
                f"source.path: {unit.path} holds no samples ({unit.size or 0:,} bytes); takes tar "
                "files as webdataset or img2dataset write them"
            )
        endings = sorted({ending for sample in first for ending in sample.endings})
        begins = f"{unit.path} begins with samples of {', '.join(endings)}"
        chosen = self.config.columns.image
        if chosen and chosen.lower() not in endings:
            raise SourceError(f"source.columns.image: {begins}; none is {chosen!r}")
        if not chosen and not any(ending.endswith(_IMAGES) for ending in endings):
            raise SourceError(f"source.path: {begins}; an image ends in {', '.join(_IMAGES)}")
        several = next((images for sample in first if len(images := sample.images()) > 1), None)
        if several and not chosen:
            raise SourceError(
                f"source.columns.image: {begins}; name the one of {', '.join(several)} that is "
                "the image"
            )
        places = [place for ours, place in self.config.columns.texts.items() if ours != "id"]
        kinds = {place.partition(".")[0] for place in places}
        if not kinds & set(endings):
            raise SourceError(
                f"source.columns: {begins}, but the texts are asked of "
                f"{', '.join(sorted(kinds)) or 'none of them'}"
            )
        self._check_keys(unit, [_document(sample.files.get("json")) for sample in first])

    def _check_keys(self, unit: Unit, documents: Sequence[Mapping[str, Any]]) -> None:
        """Warns of keys that no first sample has; raises SourceError if there are no others."""
        found = sorted({key for document in documents for key in document})
        missing = {
            ours: place.removeprefix("json.")
            for ours, place in self.config.columns.texts.items()
            if place.startswith("json.") and place.removeprefix("json.") not in found
        }
        for ours, key in missing.items():
            close = difflib.get_close_matches(key, found, n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            told = (
                f"source.columns.{ours}: the first samples of {unit.path} have no {key!r} in their "
                f"JSON{meant}, which has {', '.join(found) or 'no keys'}"
            )
            if {"id", *missing} >= self.config.columns.texts.keys():
                raise SourceError(told)
            logger.warning("%s; later ones may", told)


def _document(content: bytes | None) -> Mapping[str, Any]:
    """A sample's JSON file; empty if it is none."""
    try:
        value = json.loads((content or b"{}").decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
