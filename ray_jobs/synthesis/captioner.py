"""Captions and tags for pairs that have none, from a model that sees the image.

Two kinds of models fit: a vision-language model on one of the engines, whose one answer holds
caption and tags by a schema, and any other model behind a Python function (a captioner with a
tagger, say), which is given images and gives `Caption`s.
"""

import base64
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, ClassVar

import pyarrow as pa
from PIL import Image

from ray_jobs.beside import CAPTIONS
from ray_jobs.synthesis.task import (
    GIVEN,
    Complete,
    GenerationError,
    Row,
    SamplingConfig,
    attempt_seed,
    storable,
)
from rwkv_clip.descriptions import (
    CAPTION_SCHEMA,
    AnswerError,
    Caption,
    caption_messages,
    parse_caption,
)
from rwkv_clip.images import ImageDecodeError, small_picture

logger = logging.getLogger(__name__)

VLM = "vlm"
MODEL = "model"
_QUALITY = 90  # of the JPEG file that a model is shown

# What a Python captioner is: images in RGB in, a caption with tags for each of them out.
Captioner = Callable[[Sequence[Image.Image]], Sequence[Caption]]


@dataclass(frozen=True)
class Captioning:
    """The task of captioning and tagging images.

    Attributes:
        sampling: how the model is asked.
        image_side: the longer side of what the model is shown, in pixels.
    """

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=160))
    image_side: int = 448
    kind: ClassVar[str] = CAPTIONS
    columns: ClassVar[tuple[str, ...]] = ("image", "caption", "tags")
    answers: ClassVar[dict[str, Any]] = CAPTION_SCHEMA
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("caption", pa.string()),
            pa.field("tags", pa.list_(pa.string())),
            pa.field("caption_source", pa.string()),
            pa.field("attempts", pa.int32(), nullable=False),
            pa.field("seed", pa.int64()),
            pa.field("refused_reason", pa.string()),
            pa.field("refused_text", pa.string()),
        ]
    )

    async def __call__(self, row: Mapping[str, Any], complete: Complete) -> Row:
        """A row of `schema`; a caption or tags that are there already are kept."""
        if is_given(row):
            return captioned(row, None, GIVEN)
        try:
            messages = caption_messages(shown(row["image"], self.image_side))
        except ImageDecodeError as error:
            return captioned(row, None, "none: image", refused_text=str(error))
        refusal: dict[str, Any] = {}
        for attempt in range(self.sampling.attempts):
            seed = attempt_seed(self.sampling.seed, row["id"], attempt)
            answer = ""
            try:
                answer = await complete(messages, seed)
                found = parse_caption(answer)
            except GenerationError as error:
                logger.warning("%s: %s", row["id"], storable(str(error)))
                refusal = {"refused_reason": "generation_error", "refused_text": str(error)}
                continue
            except AnswerError as error:
                refusal = {"refused_reason": f"answer_{error.reason}", "refused_text": answer}
                continue
            return captioned(row, found, VLM, attempts=attempt + 1, seed=seed)
        attempts = self.sampling.attempts
        reason = f"none: {refusal['refused_reason']}"
        return captioned(row, None, reason, attempts=attempts, **refusal)

    def give_up(self, row: Mapping[str, Any], reason: str) -> Row:
        """The row without having asked."""
        return captioned(row, None, f"none: {reason}", refused_reason=reason)


def is_given(row: Mapping[str, Any]) -> bool:
    """Whether a pair has both already."""
    return bool(row.get("caption") and row.get("tags"))


def captioned(
    row: Mapping[str, Any],
    found: Caption | None,
    source: str,
    *,
    refused_text: str | None = None,
    **more: Any,
) -> Row:
    """A row of Captioning's schema: what the pair has goes before what was found."""
    return {
        "id": row["id"],
        "caption": row.get("caption") or (found.caption if found and found.caption else None),
        "tags": row.get("tags") or (list(found.tags) if found and found.tags else None),
        "caption_source": source,
        "attempts": 0,
        "seed": None,
        "refused_reason": None,
        "refused_text": storable(refused_text),
        **more,
    }


def shown(image: bytes, side: int) -> str:
    """An image as a data URI, no side longer than `side`; raises ImageDecodeError."""
    out = BytesIO()
    small_picture(image, side).save(out, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def see(uri: str) -> Image.Image:
    """The image of a data URI that `shown` made."""
    return Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])))
