"""What fits into a cluster, and what is said where something does not."""

import logging

import pytest

from ray_jobs.room import Need, fits, warn_without_room

NODES = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 16.0}]


@pytest.mark.parametrize(
    ("needs", "there_is_room"),
    [
        ([Need("a", 8)], True),
        ([Need("a", 17)], False),  # no node has so many, though together they do
        ([Need("a", 8, count=3)], True),
        ([Need("a", 8, count=4)], False),
        ([Need("a", 4, gpus=1, count=2), Need("b", 16)], True),
        ([Need("b", 16), Need("a", 4, gpus=1, count=3)], False),
        ([Need("a", 0.1, gpus=0.1, count=20)], True),
        ([Need("small", 8), Need("large", 16)], True),  # the small one leaves room for the large
        ([Need("a", 8, gpus=1), Need("b", 16)], True),
        ([], True),
    ],
)
def test_each_process_takes_its_share_of_one_node(needs, there_is_room):
    assert fits(needs, NODES) is there_is_room


def test_a_place_that_is_tight_is_taken_before_one_that_others_need():
    needs = [Need("a", 1, gpus=1), Need("b", 2)]
    assert fits(needs, [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}])


def test_what_does_not_fit_is_told_with_its_key(ray_cluster, caplog):
    with caplog.at_level(logging.WARNING):
        warn_without_room(Need("train.workers", 0.1), Need("train.data.cpus_per_task", 0.1))
        assert not caplog.messages
        warn_without_room(Need("train.workers", 1, gpus=1, count=4))
    (told,) = caplog.messages
    assert "train.workers: 4 x 1 CPUs and 1 GPUs" in told
    assert "waits for ever" in told
