"""When a chunk is begun: as soon as its engine wants rows, and no sooner.

An engine answers most rows of a chunk soon and a few late, for as long as the longest answer takes;
by then it has had time for the rows of many other chunks. With a fixed number of chunks in work it
would stand nearly idle until the late ones are there, again and again. With very many, an engine
that dies would take as many with it. So what counts are the rows that are still unanswered.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

# Unanswered rows for each that the engine works on: as many wait in its queue, for the time that
# the next chunk takes to be read.
_DEPTH = 2


@dataclass(eq=False)
class Turn:
    """A chunk's.

    Attributes:
        rows: of it.
        alone: it is in work with no other.
        done: rows that are answered.
    """

    rows: int
    alone: bool
    _turns: "Turns"
    done: int = 0

    def answered(self) -> None:
        """One row more is answered."""
        self.done += 1
        self._turns.changed()


class Turns:
    """Lets chunks be begun, those that are to be alone first; for one event loop."""

    def __init__(self) -> None:
        self._depth = math.inf
        self._begun: set[Turn] = set()
        self._waiting: deque[tuple[Turn, asyncio.Future[None]]] = deque()

    @property
    def answered(self) -> int:
        """Rows that are so already, of the chunks in work."""
        return sum(begun.done for begun in self._begun)

    def at_a_time(self, rows: int) -> None:
        """So many rows are worked on at a time; any number, unless this is told."""
        self._depth = _DEPTH * rows

    @asynccontextmanager
    async def turn(self, rows: int, *, alone: bool = False) -> AsyncIterator[Turn]:
        """Wait until a chunk of so many rows may be begun; it is in work in the block."""
        turn = Turn(rows, alone, self)
        place = turn, asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if alone else self._waiting.append)(place)
        self.changed()
        try:
            await place[1]
            yield turn
        finally:
            if turn in self._begun:
                self._begun.remove(turn)
            else:
                self._waiting.remove(place)
            self.changed()

    def changed(self) -> None:
        """Let in those that may be begun now."""
        while self._waiting and self._lets(self._waiting[0][0]):
            turn, let_in = self._waiting.popleft()
            self._begun.add(turn)
            if not let_in.done():  # as it is where the task that waits is cancelled
                let_in.set_result(None)

    def _lets(self, turn: Turn) -> bool:
        if turn.alone:
            return not self._begun
        if any(begun.alone for begun in self._begun):
            return False
        return sum(begun.rows - begun.done for begun in self._begun) < self._depth
