"""Linear probe: multinomial logistic regression on frozen features (CLIP, arXiv 2103.00020, A.3).

Choices, all of them CLIP's where it made one:
- Features are taken as they are, neither standardised nor normalised.
- The objective is the sum of cross entropies plus strength / 2 times the squared weights; biases
  are free. It is scikit-learn's LogisticRegression with C = 1 / strength (from three classes on;
  with two, scikit-learn fits one vector instead of two, and its C is 2 / strength).
- L-BFGS, at most 1000 iterations, on features less their mean and divided by one number. The free
  bias and the penalty make up for both, so the minimum is that of the features as they are, and a
  large common mean costs no iterations. A weak penalty does: where it is much too weak, the
  thousand can run out (scikit-learn needs as many), which `converged` tells.
- The strength is the best of 97 between 1e-6 and 1e6 on a part of the training images that is held
  out, searched coarse to fine; equal accuracies are decided by the cross entropy. The classifier is
  then fitted to all training images. Test images decide nothing.
- Gradients are written out and summed over row chunks, so that no logits of all images are held,
  and features that were made in inference mode serve as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from rwkv_clip.evaluation._arrays import (
    CHUNK_ELEMENTS,
    Array,
    Integers,
    check_finite,
    indices,
    matrix,
    rows_at_a_time,
    slices,
    widest,
)
from rwkv_clip.evaluation.classification import ClassificationResult, accuracy, label_ranks

STRENGTHS = tuple(10 ** (eighth / 8 - 6) for eighth in range(97))
MAX_ITERATIONS = 1000
# Of the mean cross entropy's gradient; what float32 can resolve, and what float64 is asked for.
_GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-8}
_HISTORY = 10
_LINE_SEARCH = 30  # PyTorch's takes at most 25 evaluations an iteration


class LinearClassifier(NamedTuple):
    """Scores are features @ weight.T + bias.

    Attributes:
        weight: [C, D]; zero for a class without training images.
        bias: [C]; minus infinity for such a class, which is therefore never predicted.
        converged: whether L-BFGS stopped before its last iteration.
    """

    weight: Tensor
    bias: Tensor
    converged: bool


@dataclass(frozen=True)
class LinearProbeResult:
    """How well the features classify.

    Attributes:
        classification: on the test images.
        strength: of the L2 penalty that was chosen.
        held_out_top1: of each strength that was tried; empty if there was one to choose from.
        converged: whether the final fit did.
    """

    classification: ClassificationResult
    strength: float
    held_out_top1: dict[float, float]
    converged: bool


@dataclass(frozen=True)
class _Labelled:
    """Features [N, D] and labels [N] on one device."""

    features: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> _Labelled:
        return _Labelled(self.features[rows], self.labels[rows])

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 for float64 features."""
        return torch.promote_types(torch.float32, self.features.dtype)


def linear_probe(
    train_features: Array,
    train_labels: Integers,
    test_features: Array,
    test_labels: Integers,
    *,
    num_classes: int | None = None,
    strengths: Sequence[float] | npt.NDArray[Any] = STRENGTHS,
    held_out: float = 0.2,
    seed: int = 0,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearProbeResult:
    """Fit on the training images, measure on the test images.

    Args:
        train_features: [N, D].
        train_labels: [N] integers.
        test_features: [M, D], on any device.
        test_labels: [M] integers.
        num_classes: C; by default one more than the largest label.
        strengths: of the L2 penalty, ascending. One alone is used without a search.
        held_out: the fraction of each class's training images that the search measures on.
        seed: decides which these are.
        max_iterations: of L-BFGS, for each fit.

    Raises:
        ValueError: shapes do not fit, an array is empty or not finite, a label is outside of the
            classes, strengths are not positive and ascending, or no class has two training images
            for the search.
        TypeError: the features are not floating, or the labels no integers.
    """
    strengths = tuple(map(float, strengths))
    _check_search(strengths, held_out)
    bound = num_classes if num_classes is not None else 1 << 31
    train = _labelled("train", train_features, train_labels, bound)
    test = _labelled("test", test_features, test_labels, bound, train.features.device)
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"train_features has {train.features.shape[1]} dimensions and test_features has "
            f"{test.features.shape[1]}; they must come from one model"
        )
    classes = num_classes or 1 + int(max(train.labels.max(), test.labels.max()))
    strength, tried = strengths[0], dict[float, float]()
    if len(strengths) > 1:
        strength, tried = _choose(train, classes, strengths, held_out, seed, max_iterations)
    classifier = _fit(train, classes, strength, max_iterations)
    ranks, _ = _measure(classifier, test)
    result = accuracy(ranks, test.labels, classes)
    return LinearProbeResult(result, strength, tried, classifier.converged)


