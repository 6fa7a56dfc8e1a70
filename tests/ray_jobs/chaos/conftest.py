"""Faults on clusters of several nodes, and a table of what they cost.

`make chaos` runs all of them; the default run leaves out those marked `chaos`.
"""

from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Figures:
    """What a fault cost.

    Attributes:
        fault: what was done.
        lost: rows or steps that are missing afterwards.
        twice: rows or steps that are there more than once.
        redone: what was done again, in words.
        seconds: from the fault to the first result after it; None where none came between.
    """

    fault: str
    lost: int
    twice: int
    redone: str
    seconds: float | None


_TABLE: list[Figures] = []


@pytest.fixture
def figures() -> list[Figures]:
    """The table that is printed at the end."""
    return _TABLE


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    if not _TABLE:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<46} lost twice recovered  redone")
    for one in _TABLE:
        seconds = f"{one.seconds:7.1f} s" if one.seconds is not None else f"{'-':>9}"
        terminalreporter.write_line(
            f"{one.fault:<46} {one.lost:>4} {one.twice:>5} {seconds}  {one.redone}"
        )
