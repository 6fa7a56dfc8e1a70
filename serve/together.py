"""Work side by side, of which a part is of no use."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


async def together(works: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """What all of them give, in order; where one fails, the others are ended, with its error.

    `asyncio.gather` lets them go on: a tower would embed what another one has no room for.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # does nothing to one that is done
