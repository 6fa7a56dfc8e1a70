"""How Ray Data runs our streams: in order where asked, and without taking a core for itself.

Ray Data's scheduling loop waits for tasks to have output. Where a task has output that nobody may
read yet, because the consumer is slower, it does not wait at all: the loop turns as fast as it can
and takes most of a CPU core from the work. Fifty turns a second are plenty for batches that take
longer than that to make, and two, besides one for each that is done, for chunks that keep an engine
busy for many seconds.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor


class Pace(ExecutionCallback):
    """Lets the scheduling loop turn fifty times a second at most."""

    turn_seconds: ClassVar[float] = 0.02

    def __init__(self) -> None:
        self._last = time.monotonic()

    def on_execution_step(self, executor: "StreamingExecutor") -> None:  # noqa: ARG002
        """Wait for what is left of the turn."""
        time.sleep(max(0.0, self._last + self.turn_seconds - time.monotonic()))
        self._last = time.monotonic()


class SlowPace(Pace):
    """Lets the scheduling loop turn twice a second, and where a task has output."""

    quiet_seconds: ClassVar[float] = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._came = False

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """Wait for output; what came is handed on in the turn after that."""
        super().on_execution_step(executor)
        operators = executor._topology or ()
        tasks = [task.get_waitable() for one in operators for task in one.get_active_tasks()]
        if self._came or not tasks:
            self._came = False
            return
        ready, _ = ray.wait(tasks, timeout=self.quiet_seconds, fetch_local=False)
        self._came = bool(ready)


def work_items(items: Sequence[Mapping[str, Any]]) -> ray.data.Dataset:
    """Items of work as a dataset, each a block of its own and so a task's.

    Not as tables: Ray would look at these in a task that waits for a whole free CPU.
    """
    return ray.data.from_items(list(items), override_num_blocks=len(items))


def arrange(
    dataset: ray.data.Dataset, *, ordered: bool = False, slow: bool = False
) -> ray.data.Dataset:
    """The dataset, to be executed quietly and at our pace.

    Args:
        dataset: what is to be executed.
        ordered: keep its rows' order.
        slow: its tasks take seconds and have work waiting, so nothing needs to be seen at once.
    """
    context = dataset.context
    context.execution_options.preserve_order = ordered
    # Ray's half an hour without a block is less than waiting for nodes or for a server may take.
    # Work that knows a limit of its own sets it.
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # a thread for each task, once a second
    context.issue_detectors_config.detectors = []  # they repeat advice on the terminal
    others = context.custom_execution_callback_classes
    kept = [one for one in others if not issubclass(one, Pace)]
    context.custom_execution_callback_classes = [*kept, SlowPace if slow else Pace]
    return dataset
