"""WebDataset shards: tar files in which neighbours with one key are one sample.

Choices:
- Shards are read as streams, front to back, from any file system, and nothing is ever unpacked to
  a disk. Still a name that is absolute or climbs is refused: ids come from names, and later stages
  shall be able to trust them.
- A shard that breaks off gives the samples before the break; the break is one rejected row.
- `columns` says which file of a sample is which of our columns: `txt`, `cls`, or `json.KEY` for a
  key of the JSON file. The image is found by its ending.
"""

import json
import logging
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, field_validator

from ray_jobs.sources.base import MAX_FILE_BYTES, FilesConfig, Raw, Rejected, SourceError, Unit
from ray_jobs.sources.files import find_files, locate
from ray_jobs.sources.parquet import id_text
from rwkv_clip.config import BaseConfig

logger = logging.getLogger(__name__)

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_SKIPPED_BYTES = 10 << 30  # a member that claims more is not even passed over
_CHECKED_SHARDS = 3  # before work starts
_BROKEN = (tarfile.TarError, EOFError, zlib.error, ValueError)


class ShardColumnsConfig(BaseConfig):
    """Which file of a sample is which of our columns."""

    id: str | None = Field(None, description="of the id; shard and key if absent")
    web_text: str | None = Field("txt", description="of what the web said")
    caption: str | None = Field(None, description="of the synthetic caption")
    tags: str | None = Field(None, description="of the tags")
    description: str | None = Field(None, description="of the generated description")

    @field_validator("*")
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


@dataclass
class _Sample:
    """The files of one key."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)  # by ending


class WebdatasetSource:
    """See WebdatasetConfig."""

    def __init__(self, config: WebdatasetConfig) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        files = find_files(self.config, _SUFFIXES)
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
        image = next((ending for ending in sample.files if ending.endswith(_IMAGES)), None)
        document = _document(sample.files.get("json"))
        for ours, place in self.config.columns.model_dump(exclude_none=True).items():
            kind, _, key = place.partition(".")
            if kind == "json":
                row[ours] = document.get(key)
            elif kind == "cls":
                row[ours] = self._class_name(sample.files.get("cls"))
            else:
                row[ours] = sample.files.get("txt")
        row["id"] = id_text(row["id"])
        return {
            **row,
            "image": sample.files.get(image or ""),
            "origin": f"{unit.label} {sample.key}",
        }

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
            for name, content in self._files(unit):
                if isinstance(content, Rejected):
                    yield content
                    continue
                folder, _, base = name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample is not None and sample.key != key:
                    yield sample
                    usual = set(sample.files)
                    count += 1
                    sample = None
                sample = sample or _Sample(key)
                sample.files.setdefault(ending.lower(), content)
        except _BROKEN as error:
            problem = f"breaks off after {count:,} samples: {type(error).__name__}: {error}"
            logger.warning("%s %s", unit.path, problem)
            yield Rejected("", unit.label, "unreadable", problem)
            # The sample at the break may lack files; then it is part of what is lost.
            if sample is not None and not usual <= set(sample.files):
                return
        if sample is not None:
            yield sample

    def _files(self, unit: Unit) -> Iterator[tuple[str, bytes | Rejected]]:
        filesystem, path = locate(unit.path, self.config.s3)
        with (
            filesystem.open_input_stream(path, compression=None) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar,
        ):
            for member in tar:
                if member.size > _SKIPPED_BYTES:
                    raise tarfile.ReadError(f"{member.name!r} claims {member.size:,} bytes")
                name = member.name.removeprefix("./")
                if not member.isreg() or name.rpartition("/")[2].startswith("."):
                    continue
                if name.startswith("/") or ".." in name.split("/") or "\\" in name:
                    reason, detail = "unsafe_name", "a name must not lead out of the shard"
                elif member.size > MAX_FILE_BYTES:
                    reason, detail = "image_too_large", f"{member.size:,} bytes"
                else:
                    content = tar.extractfile(member)
                    yield name, content.read() if content else b""
                    continue
                yield name, Rejected(name, unit.label, reason, f"{name!r}: {detail}")

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
        endings = sorted({ending for sample in first for ending in sample.files})
        if not any(ending.endswith(_IMAGES) for ending in endings):
            raise SourceError(
                f"source.path: {unit.path} begins with samples of {', '.join(endings)}; an image "
                f"ends in {', '.join(_IMAGES)}"
            )
        places = self.config.columns.model_dump(exclude_none=True, exclude={"id"})
        kinds = {place.partition(".")[0] for place in places.values()}
        if not kinds & set(endings):
            raise SourceError(
                f"source.columns: {unit.path} begins with samples of {', '.join(endings)}, but the "
                f"texts are asked of {', '.join(sorted(kinds)) or 'none of them'}"
            )


def _document(content: bytes | None) -> Mapping[str, Any]:
    """A sample's JSON file; empty if it is none."""
    try:
        value = json.loads((content or b"{}").decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
