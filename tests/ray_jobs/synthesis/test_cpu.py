"""What an engine on CPUs is told of them."""

import os

import pytest
import torch
from vllm.utils import cpu_resource_utils, torch_utils
from vllm.utils.cpu_resource_utils import LogicalCPUInfo

from ray_jobs.synthesis import cpu


@pytest.mark.parametrize(
    ("has", "expected"),
    [({"amx_bf16": True}, "bfloat16"), ({"amx_bf16": False}, "float32"), ({}, "float32")],
)
def test_it_computes_in_bfloat16_where_there_are_matrix_units(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert cpu.data_type() == expected


@pytest.mark.parametrize(
    ("quota", "threads", "places"), [(None, "2", "{2,3}"), (1.5, "1", "{2}"), (64.0, "2", "{2,3}")]
)
def test_its_threads_are_one_for_each_core_of_one_numa_node_within_the_quota(
    monkeypatch, quota, threads, places
):
    monkeypatch.setattr(torch_utils, "_cgroup_cpu_limit", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(5))
    # Two cores of two threads each, and one core of another node; (id, core, node).
    there = [(3, 1, 0), (0, 0, 0), (2, 0, 0), (1, 1, 0), (4, 2, 1)]
    allowed = [LogicalCPUInfo(*one) for one in there]
    monkeypatch.setattr(cpu_resource_utils, "get_allowed_cpu_list", lambda: allowed)
    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: [0, 1])
    told = cpu.environment()
    assert (told["OMP_NUM_THREADS"], told["OMP_PLACES"]) == (threads, places)
