"""Retrieval ranks as the definition says, whatever the blocks, the ties and the captions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_clip.evaluation import RetrievalRanks, nearest, retrieval, retrieval_ranks, top_k

Random = Callable[..., Tensor]
SETS = ["r20x5", "var"]


def golden_embeddings(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings whose product is the golden similarity."""
    similarity = tensors[f"ret/{name}/sim"]
    return torch.eye(len(similarity)), similarity.T, tensors[f"ret/{name}/txt2img"]


def brute_force(similarity: list[list[int]], owner: list[int]) -> tuple[list[int], list[int]]:
    """Ranks (text to image, image to text) by the definition, one pair of loops at a time."""
    images = range(len(similarity))
    text_ranks = [
        1 + sum(similarity[i][j] >= similarity[own][j] for i in images if i != own)
        for j, own in enumerate(owner)
    ]
    image_ranks = []
    for i in images:
        right = [similarity[i][j] for j, own in enumerate(owner) if own == i]
        wrong = [similarity[i][j] for j, own in enumerate(owner) if own != i]
        image_ranks.append(1 + sum(w >= max(right) for w in wrong) if right else 0)
    return text_ranks, image_ranks


@st.composite
def similarities(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """A matrix of few different numbers, so that most are tied, and each caption's image."""
    images, captions = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    row = st.lists(st.integers(-2, 2), min_size=captions, max_size=captions)
    matrix = draw(st.lists(row, min_size=images, max_size=images))
    owner = st.lists(st.integers(0, images - 1), min_size=captions, max_size=captions)
    return matrix, draw(owner)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("chunk_elements", [1, 30, 1 << 22])
def test_recall_equals_the_golden_values(
    name: str, chunk_elements: int, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    result = retrieval(
        *golden_embeddings(tensors, name), normalize=False, chunk_elements=chunk_elements
    )
    want = values[f"ret/{name}"]
    for direction in ("text_to_image", "image_to_text"):
        recall = getattr(result, direction).recall_at
        percent = {f"r{k}": 100 * value for k, value in recall.items()}
        assert percent == pytest.approx(want[f"{direction}_R"], abs=1e-9)
    assert result.text_to_image.queries == result.image_to_text.candidates == want["captions"]
    assert result.image_to_text.queries == result.text_to_image.candidates == want["images"]
    assert result.images_without_captions == 0


@given(similarities(), st.integers(1, 40))
@settings(deadline=None)
def test_ranks_equal_the_definition_with_ties_and_any_blocks(
    case: tuple[list[list[int]], list[int]], chunk_elements: int
) -> None:
    matrix, owner = case
    images = torch.eye(len(matrix))
    texts = torch.tensor(matrix).float().T
    ranks = retrieval_ranks(images, texts, owner, normalize=False, chunk_elements=chunk_elements)
    want_text, want_image = brute_force(matrix, owner)
    assert ranks.text_to_image.tolist() == want_text
    assert ranks.image_to_text.tolist() == want_image


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_do_not_change_a_rank(dtype: torch.dtype, random: Random) -> None:
    images, texts = random(37, 24).to(dtype), random(91, 24, seed=1).to(dtype)
    images[7] = images[3]  # two images that are the same
    owner = torch.arange(91) % 37
    whole = retrieval_ranks(images, texts, owner)
    for chunk_elements in (1, 10, 200, 5000):
        part = retrieval_ranks(images, texts, owner, chunk_elements=chunk_elements)
        assert all(map(torch.equal, whole, part))


def test_the_order_of_rows_does_not_change_a_result(random: Random) -> None:
    images, texts = random(20, 8).round(), random(40, 8, seed=1).round()
    owner = torch.arange(40) // 2
    image_order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    text_order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    place = image_order.argsort()
    shuffled = retrieval(images[image_order], texts[text_order], place[owner[text_order]])
    assert shuffled == retrieval(images, texts, owner)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_constant_embeddings_find_nothing(value: float) -> None:
    images, texts = torch.full((50, 7), value), torch.full((50, 7), value)
    result = retrieval(images, texts, torch.arange(50))
    for direction in (result.text_to_image, result.image_to_text):
        assert direction.recall_at == {1: 0, 5: 0, 10: 0}
        assert direction.median_rank == 50


def test_identical_embeddings_tie_although_their_products_may_round_apart(random: Random) -> None:
    direction = random(1, 640)
    images = direction * torch.linspace(0.1, 9, 130)[:, None]  # one direction, many lengths
    result = retrieval(images, direction.expand(130, -1), torch.arange(130))
    assert result.text_to_image.recall_at[10] == result.image_to_text.recall_at[10] == 0


def test_perfect_embeddings_find_everything_first(random: Random) -> None:
    images = random(30, 64)
    result = retrieval(images, 3 * images, torch.arange(30))
    for direction in (result.text_to_image, result.image_to_text):
        assert direction.recall_at == {1: 1, 5: 1, 10: 1}
        assert direction.median_rank == 1


def test_cosine_ignores_lengths_and_the_plain_product_does_not() -> None:
    images = torch.tensor([[1.0, 0.0], [9.0, 9.0]])
    texts = torch.tensor([[1.0, 0.1], [1.0, 1.0]])
    assert retrieval(images, texts, [0, 1]).text_to_image.recall_at[1] == 1
    assert retrieval(images, texts, [0, 1], normalize=False).text_to_image.recall_at[1] == 0.5


def test_an_image_without_captions_is_a_candidate_and_no_query() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2]])
    texts = torch.tensor([[1.0, 0.2], [0.0, 1.0]])
    result = retrieval(images, texts, [0, 1], ks=[1, 2])
    assert result.images_without_captions == 1
    assert (result.image_to_text.queries, result.text_to_image.candidates) == (2, 3)
    assert result.image_to_text.recall_at == {1: 1, 2: 1}
    assert result.text_to_image.recall_at == {1: 0.5, 2: 1}  # the third image was in the way
    assert retrieval_ranks(images, texts, [0, 1]).image_to_text.tolist() == [1, 1, 0]


