"""WebDataset shards: tar files in which neighbours with one key are one sample.

Choices:
- Shards are read as streams, front to back, from any file system, and nothing is ever unpacked to
  a disk. Still a name that is absolute or climbs is refused: ids come from names, and later stages
  shall be able to trust them.
- A shard that breaks off gives the samples before the break; the break is one rejected row.
- Links are not followed, as what they lead to may have passed or be nowhere: a sample that needs
  one is rejected.
- A file that a sample has already begins the next sample, though it has the same key: that is then
  rejected, where its id is the same, and not merged.
- `columns` says which file of a sample is which of our columns: `txt`, `cls`, or `json.KEY` for a
  key of the JSON file. The image is found by its ending: `jpg` before `depth.jpg`, and a sample
  with two of a kind is refused unless `columns.image` says which.
- Of a sample only the files that are asked for are read, and these are no more than one file may
  be, with headers that are no longer than names are.
"""

import difflib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator

from ray_jobs.sources.base import MAX_FILE_BYTES, FilesConfig, Raw, Rejected, SourceError, Unit
from ray_jobs.sources.files import HIDDEN, find_files, open_file
from ray_jobs.sources.parquet import id_text
from ray_jobs.sources.tar_shards import BROKEN, SUFFIXES, ShardFile, shard_files, stem_of
from rwkv_clip.config import BaseConfig

logger = logging.getLogger(__name__)

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_UNIT_ROWS = 4096
_MOST_ENDINGS = 100  # of a sample that are taken note of
# Looked at before work starts: as a rule so many samples; where these lack what is asked for, up to
# so many of so many shards.
_FIRST_SAMPLES = 20
_CHECKED_SAMPLES = 1000
_CHECKED_SHARDS = 30


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
    unit_rows: PositiveInt = Field(_UNIT_ROWS, description="has no effect: a task reads a shard")
    classes: tuple[str, ...] | None = Field(
        None, description="names of the classes, if `cls` files hold their numbers"
    )

    @field_validator("unit_rows")
    @classmethod
    def _without_effect(cls, _: int) -> int:
        # It must not tell runs apart; those of before have the default in their digest.
        return _UNIT_ROWS


