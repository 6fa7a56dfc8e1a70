"""Retrieval between images and captions, in both directions, with any number of captions an image.

Choices:
- A query's rank is 1 plus the number of wrong candidates that are at least as similar as the best
  right one. Ties count against the model: constant embeddings find nothing, and no order of the
  rows helps. Similarities closer than their rounding error are ties.
- An image has several right captions and the best one counts; its other captions are no wrong
  candidates. An image without captions is no query of image-to-text (there is nothing to find) and
  stays a candidate of text-to-image.
- Similarities are computed in square blocks, each of which serves both directions: a million items
  need no matrix of a million squared, and no product is computed twice.
- Recall is a fraction, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_clip.evaluation._arrays import (
    CHUNK_ELEMENTS,
    Array,
    Embeddings,
    Integers,
    indices,
    rounding_error,
    slices,
    square_side,
)


@dataclass(frozen=True)
class DirectionResult:
    """How well queries of one kind find candidates of the other.

    Attributes:
        recall_at: for each k, the fraction (0 to 1) of queries whose rank is at most k.
        median_rank: of the ranks, which start at 1.
        queries: how many were ranked.
        candidates: among how many; recall at k is 1 whatever the model does where k reaches it.
    """

    recall_at: dict[int, float]
    median_rank: float
    queries: int
    candidates: int


@dataclass(frozen=True)
class RetrievalResult:
    """Both directions.

    Attributes:
        text_to_image: captions that look for their image (others call it image retrieval).
        image_to_text: images that look for any of their captions (text retrieval).
        images_without_captions: images that were left out of image_to_text's queries.
    """

    text_to_image: DirectionResult
    image_to_text: DirectionResult
    images_without_captions: int

    def metrics(self) -> dict[str, float]:
        """Flat names for a tracker: text_to_image_recall_at_1, image_to_text_median_rank, ..."""
        named: dict[str, float] = {}
        for name in ("text_to_image", "image_to_text"):
            direction: DirectionResult = getattr(self, name)
            named |= {f"{name}_recall_at_{k}": value for k, value in direction.recall_at.items()}
            named[f"{name}_median_rank"] = direction.median_rank
        return named


class RetrievalRanks(NamedTuple):
    """Ranks from 1, int64 on the device of image_emb.

    Attributes:
        text_to_image: [M], of each caption's image.
        image_to_text: [N], of each image's best caption; 0 for an image without captions.
    """

    text_to_image: Tensor
    image_to_text: Tensor


class TopK(NamedTuple):
    """The most similar items of each query, best first.

    Attributes:
        indices: [Q, k] int64, rows of the items.
        similarities: [Q, k] float32.
    """

    indices: Tensor
    similarities: Tensor


def retrieval(
    image_emb: Array,
    text_emb: Array,
    image_of_text: Integers,
    ks: Sequence[int] = (1, 5, 10),
    *,
    normalize: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> RetrievalResult:
    """Recall at each k and median rank, in both directions.

    Args:
        image_emb: [N, D].
        text_emb: [M, D], on any device; blocks of it travel to that of image_emb.
        image_of_text: [M] integers, the row of image_emb that each caption belongs to.
        ks: the k of recall at k.
        normalize: compare by cosine. False takes the embeddings' product as it is.
        chunk_elements: most similarities held at a time.

    Raises:
        ValueError: shapes do not fit, there are no images or no captions, an embedding is not
            finite, an index has no image, or a k is below 1.
        TypeError: the embeddings are not floating, or the indices no integers.
    """
    wanted = sorted(set(ks))
    if not wanted or wanted[0] < 1:
        raise ValueError(f"ks is {list(ks)}; takes at least one k, each at least 1")
    ranks = retrieval_ranks(
        image_emb, text_emb, image_of_text, normalize=normalize, chunk_elements=chunk_elements
    )
    images, captions = len(ranks.image_to_text), len(ranks.text_to_image)
    with_captions = ranks.image_to_text[ranks.image_to_text > 0]
    return RetrievalResult(
        text_to_image=_summary(ranks.text_to_image, images, wanted),
        image_to_text=_summary(with_captions, captions, wanted),
        images_without_captions=images - len(with_captions),
    )


def retrieval_ranks(
    image_emb: Array,
    text_emb: Array,
    image_of_text: Integers,
    *,
    normalize: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> RetrievalRanks:
    """Every query's rank, for reports that show where a model is right and wrong.

    Takes and raises what `retrieval` does.
    """
    side = square_side(chunk_elements)
    images, texts = _both(("image_emb", image_emb), ("text_emb", text_emb), normalize)
    owner = indices(
        "image_of_text", image_of_text, ("text_emb", len(texts)), len(images), images.device
    )
    own = torch.cat(
        [_own_similarities(images, texts, owner, part) for part in slices(len(texts), side)]
    )
    # A captionless image keeps -inf here; its count means nothing and is dropped below.
    best = own.new_full((len(images),), -torch.inf).scatter_reduce(0, owner, own, "amax")
    dimensions = images.data.shape[1]
    slack = rounding_error(own.dtype, dimensions) * images.longest * texts.longest
    text_ranks = torch.ones_like(owner)
    image_ranks = owner.new_ones(len(images))
    for rows in slices(len(images), side):
        image_block = images.block(rows)
        numbers = torch.arange(rows.start, rows.stop, device=owner.device)
        for columns in slices(len(texts), side):
            similarity = _product(image_block, texts.block(columns))
            similarity.masked_fill_(numbers[:, None] == owner[columns], -torch.inf)
            text_ranks[columns] += (similarity >= own[columns] - slack).sum(0)
            image_ranks[rows] += (similarity >= best[rows, None] - slack).sum(1)
    image_ranks[best.isinf()] = 0
    return RetrievalRanks(text_ranks, image_ranks)


def top_k(
    query_emb: Array,
    item_emb: Array,
    k: int,
    *,
    normalize: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TopK:
    """The k items that are most similar to each query, or all of them if there are fewer.

    Items whose similarities are the same float32 number come in the order of their rows.

    Args:
        query_emb: [Q, D].
        item_emb: [N, D].
        k: how many.
        normalize: compare by cosine. False takes the embeddings' product as it is.
        chunk_elements: most similarities held at a time.

    Raises:
        ValueError: shapes do not fit, an array is empty or not finite, or k is below 1.
        TypeError: the embeddings are not floating.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    side = square_side(chunk_elements)
    queries, items = _both(("query_emb", query_emb), ("item_emb", item_emb), normalize)
    parts = [_top_k(queries.block(rows), items, k, side) for rows in slices(len(queries), side)]
    similarities, numbers = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopK(numbers, similarities)


