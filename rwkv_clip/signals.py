"""Signals that end a program, heeded for as long as a block goes on."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def keeping(*numbers: signal.Signals) -> Iterator[None]:
    """After the block the signals have the handlers from before, whoever put others there.

    Only a program's main thread can put any.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if signal.getsignal(number) is not handler:
                    # None is for a handler that is not Python's, and cannot be put back.
                    signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def heeding(handlers: Mapping[signal.Signals, Handler]) -> Iterator[Callable[[], None]]:
    """Let handlers heed signals in the block; afterwards those from before do again.

    Gives what puts the handlers there once more, after a library that has put its own in their
    place, as Ray does when it starts.
    """

    def heed() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    with keeping(*handlers):
        heed()
        yield heed
