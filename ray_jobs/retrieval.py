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
import numpy.typing as npt
from pydantic import Field, field_validator

from ray_jobs.encoding import EncoderConfig, matrix
from ray_jobs.image_sets import SET_NAME, ImageSet, ImageSetConfig, embed_set
from ray_jobs.sources import SourceError
from ray_jobs.storage import Storage
from rwkv_clip.config import BaseConfig
from rwkv_clip.evaluation import benchmark_result, retrieval, retrieval_ranks, top_k


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
        found: recalls and median ranks by the names of `RetrievalResult.metrics`.
        clip_benchmark: the same as LAION's CLIP_benchmark writes it.
        examples: what `example_queries` gives.
    """

    name: str
    images: int
    left_out: int
    captions: int
    found: dict[str, float]
    clip_benchmark: dict[str, Any]
    examples: list[dict[str, Any]]

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
    examples: int,
) -> RetrievalScore:
    """Search a set; images without a caption are distractors.

    Args:
        config: what is asked.
        images: of the set.
        encoder: what embeds.
        storage: holds the checkpoint.
        checkpoint: its folder's name.
        examples: queries to tell with what they found.

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
    image_emb, text_emb = matrix(table["image_embedding"]), matrix(texts.flatten())
    result = retrieval(image_emb, text_emb, owner)
    written = benchmark_result(
        result, dataset=config.name, model="RWKV-CLIP", pretrained=checkpoint
    )
    return RetrievalScore(
        config.name,
        len(table),
        images.rows - len(table),
        len(owner),
        result.metrics(),
        asdict(written),
        example_queries(
            examples,
            table["values"].combine_chunks().flatten().to_pylist(),
            owner,
            table["name"].to_pylist(),
            image_emb,
            text_emb,
        ),
    )


def example_queries(
    count: int,
    texts: Sequence[str],
    image_of_text: npt.NDArray[np.intp],
    ids: Sequence[str],
    image_emb: npt.NDArray[np.float32],
    text_emb: npt.NDArray[np.float32],
) -> list[dict[str, Any]]:
    """Queries spread evenly over all, not chosen by their outcome.

    Args:
        count: how many, or all if there are fewer.
        texts: M, that are asked.
        image_of_text: [M], the row of image_emb that each belongs to.
        ids: N, of the images.
        image_emb: [N, D].
        text_emb: [M, D].

    Returns:
        Of each its text, its image's id, the ids of the five nearest images with their similarity,
        and the rank of its own among all.
    """
    asked = np.linspace(0, len(texts) - 1, min(count, len(texts))).round().astype(int)
    found = top_k(text_emb[asked], image_emb, 5)
    ranks = retrieval_ranks(image_emb, text_emb[asked], image_of_text[asked]).text_to_image
    return [
        {
            "id": ids[image_of_text[query]],
            "text": texts[query],
            "nearest": [ids[at] for at in nearest],
            "similarity": [round(value, 4) for value in similarities],
            "rank": rank,
        }
        for query, nearest, similarities, rank in zip(
            asked.tolist(),
            found.indices.tolist(),
            found.similarities.tolist(),
            ranks.tolist(),
            strict=True,
        )
    ]
