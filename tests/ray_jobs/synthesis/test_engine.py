"""What the engine says of single requests, told apart from its end."""

import asyncio
import itertools
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.utils.network_utils import get_open_zmq_ipc_path
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from ray_jobs.synthesis.config import VllmConfig
from ray_jobs.synthesis.engine import ChunkEngine, Places, _bundles, environment, sockets
from ray_jobs.synthesis.task import GenerationError
from ray_jobs.synthesis.worker import EngineDiedError


def unexpected() -> Exception:
    """As vLLM raises what its processors do not expect, such as an image of 500 x 2 pixels."""
    error = EngineGenerateError()
    error.__cause__ = ValueError("aspect ratio must be smaller than 200")
    return error


@pytest.mark.parametrize(
    ("error", "errored", "kind", "told"),
    [
        (VLLMValidationError("prompt is too long"), False, GenerationError, "too long"),
        (unexpected(), False, GenerationError, "ValueError: aspect ratio"),
        (unexpected(), True, EngineDiedError, "aspect ratio"),
        (EngineDeadError(), True, EngineDiedError, "EngineCore"),
    ],
)
def test_a_request_that_is_refused_is_not_the_engines_end(error, errored, kind, told):
    async def generate(*_: Any, **__: Any) -> Any:
        raise error
        yield  # makes it a generator, as the engine's is

    engine = SimpleNamespace(
        llm=SimpleNamespace(engine=SimpleNamespace(generate=generate, errored=errored)),
        numbers=itertools.count(),
    )
    with pytest.raises(kind, match=told):
        asyncio.run(ChunkEngine._generate(engine, {"prompt": "A"}, None))


def test_an_engine_of_gpus_compiles_no_kernels_of_a_sampler_that_it_does_not_use(monkeypatch):
    config = VllmConfig.model_validate({"kind": "vllm", "model": "some/model", "gpus": 1})
    for name, value in environment(config).items():
        monkeypatch.setenv(name, value)
    assert not envs.VLLM_USE_FLASHINFER_SAMPLER


def test_an_engines_sockets_are_among_those_of_its_nodes_ray(ray_cluster, monkeypatch):
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", sockets()["VLLM_RPC_BASE_PATH"])
    folder, name = get_open_zmq_ipc_path().removeprefix("ipc://").rsplit("/", 1)
    assert {"plasma_store", "raylet"} <= {one.name for one in Path(folder).iterdir()}
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"{folder}/{name}")
    Path(folder, name).unlink()


def test_sockets_whose_paths_would_be_too_long_are_where_vllm_puts_them(ray_cluster, monkeypatch):
    node = ray._private.worker.global_worker.node
    monkeypatch.setattr(node, "_sockets_dir", "/tmp/" + "a" * 65)
    assert [*sockets()] == ["VLLM_RPC_BASE_PATH"]
    monkeypatch.setattr(node, "_sockets_dir", "/tmp/" + "a" * 66)
    assert not sockets()


class Doubler:
    """What runs in a placement group, as an engine does."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"doubled": 2 * batch["item"]}


def test_what_engines_of_several_gpus_hold_is_given_back(ray_cluster):
    places = Places([{"CPU": 0.5}, {"CPU": 0.1}])
    others = Places([{"CPU": 0.1}])
    others.take()
    rows = ray.data.from_items([1, 2, 3]).map_batches(
        Doubler, compute=ray.data.ActorPoolStrategy(size=1), **places.arguments()
    )
    assert sorted(row["doubled"] for row in rows.iter_rows()) == [2, 4, 6]
    assert states(places) == {"CREATED"}
    places.free()
    places.free()  # where an error came between
    assert states(places) == {"REMOVED"}
    assert states(others) != {"REMOVED"}
    others.free()


def states(places: Places) -> set[str]:
    table = ray.util.placement_group_table().values()
    return {one["state"] for one in table if one["name"].startswith(places.prefix)}


def test_an_engine_of_several_gpus_holds_its_cpus_once():
    config = VllmConfig.model_validate({"kind": "vllm", "model": "m", "gpus": 2, "cpus": 4})
    assert _bundles(config) == [{"CPU": 4, "GPU": 1}, {"GPU": 1}]
    piped = config.model_copy(update={"engine_kwargs": {"pipeline_parallel_size": 2}})
    assert len(_bundles(piped)) == 4
    assert [str(one) for one in piped.needs("synthesis.engine")] == [
        "synthesis.engine: 4 CPUs and 1 GPUs",
        "synthesis.engine.gpus: 3 x 0 CPUs and 1 GPUs",
    ]
