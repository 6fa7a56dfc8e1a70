"""What a training run is made of."""

from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ray_jobs.pairs import TextColumn
from ray_jobs.training.plan import check_lanes, check_shares
from ray_jobs.training.recipe import RecipeConfig
from rwkv_clip.config import BaseConfig, Precision
from rwkv_clip.model.config import CONFIGS, CLIPConfig, named_config


class ImageTowerConfig(BaseConfig):
    """The image encoder; what is absent is as in the named model."""

    depth: PositiveInt | None = Field(None, description="blocks")
    heads: PositiveInt | None = Field(None, description="of a block's time mix")
    hidden_dim: PositiveInt | None = Field(None, description="channels inside the channel mix")
    patch_size: PositiveInt | None = Field(None, description="side of a patch, in pixels")
    image_size: PositiveInt | None = Field(None, description="side of an image, in pixels")
    drop_path: float | None = Field(
        None, ge=0, lt=1, description="chance of dropping a branch in the last block"
    )


class TextTowerConfig(BaseConfig):
    """The text encoder; what is absent is as in the named model."""

    depth: PositiveInt | None = Field(None, description="blocks")
    heads: PositiveInt | None = Field(None, description="of a block's time mix")
    hidden_dim: PositiveInt | None = Field(None, description="channels inside the channel mix")
    context_length: int | None = Field(None, ge=3, description="tokens of a text")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="chance of zeroing a channel after each branch"
    )


class ModelConfig(BaseConfig):
    """A named model, and what is to differ from it."""

    name: str = Field("RWKV-CLIP-B-32", description=f"one of {', '.join(CONFIGS)}")
    embed_dim: PositiveInt | None = Field(None, description="of both encoders")
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        named_config(name)
        return name

    def clip_config(self) -> CLIPConfig:
        """The library's configuration; raises ValueError, naming the key."""
        base = named_config(self.name).to_dict()
        changed = False
        for tower in ("image", "text"):
            given = getattr(self, tower).model_dump(exclude_none=True)
            if self.embed_dim is not None:
                given["embed_dim"] = self.embed_dim
            changed |= any(base[tower][key] != value for key, value in given.items())
            base[tower] |= given
        if changed:
            base["name"] = f"{self.name} (changed)"
        return CLIPConfig.from_dict(base)


class TextWeights(BaseConfig):
    """How often each of a pair's texts is chosen, among those that it has.

    A pair that has only texts of weight 0 is left out; one without any text has its tags.
    """

    web_text: NonNegativeFloat = Field(1.0, description="weight of what the web said")
    caption: NonNegativeFloat = Field(1.0, description="weight of the synthetic caption")
    description: NonNegativeFloat = Field(1.0, description="weight of the generated description")


class JitterConfig(BaseConfig):
    """How far colours are changed; see ColourJitter."""

    brightness: float = Field(0.0, ge=0, le=1, description="reach around a factor of 1")
    contrast: float = Field(0.0, ge=0, le=1, description="reach around a factor of 1")
    saturation: float = Field(0.0, ge=0, le=1, description="reach around a factor of 1")
    grey: float = Field(0.0, ge=0, le=1, description="share of images that lose their colour")


class DataConfig(BaseConfig):
    """How batches are drawn and made; see DataPlan."""

    texts: TextWeights = TextWeights()
    jitter: JitterConfig | None = Field(None, description="of images' colours; the paper has none")
    lanes: PositiveInt = Field(
        8, description="streams a batch is drawn from, a multiple of workers"
    )
    shuffle_steps: PositiveInt = Field(16, description="steps whose samples are mixed")
    cpus_per_task: PositiveFloat = Field(1.0, description="CPUs that a task making batches holds")
    tasks: PositiveInt | None = Field(
        None, description="tasks making batches for a worker at a time; as many as fit if absent"
    )


RecallMetric = Literal[
    "text_to_image_recall_at_1",
    "text_to_image_recall_at_5",
    "text_to_image_recall_at_10",
    "image_to_text_recall_at_1",
    "image_to_text_recall_at_5",
    "image_to_text_recall_at_10",
]


class ValidationConfig(BaseConfig):
    """How checkpoints are validated while training goes on, on pairs that it does not see."""

    pairs: PositiveInt = Field(2048, description="that are searched, the first of the data set")
    text: TextColumn = Field("caption", description="of the texts that images are searched by")
    batch: PositiveInt = Field(256, description="images or texts embedded at a time")
    metric: RecallMetric = Field(
        "text_to_image_recall_at_10", description="by which the best checkpoint is found"
    )
    cpus: PositiveFloat = Field(1.0, description="CPUs that the task holds")
    gpus: NonNegativeFloat = Field(0.0, description="GPUs that the task holds")
    seconds: PositiveFloat = Field(
        3600.0, description="that a checkpoint's may take, waiting for room included"
    )


class TrainConfig(BaseConfig):
    """A training run."""

    model: ModelConfig = ModelConfig()
    recipe: RecipeConfig = RecipeConfig()
    data: DataConfig = DataConfig()
    epochs: PositiveFloat = Field(32.0, description="passes over the data")
    batch: PositiveInt = Field(4096, description="pairs in a global batch")
    micro_batches: PositiveInt = Field(
        1, description="pieces that a worker's batch is computed in; the gradient stays that of all"
    )
    workers: PositiveInt = Field(1, description="training processes")
    # These two are left out of what tells runs apart: a run that was elastic has the same batches.
    min_workers: PositiveInt | None = Field(
        None,
        description="where nodes come and go, train with as few; the global batch stays",
        exclude=True,
    )
    resize_seconds: PositiveFloat = Field(
        60.0, description="between two looks for nodes that came", exclude=True
    )
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that a worker holds")
    gpus_per_worker: float = Field(
        0.0, ge=0, le=1, description="GPUs that a worker holds; it computes on one"
    )
    threads: PositiveInt | None = Field(None, description="of a CPU worker; PyTorch's default")
    precision: Precision = "float32"
    sharding: Literal["none", "fsdp2"] = Field("none", description="of parameters over workers")
    compile: bool = Field(False, description="compile the model")
    activation_checkpointing: bool = Field(False, description="less memory for a third more time")
    loss: Literal["contrastive"] = Field("contrastive", description="CLIP's, over a global batch")
    seed: NonNegativeInt = Field(
        0, description="of weights, order, augmentation and regularisation"
    )
    log_steps: PositiveInt = Field(10, description="steps between two records of metrics")
    checkpoint_steps: PositiveInt = Field(1000, description="steps between two checkpoints")
    keep_checkpoints: PositiveInt = Field(
        2, description="newest checkpoints that are kept, or best ones where they are validated"
    )
    validation: ValidationConfig | None = Field(
        None, description="how checkpoints are validated, on the data set `validation`"
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="workers' deaths that are made good, and as many failures to join each other; "
        "-1: any",
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _has_its_parameters(cls, loss: object) -> object:
        if loss == "sigmoid":
            raise ValueError(
                "the sigmoid loss learns a bias, which the published model does not have; takes "
                "contrastive. To train with it, write a loop around rwkv_clip.loss.SigmoidLoss"
            )
        return loss

    @model_validator(mode="after")
    def _fewer_at_least(self) -> "TrainConfig":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than workers")
        return self

    @model_validator(mode="after")
    def _numbers_fit(self) -> "TrainConfig":
        """What no data is needed for to see that it is wrong."""
        try:
            self.model.clip_config()
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        check_lanes(self.batch, self.data.lanes)
        check_shares(self.data.lanes, self.workers)
        return self
