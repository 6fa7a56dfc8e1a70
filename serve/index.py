"""The deployment that searches the vectors of `rwkv-clip embed`.

Up to a million or so, a product with all of them is exact and quick enough. Beyond, FAISS puts them
into cells when they are loaded, and a search looks into those that are nearest to the query.

Vectors that are written anew, for another model or of more pairs, are loaded beside those that are
searched. These stay until requests come through the model of the new ones, and as long after the
first as one may take that came through the model before: so it does not matter which is exchanged
first, the model or its vectors.
"""

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rwkv_clip.images import ImageDecodeError, small_picture
from serve.config import FaissConfig, SearchConfig, ServeFile, StorageSection
from serve.files import open_filesystem
from serve.messages import REPORT_SECONDS

logger = logging.getLogger(__name__)

_SAMPLE = 64  # vectors for each cell, to find its centre by
_OFF = 0.02  # that a vector's squared length may be from one: rounded to 16 bits it is off by less


class SearchError(ValueError):
    """There is nothing to search in; the message says why and what to do."""


@dataclass(frozen=True)
class IndexFiles:
    """Vectors of a data set, that are complete.

    Attributes:
        storage: that holds them.
        settings: how they are searched.
        parts: the names of the Parquet files, without their suffix.
        model: the digest of the weights that made them.
        rows: the vectors of all parts, and None where an older release did not note it.
        dimensions: of a vector, likewise.
        record: what tells them from those that were there before, under the same names.
    """

    storage: StorageSection
    settings: SearchConfig
    parts: tuple[str, ...]
    model: str
    rows: int | None
    dimensions: int | None
    record: str


@dataclass(frozen=True)
class Lacking:
    """There are no vectors of the model that was asked for.

    Attributes:
        others: whether there are some of another model.
        trouble: why there are none, if there should be.
    """

    others: bool
    trouble: str | None


@dataclass(frozen=True)
class Hit:
    """A pair that was found.

    Attributes:
        id, text: the pair's.
        score: the cosine of the angle to the query.
        picture: JPEG, if it was asked for.
    """

    id: str
    text: str
    score: float
    picture: bytes | None = None


def find_index(config: ServeFile) -> IndexFiles | None:
    """The vectors that a configuration means; None if it wants none or there are none.

    Raises:
        SearchError: the storage cannot be read.
    """
    search, storage = config.serve.search, config.storage
    if search is None or storage is None:
        return None
    try:
        filesystem, root = open_filesystem(storage.uri, config.s3())
        manifest = f"{root}/vectors/{search.data}/manifest.json"
        with filesystem.open_input_stream(manifest) as file:
            content = file.read()
        written = filesystem.get_file_info(manifest).mtime_ns
        record = f"{hashlib.sha256(content).hexdigest()} {written}"
        folder = pafs.FileSelector(f"{root}/vectors/{search.data}")
        names = [info.base_name for info in filesystem.get_file_info(folder)]
        parts = sorted(
            name.removesuffix(".parquet")
            for name in names
            if name.startswith("part-") and name.endswith(".parquet")
        )
        told = json.loads(content)
        result = told.get("result", {})
        return IndexFiles(
            storage,
            search,
            tuple(parts),
            told["run"]["model"],
            result.get("rows"),
            result.get("dimensions"),
            record,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SearchError(
            f"serve.search: vectors/{search.data} of the storage cannot be read: {error}; run "
            "`rwkv-clip embed` again, or set serve.search to null"
        ) from error


Matrix = npt.NDArray[np.float32]


class Method(Protocol):
    """How the nearest of many vectors are found."""

    def nearest(self, query: Matrix, results: int) -> tuple[npt.NDArray[np.int64], Matrix]:
        """Places and scores of the nearest vectors to one [D], the nearest first."""


class Exact:
    """The product with all vectors [N, D]."""

    def __init__(self, vectors: Matrix) -> None:
        self.vectors = vectors

    def nearest(self, query: Matrix, results: int) -> tuple[npt.NDArray[np.int64], Matrix]:
        """See Method."""
        scores = self.vectors @ query
        results = min(results, len(scores))
        if not results:
            return np.empty(0, np.int64), scores
        best = np.argpartition(-scores, results - 1)[:results]
        best = best[np.argsort(-scores[best], kind="stable")]
        return best, scores[best]


class Cells:
    """Vectors [N, D] in cells around centres, by FAISS; keeps what they are rounded to."""

    def __init__(self, vectors: Matrix, config: FaissConfig) -> None:
        import faiss  # takes a second, which a server without it need not

        count, width = vectors.shape
        cells = min(config.cells or 4 * math.isqrt(count), count)
        kind = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}[config.codes]
        self.index = faiss.index_factory(width, f"IVF{cells},{kind}", faiss.METRIC_INNER_PRODUCT)
        # The centres need a few dozen vectors each, not all.
        sample = np.random.default_rng(0).permutation(count)[: _SAMPLE * cells]
        self.index.train(vectors[np.sort(sample)])
        self.index.add(vectors)
        self._cells = faiss.extract_index_ivf(self.index)
        self.look_into(config.probes)

    def look_into(self, probes: int) -> None:
        """Set how many cells a search looks into."""
        self._cells.nprobe = min(probes, self._cells.nlist)

    def nearest(self, query: Matrix, results: int) -> tuple[npt.NDArray[np.int64], Matrix]:
        """See Method; fewer if the cells that are looked into hold fewer."""
        scores, places = self.index.search(query[None], results)
        there = places[0] >= 0
        return places[0][there], scores[0][there]


