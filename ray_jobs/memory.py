"""How much memory a run takes: of this process and all that it started, at its peak.

With a local cluster that is all of it: Ray, its workers, engines and training. Of a cluster that
was there before, it is the driver alone. Memory that processes share, such as Ray's object store,
counts once (Linux's proportional set size): a sum of resident sizes would count it in each of them.
"""

import threading
import time
from types import TracebackType

import psutil

_SECONDS = 3.0  # between looks at resident sizes, of a few milliseconds
_LONGEST = 60.0  # between exact looks, for which the system walks through all pages: 0.2 s
_MORE = 1.02  # times the resident memory of the last exact look: time for another one


class PeakMemory:
    """Looks at the memory now and then, while it is open.

    An exact look slows down the processes that it looks at, so there is one when the sum of
    resident sizes is higher than it was at any before, and one a minute.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        """The most that was seen so far, in bytes; looks once more."""
        self._peak = max(self._peak, memory_of_tree())
        return self._peak

    def _watch(self) -> None:
        resident, looked = 0.0, time.monotonic()
        while not self._ended.is_set():
            now = sum(map(_resident, _tree()))
            if now > _MORE * resident or time.monotonic() - looked > _LONGEST:
                self._peak = max(self._peak, memory_of_tree())
                resident, looked = max(resident, now), time.monotonic()
            self._ended.wait(self._seconds)


def memory_of_tree() -> int:
    """Bytes of this process and all that it started and that are there now."""
    return sum(map(_proportional, _tree()))


def _tree() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _proportional(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it ended meanwhile
        return 0


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
