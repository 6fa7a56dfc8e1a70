"""The progress line, as a terminal and a log get it."""

import io
import os
import pty
import termios

import pytest

from ray_jobs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell with every update."""
    monkeypatch.setattr("ray_jobs.progress._TERMINAL_SECONDS", 0)
    monkeypatch.setattr("ray_jobs.progress._LOG_SECONDS", 0)


def told(stream: io.StringIO) -> list[str]:
    """What is written by two updates of a training and its end."""
    progress = Progress("train", 147_456, "pairs", stream=stream)
    for _ in range(2):
        progress.update(2560, "loss 4.300, waits 0 % for data, and much else besides")
    progress.close()
    return stream.getvalue().split("\r")


@pytest.mark.parametrize("columns", [40, 80])
def test_a_line_that_is_rewritten_fits_the_terminal(monkeypatch, at_once, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    empty, *rewritten, last = told(Terminal())
    assert not empty
    assert len(rewritten) == 2
    for line in rewritten:
        assert len(line.removesuffix("\x1b[K")) == columns - 1
    assert "\n" not in "".join(rewritten)
    assert last.startswith("train: done, 5,120 pairs in ")
    assert last.endswith("pairs/s\x1b[K\n"), "the end of a stage is told in full"


def test_a_line_fits_the_terminal_where_standard_output_is_a_file(monkeypatch, at_once):
    monkeypatch.setenv("COLUMNS", "80")
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 40))
    with os.fdopen(terminal, "w") as stream, os.fdopen(reader, "rb", buffering=0) as screen:
        Progress("train", 147_456, "pairs", stream=stream).update(2560, "loss 4.300")
        line = screen.read(4096).decode()
    assert len(line.removesuffix("\x1b[K")) == 1 + 39


@pytest.mark.parametrize(
    ("total", "done", "line"),
    [
        (1000, 0, "describe: 0 of 1,000 pairs (0 %), starting"),
        (1000, 250, "describe: 250 of 1,000 pairs (25 %), starting"),
        (None, 0, "describe: 0 pairs, starting"),
    ],
)
def test_a_stage_that_begins_is_told_before_anything_is_done(total, done, line):
    log, terminal = io.StringIO(), Terminal()
    with Progress("describe", total, "pairs", done=done, stream=log):
        assert log.getvalue() == line + "\n"
    with Progress("describe", total, "pairs", done=done, stream=terminal):
        assert terminal.getvalue() == f"\r{line}\x1b[K"
    assert terminal.getvalue().count("\n") == 1, "the first line is rewritten"


def test_the_loss_of_a_training_can_be_seen_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = Terminal()
    progress = Progress("train", 147_456, "pairs", stream=stream)
    now = 60.0
    progress.update(15_360, "loss 5.300, waits 0 % for data")
    now = 80.0
    progress.update(5120, "loss 4.300, waits 0 % for data")
    _, first, second = stream.getvalue().split("\r")
    assert first.startswith("train: 15,360 of 147,456 pairs (10 %), loss 5.300")
    seen = "train: 20,480 of 147,456 pairs (14 %), 256.0/s, 8 min 16 s left, loss 4.300"
    assert second.startswith(seen)


def test_a_slow_start_is_no_forecast(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    log = io.StringIO()
    progress = Progress("describe", 1128, "pairs", done=100, stream=log)
    for now, pairs in ((90.0, 128), (100.0, 100), (110.0, 200), (130.0, 200)):  # noqa: B007
        progress.update(pairs)
    assert log.getvalue().splitlines() == [
        "describe: 228 of 1,128 pairs (20 %)",
        "describe: 328 of 1,128 pairs (29 %), 10.0/s, 1 min 20 s left",
        "describe: 528 of 1,128 pairs (47 %), 15.0/s, 40 s left",
        "describe: 728 of 1,128 pairs (65 %), 10.0/s, 40 s left",
    ]


def test_what_is_as_good_as_done_is_told_and_counts_for_the_forecast(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    log = io.StringIO()
    progress = Progress("describe", 1000, "pairs", stream=log)
    for now, ahead in ((90.0, 200), (110.0, 300), (130.0, 0), (150.0, 400)):  # noqa: B007
        progress.update(100, ahead=ahead)
    progress.close("stopped")
    assert log.getvalue().splitlines() == [
        "describe: 300 of 1,000 pairs (30 %)",
        "describe: 500 of 1,000 pairs (50 %), 10.0/s, 50 s left",
        # What was ahead is lost.
        "describe: 300 of 1,000 pairs (30 %), 10.0/s, 1 min 10 s left",
        "describe: 800 of 1,000 pairs (80 %), 7.5/s, 27 s left",
        "describe: stopped, 400 pairs in 2 min 30 s, 2.7 pairs/s",
    ]


def test_a_log_has_whole_lines_and_no_signs_for_terminals(monkeypatch, at_once):
    monkeypatch.setenv("COLUMNS", "40")
    (log,) = told(io.StringIO())
    first, second, end, nothing = log.split("\n")
    assert "\x1b" not in log
    assert first.endswith("and much else besides")
    assert second.startswith("train: 5,120 of 147,456 pairs (3 %), ")
    assert end.startswith("train: done")
    assert not nothing