def method_of(vectors: Matrix, config: SearchConfig) -> Method:
    """The way in which vectors are to be searched."""
    if config.method == "exact" or (config.method == "auto" and len(vectors) <= config.exact_rows):
        return Exact(vectors)
    logger.info("%d vectors are put into cells", len(vectors))
    return Cells(vectors, config.faiss)


class Index:
    """Searches the vectors of a data set, and follows them when they are written anew.

    Args:
        config: of the endpoint.
    """

    async def __init__(self, config: ServeFile) -> None:  # type: ignore[misc]
        self.config = config
        self.threads = ThreadPoolExecutor(2, "search")
        self.loader = ThreadPoolExecutor(1, "load")
        self.newest: Collection | None = None
        self.before: Collection | None = None  # what is searched until the newest is asked for
        self.moved: float | None = None  # when the newest was first asked for
        self.trouble: str | None = None
        await self._look()
        self.watcher = asyncio.create_task(self._watch())

    async def search(
        self, query: Matrix, results: int, model: str, pictures: bool
    ) -> list[Hit] | Lacking:
        """The pairs whose images are nearest to a vector [D] of a model, the nearest first."""
        collection = self._of(model, len(query))
        if collection is None:
            return Lacking(self.newest is not None, self.trouble)
        run = asyncio.get_running_loop().run_in_executor
        return await run(self.threads, collection.search, query, results, pictures)

    async def check_health(self) -> None:
        """Fail where the vectors are no longer followed; Serve then replaces the replica."""
        if self.watcher.done():
            raise RuntimeError("the vectors are no longer followed")

    def _of(self, model: str, width: int) -> "Collection | None":
        """What a query of a model is searched in; the newest, unless that is of another width."""
        if self.newest is not None and self.newest.files.model == model:
            if self.newest.width == width:
                if self.moved is None:
                    self.moved = time.monotonic()
                return self.newest
            self._note(
                f"vectors/{self.newest.settings.data} has vectors of {self.newest.width} numbers, "
                f"and the model that is to have made them makes {width}; {self.newest.anew}"
            )
        before = self.before
        if before is not None and before.files.model == model and before.width == width:
            return before
        return None

    def _note(self, trouble: str) -> None:
        """Keep what is wrong, for who asks, and log it once."""
        if self.trouble != trouble:
            logger.error("the vectors to be searched cannot be used: %s", trouble)
        self.trouble = trouble

    def _left(self) -> bool:
        """Whether nobody asks for what was there before the newest any more."""
        if self.moved is None:
            return False
        latest = self.config.serve.request_seconds + 2 * REPORT_SECONDS  # as the towers keep theirs
        return time.monotonic() > self.moved + latest

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.config.serve.watch_seconds)
            if self._left():
                self.before = None
            await self._look()

    async def _look(self) -> None:
        """Take what is there now; what cannot be read leaves everything as it is."""
        run = asyncio.get_running_loop().run_in_executor
        there = self.newest.files if self.newest else None
        try:
            found = await run(self.loader, self._taken, there)
        except Exception as error:  # whatever is in files that others wrote
            self._note(f"{type(error).__name__}: {error}")
            return
        self.trouble = None
        if found is not None:
            if self.newest is not None and (self.moved is not None or self.before is None):
                self.before = self.newest
            self.newest, self.moved = found, None
            logger.info("%d vectors can be searched", found.about.num_rows)

    def _taken(self, there: IndexFiles | None) -> "Collection | None":
        """What took the place of the files that were there; None if nothing did."""
        files = find_index(self.config)
        if files is None or files == there:
            return None
        collection = Collection(files)
        # Parts that were replaced while they were read belong to another manifest.
        return collection if find_index(self.config) == files else None


