"""What a model runs on. Apart from the engines, whose imports take seconds."""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from ray_jobs.room import Need
from rwkv_clip.config import BaseConfig

# Of vLLM's arguments, those that say which model it is and what that reads. All others are of where
# and how fast, and may be changed when a run goes on.
_DECIDES = (
    "hf_overrides",
    "mm_processor_kwargs",
    "quantization",
    "revision",
    "tokenizer",
    "tokenizer_revision",
)


class VllmConfig(BaseConfig):
    """Engines of ours: vLLM on Ray's nodes."""

    kind: Literal["vllm"]
    model: str = Field(description="a model folder, a hub id, or package:NAME")
    engines: PositiveInt = Field(1, description="that run side by side")
    cpus: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for an engine")
    gpus: NonNegativeInt = Field(0, description="GPUs of an engine: its tensor parallel size")
    chunks_in_flight: PositiveInt = Field(
        16, description="chunks that an engine has begun at a time, at most"
    )
    max_model_len: PositiveInt = Field(512, description="tokens of prompt and answer")
    kv_cache_gb: PositiveInt = Field(1, description="memory for the cache of a CPU engine")
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="anything else that vLLM's engine takes"
    )

    @property
    def count(self) -> int:
        """Workers at a time."""
        return self.engines

    def needs(self, key: str) -> tuple[Need, ...]:
        """What one of them holds, which GPUs of several nodes may be."""
        devices = self.devices
        more = (Need(f"{key}.gpus", 0.0, 1.0, devices - 1),) if devices > 1 else ()
        return (Need(key, self.cpus, min(devices, 1)), *more)

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the model's name."""
        decides = {key: self.engine_kwargs[key] for key in _DECIDES if key in self.engine_kwargs}
        return {"engine_kwargs": decides} if decides else {}

    @property
    def devices(self) -> int:
        """GPUs of an engine, over all its stages where it is a pipeline."""
        return self.gpus * int(self.engine_kwargs.get("pipeline_parallel_size", 1))

    def arguments(self) -> dict[str, Any]:
        """What vLLM is started with; on CPUs also `ray_jobs.synthesis.cpu`, on their node."""
        chosen: dict[str, Any] = {
            "max_model_len": self.max_model_len,
            "disable_log_stats": True,  # nobody reads them, and they are gathered at every step
        }
        if self.gpus:
            chosen |= {"tensor_parallel_size": self.gpus, "dtype": "bfloat16"}
        else:
            chosen |= {
                "enforce_eager": True,
                # So that little of the part that all prompts share is computed again.
                "block_size": 32,
                "max_num_seqs": 256,
                # vLLM 0.32 dies of a seeded request whose prompt is read in pieces on a CPU: it
                # takes back a random number, which PyTorch's CPU generator cannot.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(2048, self.max_model_len),
            }
        return {**chosen, **self.engine_kwargs}


class HttpConfig(BaseConfig):
    """A server that speaks OpenAI's chat completions, ours or somebody else's."""

    kind: Literal["http"]
    url: str = Field(description="base URL, such as http://llm.example.com:8000/v1")
    model: str = Field(description="the model's name there")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="variable that holds the key, where the job's driver runs"
    )
    clients: PositiveInt = Field(1, description="processes that send requests")
    cpus: PositiveFloat = Field(0.5, description="CPUs that Ray reserves for each")
    requests_in_flight: PositiveInt = Field(64, description="of each client")
    timeout_seconds: PositiveFloat = Field(120, description="for an answer")
    patience_seconds: PositiveFloat = Field(
        600, description="a server that is away or busy is asked again for so long"
    )

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the model's name."""
        return {}

    @property
    def count(self) -> int:
        """Workers at a time."""
        return self.clients

    def needs(self, key: str) -> tuple[Need, ...]:
        """What one of them holds."""
        return (Need(key, self.cpus),)

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("takes a URL that begins with http:// or https://")
        return url.rstrip("/")


class PythonConfig(BaseConfig):
    """A captioner of one's own; see `ray_jobs.synthesis.python`."""

    kind: Literal["python"]
    model: str = Field(
        description="MODULE:FUNCTION; called with arguments, it gives a function of images"
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="of that function")
    batch: PositiveInt = Field(16, description="images captioned at a time")
    workers: PositiveInt = Field(1, description="processes that caption")
    cpus: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for each")
    gpus: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for each")

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the model's name."""
        return {"arguments": self.arguments} if self.arguments else {}

    @property
    def count(self) -> int:
        """Workers at a time."""
        return self.workers

    def needs(self, key: str) -> tuple[Need, ...]:
        """What one of them holds."""
        return (Need(key, self.cpus, self.gpus),)
