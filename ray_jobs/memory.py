"""How much memory a run takes: of this process and all that it started, at its peak.

With a local cluster that is all of it: Ray, its workers, engines and training. Of a cluster that
was there before, it is the driver alone. Memory that processes share, such as Ray's object store,
counts once (Linux's proportional set size): a sum of resident sizes would count it in each of them.
"""

import threading
from types import TracebackType

import psutil

_SECONDS = 3.0  # a look costs some forty milliseconds


class PeakMemory:
    """Looks at the memory now and then, while it is open."""

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
        while not self._ended.is_set():
            self._peak = max(self._peak, memory_of_tree())
            self._ended.wait(self._seconds)


def memory_of_tree() -> int:
    """Bytes of this process and all that it started and that are there now."""
    this = psutil.Process()
    return sum(_memory(process) for process in (this, *this.children(recursive=True)))


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it ended meanwhile
        return 0