def nearest(
    queries: Array,
    items: Array,
    k: int,
    *,
    normalize: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """`top_k` as a plain pair: scores [Q, k] float32 and rows of the items [Q, k] int64.

    Takes and raises what `top_k` does.
    """
    found = top_k(queries, items, k, normalize=normalize, chunk_elements=chunk_elements)
    return found.similarities, found.indices


def _both(
    first: tuple[str, Array], second: tuple[str, Array], normalize: bool
) -> tuple[Embeddings, Embeddings]:
    """Two arrays of one width, both read on the first one's device."""
    left = Embeddings.of(*first, normalize=normalize)
    right = Embeddings.of(*second, normalize=normalize, device=left.device)
    if left.data.shape[1] != right.data.shape[1]:
        raise ValueError(
            f"{first[0]} has {left.data.shape[1]} dimensions and {second[0]} has "
            f"{right.data.shape[1]}; they must come from one model"
        )
    return left, right


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


def _own_similarities(images: Embeddings, texts: Embeddings, owner: Tensor, part: slice) -> Tensor:
    """Each caption's similarity to its own image, for a part of the captions."""
    return (images.block(owner[part]) * texts.block(part)).sum(1)


def _summary(ranks: Tensor, candidates: int, ks: Sequence[int]) -> DirectionResult:
    return DirectionResult(
        recall_at={k: float((ranks <= k).double().mean()) for k in ks},
        median_rank=float(np.median(ranks.cpu().numpy())),
        queries=len(ranks),
        candidates=candidates,
    )


def _top_k(query: Tensor, items: Embeddings, k: int, side: int) -> tuple[Tensor, Tensor]:
    """Similarities and rows of the best items for a block of queries."""
    best = query.new_empty((len(query), 0), dtype=torch.float32)
    numbers = torch.empty((len(query), 0), dtype=torch.int64, device=query.device)
    for columns in slices(len(items), side):
        similarity = _product(query, items.block(columns)).float()
        rows = torch.arange(columns.start, columns.stop, device=query.device)
        # Both parts are in the order in which equals must stay: those kept have lower rows.
        best = torch.cat((best, similarity), 1)
        numbers = torch.cat((numbers, rows.expand_as(similarity)), 1)
        kept = _first_largest(best, min(k, best.shape[1]))
        best, numbers = best.gather(1, kept), numbers.gather(1, kept)
    return best, numbers


def _first_largest(values: Tensor, k: int) -> Tensor:
    """Columns of each row's k largest values, largest first, equals by column.

    Which of several equals torch.topk takes is not defined, so equals of the least kept value are
    chosen by a second key, in which every column is different.
    """
    width = values.shape[1]
    least = values.topk(k, dim=1).values[:, -1:]
    order = torch.arange(width, 0, -1, device=values.device)
    key = order + width * ((values >= least).long() + (values > least).long())
    chosen = key.topk(k, dim=1).indices.sort(dim=1).values
    by_value = values.gather(1, chosen).sort(dim=1, descending=True, stable=True).indices
    return chosen.gather(1, by_value)
