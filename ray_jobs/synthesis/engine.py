"""The in-process engine: vLLM through Ray Data's own processor, doing whole chunks.

Ray's stage generates once for each row, and a row's second attempt would have to wait for a second
pass over the data. Ours is the same stage, with the same engine wrapper and the same restarts, but
its rows are chunks: reading, generating, judging, asking again and publishing happen in the
engine's own process, with all requests of the chunks in flight in the engine's queue.
"""

import asyncio
import copy
import itertools
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.data
from ray._common.usage.usage_lib import usage_stats_enabled
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from ray.llm._internal.batch.observability.usage_telemetry import usage
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_jobs.cluster import quieten
from ray_jobs.models import resolve_model
from ray_jobs.synthesis import cpu
from ray_jobs.synthesis.captioner import see
from ray_jobs.synthesis.config import VllmConfig
from ray_jobs.synthesis.task import GenerationError, Messages, Task
from ray_jobs.synthesis.worker import ChunkWorker, EngineDiedError, Work
from rwkv_clip.signals import keeping

_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM warms FlashInfer's sampler up, which compiles kernels with nvcc and a C++ compiler that
    # the image has not. Nothing is lost: requests with seeds, as all of ours are, never take it.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
_SOCKET_NAME = 37  # characters of vLLM's sockets' names, which are UUIDs, with the slash before
_SOCKET_PATH = 107  # bytes of a socket's path, which Linux takes


class ChunkEngine(vLLMEngineStageUDF):
    """Ray's vLLM stage, whose rows are chunks.

    Args:
        work: what is to be done.
        source: the model as the configuration names it; it is resolved on the engine's node.
        on_cpus: whether the engine has no GPU.
        engine_kwargs: what vLLM is started with.
        arguments: what Ray's stage takes besides.
    """

    def __init__(
        self,
        *,
        work: Work,
        source: str,
        on_cpus: bool,
        engine_kwargs: Mapping[str, Any],
        **arguments: Any,
    ) -> None:
        self.worker = ChunkWorker(work)
        settings = dict(engine_kwargs)
        if on_cpus:
            settings, variables = cpu.settled(engine_kwargs)
            os.environ.update(variables)
        os.environ.update(sockets())
        with self.worker.starting():
            self.model_folder = resolve_model(source)
            arguments |= {"model": self.model_folder, "expected_input_keys": []}
            super().__init__(**arguments, engine_kwargs=settings)
        self.worker.turns.at_a_time(self.max_pending_requests)
        self.parameters = _parameters(work.task)
        self.numbers = itertools.count()
        self.warm: asyncio.Task[None] | None = None
        self.shows_images = "image" in work.task.columns
        self.template = _chat_template(self.model_folder, self.shows_images)

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        """Do an item's chunks; gives their counts."""
        if self.warm is None:
            self.warm = asyncio.create_task(self._warm_up())
        await self.warm
        yield await self.worker.run(batch, self._complete)

    async def _warm_up(self) -> None:
        """Ask for a word, so that the schema is compiled before there is anything to do.

        Meanwhile the engine looks for it without a pause, which takes a core from whoever makes the
        first prompts.
        """
        parameters = self._sampled(0)
        parameters.max_tokens = 1
        # What is wrong with the schema, every row will tell.
        with self.worker.asking(), suppress(GenerationError):
            await self._generate({"prompt": "A"}, parameters)

    async def _complete(self, messages: Messages, seed: int) -> str:
        return await self._generate(self._prompt(messages), self._sampled(seed))

    async def _generate(self, prompt: Any, parameters: Any) -> str:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        # Not through Ray's wrapper, which checks and copies each request and each answer.
        answers = self.llm.engine.generate(
            prompt, parameters, request_id=f"chunk-{next(self.numbers)}"
        )
        try:
            async for answer in answers:
                if answer.finished:
                    return self._text(answer.outputs[0])
        except EngineDeadError as error:
            raise EngineDiedError(str(error)) from error
        except VLLMClientError as error:  # a request that it does not take, as it is too long
            raise GenerationError(str(error)) from error
        except EngineGenerateError as error:  # says nothing itself
            cause = f"{type(error.__cause__).__name__}: {error.__cause__}"
            if self.llm.engine.errored:
                raise EngineDiedError(cause) from error
            raise GenerationError(cause) from error
        raise GenerationError("the engine ended without an answer")

    def _sampled(self, seed: int) -> Any:
        parameters = copy.copy(self.parameters)
        parameters.seed = seed
        return parameters

    def _text(self, output: Any) -> str:
        ids = output.token_ids
        if output.finish_reason == "stop":  # by the token that says so
            ids = ids[:-1]
        text: str = self.template.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _prompt(self, messages: Messages) -> Any:
        """The conversation as vLLM takes it: token ids, or text with images."""
        conversation, images = _with_images(messages)
        if not self.shows_images:
            ids = self.template.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=False
            )
            return {"prompt_token_ids": ids}
        text = self.template.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )
        return {"prompt": text, "multi_modal_data": {"image": images}}


