"""Vectors that cannot be searched, or not all of them: told, and what served goes on serving."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve.config import ServeFile
from serve.index import Collection, Index, Lacking, SearchError, find_index
from tests.serve.small import picture

WIDTH, ROWS = 16, 8
MODEL = "digest"
QUERY = np.eye(1, WIDTH, dtype=np.float32)[0]

Matrix = npt.NDArray[np.float32]


def unit(rows: int = ROWS, width: int = WIDTH) -> Matrix:
    """Vectors of length one, as 16 bits round them."""
    drawn = np.random.default_rng(0).standard_normal((rows, width))
    rounded = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    return rounded.astype(np.float32)


class Written:
    """A storage as `ingest` and `embed` leave it, with two parts.

    Args:
        folder: for it.
    """

    def __init__(self, folder: Path) -> None:
        self.vectors, self.pairs = folder / "vectors" / "test", folder / "pairs" / "test"
        self.config = ServeFile.model_validate({"storage": {"uri": str(folder)}})
        for made in (self.vectors, self.pairs):
            made.mkdir(parents=True)
        parts = [f"part-{at:05d}" for at in range(2)]
        named = [{"name": part, "path": f"pairs/test/{part}.parquet"} for part in parts]
        (self.pairs / "manifest.json").write_text(json.dumps({"parts": named}))
        for part in parts:
            ids = [f"{part}/{row}" for row in range(ROWS // 2)]
            images = [picture(row) for row in range(ROWS // 2)]
            table = pa.table({"id": ids, "caption": ids, "image": images})
            pq.write_table(table, self.pairs / f"{part}.parquet")
        self.manifests = 0
        self.write(unit())

    def write(self, vectors: Matrix, **result: object) -> None:
        """Vectors of all pairs, and what `embed` tells of them unless `result` says otherwise."""
        width = vectors.shape[1]
        for at, part in enumerate(np.split(vectors, 2)):
            ids = [f"part-{at:05d}/{row}" for row in range(ROWS // 2)]
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
            table = pa.table({"id": ids, "image_embedding": column})
            pq.write_table(table, self.vectors / f"part-{at:05d}.parquet")
        self.tell(**{"rows": ROWS, "dimensions": width, **result})

    def tell(self, **result: object) -> None:
        """Write a manifest, which is another one each time."""
        self.manifests += 1
        told = {"run": {"model": MODEL, "at": self.manifests}, "result": result}
        (self.vectors / "manifest.json").write_text(json.dumps(told))

    def collection(self) -> Collection:
        files = find_index(self.config)
        assert files is not None
        return Collection(files)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def spoiled(vectors: Matrix, value: float) -> Matrix:
    vectors[5] *= value
    return vectors


def lose_a_part(written: Written) -> None:
    (written.vectors / "part-00001.parquet").unlink()


def lose_rows(written: Written) -> None:
    file = written.vectors / "part-00000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 1), file)
    written.tell(rows=ROWS)


UNUSABLE = {
    "a part": (lose_a_part, "has 4 vectors, and its manifest tells of 8; delete that manifest"),
    "rows": (lose_rows, "has 5 vectors, and its manifest tells of 8"),
    "NaN": (lambda to: to.write(spoiled(unit(), np.nan)), "part-00001 has 1 vectors that are not"),
    "inf": (lambda to: to.write(spoiled(unit(), np.inf)), "part-00001 has 1 vectors that are not"),
    "longer": (lambda to: to.write(spoiled(unit(), 1.1)), "part-00001 has 1 vectors that are not"),
    "nothing": (lambda to: to.write(spoiled(unit(), 0)), "part-00001 has 1 vectors that are not"),
    "width": (
        lambda to: to.write(unit(width=4), dimensions=WIDTH),
        "has vectors of 4 numbers, and its manifest tells of 16; delete vectors/test and run",
    ),
}


@pytest.mark.parametrize(("spoil", "told"), UNUSABLE.values(), ids=UNUSABLE)
def test_vectors_that_cannot_be_used_are_told_and_leave_those_that_serve(
    written: Written, spoil: Callable[[Written], None], told: str
):
    async def work() -> None:
        index = Index.__new__(Index)
        await index.__init__(written.config)
        hits = await index.search(QUERY, ROWS, MODEL, False)
        assert isinstance(hits, list)
        assert len(hits) == ROWS
        spoil(written)
        await index._look()
        assert told in index.trouble
        assert await index.search(QUERY, ROWS, MODEL, False) == hits
        index.watcher.cancel()

        begun = Index.__new__(Index)  # after them
        await begun.__init__(written.config)
        assert await begun.search(QUERY, ROWS, MODEL, False) == Lacking(False, begun.trouble)
        assert told in begun.trouble
        begun.watcher.cancel()

    asyncio.run(work())


def test_vectors_of_another_width_than_the_queries_replace_none(written: Written):
    """As it is where no manifest tells of their width."""

    async def work() -> None:
        index = Index.__new__(Index)
        await index.__init__(written.config)
        hits = await index.search(QUERY, ROWS, MODEL, False)
        written.write(unit(width=4), dimensions=None)
        await index._look()
        assert index.newest.width == 4
        assert await index.search(QUERY, ROWS, MODEL, False) == hits
        assert "has vectors of 4 numbers, and the model that is to have made them makes 16" in (
            index.trouble
        )
        index.before = None  # as in a server that was started after them
        assert await index.search(QUERY, ROWS, MODEL, False) == Lacking(True, index.trouble)
        index.watcher.cancel()

    asyncio.run(work())


def test_what_an_older_release_did_not_note_is_not_compared(written: Written):
    written.tell()
    assert len(written.collection().search(QUERY, ROWS, pictures=False)) == ROWS
    manifest = written.vectors / "manifest.json"
    manifest.write_text(json.dumps({"run": {"model": MODEL}}))
    assert len(written.collection().search(QUERY, ROWS, pictures=False)) == ROWS


@pytest.mark.parametrize("content", ["{}", "[]", "7", '{"run": {"model": "a"}, "result": 7}'])
def test_a_manifest_of_something_else_is_told(written: Written, content: str):
    (written.vectors / "manifest.json").write_text(content)
    with pytest.raises(SearchError, match="vectors/test of the storage cannot be read"):
        find_index(written.config)


def test_pairs_without_images_are_found_without_pictures(written: Written):
    collection = written.collection()
    assert all(hit.picture for hit in collection.search(QUERY, ROWS, pictures=True))
    file = written.pairs / "part-00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["image"]), file)
    hits = collection.search(QUERY, ROWS, pictures=True)
    assert len(hits) == ROWS
    for hit in hits:
        assert (hit.picture is not None) == hit.id.startswith("part-00001")
