"""Progress for people: one line a stage, with its rate and the time left.

On a terminal the line is rewritten; elsewhere a new one appears now and then, so that a log of a
day's run stays readable.
"""

import os
import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

_TERMINAL_SECONDS = 0.2
_LOG_SECONDS = 10.0
_SMOOTHING_SECONDS = 20.0
_CLEAR = "\x1b[K"  # what the line before has left to the right


class Progress:
    """Counts what a stage has done, and tells.

    Args:
        stage: what is being done, for the line's beginning.
        total: how much there is to do; None if nobody knows.
        unit: what is counted.
        done: how much an earlier run had done already; it counts for the share, not for the rate.
        stream: where the line goes; standard error by default.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str = "rows",
        *,
        done: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.count = self.skipped = done
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = self._told = time.monotonic()
        self._rate = 0.0
        self._ahead = 0
        self._last = (self._started, done)

    def __enter__(self) -> "Progress":
        # Until the first unit is done, an engine or workers may have to start: a minute and more.
        self._write(self._line("starting"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close("stopped" if kind else "done")

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Units a second since the stage began."""
        return (self.count - self.skipped) / max(self.seconds, 1e-9)

    @property
    def _reached(self) -> int:
        return self.count + self._ahead

    def update(self, more: int, note: str = "", *, ahead: int = 0) -> None:
        """Count `more` units; tell, if it is time.

        Args:
            more: units that are done.
            note: stands at the line's end.
            ahead: units that are as good as done, and count with others that are not; told and
                forecast with, because what counts comes in bunches.
        """
        now = time.monotonic()
        first = self.count == self.skipped
        self.count += more
        self._ahead = ahead
        if first:
            # An engine or workers had to start for these: no forecast can be made of their rate.
            self._last = (now, self._reached)
        if now - self._told < (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            return
        self._told = now
        self._smooth(now)
        self._write(self._line(note))

    def skip(self, count: int) -> None:
        """Note that this much turned out to be done already."""
        self.count = self.skipped = count

    def close(self, outcome: str = "done") -> None:
        """Tell how the stage ended."""
        count = f"{self.count - self.skipped:,} {self.unit}"
        kept = f" ({self.skipped:,} were there already)" if self.skipped else ""
        line = (
            f"{self.stage}: {outcome}, {count}{kept} in {duration(self.seconds)}, "
            f"{self.rate:,.1f} {self.unit}/s"
        )
        # It stays, so it may wrap.
        self._stream.write(f"\r{line}{_CLEAR}\n" if self._terminal else line + "\n")
        self._stream.flush()

    def _smooth(self, now: float) -> None:
        """Follow the rate of the last seconds."""
        then, count = self._last
        if self._reached <= count:
            return
        rate = (self._reached - count) / max(now - then, 1e-9)
        weight = min(1.0, (now - then) / _SMOOTHING_SECONDS) if self._rate else 1.0
        self._rate += weight * (rate - self._rate)
        self._last = (now, self._reached)

    def _line(self, note: str) -> str:
        of = share = rate = left = ""
        reached = self._reached
        if self.total:
            of = f" of {self.total:,}"
            share = f" ({100 * reached / self.total:.0f} %)"
        if self._rate > 0:
            # Short, for what is noted at the end is to be seen in 80 columns too.
            rate = f", {self._rate:,.1f}/s"
            if self.total:
                left = f", {duration(max(self.total - reached, 0) / self._rate)} left"
        end = f", {note}" if note else ""
        return f"{self.stage}: {reached:,}{of} {self.unit}{share}{rate}{left}{end}"

    def _write(self, line: str) -> None:
        if self._terminal:
            # A line that wraps could not be rewritten: each time it would take rows of its own.
            width = self._columns() - 1
            self._stream.write(f"\r{line[:width]}{_CLEAR}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _columns(self) -> int:
        """Of the stream's own terminal; standard output, which others ask, may be a file."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        return columns or shutil.get_terminal_size().columns


def tell(line: str) -> None:
    """A line of its own, among those of the stages."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
