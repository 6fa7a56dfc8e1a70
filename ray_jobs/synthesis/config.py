"""What the language model runs on. Apart from the engines, whose imports take seconds."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rwkv_clip.config import BaseConfig


class VllmConfig(BaseConfig):
    """Engines of ours: vLLM on Ray's nodes."""

    kind: Literal["vllm"] = "vllm"
    model: str = Field(description="a model folder, a hub id, or package:NAME")
    engines: PositiveInt = Field(1, description="that run side by side")
    cpus: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for an engine")
    gpus: NonNegativeInt = Field(0, description="GPUs of an engine: its tensor parallel size")
    chunks_in_flight: PositiveInt = Field(4, description="chunks that an engine has at a time")
    max_model_len: PositiveInt = Field(512, description="tokens of prompt and answer")
    kv_cache_gb: PositiveInt = Field(1, description="memory for the cache of a CPU engine")
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="anything else that vLLM's engine takes"
    )

    def arguments(self) -> dict[str, Any]:
        """What vLLM is started with."""
        chosen: dict[str, Any] = {"max_model_len": self.max_model_len}
        if self.gpus:
            chosen |= {"tensor_parallel_size": self.gpus, "dtype": "bfloat16"}
        else:
            chosen |= {
                "dtype": "float32",  # faster than bfloat16 where there are no matrix units
                "enforce_eager": True,
                # A second process would wait for the first one with a core of its own.
                "distributed_executor_backend": "uni",
                # So that little of the part that all prompts share is computed again.
                "block_size": 32,
                "max_num_seqs": 256,
                # vLLM 0.32 dies of a seeded request whose prompt is read in pieces on a CPU: it
                # takes back a random number, which PyTorch's CPU generator cannot.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(2048, self.max_model_len),
            }
        return {**chosen, **self.engine_kwargs}
