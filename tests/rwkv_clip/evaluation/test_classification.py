"""Zero-shot classification: golden values, the definition, and what a model's prompts become."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_clip.evaluation import class_embeddings, classify, prompts, zero_shot_classifier
from rwkv_clip.model import RWKVCLIP, create_model
from rwkv_clip.tokenizer import tokenize

Random = Callable[..., Tensor]


@pytest.fixture(scope="module")
def model() -> RWKVCLIP:
    torch.manual_seed(0)
    return create_model("RWKV-CLIP-Tiny").eval()


def test_scores_equal_the_golden_values(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    want = values["cls/c10"]
    result = classify(
        tensors["cls/c10/features"], tensors["cls/c10/classifier"].T, tensors["cls/c10/target"]
    )
    exact = want["exact_float_logits"]
    assert result.top1 == pytest.approx(exact["top1"], abs=1e-6)
    assert result.top5 == pytest.approx(exact["top5"], abs=1e-6)
    assert result.mean_per_class == pytest.approx(exact["mean_per_class"], abs=1e-6)
    assert (result.images, result.classes) == (want["n"], want["num_classes"])


@pytest.mark.parametrize("name", ["c10", "c101"])
@pytest.mark.parametrize("chunk_elements", [1, 1000, 1 << 22])
def test_scores_are_those_of_the_golden_logits(
    name: str, chunk_elements: int, tensors: dict[str, Tensor]
) -> None:
    logits, target = tensors[f"cls/{name}/logits"], tensors[f"cls/{name}/target"]
    result = classify(
        tensors[f"cls/{name}/features"],
        tensors[f"cls/{name}/classifier"].T,
        target,
        chunk_elements=chunk_elements,
    )
    right = logits.argmax(1) == target
    in_five = (logits.topk(5).indices == target[:, None]).any(1)
    assert result.top1 == pytest.approx(float(right.double().mean()))
    assert result.top5 == pytest.approx(float(in_five.double().mean()))
    recalls = [float(right[target == c].double().mean()) for c in range(logits.shape[1])]
    assert result.per_class == pytest.approx(recalls)
    assert result.mean_per_class == pytest.approx(sum(recalls) / len(recalls))


def test_class_embeddings_equal_the_golden_classifier(tensors: dict[str, Tensor]) -> None:
    got = class_embeddings(tensors["prompt/text_embeddings"])
    assert torch.allclose(got, tensors["prompt/classifier"].T, atol=1e-6)


@st.composite
def scores(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    images, classes = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    row = st.lists(st.integers(-2, 2), min_size=classes, max_size=classes)
    matrix = draw(st.lists(row.filter(any), min_size=images, max_size=images))
    labels = st.lists(st.integers(0, classes - 1), min_size=images, max_size=images)
    return matrix, draw(labels)


@given(scores(), st.integers(1, 20))
@settings(deadline=None)
def test_scores_equal_the_definition_with_ties_and_any_chunks(
    case: tuple[list[list[int]], list[int]], chunk_elements: int
) -> None:
    matrix, labels = case
    classes = len(matrix[0])
    result = classify(
        torch.tensor(matrix).float(), torch.eye(classes), labels, chunk_elements=chunk_elements
    )
    orders = [sorted(range(classes), key=lambda c: -row[c]) for row in matrix]
    pairs = list(zip(orders, labels, strict=True))
    right = [order[0] == label for order, label in pairs]
    assert result.top1 == pytest.approx(np.mean(right))
    assert result.top5 == pytest.approx(np.mean([label in order[:5] for order, label in pairs]))
    for number, recall in enumerate(result.per_class):
        of_class = [r for r, label in zip(right, labels, strict=True) if label == number]
        assert recall == (pytest.approx(np.mean(of_class)) if of_class else None)
    assert result.classes_without_images == classes - len(set(labels))


def test_of_two_classes_of_one_name_the_first_is_predicted(random: Random) -> None:
    classes = random(3, 640)
    classes[2] = classes[0]
    images = classes[[0, 0, 1, 2]]
    result = classify(images, classes, [0, 0, 1, 2])
    assert result.per_class == (1, 1, 0)
    assert result.top1 == 0.75


def test_constant_embeddings_score_as_always_naming_the_first_class() -> None:
    result = classify(torch.ones(100, 640), torch.ones(10, 640), torch.arange(100) % 10)
    assert result.top1 == pytest.approx(0.1)
    assert result.top5 == pytest.approx(0.5)


def test_logits_are_not_truncated(random: Random) -> None:
    # Similarities that are all alike after times 100 and truncation to integers.
    images = torch.tensor([[1.0, 0.001], [1.0, -0.001]])
    classes = torch.tensor([[1.0, 0.01], [1.0, -0.01]])
    assert classify(images, classes, [0, 1]).top1 == 1


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_fewer_than_five_classes_are_all_among_the_first_five(classes: int, random: Random) -> None:
    labels = torch.arange(8) % classes
    result = classify(random(8, 6), random(classes, 6, seed=1), labels)
    assert result.top5 == 1
    assert result.classes == classes


def test_classes_without_images_are_left_out_of_the_mean_and_counted() -> None:
    result = classify(torch.eye(4)[[0, 0, 2]], torch.eye(4), [0, 1, 2])
    assert result.per_class == (1, 0, 1, None)
    assert result.mean_per_class == pytest.approx(2 / 3)
    assert result.classes_without_images == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_emb": torch.zeros(0, 4), "labels": []}, r"image_emb has shape \[0, 4\]"),
        ({"class_emb": torch.zeros(0, 4)}, r"class_emb has shape \[0, 4\]"),
        ({"class_emb": torch.ones(3, 5)}, "4 dimensions and class_emb has 5"),
        ({"class_emb": torch.full((3, 4), torch.nan)}, r"class_emb\[0\] is not finite"),
        ({"image_emb": torch.full((2, 4), torch.inf)}, r"image_emb\[0\] is not finite"),
        ({"labels": [0, 3]}, r"labels\[1\] is 3; takes 0 to 2"),
        ({"labels": [0]}, r"labels has shape \[1\]; takes \[2\]"),
        ({"chunk_elements": 0}, "chunk_elements is 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"image_emb": torch.ones(2, 4), "class_emb": torch.ones(3, 4), "labels": [0, 1]}
    with pytest.raises(ValueError, match=message):
        classify(**arguments | change)


def test_prompts_put_the_name_into_every_brace_pair_and_nowhere_else() -> None:
    templates = ["a {}.", "{} or {}", "a {} {x} 100%"]
    assert prompts("b{0}", templates) == ["a b{0}.", "b{0} or b{0}", "a b{0} {x} 100%"]


def test_a_template_without_a_place_for_the_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"templates\[1\] is 'a photo'"):
        prompts("dog", ["a {}", "a photo"])
    with pytest.raises(ValueError, match="templates is empty"):
        prompts("dog", [])
    with pytest.raises(TypeError, match="templates is one string"):
        prompts("dog", "a {}")


def test_class_embeddings_refuse_what_has_no_direction(random: Random) -> None:
    opposite = random(3, 2, 8)
    opposite[1, 1] = -opposite[1, 0]
    opposite[1] = opposite[1].sign()
    not_finite = random(3, 2, 8)
    not_finite[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="class 1 have no direction"):
        class_embeddings(opposite)
    with pytest.raises(ValueError, match="class 2 have no direction"):
        class_embeddings(not_finite)
    with pytest.raises(ValueError, match=r"takes \[classes, templates, dimensions\]"):
        class_embeddings(random(3, 8))


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_a_classifier_is_the_models_mean_prompt(model: RWKVCLIP, batch_size: int) -> None:
    names, templates = ["dog", "red car", "sea"], ["a photo of a {}.", "the {}"]
    got = zero_shot_classifier(model, names, templates, batch_size)
    for row, name in zip(got, names, strict=True):
        texts = [template.format(name) for template in templates]
        with torch.no_grad():
            mean = model.encode_text(tokenize(texts, model.config.context_length)).mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)
    assert not got.requires_grad


def test_a_classifier_is_not_made_of_a_model_in_training_mode(model: RWKVCLIP) -> None:
    model.train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        zero_shot_classifier(model, ["dog"], ["a {}"])
    model.eval()


def test_a_classifier_needs_classes_templates_and_a_batch(model: RWKVCLIP) -> None:
    with pytest.raises(ValueError, match="class_names is empty"):
        zero_shot_classifier(model, [], ["a {}"])
    with pytest.raises(ValueError, match="templates is empty"):
        zero_shot_classifier(model, ["dog"], [])
    with pytest.raises(TypeError, match="class_names is one string"):
        zero_shot_classifier(model, "dog", ["a {}"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        zero_shot_classifier(model, ["dog"], ["a {}"], 0)