class Collection:
    """All vectors of a data set in memory.

    Args:
        files: that are searched.
    """

    def __init__(self, files: IndexFiles) -> None:
        self.files, self.settings = files, files.settings
        # What a manifest calls done, `embed` leaves as it is.
        self.anew = f"delete vectors/{self.settings.data} and run `rwkv-clip embed`"
        self.filesystem, self.root = open_filesystem(files.storage.uri, files.storage.s3)
        self.parts, self.pairs = files.parts, self._pairs()
        self._check_rows()
        loaded = [self._load(part) for part in files.parts]
        vectors = np.concatenate([one for one, _ in loaded])
        self.width = vectors.shape[1]
        if files.dimensions not in (self.width, None):
            raise SearchError(
                f"vectors/{self.settings.data} has vectors of {self.width} numbers, and its "
                f"manifest tells of {files.dimensions}; {self.anew}"
            )
        self.method = method_of(vectors, self.settings)
        self.about = pa.concat_tables([about for _, about in loaded])
        self.part_of = np.repeat(np.arange(len(loaded)), [len(about) for _, about in loaded])

    def search(self, query: Matrix, results: int, pictures: bool) -> list[Hit]:
        """The nearest pairs to a vector [D]; see `Index.search`."""
        best, scores = self.method.nearest(query, results)
        about = self.about.take(pa.array(best))
        texts = [text or "" for text in about["text"].to_pylist()]
        ids = about["id"].to_pylist()
        rows = about["row"].to_numpy()
        shown = self._pictures(best, rows, ids) if pictures else [None] * len(best)
        values = scores.tolist()
        return [Hit(*hit) for hit in zip(ids, texts, values, shown, strict=True)]

    def _pictures(
        self, places: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], ids: Sequence[str]
    ) -> list[bytes | None]:
        """Small pictures of pairs; None for one that cannot be had."""
        found: list[bytes | None] = [None] * len(places)
        owners = self.part_of[places]
        for part in np.unique(owners):
            wanted = np.flatnonzero(owners == part)
            try:
                images = self._images(self.parts[part], rows[wanted])
            except (OSError, LookupError, pa.ArrowException) as error:
                logger.warning("pictures of %s cannot be read: %s", self.parts[part], error)
                continue
            for at, (id_there, image) in zip(wanted, images, strict=True):
                if id_there == ids[at]:  # the pairs may be others than those that were embedded
                    found[at] = _jpeg(image, self.settings.picture_side)
        return found

    def _images(self, part: str, rows: npt.NDArray[np.int64]) -> list[tuple[str, bytes]]:
        """Ids and images that are in rows now."""
        with pq.ParquetFile(self.filesystem.open_input_file(self.pairs[part])) as file:
            counts = [
                file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)
            ]
            ends = np.cumsum(counts)
            groups = np.searchsorted(ends, rows, side="right")
            images: dict[int, tuple[str, bytes]] = {}
            for group in np.unique(groups):
                read = file.read_row_group(int(group), columns=["id", "image"])
                begin = int(ends[group]) - counts[group]
                for row in rows[groups == group]:
                    at = int(row) - begin
                    images[int(row)] = read["id"][at].as_py(), read["image"][at].as_py()
            return [images[int(row)] for row in rows]

    def _check_rows(self) -> None:
        """Raise SearchError where a part is not there any more, before any is read."""
        if self.files.rows is None:
            return
        rows = 0
        for part in self.parts:
            with self.filesystem.open_input_file(self._vectors(part)) as file:
                rows += pq.read_metadata(file).num_rows
        if rows != self.files.rows:
            raise SearchError(
                f"vectors/{self.settings.data} has {rows:,} vectors, and its manifest tells of "
                f"{self.files.rows:,}; delete that manifest.json and run `rwkv-clip embed`, which "
                "makes what is missing"
            )

    def _vectors(self, part: str) -> str:
        return f"{self.root}/vectors/{self.settings.data}/{part}.parquet"

    def _load(self, part: str) -> tuple[Matrix, pa.Table]:
        """Vectors [n, D] of a part, and of each its pair's id, text and row."""
        vectors = self._read(self._vectors(part), ["id", "image_embedding"])
        if part not in self.pairs:
            raise self._others(part)
        pairs = self._read(self.pairs[part], ["id", self.settings.text])
        column = vectors["image_embedding"].combine_chunks()
        size = column.type.list_size
        matrix = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
        matrix = matrix.astype(np.float32, copy=False)
        self._check_vectors(part, matrix)
        rows = pc.index_in(vectors["id"], pairs["id"].combine_chunks())
        if rows.null_count:
            raise self._others(part)
        about = {"id": vectors["id"], "text": pairs[self.settings.text].take(rows), "row": rows}
        return matrix, pa.table(about)

    def _check_vectors(self, part: str, matrix: Matrix) -> None:
        """Raise SearchError for what no query can be compared with: it would be of every answer."""
        squares = np.einsum("nd,nd->n", matrix, matrix)
        unusable = int(np.count_nonzero(~(np.abs(squares - 1) <= _OFF)))  # NaN and inf among them
        if unusable:
            raise SearchError(
                f"vectors/{self.settings.data}/{part} has {unusable} vectors that are not "
                f"finite, or not of length one; look at the model, and {self.anew}"
            )

    def _pairs(self) -> dict[str, str]:
        """The parts' files of pairs, which are not all called as the parts are."""
        manifest = f"{self.root}/pairs/{self.settings.data}/manifest.json"
        with self.filesystem.open_input_stream(manifest) as file:
            parts = json.loads(file.read())["parts"]
        return {part["name"]: f"{self.root}/{part['path']}" for part in parts}

    def _others(self, part: str) -> SearchError:
        return SearchError(
            f"vectors/{self.settings.data}/{part} has vectors of pairs that are not there any "
            "more; run `rwkv-clip embed` again"
        )

    def _read(self, path: str, columns: Sequence[str]) -> pa.Table:
        with self.filesystem.open_input_file(path) as file:
            return pq.read_table(file, columns=list(columns))


def _jpeg(image: bytes, side: int) -> bytes | None:
    try:
        picture = small_picture(image, side)
    except ImageDecodeError:
        return None
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()


def told(hit: Hit, index: int) -> dict[str, Any]:
    """A hit as the answer gives it."""
    answer: dict[str, Any] = {
        "object": "result",
        "index": index,
        "id": hit.id,
        "score": hit.score,
        "text": hit.text,
    }
    if hit.picture is not None:
        answer["image"] = "data:image/jpeg;base64," + base64.b64encode(hit.picture).decode()
    return answer
