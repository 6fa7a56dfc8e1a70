"""The order of the data: every row once an epoch, the same for any number of workers."""

from copy import deepcopy
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_jobs.training.plan import DataPlan, PlanError, RowAddress, Window, check_shares

groups = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def whole_batch(plan: DataPlan, step: int) -> list[int]:
    """The rows of one global batch, lane by lane."""
    epoch, first = divmod(step, plan.steps_per_epoch)
    rows = [plan.rows_of(Window(epoch, first, 1), lane).tolist() for lane in range(plan.lanes)]
    return list(chain.from_iterable(rows))


@settings(max_examples=60, deadline=None)
@given(groups, st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(1, 7))
def test_an_epoch_takes_every_row_at_most_once_and_leaves_out_less_than_a_batch(
    sizes, lanes, per_lane, shuffle
):
    rows, batch = sum(sizes), lanes * per_lane
    if rows < batch:
        return
    plan = DataPlan(tuple(sizes), batch, lanes, shuffle, seed=3)
    steps = range(plan.steps_per_epoch)
    seen = list(chain.from_iterable(whole_batch(plan, step) for step in steps))
    assert len(seen) == len(set(seen)) == plan.steps_per_epoch * batch > rows - batch
    assert set(seen) <= set(range(rows))


def plan_of(seed: int = 0) -> DataPlan:
    return DataPlan((32, 32, 26, 32, 32, 26), batch=24, lanes=4, shuffle_steps=3, seed=seed)


def test_the_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else():
    plan = plan_of()
    again = plan_of()
    first = [whole_batch(plan, step) for step in range(plan.steps_per_epoch)]
    assert first == [whole_batch(again, step) for step in range(plan.steps_per_epoch)]
    second = [whole_batch(plan, plan.steps_per_epoch + s) for s in range(plan.steps_per_epoch)]
    assert first != second
    assert first != [whole_batch(plan_of(seed=1), s) for s in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("name", ["windows", "windows_at_first"])
def test_windows_cover_all_steps_in_order_and_may_begin_anywhere(name):
    plan = plan_of()
    for start in range(2 * plan.steps_per_epoch):
        steps = [
            window.epoch * plan.steps_per_epoch + window.first + at
            for window in getattr(plan, name)(start, 2 * plan.steps_per_epoch + 1)
            for at in range(window.steps)
        ]
        assert steps == list(range(start, 2 * plan.steps_per_epoch + 1))


def test_the_first_windows_are_small():
    plan = DataPlan((1000,), batch=10, lanes=2, shuffle_steps=16, seed=0)
    sizes = [window.steps for window in plan.windows_at_first(0, 80)]
    assert sizes == [1, 2, 4, 8, 1, 16, 16, 16, 16]


def test_a_window_that_begins_in_the_middle_has_the_rows_of_the_whole_one():
    plan = plan_of()
    whole = plan.rows_of(Window(0, 0, 3), 2)
    rest = plan.rows_of(Window(0, 1, 2), 2)
    assert rest.tolist() == whole[plan.slice_rows :].tolist()


def test_workers_share_the_lanes():
    plan = plan_of()
    assert [list(plan.lanes_of(rank, 2)) for rank in range(2)] == [[0, 1], [2, 3]]
    check_shares(plan.lanes, 2)
    with pytest.raises(PlanError, match="4 lanes cannot be shared by 3 workers"):
        check_shares(plan.lanes, 3)


@pytest.mark.parametrize("workers", range(1, 5))
def test_however_many_workers_are_there_the_batch_is_the_same(workers):
    shares = [list(plan_of().lanes_of(rank, workers)) for rank in range(workers)]
    assert [lane for share in shares for lane in share] == [0, 1, 2, 3]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(PlanError, match="4 lanes are not enough for 5 workers"):
        plan_of().lanes_of(0, 5)


def test_what_cannot_be_is_refused():
    with pytest.raises(PlanError, match="cannot be cut"):
        DataPlan((100,), batch=10, lanes=4, shuffle_steps=1, seed=0)
    with pytest.raises(PlanError, match="8 pairs do not fill a batch of 12"):
        DataPlan((8,), batch=12, lanes=4, shuffle_steps=1, seed=0)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_an_address_finds_each_row(parts):
    address = RowAddress.of(parts)
    expected = [
        (part, group, row)
        for part, sizes in enumerate(parts)
        for group, size in enumerate(sizes)
        for row in range(size)
    ]
    rows = np.arange(len(expected))
    found = address.groups(rows)
    assert [
        (
            int(address.part_of_group[g]),
            int(address.group_in_part[g]),
            int(row - address.first_row[g]),
        )
        for g, row in zip(found, rows, strict=True)
    ] == expected


def test_a_plan_travels_without_what_it_has_computed():
    plan = plan_of()
    rows = plan.rows_of(Window(1, 0, 3), 0)
    sent = deepcopy(plan)  # by what it would be sent as
    assert sent == plan
    assert set(vars(sent)) == {"row_groups", "batch", "lanes", "shuffle_steps", "seed"}
    np.testing.assert_array_equal(sent.rows_of(Window(1, 0, 3), 0), rows)