def _parameters(task: Task) -> Any:
    """What all requests have in common."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    sampling = task.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        structured_outputs=StructuredOutputsParams(json=task.answers),
        # Only whole answers are of use; else each token of each row is an event here, or made text.
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=False,
        skip_clone=True,  # else the schema is copied for each request, node by node
    )


def _chat_template(model_folder: str, images: bool) -> Any:
    """What makes a conversation the model's prompt, and the model's tokens text."""
    from transformers import AutoProcessor, AutoTokenizer

    kind: Any = AutoProcessor if images else AutoTokenizer
    return kind.from_pretrained(model_folder)


def _with_images(messages: Messages) -> tuple[list[dict[str, Any]], list[Any]]:
    """A conversation as chat templates take it, and the images it shows."""
    conversation, images = [], []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            images += [see(part["image_url"]["url"]) for part in content if "image_url" in part]
            content = [{"type": "image"} if "image_url" in part else part for part in content]
        conversation.append({**message, "content": content})
    return conversation, images


def environment(config: VllmConfig) -> dict[str, str]:
    """The variables that an engine's process is started with."""
    variables = dict(_ENVIRONMENT)
    if not config.gpus:
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gb)
        variables["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # the others wait while it computes
    if resolve_model(config.model) != config.model:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


def sockets() -> dict[str, str]:
    """Where vLLM's sockets are to be on this node: among those of Ray's session.

    An engine that is killed leaves its own behind. They go with the session's folder, in which
    nobody looks for anything else, and do not gather in the folder of all temporary files.
    """
    node: Any = ray._private.worker.global_worker.node  # which knows the session's folders
    folder = node.get_sockets_dir_path()
    there = len(os.fsencode(folder)) + _SOCKET_NAME <= _SOCKET_PATH
    return {"VLLM_RPC_BASE_PATH": folder} if there else {}


def _end_telemetry() -> None:
    """End the actor that holds what Ray would tell of its use, where it is not to tell anything.

    It is made with every processor and stays for as long as the cluster does, at 2 % of a core.
    """
    if usage_stats_enabled():
        return
    with suppress(ValueError):  # there is none
        actor = usage.LLM_BATCH_TELEMETRY_ACTOR_NAME
        ray.kill(ray.get_actor(actor, usage.LLM_BATCH_TELEMETRY_NAMESPACE))


@contextmanager
def vllm_stream(
    config: VllmConfig, items: ray.data.Dataset, work: Work
) -> Iterator[ray.data.Dataset]:
    """Counts of the chunks, as engines do them; in the block, the engines may run.

    Args:
        config: of the engines.
        items: of work; see `ray_jobs.synthesis.chunks.work_of`.
        work: what is done with them.
    """
    quieten()  # after the import of ray.data.llm
    model, bundles = resolve_model(config.model), _bundles(config)
    in_flight = min(config.chunks_in_flight, work.share)
    settings = vLLMEngineProcessorConfig(
        model_source=model,
        accelerator_type=None,
        concurrency=config.engines,
        batch_size=1,
        max_concurrent_batches=in_flight,
        max_tasks_in_flight_per_actor=in_flight,
        engine_kwargs=config.arguments(),
        placement_group_config={"bundles": bundles},
        runtime_env={"env_vars": environment(config)},
        log_engine_metrics=False,
        chat_template_stage={"enabled": False},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
    )
    with keeping(signal.SIGTERM):  # it calls `ray.init`, whose handler ends with another status
        processor: Any = build_processor(settings)
    _end_telemetry()
    # Maps around the stage, which only rename columns; each takes processes of its own, and those
    # of the second one are started when the first chunk is done, on the engines' cores.
    processor.preprocess = processor.postprocess = None
    name = "vLLMEngineStage"
    stage = processor.get_stage_by_name(name)
    places = Places(bundles)
    # A copy, because assigning to a stage works out its resources anew, and wrongly.
    processor.stages[name] = stage.model_copy(
        update={
            "fn": ChunkEngine,
            "fn_constructor_kwargs": {
                **stage.fn_constructor_kwargs,
                "work": work,
                "source": config.model,
                "on_cpus": not config.devices,
            },
            "map_batches_kwargs": {
                **stage.map_batches_kwargs,
                # Groups of ours wherever Ray would make some: for vLLM's executor on Ray.
                **(places.arguments() if "ray_remote_args_fn" in stage.map_batches_kwargs else {}),
            },
        }
    )
    try:
        yield processor(items)
    finally:
        places.free()


def _bundles(config: VllmConfig) -> list[dict[str, float]]:
    """What an engine holds: a GPU in each, and the CPUs where its own process is."""
    if not config.devices:
        return [{"CPU": config.cpus}]
    return [{"CPU": config.cpus, "GPU": 1.0}] + [{"GPU": 1.0}] * (config.devices - 1)


class Places:
    """Where engines of several GPUs run: placement groups, which Ray's own stage leaves behind.

    Whatever waits for GPUs after it would then wait until the job ends.

    Args:
        bundles: of an engine, the first with the CPUs of its own process.
    """

    def __init__(self, bundles: Sequence[Mapping[str, float]]) -> None:
        self.bundles = [dict(bundle) for bundle in bundles]
        self.prefix = f"engine-{uuid.uuid4().hex}-"

    def arguments(self) -> dict[str, Any]:
        """What `map_batches` takes, so that each engine has one."""
        return {"ray_remote_args_fn": self.take, "num_cpus": self.bundles[0]["CPU"]}

    def take(self) -> dict[str, Any]:
        """A new one; the arguments of an actor that runs in it."""
        # By their names, because Ray Data may call this on a copy.
        name = f"{self.prefix}{uuid.uuid4().hex}"
        group = ray.util.placement_group(self.bundles, strategy="PACK", name=name)
        strategy = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        return {"scheduling_strategy": strategy}

    def free(self) -> None:
        """Give all of them back, with what runs there still."""
        for one in ray.util.placement_group_table().values():
            if one["name"].startswith(self.prefix) and one["state"] != "REMOVED":
                ray.util.remove_placement_group(ray.util.get_placement_group(one["name"]))
