"""Which pairs make up which batch: a pure function of (seed, epoch, step).

Nothing here depends on how many workers there are or on who reads what first. So a run that was
killed goes on with exactly the samples it would have had, and two workers see the batches of one.

Choices:
- An epoch draws a new order of the row groups and lays their rows out in one line. The line is cut
  into `lanes` of equal length, and every global batch takes the same number of rows, a slice, from
  each lane. A worker owns whole lanes. So each row group is read once (twice if a cut goes through
  it), by one worker, in sequence, which is what object stores are good at.
- Inside a lane, rows are shuffled within windows of `shuffle_steps` slices. What is mixed with what
  is thus limited to lanes * window rows, drawn from everywhere; where the data set is smaller than
  that, it is a full shuffle of each lane.
- The rows that do not fill the last batch are left out of the epoch; which ones, changes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


class PlanError(ValueError):
    """A data set and a batch that do not go together."""


def check_lanes(batch: int, lanes: int) -> None:
    """Raises PlanError where a batch cannot be cut into equal lanes."""
    if batch % lanes:
        raise PlanError(
            f"a batch of {batch} cannot be cut into {lanes} equal lanes; take a data.lanes that "
            "divides it"
        )


def check_shares(lanes: int, workers: int) -> None:
    """Raises PlanError where workers cannot share the lanes equally."""
    if lanes % workers:
        raise PlanError(
            f"{lanes} lanes cannot be shared by {workers} workers; "
            "take a data.lanes that is a multiple of the workers"
        )


@dataclass(frozen=True)
class Window:
    """A piece of work for whoever prepares batches.

    Attributes:
        epoch: counted from 0.
        first: the first step, within the epoch.
        steps: how many.
    """

    epoch: int
    first: int
    steps: int


@dataclass(frozen=True)
class DataPlan:
    """The order of a data set's rows.

    Attributes:
        row_groups: rows in each row group, over all parts in their order.
        batch: pairs in a global batch.
        lanes: independent streams that a batch is drawn from; a multiple of the workers.
        shuffle_steps: steps whose rows are mixed.
        seed: of the order.
    """

    row_groups: tuple[int, ...]
    batch: int
    lanes: int
    shuffle_steps: int
    seed: int

    def __post_init__(self) -> None:
        check_lanes(self.batch, self.lanes)
        if self.rows < self.batch:
            raise PlanError(
                f"{self.rows:,} pairs do not fill a batch of {self.batch:,}; take a smaller batch"
            )

    @cached_property
    def rows(self) -> int:
        """Pairs in the data set."""
        return sum(self.row_groups)

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.batch

    @property
    def slice_rows(self) -> int:
        """Pairs that a batch takes from each lane."""
        return self.batch // self.lanes

    def lanes_of(self, rank: int, workers: int) -> range:
        """The lanes that a worker owns, one more or less than another's where they do not go up.

        Raises:
            PlanError: there are more workers than lanes.
        """
        if workers > self.lanes:
            raise PlanError(f"{self.lanes} lanes are not enough for {workers} workers")
        return range(rank * self.lanes // workers, (rank + 1) * self.lanes // workers)

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        """The work from a global step to before another one, in order; windows may be cut."""
        step = first_step
        while step < last_step:
            epoch, within = divmod(step, self.steps_per_epoch)
            end = min(
                (within // self.shuffle_steps + 1) * self.shuffle_steps,
                self.steps_per_epoch,
                within + last_step - step,
            )
            yield Window(epoch, within, end - within)
            step += end - within

    def windows_at_first(self, first_step: int, last_step: int) -> Iterator[Window]:
        """The same work with smaller windows at its beginning: of one step, of two, of four.

        A small window is ready soon, and whoever waits for its batches has something to do.
        """
        most = 1
        for window in self.windows(first_step, last_step):
            first, end = window.first, window.first + window.steps
            while first < end:
                steps = min(most, end - first)
                yield Window(window.epoch, first, steps)
                first += steps
                most = min(2 * most, self.shuffle_steps)

    def rows_of(self, window: Window, lane: int) -> Rows:
        """The rows of a lane's slices in a window's steps, in order.

        Returns:
            int64 [steps * slice_rows]: each row's position in the data set.
        """
        start = window.first // self.shuffle_steps * self.shuffle_steps
        end = min(start + self.shuffle_steps, self.steps_per_epoch)
        lane_start = lane * self.steps_per_epoch * self.slice_rows
        begin, count = lane_start + start * self.slice_rows, (end - start) * self.slice_rows
        rows = self._stretch(window.epoch, begin, count)
        rows = self._generator(window.epoch, lane + 1, start).permutation(rows)
        skipped = (window.first - start) * self.slice_rows
        return rows[skipped : skipped + window.steps * self.slice_rows]

    def _stretch(self, epoch: int, begin: int, count: int) -> Rows:
        """Some consecutive rows of the epoch's line."""
        line = self._line(epoch)
        sizes, order, ends, starts_in_data = line.sizes, line.order, line.ends, line.starts
        first, last = np.searchsorted(ends, [begin, begin + count - 1], side="right")
        pieces = []
        for at in range(first, last + 1):
            group = order[at]
            group_begin = ends[at] - sizes[group]
            low, high = max(begin, group_begin), min(begin + count, ends[at])
            offset = starts_in_data[group] - group_begin
            pieces.append(np.arange(low + offset, high + offset, dtype=np.int64))
        return np.concatenate(pieces)

    def _line(self, epoch: int) -> "_Line":
        """The order of an epoch's row groups; the last one is kept, for its other windows."""
        held: _Line | None = self.__dict__.get("_held_line")
        if held is None or held.epoch != epoch:
            sizes = np.asarray(self.row_groups, dtype=np.int64)
            order = self._generator(epoch, 0, 0).permutation(len(sizes))
            held = _Line(epoch, sizes, order, np.cumsum(sizes[order]), np.cumsum(sizes) - sizes)
            self.__dict__["_held_line"] = held
        return held

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed again: plans travel to every task that makes batches."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


@dataclass(frozen=True)
class _Line:
    """An epoch's row groups, one after the other.

    Attributes:
        epoch: which.
        sizes: rows of each group, by its place in the data set.
        order: the groups' places in the data set, as they lie in the line.
        ends: where in the line each of these ends.
        starts: each group's first row in the data set.
    """

    epoch: int
    sizes: Rows
    order: Rows
    ends: Rows
    starts: Rows


@dataclass(frozen=True)
class RowAddress:
    """Where rows of a data set are: parts, and row groups in them."""

    part_of_group: Rows
    group_in_part: Rows
    first_row: Rows  # of each group, in the data set

    @classmethod
    def of(cls, parts: Sequence[Sequence[int]]) -> "RowAddress":
        """From each part's row group sizes."""
        sizes = np.array([rows for part in parts for rows in part], dtype=np.int64)
        part = np.repeat(np.arange(len(parts)), [len(groups) for groups in parts])
        within = [np.arange(len(groups)) for groups in parts]
        return cls(part, np.concatenate(within), np.cumsum(sizes) - sizes)

    def groups(self, rows: Rows) -> Rows:
        """The row group, counted over all parts, that each row is in."""
        found: Rows = np.searchsorted(self.first_row, rows, side="right") - 1
        return found
