"""What stages took while they did their work, whichever run did it.

Noted in the storage as soon as a stage ends, by a pipeline or by the stage's own command, also when
it fails, and every half minute before that, for whoever goes on after a kill; a stage that finds
its work done adds nothing.

Each work has a file of its own, so stages that are at work on one storage at the same time do not
undo each other's notes.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ray_jobs.storage import Storage, digest_of_json

_NOTE_SECONDS = 30.0  # between notes of work that goes on
_OLDER_FILE = "times.json"  # of releases that kept all of a storage's in one file


@dataclass
class Work:
    """A stage's work.

    Attributes:
        resumed: whether all of it was done before; for the one who does it to say.
        seconds: that it took in all attempts so far; 0 where nobody noted it.
    """

    resumed: bool = False
    seconds: float = 0.0


class StageTimes:
    """The times of a storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @contextmanager
    def measured(self, name: str, of: Any) -> Iterator[Work]:
        """Work whose time is noted when the block ends.

        Args:
            name: what is done.
            of: what decides its outcome, as JSON takes it; other work has a time of its own.
        """
        key, work = digest_of_json(of), Work()
        before = self._noted(name, key)
        start = time.perf_counter()

        def note(*, finished: bool = False) -> float:
            """What was spent until the work was finished is its time; all of it so far."""
            spent = before["unfinished"] + time.perf_counter() - start
            now = {"seconds": spent, "unfinished": 0.0} if finished else {"unfinished": spent}
            self.storage.write_json(_file(name, key), {**before, **now})
            return spent

        try:
            with _repeated(note, lambda: work.resumed):
                yield work
        except BaseException:
            # What went wrong is told, and not that it could not be noted either.
            with suppress(OSError):
                note()
            raise
        work.seconds = before["seconds"] if work.resumed else note(finished=True)

    def _noted(self, name: str, key: str) -> dict[str, float]:
        """Seconds that the work took until it was finished, and those of attempts since."""
        found = self.storage.find_json(_file(name, key))
        if found is None:
            older = (self.storage.find_json(_OLDER_FILE) or {}).get(name)
            # Bare numbers are of a still older one, and may be times of stages that were skipped.
            found = older.get(key) if isinstance(older, dict) else None
        return {"seconds": 0.0, "unfinished": 0.0, **(found or {})}


@contextmanager
def _repeated(note: Callable[[], object], idle: Callable[[], bool]) -> Iterator[None]:
    """Note every now and then while the block runs, unless there is nothing to do."""

    def repeat() -> None:
        while not ended.wait(_NOTE_SECONDS):
            with suppress(OSError):  # the next one, or the work itself, tells of what lasts
                if not idle():
                    note()

    ended = threading.Event()
    thread = threading.Thread(target=repeat, name="times", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _file(name: str, key: str) -> str:
    return f"times/{name.replace(' ', '-')}/{key[:16]}.json"
