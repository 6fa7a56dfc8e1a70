"""Metrics on their way to the driver."""

import threading

import pytest
import ray

from ray_jobs.training.records import Listener, Record


@pytest.mark.parametrize("ends", ["for a moment", "for good"])
def test_records_whose_mailbox_ends_cost_no_run(ray_cluster, ends):
    heard: list[Record] = []
    arrived = threading.Event()

    def hear(record: Record) -> None:
        heard.append(record)
        arrived.set()

    with Listener(hear) as listener:
        listener.send({"step": 1.0})
        assert arrived.wait(60)
        arrived.clear()
        ray.kill(listener._mailbox, no_restart=ends == "for good")
        listener.send({"step": 2.0})  # may be lost
        while ends == "for a moment" and not arrived.wait(0.2):
            listener.send({"step": 2.0})
    assert heard[0] == {"step": 1.0}
    assert all(record == {"step": 2.0} for record in heard[1:])
