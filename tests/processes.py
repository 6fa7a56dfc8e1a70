"""Processes that work together by PyTorch's gloo, for tests of what several ranks do."""

import faulthandler
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Far beyond what the work takes. A rank that waits for one that is gone would wait for ever; this
# ends it with the place where each of its threads stands.
_LIMIT_SECONDS = 300


def run_ranks(work: Callable[..., None], ranks: int, folder: Path, *arguments: Any) -> None:
    """Call `work(rank, folder, *arguments)` in `ranks` processes of one group; all must succeed.

    Args:
        folder: an empty one, where they meet and where `work` may leave what it finds.
    """
    torch.multiprocessing.spawn(_rank, (ranks, work, folder, arguments), nprocs=ranks)


def _rank(
    rank: int, ranks: int, work: Callable[..., None], folder: Path, arguments: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(_LIMIT_SECONDS, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    work(rank, folder, *arguments)
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
