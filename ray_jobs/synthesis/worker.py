"""Doing a chunk: read it, describe its rows, publish it, and live with engines that die.

A worker belongs to one engine. It is told when the engine died, notices when it hangs, and ends
its process in both cases: Ray starts it anew with a fresh engine and gives it the same chunks.
"""

import asyncio
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import psutil

from ray_jobs.storage import Storage
from ray_jobs.synthesis.chunks import Chunk, read_sources, write_chunk
from ray_jobs.synthesis.describer import (
    ENGINE_FAILED,
    Complete,
    Messages,
    Row,
    SamplingConfig,
    describe,
    describe_rows,
    fall_back,
)
from ray_jobs.synthesis.watch import MAX_STARTS, Watch
from rwkv_clip.descriptions import Sources


class EngineDiedError(RuntimeError):
    """The engine that serves this worker is gone."""


class ChunkWorker:
    """Describes chunks with one engine.

    Args:
        storage: holds the pairs, and gets the descriptions.
        name: of the data set.
        sampling: how the model is asked.
        watch: is told what happens.
        hang_seconds: an engine that answers nothing for so long while it is asked is ended.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        sampling: SamplingConfig,
        watch: Watch,
        hang_seconds: float,
    ) -> None:
        self.storage, self.name, self.sampling, self.watch = storage, name, sampling, watch
        self.identity = uuid.uuid4().hex
        self._pulse = _Pulse(hang_seconds, self._end_hung)
        self._one_at_a_time: asyncio.Lock | None = None
        if (starts := watch.start()) > MAX_STARTS:
            raise RuntimeError(
                f"an engine came up {starts} times without finishing a chunk; its log says why"
            )

    async def run(self, chunk: Chunk, complete: Complete) -> dict[str, Any]:
        """Do a chunk; gives its counts."""
        started = time.monotonic()
        file = chunk.file(self.name)
        begun = await self.watch.begin(file, self.identity)
        sources = await asyncio.to_thread(read_sources, self.storage, chunk)
        asked = self._alive(complete)
        if begun.careful:
            described = await self._carefully(file, sources, asked, begun.poison)
        else:
            described = await describe_rows(sources, asked, self.sampling)
        await asyncio.to_thread(write_chunk, self.storage, self.name, chunk, described)
        await self.watch.end(file)
        return {
            "part": chunk.part,
            "index": chunk.index,
            "rows": len(described),
            "seconds": time.monotonic() - started,
        }

    async def _carefully(
        self,
        file: str,
        rows: Sequence[Mapping[str, Any]],
        complete: Complete,
        poison: frozenset[str],
    ) -> list[Row]:
        """Row by row, one on this engine at a time, so that the row that kills it is known."""
        if self._one_at_a_time is None:
            self._one_at_a_time = asyncio.Lock()
        described = []
        for row in rows:
            if row["id"] in poison:
                described.append(fall_back(row, Sources.from_row(row), 0, ENGINE_FAILED))
                continue
            async with self._one_at_a_time:
                await self.watch.row(file, row["id"])
                described.append(await describe(row, complete, self.sampling))
                await self.watch.row(file, None)
        return described

    def _alive(self, complete: Complete) -> Complete:
        """The same, noting that it is being waited for, and ending the process with the engine."""

        async def asked(messages: Messages, seed: int) -> str:
            try:
                with self._pulse:
                    return await complete(messages, seed)
            except EngineDiedError as error:
                self.watch.last_words(self.identity, "engine_died", str(error))
                end_process()

        return asked

    def _end_hung(self, seconds: float) -> None:
        detail = f"no answer in {seconds:.0f} s"
        try:
            self.watch.last_words(self.identity, "engine_hung", detail)
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


def count_sources(sources: Sequence[str | None]) -> Counter[str]:
    """How often each `description_source` is there."""
    return Counter(source or "none" for source in sources)
