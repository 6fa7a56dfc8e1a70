"""Tables beside the pairs: what a stage adds is a table of its own, row by row with each part.

Filling a column for 400 million pairs so rewrites no image. A stage's tables count once its
manifest is there:

    captions/NAME/part-00000.parquet        caption and tags of the pairs that had none
    descriptions/NAME/part-00000.parquet    descriptions
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from ray_jobs.storage import Storage

CAPTIONS, DESCRIPTIONS = "captions", "descriptions"
# What each table says of a pair, in place of the pair's own columns.
_SAYS = {CAPTIONS: ("caption", "tags"), DESCRIPTIONS: ("description", "alternatives")}


@dataclass(frozen=True)
class Beside:
    """A stage's tables for one data set.

    Attributes:
        kind: CAPTIONS or DESCRIPTIONS.
        name: of the data set.
    """

    kind: str
    name: str

    @property
    def folder(self) -> str:
        """Where all of it is."""
        return f"{self.kind}/{self.name}"

    @property
    def manifest_file(self) -> str:
        """What says that all parts are done."""
        return f"{self.folder}/manifest.json"

    def part_file(self, part: str) -> str:
        """The table beside a part."""
        return f"{self.folder}/{part}.parquet"

    def part_folder(self, part: str) -> str:
        """Where the pieces of a part's table are while it is in work."""
        return f"{self.folder}/{part}"

    @property
    def says(self) -> tuple[str, ...]:
        """The columns that readers take from it."""
        return _SAYS[self.kind]


def written(storage: Storage, name: str) -> tuple[Beside, ...]:
    """The finished tables of a data set."""
    both = (Beside(kind, name) for kind in _SAYS)
    return tuple(one for one in both if storage.exists(one.manifest_file))


def lay_over(
    storage: Storage,
    pairs: pa.Table,
    beside: Sequence[Beside],
    part: str,
    first: int,
    columns: Sequence[str],
) -> pa.Table:
    """Rows of a part with what stages wrote beside them.

    Args:
        storage: holds the tables.
        pairs: consecutive rows of the part, with their ids.
        beside: the tables that are there.
        part: the part's name.
        first: the position in the part of the first of the rows.
        columns: of the tables, that are wanted.

    Raises:
        ValueError: a table does not belong to these pairs.
    """
    for one in beside:
        wanted = [name for name in one.says if name in columns]
        if not wanted:
            continue
        file = one.part_file(part)
        table = storage.read_rows(file, ["id", *wanted], first, len(pairs))
        if not table["id"].combine_chunks().equals(pairs["id"].combine_chunks()):
            raise ValueError(
                f"{file} does not belong to the pairs beside it: their ids differ; delete "
                f"{one.folder} and make it again"
            )
        for name in wanted:
            at = pairs.schema.get_field_index(name)
            if at < 0:
                pairs = pairs.append_column(name, table[name])
            else:
                pairs = pairs.set_column(at, name, table[name])
    return pairs
