"""Metrics on their way from the first worker to the driver, while training goes on.

The worker hands a record over and does not wait; the driver shows it, and logs it wherever that
may be slow. What a run's metrics were is kept in its checkpoints, whoever listened.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from ray_jobs.cluster import lasting_actor

_POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)

Record = Mapping[str, float]


class _Mailbox:
    """Holds records until they are fetched."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def put(self, record: Record) -> None:
        self._records.append(record)

    def take(self) -> list[Record]:
        taken, self._records = self._records, []
        return taken


class Listener:
    """Calls a function in this process with every record that a worker sends.

    Use it as a context; give workers its `send`.
    """

    def __init__(self, on_record: Callable[[Record], None]) -> None:
        self._on_record = on_record
        self._stop = threading.Event()
        self._mailbox = lasting_actor(_Mailbox)
        self._thread = threading.Thread(target=self._listen, name="records", daemon=True)
        self.send = Sender(self._mailbox)

    def __enter__(self) -> "Listener":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._deliver()
        ray.kill(self._mailbox)

    def _listen(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._deliver()

    def _deliver(self) -> None:
        try:
            records = ray.get(self._mailbox.take.remote())
        except RayError as error:  # a run does not fail for those who look at it
            logger.warning("metrics of training did not arrive: %s", error)
            return
        for record in records:
            self._on_record(record)


class Sender:
    """What a worker calls; it can be sent to other processes."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def __call__(self, record: Record) -> None:
        self._mailbox.put.remote(dict(record))
