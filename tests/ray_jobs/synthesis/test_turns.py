"""When chunks are begun."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ray_jobs.synthesis.turns import Turn, Turns

ROWS = 8


class Chunks:
    """Chunks that are in work until they are told to end.

    Args:
        at_a_time: rows that are worked on at a time; as many may wait.
    """

    def __init__(self, at_a_time: int | None = ROWS) -> None:
        self.turns = Turns()
        if at_a_time is not None:
            self.turns.at_a_time(at_a_time)
        self.begun: dict[str, Turn] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._end: dict[str, asyncio.Event] = {}

    async def start(self, *names: str, alone: bool = False) -> None:
        for name in names:
            self._end[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._one(name, alone))
        await settled()

    async def _one(self, name: str, alone: bool) -> None:
        async with self.turns.turn(ROWS, alone=alone) as turn:
            self.begun[name] = turn
            await self._end[name].wait()
        del self.begun[name]

    async def answer(self, name: str, rows: int) -> None:
        for _ in range(rows):
            self.begun[name].answered()
        await settled()

    async def end(self, name: str) -> None:
        self._end[name].set()
        await settled()

    @property
    def names(self) -> str:
        return "".join(self.begun)


async def settled() -> None:
    """Whatever can go on has gone on."""
    for _ in range(5):
        await asyncio.sleep(0)


def asynchronous(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    return run


@asynchronous
async def test_chunks_are_begun_while_fewer_rows_are_unanswered_than_are_wanted() -> None:
    chunks = Chunks()
    await chunks.start("a", "b", "c", "d")
    assert chunks.names == "ab"
    await chunks.answer("a", 1)
    assert chunks.names == "abc"


@asynchronous
async def test_a_slow_row_of_a_chunk_does_not_keep_others_waiting() -> None:
    chunks = Chunks()
    await chunks.start(*"abcdefgh")
    for name in "abcdef":
        await chunks.answer(name, ROWS - 1)
    assert chunks.names == "abcdefgh"


@asynchronous
async def test_rows_are_answered_as_long_as_their_chunk_is_in_work() -> None:
    chunks = Chunks()
    await chunks.start("a", "b")
    await chunks.answer("a", 3)
    await chunks.answer("b", ROWS)
    assert chunks.turns.answered == 3 + ROWS
    await chunks.end("b")
    assert chunks.turns.answered == 3


@asynchronous
async def test_without_a_limit_all_are_begun() -> None:
    chunks = Chunks(at_a_time=None)
    await chunks.start(*"abcd")
    assert chunks.names == "abcd"


@asynchronous
async def test_a_chunk_that_ended_with_rows_unanswered_makes_room() -> None:
    chunks = Chunks()
    await chunks.start("a", "b", "c")
    await chunks.end("a")
    assert chunks.names == "bc"


@asynchronous
async def test_a_chunk_that_is_to_be_alone_is_the_next_and_alone() -> None:
    chunks = Chunks()
    await chunks.start("a", "b", "c")
    await chunks.start("x", "y", alone=True)
    await chunks.answer("a", ROWS)
    await chunks.end("a")
    assert chunks.names == "b"  # and not c, which would go on forever like this
    await chunks.end("b")
    first = chunks.names
    assert first in {"x", "y"}
    await chunks.answer(first, ROWS)
    assert chunks.names == first
    await chunks.end(first)
    (second,) = {"x", "y"} - {first}
    assert chunks.names == second
    await chunks.end(second)
    assert chunks.names == "c"


@asynchronous
async def test_who_is_cancelled_leaves_no_place_behind() -> None:
    chunks = Chunks()
    await chunks.start("a", "b", "c", "d")
    chunks.tasks["c"].cancel()  # waits
    chunks.tasks["a"].cancel()  # is in work
    await settled()
    await chunks.start("e")
    assert chunks.names.replace("a", "") == "bd"
    await chunks.end("b")
    assert chunks.names.replace("a", "") == "de"


@asynchronous
async def test_a_place_that_comes_when_its_chunk_is_cancelled_goes_to_the_next() -> None:
    chunks = Chunks()
    await chunks.start("a", "b", "c", "d")
    chunks.tasks["c"].cancel()
    for _ in range(ROWS):
        chunks.begun["a"].answered()  # lets c in, which does not know yet that it is cancelled
    await settled()
    assert chunks.names == "abd"
