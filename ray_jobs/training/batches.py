"""Batches for a training worker: read, decoded, augmented and tokenized on Ray Data's CPU workers.

Choices:
- A worker has a stream of its own: Ray Data executions whose work items are the plan's windows, in
  order, across epochs, so that the pipeline does not drain at an epoch's end.
- Images are encoded files until the last stage. What travels to the worker are uint8 pixels, plane
  by plane as the resize gives them and the model takes them, and int32 tokens; the worker
  normalises, which on a GPU is free.
- A sample's text, crop, flip and colours are drawn from (seed, epoch, id): whoever prepares it,
  whenever.
- A row whose image cannot be decoded (or whose texts are all empty) is marked and left out by the
  worker, which counts it. Ingestion has decoded each image once, so this is rare.
- PyTorch is imported where batches are made, and not by the process of Ray Data's that only hands
  the windows out.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from ray_jobs.beside import Beside, lay_over, written
from ray_jobs.execution import arrange, work_items
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.storage import Storage
from ray_jobs.training.plan import DataPlan, RowAddress, Rows, Window
from rwkv_clip.images import ImageDecodeError
from rwkv_clip.jitter import ColourJitter

if TYPE_CHECKING:
    from rwkv_clip.transforms import ImageSettings, ImageTransform

logger = logging.getLogger(__name__)

TEXTS = ("web_text", "caption", "description")
_COLUMNS = ["id", "image", "web_text", "caption", "tags", "description"]
_SAID = ("caption", "tags", "description", "alternatives")

_READERS = 8  # of row groups: an object store lets each wait for several answers, one by one

# Handed to Ray Data at a time: each costs the worker a millisecond or two before the first batch,
# and between one lot and the next the pipeline drains, once in hours.
_WINDOWS = 2000

Batch = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class PairFiles:
    """A data set's files: the pairs, and what stages wrote beside them.

    Attributes:
        storage: where they are.
        parts: names of the pairs' files.
        row_groups: each part's row group sizes.
        names: the parts' names.
        beside: the tables that lie beside them.
    """

    storage: Storage
    parts: tuple[str, ...]
    row_groups: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] = ()
    beside: tuple[Beside, ...] = ()

    @classmethod
    def of(cls, storage: Storage, name: str = "train") -> "PairFiles":
        """Those of an ingested data set, with the captions and descriptions that were made."""
        parts = Manifest.from_storage(storage, name).parts
        return cls(
            storage,
            tuple(part.path for part in parts),
            tuple(part.row_groups for part in parts),
            tuple(part.name for part in parts),
            written(storage, name),
        )

    @cached_property
    def address(self) -> RowAddress:
        return RowAddress.of(self.row_groups)

    @property
    def flat_row_groups(self) -> tuple[int, ...]:
        """Rows in each row group, over all parts."""
        return tuple(rows for part in self.row_groups for rows in part)

    def texts(self) -> Iterator[dict[str, Any]]:
        """The pairs in order, without images and what was written beside them."""
        for part in self.parts:
            with self.storage.parquet(part) as file:
                for batch in file.iter_batches(columns=[*TEXTS, "tags"]):
                    yield from batch.to_pylist()

    def take(self, rows: Rows) -> list[dict[str, Any]]:
        """The pairs at these positions, in their order."""
        groups = self.address.groups(rows)
        there = np.unique(groups)
        wanted = [np.unique(rows[groups == group]) for group in there]
        with ThreadPoolExecutor(_READERS) as pool:
            read = chain.from_iterable(pool.map(self._read, there.tolist(), wanted))
            found = dict(zip(np.concatenate(wanted).tolist(), read, strict=True))
        return [found[row] for row in rows.tolist()]

    def batches(self, part: int, rows: int) -> Iterator[list[dict[str, Any]]]:
        """The pairs of a part in order, so many at a time; each row group is read once."""
        waiting: list[dict[str, Any]] = []
        read = sum(map(sum, self.row_groups[:part]))
        there, end = read, read + sum(self.row_groups[part])
        for size in self.row_groups[part]:
            there += size
            # As many row groups as fill a batch, because they are read at the same time.
            if len(waiting) + there - read < rows and there < end:
                continue
            waiting += self.take(np.arange(read, there))
            read = there
            while len(waiting) >= rows:
                yield waiting[:rows]
                del waiting[:rows]
        if waiting:
            yield waiting

    def _read(self, group: int, rows: Rows) -> list[dict[str, Any]]:
        """Some rows of a row group, with what was written beside them."""
        part = int(self.address.part_of_group[group])
        inside = int(self.address.group_in_part[group])
        with self.storage.parquet(self.parts[part]) as file:
            table = file.read_row_group(inside, columns=_COLUMNS)
        if self.beside:
            first = sum(self.row_groups[part][:inside])
            table = lay_over(self.storage, table, self.beside, self.names[part], first, _SAID)
        return rows_at(table, rows - self.address.first_row[group])


def rows_at(table: pa.Table, positions: Rows) -> list[dict[str, Any]]:
    """The rows of a table at these positions, which go up.

    Taken chunk by chunk: the whole of a column may be over the 2 GB that Arrow can join.
    """
    found, first = [], 0
    for batch in table.to_batches():
        begin, end = np.searchsorted(positions, [first, first + len(batch)])
        found += batch.take(pa.array(positions[begin:end] - first)).to_pylist()
        first += len(batch)
    return found


@dataclass(frozen=True)
class Images:
    """What a model's training makes of images; see `rwkv_clip.image_transform`.

    Attributes:
        image_size, image_mean, image_std: of the model's configuration.
        jitter: changes their colours; None keeps them.
    """

    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    jitter: ColourJitter | None = None

    @classmethod
    def of(cls, model: "ImageSettings", jitter: ColourJitter | None = None) -> "Images":
        """For a model, by its configuration."""
        return cls(model.image_size, model.image_mean, model.image_std, jitter)

    def transform(self) -> "ImageTransform":
        """With training augmentation."""
        from rwkv_clip.transforms import image_transform

        return image_transform(self, train=True, jitter=self.jitter)


@dataclass(frozen=True)
class BatchMaker:
    """Turns windows of the plan into batches for one worker.

    Attributes:
        files: the pairs.
        plan: their order.
        lanes: those of the worker.
        images: what becomes of them.
        context_length: tokens of a text.
        weights: how often each text is chosen, of those that a pair has.
    """

    files: PairFiles
    plan: DataPlan
    lanes: range
    images: Images
    context_length: int
    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TEXTS, 1.0))

    def __call__(self, windows: Mapping[str, Any]) -> Iterator[Batch]:
        """A batch for each step of the windows; what `map_batches` calls."""
        columns = (windows[name].tolist() for name in ("epoch", "first", "steps"))
        for epoch, first, steps in zip(*columns, strict=True):
            yield from self.batches(Window(epoch, first, steps))

    def batches(self, window: Window) -> Iterator[Batch]:
        """The worker's share of each batch of a window, in order."""
        shape = (len(self.lanes), window.steps, self.plan.slice_rows)
        rows = np.concatenate([self.plan.rows_of(window, lane) for lane in self.lanes])
        pairs = self.files.take(rows)
        for step in range(window.steps):
            order = np.arange(rows.size).reshape(shape)[:, step].ravel()
            chosen = [pairs[at] for at in order]
            number = window.epoch * self.plan.steps_per_epoch + window.first + step
            yield self._batch(chosen, window.epoch, number)

    @cached_property
    def _transform(self) -> "ImageTransform":
        return self.images.transform()

    def _batch(self, pairs: Sequence[Mapping[str, Any]], epoch: int, step: int) -> Batch:
        from rwkv_clip.tokenizer import tokenize

        size = self.images.image_size
        pixels = np.zeros((len(pairs), 3, size, size), np.uint8)
        usable = np.ones(len(pairs), np.bool_)
        seeds = np.zeros(len(pairs), np.int64)
        texts = []
        for at, pair in enumerate(pairs):
            rng = sample_generator(self.plan.seed, epoch, pair["id"])
            text = choose_text(pair, self.weights, rng)
            texts.append(text)
            try:
                pixels[at] = self._transform.planes(pair["image"], rng, name=pair["id"])
            except ImageDecodeError as error:
                logger.warning("left out: %s", error)
                usable[at] = False
            usable[at] &= bool(text)
            seeds[at] = rng.integers(1 << 63)
        return {
            "pixels": pixels,
            "tokens": tokenize(texts, self.context_length).numpy().astype(np.int32),
            "seeds": seeds,
            "usable": usable,
            "id": np.array([pair["id"] for pair in pairs], dtype=object),
            "step": np.full(len(pairs), step, np.int64),
        }


