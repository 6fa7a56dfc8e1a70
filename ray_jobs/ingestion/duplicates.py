"""Rows that repeat an earlier row of the data set.

Choices:
- Equality is that of 64-bit hashes: among 400 million ids the chance that a single row is dropped
  wrongly is 0.4 %. The driver holds 18 bytes a row for a while, and 37 where a third of the rows
  repeat others and are dropped.
- Two texts are near duplicates when they have the same set of words, whatever the order, case,
  punctuation and numbers; texts of fewer than four words are not compared.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_jobs.ingestion.manifest import part_name
from ray_jobs.pairs import rejected_table
from ray_jobs.storage import Storage, digest_of_json
from rwkv_clip.descriptions.words import UNSPACED

KEYS_SCHEMA = pa.schema([(name, pa.uint64()) for name in ("id", "image", "text")])
_MIN_WORDS = 4
_WORD = re.compile(rf"([{UNSPACED}]+)|([^\W\d_{UNSPACED}]+)")
_CHUNK = 1 << 24

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Drop:
    """Rows of a part that repeat earlier ones: hashes of their ids, and the earlier ones' parts."""

    reason: str
    ids: Hashes
    owners: npt.NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        return {"reason": self.reason, "ids": self.ids.tolist(), "owners": self.owners.tolist()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Drop":
        ids, owners = value["ids"], value["owners"]
        return cls(value["reason"], np.array(ids, np.uint64), np.array(owners, np.int64))


class DuplicateSearch:
    """Looks for rows that repeat an earlier one, a column of the keys at a time."""

    def __init__(self, storage: Storage, name: str, rows: Mapping[int, int]) -> None:
        """Over parts of so many rows, dropped ones included."""
        self.storage, self.name = storage, name
        self.parts = np.array(sorted(rows), np.int64)
        sizes = [rows[part] for part in self.parts.tolist()]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.left = np.ones(self.starts[-1], bool)  # rows that are not dropped yet

    def find(self, column: str, reason: str, drop: bool) -> tuple[int, dict[int, Drop]]:
        """How many rows repeat an earlier one, and if they shall be dropped, which, by part."""
        hashes = self._load(column)
        later, first = later_duplicates(hashes, self.left)
        if not drop or len(later) == 0:
            return len(later), {}
        self.left[later] = False
        del hashes
        ids = self._load("id")[later]
        places, owners = (np.searchsorted(self.starts, at, "right") - 1 for at in (later, first))
        found = {}
        there, begins = np.unique(places, return_index=True)  # `later`, and so they, go up
        for place, begin, end in zip(there, begins, [*begins[1:], len(places)], strict=True):
            here = slice(begin, end)
            found[int(self.parts[place])] = Drop(reason, ids[here], self.parts[owners[here]])
        return len(later), found

    def _load(self, column: str) -> Hashes:
        hashes = np.empty(self.starts[-1], np.uint64)

        def read(place: int) -> None:
            path = f"keys/{self.name}/{part_name(int(self.parts[place]))}.parquet"
            rows = slice(self.starts[place], self.starts[place + 1])
            hashes[rows] = self.storage.read_table(path, [column])[column].to_numpy()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(len(self.parts))))
        return hashes


def later_duplicates(
    hashes: Hashes, considered: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows whose hash an earlier considered row has too, and the first such row of each.

    A hash of 0 equals nothing. Besides a sorted copy of the hashes, only the duplicates' places
    are held.
    """
    values = hashes[considered]
    values.sort()
    repeated = np.unique(values[1:][values[1:] == values[:-1]])
    del values
    repeated = repeated[repeated != 0]
    chunks = []
    for start in range(0, len(hashes), _CHUNK) if len(repeated) else ():
        chunk = hashes[start : start + _CHUNK]
        place = np.minimum(np.searchsorted(repeated, chunk), len(repeated) - 1)
        hit = (repeated[place] == chunk) & considered[start : start + _CHUNK]
        chunks.append(start + np.flatnonzero(hit))
    rows = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
    _, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
    firsts = rows[first[group]]
    later = rows != firsts
    return rows[later], firsts[later]


def hash_of(data: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash_of_words(text: str) -> int:
    """64 bits over the set of the text's words; 0 if there are too few to compare.

    In scripts without spaces, pairs of neighbouring characters stand for words; two characters
    count as one.
    """
    found = _WORD.findall(text.casefold())
    runs = {run for run, _ in found if run}
    words = {word for _, word in found if word}
    if len(words) + len(set().union(*runs)) / 2 < _MIN_WORDS:
        return 0
    words.update(run[at : at + 2] for run in runs for at in range(max(1, len(run) - 1)))
    return hash_of(" ".join(sorted(words)).encode())


def explain(index: int, ids: Iterable[str], drops: Sequence[Drop]) -> pa.Table:
    """The rejected rows for what is dropped from a part."""
    keys = [(identity, hash_of(identity.encode())) for identity in ids]
    rows = []
    for one in drops:
        owners = dict(zip(one.ids.tolist(), one.owners.tolist(), strict=True))
        rows += [
            {
                "id": identity,
                "origin": part_name(index),
                "reason": one.reason,
                "detail": f"the first one is in {part_name(owners[key])}",
            }
            for identity, key in keys
            if key in owners
        ]
    return rejected_table(rows)


def digest_of(drops: Sequence[Drop]) -> str:
    """Tells what was dropped from a part."""
    return digest_of_json([[one.reason, one.ids.tolist()] for one in drops])
