"""Retrieval on published sets: images with any number of captions each, in Parquet files.

    retrieval:
      - name: flickr30k
        test: {path: data/flickr30k/test.parquet, captions: caption}

The column of captions holds one string or a list of them. A caption has one right image; an image
is found by any of its captions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from ray_jobs.encoding import EncoderConfig, matrix, named_metrics
from ray_jobs.image_sets import SET_NAME, ImageSet, ImageSetConfig, embed_set
from ray_jobs.sources import SourceError
from ray_jobs.storage import Storage
from rwkv_clip.config import BaseConfig
from rwkv_clip.evaluation import benchmark_result, retrieval


class CaptionedConfig(ImageSetConfig):
    """Images with captions, in Parquet files."""

    captions: str = Field("caption", description="column of captions: a string, or a list of them")


class RetrievalConfig(BaseConfig):
    """A set that is searched in both directions."""

    name: str = Field(pattern=SET_NAME, description="of the set")
    test: CaptionedConfig = Field(description="its images and captions")
    template: str = Field(
        "{}",
        description="what captions are put into, at the {}; the published numbers of flickr30k and "
        "coco are of `a photo of {}`",
    )

    @field_validator("template")
    @classmethod
    def _takes_a_caption(cls, template: str) -> str:
        if "{}" not in template:
            raise ValueError("it has no {}; the caption goes there")
        return template


@dataclass(frozen=True)
class RetrievalScore:
    """How well a set was searched.

    Attributes:
        name: of the set.
        images: that were searched.
        left_out: images that could not be decoded.
        captions: of all images.
        found: recalls and median ranks by the names of `named_metrics`.
        clip_benchmark: the same as LAION's CLIP_benchmark writes it.
    """

    name: str
    images: int
    left_out: int
    captions: int
    found: dict[str, float]
    clip_benchmark: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """By names that MLflow takes."""
        return {f"{self.name}_{key}": value for key, value in self.found.items()}


def open_captioned(configs: Sequence[RetrievalConfig]) -> list[tuple[RetrievalConfig, ImageSet]]:
    """The sets with their files; raises SourceError before any work."""
    return [
        (config, captioned(config.test, f"evaluation.retrieval.{at}.test"))
        for at, config in enumerate(configs)
    ]


def captioned(config: CaptionedConfig, key: str) -> ImageSet:
    """Images with captions; raises SourceError."""
    return ImageSet(config, config.captions, key, "captions", labels=False)


def search_set(
    config: RetrievalConfig,
    images: ImageSet,
    encoder: EncoderConfig,
    storage: Storage,
    checkpoint: str,
) -> RetrievalScore:
    """Search a set; images without a caption are distractors.

    Raises:
        SourceError: there are captions of no image.
    """
    told = f"search {config.name}"
    table = embed_set(told, images, encoder, storage, checkpoint, template=config.template)
    texts = table["text_embedding"].combine_chunks()
    counts = np.asarray(texts.value_lengths())
    owner = np.repeat(np.arange(len(table)), counts)
    if not len(owner):
        raise SourceError(
            f"{images.key}.captions: column {images.column!r} has no caption of any image that can "
            "be decoded"
        )
    result = retrieval(matrix(table["image_embedding"]), matrix(texts.flatten()), owner)
    written = benchmark_result(
        result, dataset=config.name, model="RWKV-CLIP", pretrained=checkpoint
    )
    return RetrievalScore(
        config.name,
        len(table),
        images.rows - len(table),
        len(owner),
        named_metrics(result),
        asdict(written),
    )
