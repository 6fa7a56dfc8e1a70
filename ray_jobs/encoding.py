"""Embeddings of stored pairs, and the metrics of retrieval by the names that are logged."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import rwkv_clip
from ray_jobs.training.batches import PairFiles
from rwkv_clip.evaluation import RetrievalResult
from rwkv_clip.model import RWKVCLIP

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """Pairs with their embeddings, [B, D] each, of length 1."""

    ids: list[str]
    texts: list[str]
    image_emb: Tensor
    text_emb: Tensor


class PairEncoder:
    """Embeds pairs with a model, on a GPU where there is one.

    Args:
        model: the model.
        files: the pairs.
        text: the column whose texts are embedded.
    """

    def __init__(self, model: RWKVCLIP, files: PairFiles, text: str) -> None:
        self.files, self.text = files, text
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.transform = rwkv_clip.image_transform(self.model.config)

    def encode(self, first: int, rows: int) -> Encoded:
        """The rows first .. first + rows; those whose image cannot be decoded are left out."""
        pairs = self.files.take(np.arange(first, first + rows))
        transformed = self.transform.batch([pair["image"] for pair in pairs])
        for error in transformed.errors:
            logger.warning("left out: %s", error)
        pairs = [pairs[at] for at in transformed.indices]
        texts = [pair[self.text] or "" for pair in pairs]
        tokens = rwkv_clip.tokenize(texts, self.model.config.context_length)
        with torch.inference_mode():
            image_emb = self.model.encode_image(transformed.pixels.to(self.device))
            text_emb = self.model.encode_text(tokens.to(self.device))
        return Encoded([pair["id"] for pair in pairs], texts, image_emb, text_emb)


def named_metrics(result: RetrievalResult) -> dict[str, float]:
    """Recalls, from 0 to 1, and median ranks, under names that MLflow takes."""
    metrics = {}
    for direction in ("text_to_image", "image_to_text"):
        found = getattr(result, direction)
        for k, recall in found.recall_at.items():
            metrics[f"{direction}_recall_at_{k}"] = float(recall)
        metrics[f"{direction}_median_rank"] = float(found.median_rank)
    return metrics
