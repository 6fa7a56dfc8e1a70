"""Doing a chunk: read it, do its rows, publish it, and live with engines that die.

A worker belongs to one engine. It is told when the engine died, notices when it hangs, and ends
its process in both cases: Ray starts it anew with a fresh engine and gives it the same chunks.
"""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import psutil

from ray_jobs.beside import Beside
from ray_jobs.storage import Storage
from ray_jobs.synthesis.chunks import Chunk, chunks_in, counts_of, read_chunk, write_chunk
from ray_jobs.synthesis.task import ENGINE_FAILED, Complete, GenerationError, Messages, Row, Task
from ray_jobs.synthesis.turns import Turn, Turns
from ray_jobs.synthesis.watch import ALONE_BEGIN, MAX_STARTS, Watch

# No row of these was to blame, or data would have to be very odd; what is wrong is the engine.
MOST_REFUSALS = 200

Counts = dict[str, list[Any]]
# The rows for pairs, in their order; the turn may be told of each one as it is answered.
Together = Callable[[Sequence[Row], Turn], Awaitable[list[Row]]]


@dataclass(frozen=True)
class Patience:
    """How long engines are waited for.

    Attributes:
        hang_seconds: one that answers nothing for so long while it is asked is ended.
        start_seconds: and one that takes longer than this to start.
    """

    hang_seconds: float
    start_seconds: float


@dataclass(frozen=True)
class Work:
    """What workers are told.

    Attributes:
        storage: holds the pairs, and gets what is made of them.
        name: of the data set.
        others: tables that earlier stages wrote beside the pairs.
        task: what is done for each row.
        watch: is told what happens.
        patience: with engines.
        engines: workers at most.
        share: items of work that are for one of them, if each gets as many.
    """

    storage: Storage
    name: str
    others: tuple[Beside, ...]
    task: Task
    watch: Watch
    patience: Patience
    engines: int
    share: int

    @property
    def beside(self) -> Beside:
        """The tables that are filled."""
        return Beside(self.task.kind, self.name)

    def read(self, chunk: Chunk) -> list[Row]:
        """A chunk's rows."""
        return read_chunk(self.storage, chunk, self.task.columns, self.others)

    def write(self, chunk: Chunk, rows: Sequence[Row]) -> None:
        """Publish a chunk."""
        write_chunk(self.storage, self.beside, chunk, rows, self.task.schema)


class RefusedError(RuntimeError):
    """The model takes no requests as they are; rows are not to blame."""


class EngineDiedError(RuntimeError):
    """The engine that serves this worker is gone."""


