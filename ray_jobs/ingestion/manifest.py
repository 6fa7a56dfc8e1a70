"""What ingestion leaves for every later stage: a data set's parts and what is known of them."""

from dataclasses import asdict, dataclass

from ray_jobs.storage import Storage


class IngestError(RuntimeError):
    """Ingestion cannot go on, or what it made cannot be used."""


@dataclass(frozen=True)
class Part:
    """A file of pairs.

    Attributes:
        name: `part-00000`, which every later stage keeps.
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
            value = storage.read_json(manifest_name(name))
        except FileNotFoundError as error:
            raise IngestError(
                f"{storage.child_uri(manifest_name(name))} does not exist: the data set {name!r} "
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
        storage.write_json(manifest_name(self.name), value)


def manifest_name(name: str) -> str:
    """Of a data set, in the storage."""
    return f"pairs/{name}/manifest.json"


def part_name(index: int) -> str:
    """Of a unit's part."""
    return f"part-{index:05d}"