@dataclass
class _Sample:
    """The files of one key.

    Attributes:
        files: those that are asked for, by ending; of images the first of the best.
        endings: of all of them.
        links: what is a link in place of a file, by ending.
        too_large: what of it is too large to be read, if anything is.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)
    links: dict[str, str] = field(default_factory=dict)
    too_large: str = ""

    def images(self) -> list[str]:
        """The endings that may be its image: several if it does not tell which is."""
        found = sorted(ending for ending in self.endings if ending.endswith(_IMAGES))
        return [ending for ending in found if ending in _IMAGES] or found


@dataclass
class _Seen:
    """What the samples have that are looked at before work starts.

    Attributes:
        shards: how many were opened.
        samples: how many these gave.
        whole: whether one of them has an image and what texts are asked of.
        endings: of all of their files.
        keys: of all of their JSON files.
        several: endings that may be the image of one of them, if they are several.
    """

    shards: int = 0
    samples: int = 0
    whole: bool = False
    endings: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    several: list[str] = field(default_factory=list)


class WebdatasetSource:
    """See WebdatasetConfig."""

    def __init__(self, config: WebdatasetConfig) -> None:
        self.config = config
        self._texts = config.columns.texts
        self._kinds = _kinds(self._texts.values())
        self._text_kinds = _kinds(place for ours, place in self._texts.items() if ours != "id")

    def units(self) -> list[Unit]:
        files = find_files(self.config, SUFFIXES, hidden=HIDDEN)
        stems = [stem_of(file.label) for file in files]
        counts = Counter(stems)
        units = [
            Unit(
                file.uri,
                file.label,
                size=file.size,
                modified=file.modified,
                # Its suffix is part of ids then, which else are those of the others.
                beside=f"{counts[stem]} of this name" if counts[stem] > 1 else None,
            )
            for file, stem in zip(files, stems, strict=True)
        ]
        self._check_first(units)
        return units

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        for sample in self._samples(unit):
            yield sample if isinstance(sample, Rejected) else self._row(sample, unit)

    def _row(self, sample: _Sample, unit: Unit) -> Raw | Rejected:
        shard = unit.label if unit.beside else stem_of(unit.label)
        row: dict[str, Any] = {"id": f"{shard}/{sample.key}"}
        origin = f"{unit.label} {sample.key}"
        images = self._images(sample)
        if problem := self._problem(sample, images):
            return Rejected(row["id"], origin, *problem)
        try:
            document = _document(sample.files.get("json"))
        except ValueError as error:
            told = f"its JSON file is no object in UTF-8: {error}"
            return Rejected(row["id"], origin, "bad_row", told)
        for ours, place in self._texts.items():
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

    def _images(self, sample: _Sample) -> list[str]:
        """The endings that may be the image of a sample."""
        return [self.config.columns.image] if self.config.columns.image else sample.images()

    def _problem(self, sample: _Sample, images: Sequence[str]) -> tuple[str, str] | None:
        """Why a sample cannot be used, as reason and detail."""
        if sample.too_large:
            return "sample_too_large", sample.too_large
        if len(images) > 1:
            return "ambiguous_image", f"one of {', '.join(images)}?"
        for ending in (*images, *self._kinds):
            if link := sample.links.get(ending.lower()):
                return "link", f"{ending} is {link}, and links are not followed"
        return None

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
            for member in self._files(unit):
                if isinstance(member, Rejected):
                    yield member
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                ending = ending.lower()
                if sample is not None and (sample.key != key or ending in sample.endings):
                    yield sample
                    usual = sample.endings
                    count += 1
                    sample = None
                sample = sample or _Sample(key)
                self._take(sample, ending, member)
        except BROKEN as error:
            problem = f"breaks off after {count:,} samples: {type(error).__name__}: {error}"
            logger.warning("%s %s", unit.path, problem)
            yield Rejected("", unit.label, "unreadable", problem)
            # The sample at the break may lack files; then it is part of what is lost.
            if sample is not None and not usual <= sample.endings:
                return
        if sample is not None:
            yield sample

    def _take(self, sample: _Sample, ending: str, member: ShardFile) -> None:
        """Read a file of a sample, if it is asked for."""
        worse = self._worse(sample, ending)
        if worse is not None and not sample.too_large and not member.link:
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
            if member.link:
                sample.links[ending] = member.link

    def _worse(self, sample: _Sample, ending: str) -> list[str] | None:
        """The files of a sample that one is read in place of; None if it is not asked for."""
        if ending in sample.files:
            return None
        columns = self.config.columns
        if ending in self._kinds:
            return []
        if columns.image:
            return [] if ending == columns.image.lower() else None
        held = [name for name in sample.files if name.endswith(_IMAGES)]
        if not ending.endswith(_IMAGES) or any(name in _IMAGES for name in held):
            return None
        return held if ending in _IMAGES or not held else None

    def _files(self, unit: Unit) -> Iterator[ShardFile | Rejected]:
        with open_file(unit.path, self.config.s3, unit.size) as file:
            for member in shard_files(file):
                name = member.name
                if name.startswith("/") or ".." in name.split("/") or "\\" in name:
                    told = f"{name!r}: a name must not lead out of the shard"
                    yield Rejected(name, unit.label, "unsafe_name", told)
                else:
                    yield member

    def _check_first(self, units: Sequence[Unit]) -> None:
        """Raises SourceError if no sample that is looked at has what is asked for."""
        # The first shards may be empty, or odd; these lie evenly among all.
        looked = units[:: -(-len(units) // _CHECKED_SHARDS)]
        seen = _Seen()
        for sample in self._first_samples(looked, seen):
            self._look(sample, seen)
            if seen.several or (seen.samples >= _FIRST_SAMPLES and not self._lacking(seen)):
                break
        first, more = units[0], seen.shards - 1
        others = f"{more} other{'s' * (more > 1)}"
        if not seen.samples:
            nor = f", nor do {others}" if more else ""
            raise SourceError(
                f"source.path: {first.path} holds no samples ({first.size or 0:,} bytes){nor}; "
                "takes tar files as webdataset or img2dataset write them"
            )
        begin = f" and {others} begin" if more else " begins"
        begins = f"{first.path}{begin} with samples of {', '.join(sorted(seen.endings))}"
        if problem := self._lacking(seen):
            key, told = problem
            raise SourceError(f"source.{key}: {begins}{told}")
        for ours, key in self._missing(seen).items():
            where = f"source.columns.{ours}: the first samples of {first.path}"
            logger.warning("%s%s; later ones may", where, _lack(key, seen.keys))

    def _first_samples(self, units: Sequence[Unit], seen: _Seen) -> Iterator[_Sample]:
        """Some samples of each shard; `seen` counts the shards."""
        for unit in units:
            seen.shards += 1
            for sample in islice(self._samples(unit), _CHECKED_SAMPLES // len(units)):
                if isinstance(sample, _Sample):
                    yield sample

    def _look(self, sample: _Sample, seen: _Seen) -> None:
        """Take note of what a sample has."""
        images = self._images(sample)
        if len(images) > 1:
            seen.several = seen.several or images
        image = any(ending.lower() in sample.endings for ending in images)
        seen.samples += 1
        seen.whole |= image and not sample.endings.isdisjoint(self._text_kinds)
        seen.endings |= sample.endings
        with suppress(ValueError):
            seen.keys.update(_document(sample.files.get("json")))

    def _lacking(self, seen: _Seen) -> tuple[str, str] | None:
        """What the samples lack that is asked for: a key of the configuration, and what is told."""
        chosen = self.config.columns.image
        if chosen and chosen.lower() not in seen.endings:
            return "columns.image", f"; none is {chosen!r}"
        if not chosen and not any(ending.endswith(_IMAGES) for ending in seen.endings):
            return "path", f"; an image ends in {', '.join(_IMAGES)}"
        if seen.several:
            which = f"name the one of {', '.join(seen.several)} that is the image"
            return "columns.image", f"; {which}"
        if seen.endings.isdisjoint(self._text_kinds):
            asked = ", ".join(self._text_kinds) or "none of them"
            return "columns", f", but the texts are asked of {asked}"
        if not seen.whole:
            return "path", (
                ", but none has an image and a text; files of one sample follow each other, and "
                "are called alike up to the first dot"
            )
        missing = self._missing(seen)
        if {"id", *missing} >= self._texts.keys():
            ours, key = next(iter(missing.items()))
            return f"columns.{ours}", f"; these{_lack(key, seen.keys)}"
        return None

    def _missing(self, seen: _Seen) -> dict[str, str]:
        """Our columns whose key no JSON file has, and the key."""
        keys = {
            ours: place.removeprefix("json.")
            for ours, place in self._texts.items()
            if place.startswith("json.")
        }
        return {ours: key for ours, key in keys.items() if key not in seen.keys}


def _kinds(places: Iterable[str]) -> list[str]:
    """The endings of the files that places of texts are in."""
    return sorted({place.partition(".")[0] for place in places})


def _lack(key: str, found: Collection[str]) -> str:
    """Told of samples whose JSON files lack a key."""
    close = difflib.get_close_matches(key, sorted(found), n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    has = ", ".join(sorted(found)) or "no keys"
    return f" have no {key!r} in their JSON{meant}, which has {has}"


def _document(content: bytes | None) -> Mapping[str, Any]:
    """A sample's JSON file, empty if it has none; raises ValueError if it is no object in UTF-8."""
    if content is None:
        return {}
    try:
        value = json.loads(content.decode("utf-8-sig", "replace"))
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value
