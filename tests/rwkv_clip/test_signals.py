"""Signals are heeded in the block alone."""

import signal

import pytest

from rwkv_clip.signals import heeding


def test_handlers_are_put_there_again_and_those_from_before_come_back():
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    heeded: list[int] = []

    def handler(number: int, _: object) -> None:
        heeded.append(number)

    def start() -> None:
        with heeding(dict.fromkeys(numbers, handler)) as heed:
            signal.raise_signal(signal.SIGUSR1)
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)  # as a library does
                signal.raise_signal(number)
            heed()
            signal.raise_signal(signal.SIGUSR2)
            raise RuntimeError("Ray cannot start")

    with pytest.raises(RuntimeError, match="Ray cannot start"):
        start()
    assert heeded == [signal.SIGUSR1, signal.SIGUSR2]
    assert {number: signal.getsignal(number) for number in numbers} == before
