"""What faults cost: rows for a table that is printed at the end.

`make chaos` tries all of them, on clusters of several nodes; the default run leaves out those that
are marked `chaos`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROPERTY = "figures"  # of a test's report, which comes from whichever process ran it


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


def print_table(terminalreporter: Any) -> None:
    """Print all tests' rows, if there are any."""
    rows = [
        Figures(**value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PROPERTY
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
