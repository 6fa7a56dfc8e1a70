"""What every test may use. Imports pytest alone: the operator's tests run where little
else is.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """A function from a golden file's name to its path."""

    def path(name: str) -> Path:
        file = GOLDEN / name
        if not file.is_file():
            have = ", ".join(sorted(entry.name for entry in GOLDEN.glob("*"))) or "nothing"
            pytest.fail(f"golden file {name} is not in {GOLDEN} (which holds {have})")
        return file

    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with two CPUs, for everything that needs one."""
    import os

    import ray

    from rwkv_clip.quiet import QUIET
    from serve.command import fewer_hops

    os.environ.update(QUIET)  # as local clusters of jobs have it
    # Ray Train looks at its workers every two seconds, and hears of a checkpoint at each look.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    fewer_hops()
    ray.init(
        "local",  # without an address Ray would join whatever `ray start` began on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300_000_000,
        _system_config={
            "metrics_report_interval_ms": 2000,  # what is counted is told soon enough for tests
            # A worker that has imported Ray Data and PyTorch waits for the next test's tasks.
            "num_workers_soft_limit": 6,
        },
    )
    yield
    ray.shutdown()


# Whose tests share what takes long to make.
_TOGETHER = ("tests/serve/", "tests/ray_jobs/training/")
# Whose tests need no cluster.
_WITHOUT_RAY = ("tests/rwkv_clip/", "tests/infra/", "tests/docs/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The former come first, so that a process does not begin one when the others are done.

    And the latter last: a cluster with nothing to do takes a tenth of a core.
    """
    items.sort(
        key=lambda item: (
            not item.nodeid.startswith(_TOGETHER),
            item.nodeid.startswith(_WITHOUT_RAY),
        )
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End this process's cluster before the first test that needs none: no other comes."""
    ray = sys.modules.get("ray")
    if ray and item.nodeid.startswith(_WITHOUT_RAY) and ray.is_initialized():
        ray.shutdown()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadScopeScheduling":
    """Share the tests out among processes, as `make test` does: a file at a time, or a folder."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = next((one for one in _TOGETHER if nodeid.startswith(one)), None)
            return folder or nodeid.partition("::")[0]

    # As they are collected: the long ones first, and small ones to fill what is left at the end.
    config.option.loadscopereorder = False
    return Files(config, log)