def fit_logistic_regression(
    features: Array,
    labels: Integers,
    strength: float,
    *,
    num_classes: int | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearClassifier:
    """Minimise the sum of cross entropies + strength / 2 * the sum of squared weights.

    Args:
        features: [N, D].
        labels: [N] integers.
        strength: above 0; without a penalty, separable classes have no minimum.
        num_classes: C; by default one more than the largest label.
        max_iterations: of L-BFGS.

    Raises:
        ValueError, TypeError: as `linear_probe` does.
    """
    _check_search([strength], 0.5)
    bound = num_classes if num_classes is not None else 1 << 31
    data = _labelled("", features, labels, bound)
    return _fit(data, num_classes or 1 + int(data.labels.max()), strength, max_iterations)


def _check_search(strengths: Sequence[float], held_out: float) -> None:
    ascending = all(low < high for low, high in itertools.pairwise(strengths))
    if not strengths or not ascending or not 0 < strengths[0] <= strengths[-1] < float("inf"):
        raise ValueError(f"strengths are {list(strengths)}; takes positive numbers, ascending")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; takes a fraction between 0 and 1")


def _labelled(
    part: str, features: Array, labels: Integers, bound: int, device: torch.device | None = None
) -> _Labelled:
    prefix = f"{part}_" if part else ""
    data = matrix(f"{prefix}features", features)
    check_finite(f"{prefix}features", data)
    data = data.to(device or data.device)
    rows = (f"{prefix}features", len(data))
    return _Labelled(data, indices(f"{prefix}labels", labels, rows, bound, data.device))


def _choose(
    train: _Labelled,
    classes: int,
    strengths: Sequence[float],
    fraction: float,
    seed: int,
    max_iterations: int,
) -> tuple[float, dict[float, float]]:
    """The best strength on held-out images, and the accuracy of all that were tried."""
    held = _held_out(train.labels, fraction, seed)
    rest, check = train[~held], train[held]
    if not len(check.labels):
        raise ValueError(
            "no class has two training images, so none can be held out to choose the strength; "
            "pass one strength"
        )
    tried: dict[float, float] = {}

    def score(index: int) -> tuple[float, float]:
        ranks, loss = _measure(_fit(rest, classes, strengths[index], max_iterations), check)
        tried[strengths[index]] = float((ranks == 0).double().mean())
        return tried[strengths[index]], -loss

    best = _search(len(strengths), score)
    return strengths[best], dict(sorted(tried.items()))


def _held_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Which rows [N] are held out: the fraction of every class, but neither none nor all of it."""
    here = labels.cpu()
    # Each names its device, whatever PyTorch's default one.
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(here), generator=generator, device="cpu")
    order = order[here[order].argsort(stable=True)]  # by class, and random within it
    counts = torch.bincount(here)
    share = (counts * fraction).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    place = torch.arange(len(here), device="cpu") - (counts.cumsum(0) - counts)[here[order]]
    held = torch.zeros(len(here), dtype=torch.bool, device="cpu")
    held[order] = place < share[here[order]]
    return held.to(labels.device)


def _search(count: int, score: Callable[[int], tuple[float, float]]) -> int:
    """The index of the best score: some seven at equal distances, then ever finer around the best.

    Of equal scores the larger index, which is the stronger penalty.
    """
    step = 1 << max(0, (count // 6).bit_length() - 1)
    scores = {index: score(index) for index in range(0, count, step)}
    while step > 1:
        step //= 2
        best = _best(scores)
        near = (best - step, best + step)
        scores |= {index: score(index) for index in near if 0 <= index < count}
    return _best(scores)


def _best(scores: dict[int, tuple[float, float]]) -> int:
    return max(scores, key=lambda index: (scores[index], index))


@dataclass(frozen=True)
class _Centred:
    """Features less their mean, divided by their spread, in row chunks; with labels 0 to C - 1."""

    data: _Labelled
    mean: Tensor  # [D]
    spread: float

    @classmethod
    def of(cls, data: _Labelled) -> _Centred:
        features, dtype = data.features, data.dtype
        mean = features.mean(0, dtype=dtype)
        step = rows_at_a_time(CHUNK_ELEMENTS, len(mean))
        wide = widest(features.device)  # of features around 1e20, float32 has no squares
        squares = sum(
            float((features[rows].to(dtype) - mean).to(wide).square().sum())
            for rows in slices(len(features), step)
        )
        return cls(data, mean, math.sqrt(squares / features.numel()) or 1.0)

    def chunks(self, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [c, D] and labels [c], where c * columns is bounded."""
        features, labels = self.data.features, self.data.labels
        for rows in slices(len(labels), rows_at_a_time(CHUNK_ELEMENTS, columns)):
            yield (features[rows].to(self.data.dtype) - self.mean) / self.spread, labels[rows]


def _fit(data: _Labelled, classes: int, strength: float, max_iterations: int) -> LinearClassifier:
    # The bias of a class without images has no minimum, so such classes are left out of the fit.
    present, labels = torch.unique(data.labels, return_inverse=True)
    centred = _Centred.of(_Labelled(data.features, labels))
    dimensions = len(centred.mean)
    theta = centred.mean.new_zeros((len(present), dimensions + 1))
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=max_iterations,
        max_eval=_LINE_SEARCH * max_iterations,
        tolerance_grad=_GRADIENT_TOLERANCE[theta.dtype],
        tolerance_change=torch.finfo(theta.dtype).eps,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )
    decay = strength / len(labels) / centred.spread**2

    def closure() -> Tensor:
        loss, theta.grad = _loss_and_gradient(theta, centred, decay)
        return loss

    with torch.autocast(theta.device.type, enabled=False):
        optimizer.step(closure)
    iterations: int = optimizer.state[theta]["n_iter"]
    weight = theta.new_zeros((classes, dimensions))
    bias = theta.new_full((classes,), -torch.inf)
    weight[present] = theta[:, :-1] / centred.spread
    bias[present] = theta[:, -1] - weight[present] @ centred.mean
    return LinearClassifier(weight, bias, converged=iterations < max_iterations)