def sample_generator(seed: int, epoch: int, identity: str) -> np.random.Generator:
    """The random numbers of one sample in one epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch, crc32(identity.encode())]))


def choose_text(
    pair: Mapping[str, Any], weights: Mapping[str, float], rng: np.random.Generator
) -> str:
    """One of a pair's texts, by weight among those it has; its tags if it has none at all.

    Empty where the only texts are such as shall not be trained on: the pair is left out.
    """
    there = [(pair[name], weights.get(name, 0.0)) for name in TEXTS if pair.get(name)]
    total = sum(weight for _, weight in there)
    if not there:
        return ", ".join(pair.get("tags") or ())
    if total <= 0:
        return ""
    mark = rng.random() * total
    chosen = str(there[-1][0])
    for text, weight in there:
        mark -= weight
        if mark < 0:
            chosen = str(text)
            break
    others = pair.get("alternatives")
    if others and chosen == pair["description"]:
        chosen = str([chosen, *others][rng.integers(1 + len(others))])
    return chosen


def stream(
    maker: BatchMaker,
    first_step: int,
    last_step: int,
    cpus_per_task: float,
    tasks: int | None = None,
    windows: int = _WINDOWS,
) -> Iterator[Batch]:
    """The worker's share of each batch from one global step to before another, in order.

    Args:
        maker: of the batches.
        first_step, last_step: counted over all epochs.
        cpus_per_task: that a task making batches holds.
        tasks: that make batches at a time; as many as fit if absent.
        windows: of the plan, that Ray Data is given at a time.
    """
    plan = maker.plan
    rows = plan.slice_rows * len(maker.lanes)
    stretch = windows * plan.shuffle_steps
    for first in range(first_step, last_step, stretch):
        windows_from = plan.windows_at_first if first == first_step else plan.windows
        todo = windows_from(first, min(first + stretch, last_step))
        dataset = work_items([asdict(window) for window in todo]).map_batches(
            maker,
            batch_size=1,
            num_cpus=cpus_per_task,
            zero_copy_batch=True,
            compute=ray.data.TaskPoolStrategy(tasks),
        )
        (share,) = arrange(dataset, ordered=True).streaming_split(1, equal=False)
        yield from share.iter_batches(
            batch_size=rows, batch_format="numpy", prefetch_batches=4, drop_last=False
        )
