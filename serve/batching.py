"""What waits for a model becomes a batch when the model is free.

Choices:
- No timer: a lone request is run at once, and while the model is busy the next batch grows. A batch
  that is closed early, to wait for its turn closed, would be a small one.
- Items are let in a few batches ahead of the model and no further, so what is decoded is bounded
  however much is asked for.
- A batch that fails is run again in its callers' parts, so none fails for what another sent.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from serve.messages import Vectors

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


@dataclass(frozen=True)
class Done:
    """A caller's share of a batch.

    Attributes:
        vectors: [n, D].
        waited: seconds until the batch began.
        took: seconds of the batch.
    """

    vectors: Vectors
    waited: float
    took: float


@dataclass(frozen=True)
class _Waiting(Generic[Model]):
    model: Model
    inputs: torch.Tensor
    since: float
    done: "asyncio.Future[Done]"


class Batcher(Generic[Model]):
    """Runs a model on what came while it was busy. Belongs to one event loop.

    Args:
        run: inputs [n, ...] to vectors [n, D]; called in a thread of its own, one call at a time.
        size: items in a batch at most.
        observe: is told of each batch: its first model, items, and seconds.
        prepare: is called in that thread before all else.
    """

    def __init__(
        self,
        run: Callable[[Model, torch.Tensor], Vectors],
        size: int,
        observe: Callable[[Model, int, float], None],
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._run, self._size, self._observe = run, size, observe
        self._queue: deque[_Waiting[Model]] = deque()
        self._thread = ThreadPoolExecutor(1, "model", initializer=prepare)
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, model: Model, inputs: torch.Tensor) -> Done:
        """A model's vectors of inputs [n, ...], n at most `size`."""
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(model, inputs, time.monotonic(), done))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await done

    async def _work(self) -> None:
        while batch := self._next():
            await self._settle(batch)

    async def _settle(self, batch: list[_Waiting[Model]]) -> None:
        """Answer all callers of a batch, with their vectors or their own error."""
        try:
            await self._answer(batch)
        except Exception as error:
            if len(batch) > 1:
                logger.warning("a batch failed, and is run part by part: %s", error)
                for one in batch:
                    await self._settle([one])
            elif not batch[0].done.done():
                batch[0].done.set_exception(error)

    def _next(self) -> list[_Waiting[Model]]:
        """The longest beginning of the queue that makes a batch of one model."""
        batch: list[_Waiting[Model]] = []
        items = 0
        while self._queue:
            first = self._queue[0]
            if first.done.done():  # whoever asked is gone
                self._queue.popleft()
                continue
            if batch and (
                items + len(first.inputs) > self._size or first.model is not batch[0].model
            ):
                break
            items += len(first.inputs)
            batch.append(self._queue.popleft())
        return batch

    async def _answer(self, batch: list[_Waiting[Model]]) -> None:
        began = time.monotonic()
        model = batch[0].model
        inputs = torch.cat([one.inputs for one in batch]) if len(batch) > 1 else batch[0].inputs
        run = asyncio.get_running_loop().run_in_executor
        vectors = await run(self._thread, self._run, model, inputs)
        took = time.monotonic() - began
        self._observe(model, len(inputs), took)
        at = 0
        for one in batch:
            part = vectors[at : at + len(one.inputs)]
            at += len(one.inputs)
            if not one.done.done():
                one.done.set_result(Done(part, began - one.since, took))


class Room:
    """Room for so many items; who comes first goes first.

    Args:
        size: the items.
    """

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def of(self, items: int) -> AsyncIterator[None]:
        """Hold room for the block, as soon as there is some."""
        items = min(items, self._size)
        async with self._turn:
            while self._free < items:
                self._freed.clear()
                await self._freed.wait()
            self._free -= items
        try:
            yield
        finally:
            self._free += items
            self._freed.set()
