"""What befell the engines: an actor that outlives them keeps count, for the job and its report.

An engine that dies takes its process with it, so nobody there can tell. But Ray starts the process
again and hands it the same chunks, and who begins a chunk that was begun before tells enough.

The actor may end itself, with a node's memory. It is started again and has forgotten: who is at
work tells it anew, and the driver keeps the incidents that it has heard of.
"""

import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from ray_jobs.cluster import lasting_actor

# Engines that come up this often each without one finishing a chunk will not do better next time.
MAX_STARTS = 6
# A chunk that is begun for this many times is in work alone, to find the chunk that kills engines;
# and from then on row by row, to find the row.
ALONE_BEGIN, CAREFUL_BEGIN = 3, 4
# A row that was in work alone when this many engines died is given up.
MAX_ROW_DEATHS = 2
# Such deaths are not counted among the starts in vain: they find rows to give up, so that the chunk
# is finished at last. As many as this, since an engine that dies of every row is broken.
MAX_FINDING_DEATHS = 8


@dataclass(frozen=True)
class Begun:
    """What a worker needs to know of a chunk's history.

    Attributes:
        careful: do it row by row, and tell of each row.
        poison: ids that are to be given up.
    """

    careful: bool
    poison: frozenset[str]


@dataclass
class Incident:
    """Something that cost a chunk.

    Attributes:
        kind: `engine_died`, `engine_hung` or `engine_lost` (its process was gone without a word).
        chunk: the file that was not written; none if the engine had not started.
        detail: what the engine said.
    """

    kind: str
    chunk: str
    detail: str


@dataclass
class _Chunk:
    begins: int = 0
    running: str | None = None
    row: str | None = None
    deaths: dict[str, int] = field(default_factory=dict)


class _Watch:
    """The state; see `Watch` for what it is asked."""

    def __init__(self) -> None:
        self._life = uuid.uuid4().hex
        self._chunks: dict[str, _Chunk] = {}
        self._incidents: list[Incident] = []
        self._last_words: dict[str, tuple[str, str]] = {}
        self._starts = 0
        self._finding_deaths = 0

    def start(self) -> int:
        """An engine comes up; how often that happened since a chunk was finished."""
        self._starts += 1
        return self._starts

    def begins(self, name: str) -> int:
        """How often a chunk was begun and not ended."""
        chunk = self._chunks.get(name)
        return chunk.begins if chunk else 0

    def begin(self, name: str, worker: str) -> Begun:
        chunk = self._chunks.setdefault(name, _Chunk())
        if chunk.running is not None:
            kind, detail = self._last_words.get(chunk.running, ("engine_lost", "no word from it"))
            self._incidents.append(Incident(kind, name, detail))
            if chunk.row is not None:
                chunk.deaths[chunk.row] = chunk.deaths.get(chunk.row, 0) + 1
                if self._finding_deaths < MAX_FINDING_DEATHS:
                    self._finding_deaths += 1
                    self._starts = max(0, self._starts - 1)
        chunk.begins += 1
        chunk.running, chunk.row = worker, None
        poison = {row for row, deaths in chunk.deaths.items() if deaths >= MAX_ROW_DEATHS}
        return Begun(chunk.begins >= CAREFUL_BEGIN, frozenset(poison))

    def row(self, name: str, worker: str, identity: str | None) -> None:
        """The row that a careful worker is at."""
        chunk = self._chunks.setdefault(name, _Chunk(begins=CAREFUL_BEGIN))
        chunk.running, chunk.row = worker, identity

    def end(self, name: str) -> None:
        self._chunks.pop(name, None)
        self._starts = self._finding_deaths = 0

    def last_words(self, worker: str, kind: str, detail: str) -> None:
        """A worker ends itself, and says why."""
        self._last_words[worker] = (kind, detail)

    def start_failed(self, kind: str, detail: str) -> None:
        """A worker ends itself before it has begun a chunk."""
        self._incidents.append(Incident(kind, "", detail))

    def incidents(self) -> list[dict[str, Any]]:
        return [asdict(incident) for incident in self._incidents]

    def told(self) -> tuple[str, list[dict[str, Any]]]:
        """The incidents of this process, and which process it is."""
        return self._life, self.incidents()


class Watch:
    """A handle that can be sent to workers; the driver makes and closes it."""

    def __init__(self) -> None:
        self._actor = lasting_actor(_Watch)
        self._heard: dict[str, list[dict[str, Any]]] = {}  # by the actor's process

    def start(self) -> int:
        """See `_Watch.start`; waits for the answer."""
        return int(ray.get(self._actor.start.remote()))

    async def begins(self, name: str) -> int:
        """See `_Watch.begins`."""
        begins: int = await self._actor.begins.remote(name)
        return begins

    async def begin(self, name: str, worker: str) -> Begun:
        """A worker takes a chunk."""
        begun: Begun = await self._actor.begin.remote(name, worker)
        return begun

    async def row(self, name: str, worker: str, identity: str | None) -> None:
        """A careful worker takes a row; waits until that is noted."""
        await self._actor.row.remote(name, worker, identity)

    async def end(self, name: str) -> None:
        """A chunk is published."""
        await self._actor.end.remote(name)

    def last_words(self, worker: str, kind: str, detail: str) -> None:
        """Wait until it is noted, since the caller ends."""
        ray.get(self._actor.last_words.remote(worker, kind, detail), timeout=10)

    def start_failed(self, kind: str, detail: str) -> None:
        """Wait until it is noted, since the caller ends."""
        ray.get(self._actor.start_failed.remote(kind, detail), timeout=10)

    def incidents(self) -> list[dict[str, Any]]:
        """All that happened so far, as far as this process has heard."""
        life, incidents = ray.get(self._actor.told.remote())
        self._heard[life] = incidents
        return [one for heard in self._heard.values() for one in heard]

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)
