"""The linear probe is scikit-learn's logistic regression, and chooses its penalty fairly."""

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from rwkv_clip.evaluation import STRENGTHS, fit_logistic_regression, linear_probe

# Weaker penalties take many times the iterations.
FEW = (1.0, 1e1, 1e2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several would wait for one another longer than they compute on arrays as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clusters(
    classes: int, each: int, seed: int, spread: float = 2.0, dimensions: int = 12
) -> tuple[Tensor, Tensor]:
    """Overlapping clusters whose centres do not depend on the seed, in float64."""
    centres = torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat(each)
    noise = torch.randn(len(labels), dimensions, generator=torch.Generator().manual_seed(seed))
    return (centres[labels] + spread * noise).double(), labels


@pytest.mark.parametrize("strength", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("classes", [3, 7])
def test_the_fit_equals_scikit_learns(strength: float, classes: int) -> None:
    features, labels = clusters(classes, 40, seed=1)
    ours = fit_logistic_regression(features, labels, strength)
    theirs = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000)
    theirs.fit(features.numpy(), labels.numpy())
    assert ours.converged
    assert np.allclose(ours.weight.numpy(), theirs.coef_, atol=1e-4)
    # A constant added to every bias changes nothing.
    bias = ours.bias.numpy()
    assert np.allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


def test_two_classes_equal_scikit_learns_with_twice_the_inverse_strength() -> None:
    features, labels = clusters(2, 60, seed=1)
    ours = fit_logistic_regression(features, labels, 2.0)
    theirs = LogisticRegression(C=2 / 2.0, tol=1e-8, max_iter=5000)
    theirs.fit(features.numpy(), labels.numpy())
    assert np.allclose((ours.weight[1] - ours.weight[0]).numpy(), theirs.coef_[0], atol=1e-4)


def test_a_common_mean_changes_no_weight_and_the_scale_only_the_penaltys_meaning() -> None:
    features, labels = clusters(4, 50, seed=1)
    moved = fit_logistic_regression(features + 50, labels, 1.0)
    plain = fit_logistic_regression(features, labels, 1.0)
    scaled = fit_logistic_regression(features * 3, labels, 9.0)
    assert moved.converged
    assert torch.allclose(moved.weight, plain.weight, atol=1e-4)  # the bias takes the mean up
    assert torch.allclose(scaled.weight * 3, plain.weight, atol=1e-4)


def test_the_probe_scores_as_scikit_learn_with_the_strength_it_chose() -> None:
    train, train_labels = clusters(7, 30, seed=1)
    test, test_labels = clusters(7, 50, seed=2)
    result = linear_probe(train, train_labels, test, test_labels)
    theirs = LogisticRegression(C=1 / result.strength, tol=1e-8, max_iter=5000)
    theirs.fit(train.numpy(), train_labels.numpy())
    score = theirs.score(test.numpy(), test_labels.numpy())
    assert result.converged
    assert result.classification.top1 == pytest.approx(score, abs=2 / len(test))
    assert result.classification.top1 > 2 / 7  # twice chance: the clusters were learned
    assert result.classification.top5 > result.classification.top1
    assert result.classification.mean_per_class == pytest.approx(result.classification.top1)


def test_the_strength_is_the_best_of_those_tried_on_held_out_images() -> None:
    train, train_labels = clusters(5, 30, seed=1, dimensions=40)
    result = linear_probe(train, train_labels, train, train_labels)
    assert result.held_out_top1[result.strength] == max(result.held_out_top1.values())
    assert set(result.held_out_top1) <= set(STRENGTHS)
    assert 7 <= len(result.held_out_top1) <= 15
    assert result.strength > 1e-2  # forty dimensions and 150 images: no penalty overfits


def test_test_images_do_not_decide_the_strength() -> None:
    train, train_labels = clusters(3, 20, seed=1)
    test, test_labels = clusters(3, 20, seed=2)
    one = linear_probe(train, train_labels, test, test_labels, strengths=FEW)
    other = linear_probe(train, train_labels, test, test_labels.flip(0), strengths=FEW)
    assert one.held_out_top1 == other.held_out_top1
    assert one.strength == other.strength


def test_a_seed_gives_the_same_result_again_and_another_holds_out_others() -> None:
    train, labels = clusters(3, 15, seed=1, spread=3)
    first = linear_probe(train, labels, train, labels, strengths=FEW)
    assert linear_probe(train, labels, train, labels, strengths=FEW) == first
    others = [linear_probe(train, labels, train, labels, strengths=FEW, seed=s) for s in (1, 2)]
    assert any(other.held_out_top1 != first.held_out_top1 for other in others)


def test_one_strength_needs_no_search() -> None:
    features, labels = torch.eye(3), torch.arange(3)  # one image a class: none can be held out
    result = linear_probe(features, labels, features, labels, strengths=[0.1])
    assert result.strength == 0.1
    assert result.held_out_top1 == {}
    assert result.classification.top1 == 1
    with pytest.raises(ValueError, match="no class has two training images"):
        linear_probe(features, labels, features, labels)


def test_a_class_without_training_images_is_never_predicted() -> None:
    features, labels = clusters(4, 20, seed=1)
    train = labels != 2
    result = linear_probe(
        features[train], labels[train], features, labels, strengths=FEW, num_classes=6
    )
    assert result.classification.per_class[2] == 0
    assert result.classification.per_class[4:] == (None, None)
    classifier = fit_logistic_regression(features[train], labels[train], 1.0)
    assert classifier.converged
    assert classifier.bias[2] == -torch.inf
    assert torch.equal(classifier.weight[2], torch.zeros(12, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_features_are_fitted_in_float32(dtype: torch.dtype) -> None:
    features, labels = clusters(3, 40, seed=1)
    narrow = fit_logistic_regression(features.to(dtype), labels, 1.0)
    wide = fit_logistic_regression(features.to(dtype).double(), labels, 1.0)
    assert narrow.weight.dtype == torch.float32
    assert torch.allclose(narrow.weight.double(), wide.weight, atol=2e-3)


def test_features_of_inference_mode_and_arrays_serve_as_well() -> None:
    features, labels = clusters(3, 10, seed=1)
    want = fit_logistic_regression(features, labels, 1.0)
    with torch.inference_mode():
        made = features * 1
    assert torch.equal(fit_logistic_regression(made, labels, 1.0).weight, want.weight)
    got = fit_logistic_regression(features.numpy(), labels.tolist(), 1.0)
    assert torch.equal(got.weight, want.weight)


def test_row_chunks_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(4, 30, seed=1)
    want = fit_logistic_regression(features, labels, 10.0)
    whole = linear_probe(features, labels, features, labels, strengths=FEW)
    # By its name, because the package has a function that is called like the module.
    module = importlib.import_module("rwkv_clip.evaluation.linear_probe")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 100)
    got = fit_logistic_regression(features, labels, 10.0)
    assert torch.allclose(got.weight, want.weight, atol=1e-5)
    assert torch.allclose(got.bias, want.bias, atol=1e-5)
    assert linear_probe(features, labels, features, labels, strengths=FEW) == whole


def test_too_few_iterations_are_reported() -> None:
    features, labels = clusters(5, 20, seed=1)
    assert not fit_logistic_regression(features, labels, 1e-3, max_iterations=2).converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": torch.zeros(0, 3), "train_labels": []}, "train_features has shape"),
        ({"test_features": torch.zeros(0, 3), "test_labels": []}, "test_features has shape"),
        ({"test_features": torch.ones(4, 2)}, "3 dimensions and test_features has 2"),
        ({"train_features": torch.full((4, 3), torch.nan)}, r"train_features\[0\] is not finite"),
        ({"test_labels": [0, 1, -1, 0]}, r"test_labels\[2\] is -1"),
        ({"num_classes": 1}, r"train_labels\[1\] is 1; takes 0 to 0"),
        ({"strengths": []}, "strengths are"),
        ({"strengths": [1.0, 0.1]}, "strengths are"),
        ({"strengths": [0.0, 0.1]}, "strengths are"),
        ({"held_out": 1.0}, "held_out is 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "train_features": torch.ones(4, 3),
        "train_labels": [0, 1, 0, 1],
        "test_features": torch.ones(4, 3),
        "test_labels": [0, 1, 0, 1],
    }
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments | change)


def test_the_search_is_on_the_cpu_whatever_pytorchs_default_device() -> None:
    features, labels = torch.randn(40, 6), torch.arange(40) % 3
    expected = linear_probe(features, labels, features, labels, strengths=(0.1, 1.0))
    torch.set_default_device("meta")
    try:
        result = linear_probe(features, labels, features, labels, strengths=(0.1, 1.0))
    finally:
        torch.set_default_device(None)
    assert result == expected


def test_strengths_may_be_an_array() -> None:
    features, labels = clusters(3, 20, seed=1)
    data = features, labels, features, labels
    expected = linear_probe(*data, strengths=FEW)
    assert linear_probe(*data, strengths=np.array(FEW)) == expected


def test_large_features_are_fitted_as_small_ones() -> None:
    features, labels = clusters(3, 20, seed=1)
    small = fit_logistic_regression(features.float(), labels, 1.0)
    large = fit_logistic_regression(1e20 * features.float(), labels, 1e40)
    torch.testing.assert_close(1e20 * large.weight, small.weight, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(large.bias, small.bias, rtol=1e-2, atol=1e-2)