def _loss_and_gradient(theta: Tensor, centred: _Centred, decay: float) -> tuple[Tensor, Tensor]:
    """The objective divided by N, and its gradient by theta [C, D + 1], weights and then bias."""
    weight, bias = theta[:, :-1], theta[:, -1]
    total = len(centred.data.labels)
    loss = decay / 2 * weight.square().sum()
    gradient = torch.zeros_like(theta)
    gradient[:, :-1] = decay * weight
    for features, labels in centred.chunks(max(theta.shape)):
        log_probability = torch.addmm(bias, features, weight.T).log_softmax(1)
        own = log_probability.gather(1, labels[:, None])
        loss -= own.sum() / total
        error = log_probability.exp_()
        error.scatter_add_(1, labels[:, None], -torch.ones_like(own))
        gradient[:, :-1] += error.T @ features / total
        gradient[:, -1] += error.sum(0) / total
    return loss, gradient


def _measure(classifier: LinearClassifier, data: _Labelled) -> tuple[Tensor, float]:
    """Ranks of the labels [N], and the mean cross entropy."""
    weight, bias = classifier.weight, classifier.bias
    ranks: list[Tensor] = []
    loss = 0.0
    with torch.autocast(weight.device.type, enabled=False):
        for rows in slices(len(data.labels), rows_at_a_time(CHUNK_ELEMENTS, max(weight.shape))):
            features, labels = data.features[rows].to(weight.dtype), data.labels[rows]
            scores = torch.addmm(bias, features, weight.T)
            ranks.append(label_ranks(scores, labels))
            loss -= float(scores.log_softmax(1).gather(1, labels[:, None]).sum())
    return torch.cat(ranks), loss / len(data.labels)