def test_an_images_own_captions_are_not_in_each_others_way() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    ranks = retrieval_ranks(images, texts, [0, 0, 0, 1])
    assert ranks.image_to_text.tolist() == [1, 1]


def test_the_median_of_an_even_number_of_ranks_is_between_the_middle_two() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert retrieval(images, texts, [0, 1]).text_to_image.median_rank == 1.5


def test_arrays_and_tensors_give_the_same(random: Random) -> None:
    images, texts, owner = random(9, 5), random(12, 5, seed=1), torch.arange(12) % 9
    locked = images.numpy().copy()
    locked.flags.writeable = False
    want = retrieval(images, texts, owner)
    assert retrieval(locked, texts.numpy()[::-1][::-1], owner.numpy().astype(np.uint16)) == want
    assert retrieval(images, texts, owner.tolist()) == want


def test_autocast_and_inference_mode_change_nothing(random: Random) -> None:
    images, texts, owner = random(40, 16), random(40, 16, seed=1), torch.arange(40)
    want = retrieval_ranks(images, texts, owner)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        got = retrieval_ranks(images, texts, owner)
    assert isinstance(got, RetrievalRanks)
    assert all(map(torch.equal, want, got))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["image_emb", "text_emb"])
def test_embeddings_that_are_not_finite_are_refused_by_name(
    bad: float, which: str, random: Random
) -> None:
    arrays = {"image_emb": random(6, 4), "text_emb": random(6, 4, seed=1)}
    arrays[which][2, 1] = arrays[which][5, 0] = bad
    with pytest.raises(ValueError, match=rf"{which}\[2\] is not finite \(2 of 6"):
        retrieval(**arrays, image_of_text=torch.arange(6))
    with pytest.raises(ValueError, match="is not finite"):
        top_k(arrays["image_emb"], arrays["text_emb"], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_emb": torch.zeros(0, 4)}, r"image_emb has shape \[0, 4\]"),
        ({"text_emb": torch.zeros(0, 4), "image_of_text": []}, r"text_emb has shape \[0, 4\]"),
        ({"image_emb": torch.zeros(4)}, r"image_emb has shape \[4\]"),
        ({"text_emb": torch.zeros(3, 5)}, "4 dimensions and text_emb has 5"),
        ({"image_of_text": [0, 1]}, r"image_of_text has shape \[2\]; takes \[3\]"),
        ({"image_of_text": [0, 1, 2]}, r"image_of_text\[2\] is 2; takes 0 to 1"),
        ({"image_of_text": [0, -1, 1]}, r"image_of_text\[1\] is -1"),
        ({"ks": []}, "ks is"),
        ({"ks": [0, 5]}, "ks is"),
        ({"chunk_elements": 0}, "chunk_elements is 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "image_emb": torch.ones(2, 4),
        "text_emb": torch.ones(3, 4),
        "image_of_text": [0, 1, 1],
    }
    with pytest.raises(ValueError, match=message):
        retrieval(**arguments | change)


def test_integers_are_no_embeddings_and_floats_are_no_indices() -> None:
    ones = torch.ones(2, 4)
    with pytest.raises(TypeError, match=r"image_emb is torch\.int64"):
        retrieval(ones.long(), ones, [0, 1])
    with pytest.raises(TypeError, match=r"image_of_text is torch\.float32"):
        retrieval(ones, ones, torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match="image_emb is a list"):
        retrieval(ones.tolist(), ones, [0, 1])  # type: ignore[arg-type]


@given(similarities(), st.integers(1, 12), st.integers(1, 40))
@settings(deadline=None)
def test_top_k_is_the_head_of_a_stable_sort(
    case: tuple[list[list[int]], list[int]], k: int, chunk_elements: int
) -> None:
    matrix, _ = case
    got = top_k(
        torch.eye(len(matrix)),
        torch.tensor(matrix).float().T,
        k,
        normalize=False,
        chunk_elements=chunk_elements,
    )
    for row, indices, found in zip(matrix, got.indices.tolist(), got.similarities, strict=True):
        want = sorted(range(len(row)), key=lambda j: -row[j])[:k]
        assert indices == want
        assert found.tolist() == [row[j] for j in want]


def test_top_k_returns_cosines_and_does_not_depend_on_blocks(random: Random) -> None:
    queries, items = random(11, 48), random(70, 48, seed=1)
    items[[5, 33, 69]] = 2 * items[20]  # four items of one direction
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], items[None], dim=-1)
    want = cosine.topk(9)
    for chunk_elements in (1, 90, 1 << 22):
        got = top_k(queries, items, 9, chunk_elements=chunk_elements)
        assert torch.allclose(got.similarities, want.values, atol=1e-6)
        assert torch.equal(got.indices, top_k(queries, items, 9).indices)
    same = top_k(items[20:21], items, 4).indices.tolist()
    assert same == [[5, 20, 33, 69]]


def test_nearest_is_top_k_as_scores_and_indices(random: Random) -> None:
    queries, items = random(5, 16), random(30, 16, seed=1)
    want = top_k(queries, items, 4)
    scores, indices = nearest(queries, items, 4, chunk_elements=50)
    assert torch.equal(scores, want.similarities)
    assert torch.equal(indices, want.indices)


def test_metrics_are_both_directions_under_flat_names(random: Random) -> None:
    result = retrieval(random(6, 8), random(9, 8, seed=1), torch.arange(9) % 6, ks=[1, 10])
    text, image = result.text_to_image, result.image_to_text
    assert result.metrics() == {
        "text_to_image_recall_at_1": text.recall_at[1],
        "text_to_image_recall_at_10": text.recall_at[10],
        "text_to_image_median_rank": text.median_rank,
        "image_to_text_recall_at_1": image.recall_at[1],
        "image_to_text_recall_at_10": image.recall_at[10],
        "image_to_text_median_rank": image.median_rank,
    }


def test_top_k_refuses_k_below_one(random: Random) -> None:
    with pytest.raises(ValueError, match="k is 0"):
        top_k(random(2, 3), random(2, 3), 0)
