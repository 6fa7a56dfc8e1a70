"""The in-process engine: vLLM through Ray Data's own processor, doing whole chunks.

Ray's stage generates once for each row, and a row's second attempt would have to wait for a second
pass over the data. Ours is the same stage, with the same engine wrapper and the same restarts, but
its rows are chunks: reading, generating, judging, asking again and publishing happen in the
engine's own process, with all requests of the chunks in flight in the engine's queue.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import ray.data
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from ray_jobs.models import resolve_model
from ray_jobs.storage import Storage
from ray_jobs.synthesis.chunks import Chunk
from ray_jobs.synthesis.config import VllmConfig
from ray_jobs.synthesis.describer import GenerationError, Messages, SamplingConfig
from ray_jobs.synthesis.watch import Watch
from ray_jobs.synthesis.worker import ChunkWorker, EngineDiedError
from rwkv_clip.descriptions import DESCRIPTION_SCHEMA

_ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"}


class Describer(vLLMEngineStageUDF):
    """Ray's vLLM stage, whose rows are chunks.

    Args:
        storage: holds the pairs, and gets the descriptions.
        name: of the data set.
        sampling: how the model is asked.
        watch: is told what happens.
        hang_seconds: see ChunkWorker.
        source: the model as the configuration names it; it is resolved on the engine's node.
        arguments: what Ray's stage takes.
    """

    def __init__(
        self,
        *,
        storage: Storage,
        name: str,
        sampling: SamplingConfig,
        watch: Watch,
        hang_seconds: float,
        source: str,
        **arguments: Any,
    ) -> None:
        from transformers import AutoTokenizer

        self.worker = ChunkWorker(storage, name, sampling, watch, hang_seconds)
        model = resolve_model(source)
        super().__init__(**{**arguments, "model": model, "expected_input_keys": []})
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.sampling = sampling

    async def udf(  # type: ignore[override]  # Ray's own declaration has no yield
        self, batch: list[dict[str, Any]]
    ) -> AsyncIterator[dict[str, Any]]:
        """Do chunks; gives their counts in the order in which they are done."""
        for done in asyncio.as_completed([self._run(row) for row in batch]):
            yield await done

    async def _run(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk(**{name: row[name] for name in ("part", "path", "index", "first", "rows")})
        counts = await self.worker.run(chunk, self._complete)
        return {**counts, self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN]}

    async def _complete(self, messages: Messages, seed: int) -> str:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        request = {
            "prompt": "",
            "tokenized_prompt": prompt,
            "sampling_params": {
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "max_tokens": self.sampling.max_tokens,
                "seed": seed,
                "structured_outputs": {"json": DESCRIPTION_SCHEMA},
                # Only whole answers are of use; else each token of each row is an event here.
                "output_kind": RequestOutputKind.FINAL_ONLY,
            },
            self.IDX_IN_BATCH_COLUMN: 0,
        }
        try:
            _, output, _ = await self.llm.generate_async(request)
        except EngineDeadError as error:
            raise EngineDiedError(str(error)) from error
        except ValueError as error:  # vLLM's word for a request that it does not take
            raise GenerationError(str(error)) from error
        return str(output["generated_text"])


def environment(config: VllmConfig) -> dict[str, str]:
    """The variables that an engine's process is started with."""
    variables = dict(_ENVIRONMENT)
    if not config.gpus:
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gb)
        variables["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # the others wait while it computes
    if resolve_model(config.model) != config.model:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


def vllm_stream(
    config: VllmConfig, chunks: ray.data.Dataset, settings: dict[str, Any]
) -> ray.data.Dataset:
    """Counts of the chunks, as engines do them.

    Args:
        config: of the engines.
        chunks: rows with the fields of Chunk.
        settings: the arguments of Describer that are not vLLM's.
    """
    bundles = [{"CPU": config.cpus, **({"GPU": 1} if config.gpus else {})}] * max(1, config.gpus)
    model = resolve_model(config.model)
    processor: Any = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model,
            accelerator_type=None,
            concurrency=config.engines,
            batch_size=1,
            max_concurrent_batches=config.chunks_in_flight,
            engine_kwargs=config.arguments(),
            placement_group_config={"bundles": bundles},
            runtime_env={"env_vars": environment(config)},
            log_engine_metrics=False,
            chat_template_stage={"enabled": False},
            tokenize_stage={"enabled": False},
            detokenize_stage={"enabled": False},
        ),
        preprocess_map_kwargs={"num_cpus": 0.01},
        postprocess_map_kwargs={"num_cpus": 0.01},
        postprocess=_counts,
    )
    name = "vLLMEngineStage"
    stage = processor.get_stage_by_name(name)
    # A copy, because assigning to a stage works out its resources anew, and wrongly.
    processor.stages[name] = stage.model_copy(
        update={
            "fn": Describer,
            "fn_constructor_kwargs": {
                **stage.fn_constructor_kwargs,
                **settings,
                "source": config.model,
            },
        }
    )
    described: ray.data.Dataset = processor(chunks)
    return described


def _counts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("part", "index", "rows", "seconds")}
