"""What the tests of jobs share."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from tests.ray_jobs.figures import PROPERTY, AddFigures, Figures, print_table

if TYPE_CHECKING:
    from tests.ray_jobs.s3_server import Server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Server]":
    """An S3 server with an empty bucket, and credentials for it."""
    from tests.ray_jobs.s3_server import CREDENTIALS, s3_server  # which takes a second

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as made:
        yield made


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> AddFigures:
    """A function that puts a row into the table of what faults cost."""

    def add(row: Figures) -> None:
        record_property(PROPERTY, asdict(row))

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print that table."""
    print_table(terminalreporter)
