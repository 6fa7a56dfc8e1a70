"""The registered model as MLflow loads it: texts and images in, embeddings out.

MLflow keeps this file beside the checkpoint and runs it (models from code), so it imports nothing
of this project but the library, of which the model has a copy for machines without it.
"""

import base64
import binascii
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from pydantic import BaseModel, Field, field_validator

# MLflow puts the model's copy first. A library that is installed comes before it, because that may
# have been built for this machine's GPU.
_COPY = Path(__file__).resolve().with_name("code")
sys.path = [entry for entry in sys.path if Path(entry).resolve() != _COPY]
if find_spec("rwkv_clip") is None:
    sys.path.append(str(_COPY))

import rwkv_clip  # noqa: E402

_PIECE = 64  # items that are embedded at once: a text of B/32 takes 4 MB meanwhile


class Item(BaseModel):
    """One input: a text or an image."""

    text: str | None = Field(None, description="a text")
    image: str | None = Field(
        None, description="an encoded image file (JPEG, PNG, WebP, ...): its bytes, or in base64"
    )

    @field_validator("image", mode="before")
    @classmethod
    def _bytes_in_base64(cls, image: Any) -> Any:
        return base64.b64encode(image).decode() if isinstance(image, bytes) else image


class EmbeddingModel(PythonModel):
    """Embeds texts and images into the same space; all embeddings have length 1.

    It takes a list of dicts, each with a `text` or an `image`, or a pandas DataFrame with the
    columns `text`, `image` or both, one of which is null in each row; other columns are passed
    over. An image is an encoded file: its bytes, or these in base64, as JSON wants them. The answer
    is a list with a list of D floats for each item.
    """

    def load_context(self, context: Any) -> None:
        """Load the checkpoint."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = rwkv_clip.load_checkpoint(context.artifacts["checkpoint"]).to(device)
        self.transform = rwkv_clip.image_transform(self.model.config)

    # MLflow calls by what the hints say, without a context.
    def predict(self, model_input: list[Item]) -> list[list[float]]:  # type: ignore[override]
        """Embeddings in the order of the items.

        Raises:
            ValueError: an item has not exactly one of text and image, or a broken image.
        """
        for at, item in enumerate(model_input):
            if (item.text is None) == (item.image is None):
                raise ValueError(f"item {at}: takes either text or image")
        vectors: list[list[float]] = []
        while len(vectors) < len(model_input):
            at = len(vectors)
            vectors += self._embed(dict(enumerate(model_input[at : at + _PIECE], at)))
        return vectors

    def _embed(self, items: dict[int, Item]) -> list[list[float]]:
        """Embeddings of a piece, by the items' positions in the whole."""
        texts = {at: item.text for at, item in items.items() if item.text is not None}
        images = {
            at: _decode(at, item.image) for at, item in items.items() if item.image is not None
        }
        vectors: dict[int, list[float]] = {}
        device = self.model.logit_scale.device
        with torch.inference_mode():
            if texts:
                tokens = rwkv_clip.tokenize(list(texts.values()), self.model.config.context_length)
                embedded = self.model.encode_text(tokens.to(device))
                vectors |= zip(texts, embedded.float().tolist(), strict=True)
            if images:
                pixels = [self.transform(data, name=f"item {at}") for at, data in images.items()]
                embedded = self.model.encode_image(torch.stack(pixels).to(device))
                vectors |= zip(images, embedded.float().tolist(), strict=True)
        return [vectors[at] for at in items]


def _decode(at: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"item {at}: image is not base64: {error}") from error


set_model(EmbeddingModel())
