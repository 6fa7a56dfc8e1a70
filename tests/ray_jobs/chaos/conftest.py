"""Faults on clusters of several nodes, and a table of what they cost.

`make chaos` runs all of them; the default run leaves out those marked `chaos`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
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


AddFigures = Callable[[Figures], None]

_NAME = "figures"


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> AddFigures:
    """A function that puts a row into the table that is printed at the end."""

    def add(row: Figures) -> None:
        # With the test's report, which comes from whichever process ran it.
        record_property(_NAME, asdict(row))

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    rows = [
        Figures(**value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == _NAME
    ]
    if not rows:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<46} lost twice recovered  redone")
    for one in rows:
        seconds = f"{one.seconds:7.1f} s" if one.seconds is not None else f"{'-':>9}"
        terminalreporter.write_line(
            f"{one.fault:<46} {one.lost:>4} {one.twice:>5} {seconds}  {one.redone}"
        )
