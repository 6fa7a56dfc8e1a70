"""What an engine on CPUs is told on the node that it runs on.

vLLM starts an engine in a process of its own, and its model in one more, for the sake of OpenMP,
whose threads are settled when a process begins. Told of them in time, engine and model are one
process, which is there in half the time (15 s in place of 30 on two cores).
"""

from collections.abc import Mapping
from typing import Any

import torch


def settled(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What vLLM is started with on this node, and the variables of the process that starts it.

    Args:
        arguments: of a `VllmConfig`.
    """
    return {"dtype": data_type(), **arguments}, environment()


def data_type() -> str:
    """The faster one here: bfloat16 where there are matrix units for it, else float32."""
    return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"


def environment() -> dict[str, str]:
    """The variables of an engine whose model is in its own process, with a thread for each core.

    The cores are those that vLLM would take: one logical CPU of each in the first NUMA node that is
    there for us. A container's quota, which vLLM does not look at here, allows no more of them: the
    others' threads would use it up while they wait, and all would stand still until the next one.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node
    from vllm.utils.torch_utils import available_cpu_count

    node = get_visible_memory_node()[0]
    allowed = sorted(get_allowed_cpu_list(), key=lambda cpu: cpu.id)
    cores = {cpu.physical_core: cpu.id for cpu in allowed if cpu.numa_node == node}
    cpus = sorted(cores.values())[: available_cpu_count()]
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(len(cpus)),
        "OMP_PLACES": f"{{{','.join(map(str, cpus))}}}",
        "OMP_PROC_BIND": "true",
    }
