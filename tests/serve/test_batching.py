"""Batches of what waits, and room for what is decoded."""

import asyncio
import threading

import numpy as np
import pytest
import torch

from serve.batching import Batcher, Room


class Model:
    """Doubles numbers, one batch at a time, when it is let."""

    def __init__(self, wait: bool = False) -> None:
        self.batches: list[list[float]] = []
        self.open = threading.Event()
        if not wait:
            self.open.set()

    def run(self, factor: float, inputs: torch.Tensor) -> np.ndarray:
        self.open.wait()
        self.batches.append(inputs[:, 0].tolist())
        if (inputs < 0).any():
            raise ValueError("a negative number")
        return (factor * inputs).numpy()


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_a_batch_grows_while_the_model_is_busy():
    async def work() -> None:
        model = Model(wait=True)
        seen = []
        batcher = Batcher(model.run, 4, lambda factor, items, seconds: seen.append(items))
        first = asyncio.create_task(batcher(2.0, numbers(1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        parts = [numbers(2, 3), numbers(4), numbers(5, 6)]
        later = [asyncio.create_task(batcher(2.0, part)) for part in parts]
        await asyncio.sleep(0)
        model.open.set()
        answers = await asyncio.gather(first, *later)
        assert model.batches == [[1], [2, 3, 4], [5, 6]]
        assert seen == [1, 3, 2]
        for answer, part in zip(answers, [numbers(1), *parts], strict=True):
            np.testing.assert_array_equal(answer.vectors, 2 * part.numpy())

    asyncio.run(work())


def test_two_models_share_no_batch():
    async def work() -> None:
        model = Model()
        batcher = Batcher(model.run, 8, lambda *_: None)
        answers = await asyncio.gather(
            *(batcher(factor, numbers(1, 2)) for factor in (2.0, 3.0, 3.0))
        )
        assert [float(answer.vectors[0, 0]) for answer in answers] == [2, 3, 3]
        assert len(model.batches) == 2

    # Models are told apart by identity, and equal literals of one function are the same object.
    asyncio.run(work())


def test_a_broken_part_fails_for_its_caller_alone():
    async def work() -> None:
        model = Model()
        batcher = Batcher(model.run, 8, lambda *_: None)
        good, bad, better = await asyncio.gather(
            *(batcher(2.0, numbers(value)) for value in (1, -1, 3)), return_exceptions=True
        )
        assert (good.vectors[0, 0], better.vectors[0, 0]) == (2, 6)
        assert isinstance(bad, ValueError)
        assert (await batcher(2.0, numbers(4))).vectors[0, 0] == 8

    asyncio.run(work())


def test_whoever_is_gone_is_not_computed_for():
    async def work() -> None:
        model = Model(wait=True)
        batcher = Batcher(model.run, 1, lambda *_: None)
        tasks = [asyncio.create_task(batcher(2.0, numbers(value))) for value in (1, 2, 3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        model.open.set()
        await asyncio.gather(tasks[0], tasks[2])
        assert model.batches == [[1], [3]]

    asyncio.run(work())


@pytest.mark.parametrize("sizes", [[3, 3, 1, 4, 9], [1] * 10])
def test_room_is_given_in_order_and_never_exceeded(sizes):
    async def work() -> None:
        room = Room(4)
        held, most, order = 0, 0, []

        async def use(at: int, size: int) -> None:
            nonlocal held, most
            async with room.of(size):
                order.append(at)
                held += min(size, 4)
                most = max(most, held)
                for _ in range(3):
                    await asyncio.sleep(0)
                held -= min(size, 4)

        await asyncio.gather(*(use(at, size) for at, size in enumerate(sizes)))
        assert order == list(range(len(sizes)))
        assert most <= 4
        assert held == 0

    asyncio.run(work())