class ChunkWorker:
    """Does chunks with one engine.

    Args:
        work: what is to be done.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.watch = work, work.watch
        self.identity = uuid.uuid4().hex
        self._pulse = _Pulse(work.patience.hang_seconds, self._end_hung)
        self.turns = Turns()
        self._refusals = 0  # in a row
        if (starts := self.watch.start()) > MAX_STARTS * work.engines:
            raise RuntimeError(
                f"{work.engines} engines came up {starts} times without finishing a chunk; their "
                "logs say why"
            )

    async def run(self, batch: Mapping[str, Any], complete: Complete) -> Counts:
        """Do an item's chunks by asking a model; gives their counts, as `do`."""
        asked = self._alive(complete)

        async def one(row: Row, turn: Turn) -> Row:
            done = await self.work.task(row, asked)
            turn.answered()
            return done

        async def together(rows: Sequence[Row], turn: Turn) -> list[Row]:
            return list(await asyncio.gather(*(one(row, turn) for row in rows)))

        return await self.do(batch, together)

    async def do(self, batch: Mapping[str, Any], together: Together) -> Counts:
        """Do an item's chunks, one after the other.

        Args:
            batch: of one item of work.
            together: gives the rows for pairs, in their order.

        Returns:
            Of each chunk its part, index and rows, and when it began, in seconds since 1970; and
            when it was done, who this is and how many rows of other chunks were answered.
        """
        done = []
        for chunk in chunks_in(batch):
            began = time.time()
            await self._chunk(chunk, together)
            done.append(
                {
                    "part": chunk.part,
                    "index": chunk.index,
                    "rows": chunk.rows,
                    "began": began,
                    "worker": self.identity,
                    "ahead": self.turns.answered,
                }
            )
        return counts_of(done)

    async def _chunk(self, chunk: Chunk, together: Together) -> None:
        file = chunk.file(self.work.beside)
        if await asyncio.to_thread(self.work.storage.exists, file):
            return  # done before the process ended in another of the item's chunks
        alone = await self.watch.begins(file) >= ALONE_BEGIN - 1
        async with self.turns.turn(chunk.rows, alone=alone) as turn:
            begun = await self.watch.begin(file, self.identity)
            rows = await asyncio.to_thread(self.work.read, chunk)
            if begun.careful:
                done = await self._carefully(file, rows, together, turn, begun.poison)
            else:
                done = await together(rows, turn)
            await asyncio.to_thread(self.work.write, chunk, done)
            await self.watch.end(file)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around what the engine answers: ends the process if it hangs, or with the engine."""
        try:
            with self._pulse:
                yield
        except EngineDiedError as error:
            try:
                self.watch.last_words(self.identity, "engine_died", str(error))
            finally:
                end_process()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around an engine's start: ends the process if that takes too long."""
        seconds = self.work.patience.start_seconds
        limit = threading.Timer(seconds, self._end_unstarted, [seconds])
        limit.daemon = True
        limit.start()
        try:
            yield
        finally:
            limit.cancel()

    async def _carefully(
        self,
        file: str,
        rows: Sequence[Row],
        together: Together,
        turn: Turn,
        poison: frozenset[str],
    ) -> list[Row]:
        """Row by row, so that the row that kills the engine is known."""
        done = []
        for row in rows:
            if row["id"] in poison:
                done.append(self.work.task.give_up(row, ENGINE_FAILED))
                continue
            await self.watch.row(file, self.identity, row["id"])
            done += await together([row], turn)
            await self.watch.row(file, self.identity, None)
        return done

    def _alive(self, complete: Complete) -> Complete:
        """The same, noting that it is being waited for, and ending the process with the engine."""

        async def asked(messages: Messages, seed: int) -> str:
            try:
                with self.asking():
                    answer = await complete(messages, seed)
            except GenerationError as error:
                self._refusals += 1
                if self._refusals >= MOST_REFUSALS:
                    raise RefusedError(
                        f"the model refused {self._refusals} requests in a row, the last with: "
                        f"{error}"
                    ) from error
                raise
            self._refusals = 0
            return answer

        return asked

    def _end_hung(self, seconds: float) -> None:
        detail = f"no answer in {seconds:.0f} s"
        try:
            self.watch.last_words(self.identity, "engine_hung", detail)
        finally:
            end_process()

    def _end_unstarted(self, seconds: float) -> None:
        try:
            self.watch.start_failed("engine_hung", f"did not start in {seconds:.0f} s")
        finally:
            end_process()


class _Pulse:
    """Calls `on_hang` when requests are waiting and none of them has ended for too long."""

    def __init__(self, seconds: float, on_hang: Any) -> None:
        self._seconds, self._on_hang = seconds, on_hang
        self._waiting = 0
        self._last = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._look, name="pulse", daemon=True).start()

    def __enter__(self) -> None:
        with self._lock:
            if self._waiting == 0:
                self._last = time.monotonic()
            self._waiting += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._waiting -= 1
            self._last = time.monotonic()

    def _look(self) -> None:
        while True:
            time.sleep(min(self._seconds / 4, 5.0))
            with self._lock:
                silent = time.monotonic() - self._last if self._waiting else 0.0
            if silent > self._seconds:
                self._on_hang(silent)


def end_process() -> NoReturn:
    """End this process and all it started, at once; Ray starts an actor anew that ends so."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(1)
