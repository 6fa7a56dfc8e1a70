"""Signals that end a program, heeded for as long as a block goes on."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def heeding(handlers: Mapping[signal.Signals, Handler]) -> Iterator[Callable[[], None]]:
    """Let handlers heed signals in the block; afterwards those from before do again.

    Gives what puts the handlers there once more, after a library that has put its own in their
    place, as Ray does when it starts.
    """
    # None is for a handler that is not Python's, and cannot be put back.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in handlers}

    def heed() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    try:
        heed()
        yield heed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
