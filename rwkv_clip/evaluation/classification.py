"""Zero-shot classification: prompts to class embeddings, images to the most similar class.

Choices:
- A class embedding is the mean of its prompts' normalised embeddings, normalised again (CLIP,
  arXiv 2103.00020, section 3.1.4).
- The most similar class is the prediction, the first of equally similar ones, so two classes of
  one name (ImageNet has two such pairs) share what they get as they do elsewhere.
- Scores are ranked as real numbers; the published evaluation ranks them truncated to integers.
- A class without test images has no recall: it is left out of the mean and counted.
- Scores are fractions, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_clip.evaluation._arrays import (
    CHUNK_ELEMENTS,
    Array,
    Embeddings,
    Integers,
    indices,
    rounding_error,
    rows_at_a_time,
    slices,
)
from rwkv_clip.model import RWKVCLIP
from rwkv_clip.tokenizer import tokenize


@dataclass(frozen=True)
class ClassificationResult:
    """Fractions (0 to 1) of images that were classified right.

    Attributes:
        top1: their class came first.
        top5: their class came among the first five, or among all if there are fewer, which then
            is 1 whatever the model does.
        mean_per_class: the mean of per_class over the classes that have images.
        per_class: each class's top1; None for a class without images.
        images: how many.
        classes: how many.
        classes_without_images: how many of them the mean leaves out.
    """

    top1: float
    top5: float
    mean_per_class: float
    per_class: tuple[float | None, ...]
    images: int
    classes: int
    classes_without_images: int


def class_embeddings(text_emb: Tensor) -> Tensor:
    """Classes from their prompts.

    Args:
        text_emb: [C, P, D], of C classes in P templates; need not be normalised.

    Returns:
        [C, D] of length 1, float32 (float64 for float64).

    Raises:
        ValueError: another shape, an empty one, or a class whose prompts are not finite or cancel.
    """
    if text_emb.dim() != 3 or 0 in text_emb.shape:
        raise ValueError(
            f"text_emb has shape {list(text_emb.shape)}; takes [classes, templates, dimensions], "
            "at least one of each"
        )
    wide = text_emb.to(torch.promote_types(torch.float32, text_emb.dtype))
    mean = F.normalize(wide, dim=-1).mean(1)
    norm = mean.norm(dim=-1, keepdim=True)
    bad = torch.nonzero(~(norm[:, 0] > 0))  # NaN is not above 0 either
    if len(bad):
        raise ValueError(
            f"the prompts of class {int(bad[0])} have no direction: they are zero, not finite, or "
            "cancel each other"
        )
    normalised: Tensor = mean / norm
    return normalised


def prompts(class_name: str, templates: Sequence[str]) -> list[str]:
    """A class's name in every template, in place of each `{}`.

    Raises:
        ValueError: there are no templates, or one has no `{}`.
        TypeError: templates is one string.
    """
    for index, template in enumerate(_strings("templates", templates)):
        if "{}" not in template:
            raise ValueError(
                f"templates[{index}] is {template!r}, without {{}}; the class name goes there"
            )
    # Not str.format: other braces in a template or a name are text.
    return [template.replace("{}", class_name) for template in templates]


@torch.no_grad()
def zero_shot_classifier(
    model: RWKVCLIP,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> Tensor:
    """Class embeddings of a model.

    Args:
        model: in evaluation mode.
        class_names: C names, as they read in a sentence.
        templates: P sentences with `{}` where the name goes.
        batch_size: how many prompts are encoded at a time.

    Returns:
        [C, D] of length 1, on the model's device.

    Raises:
        ValueError: the model is in training mode (dropout would change the embeddings), there are
            no classes or no templates, a template has no `{}`, or batch_size is below 1.
        TypeError: class_names or templates is one string.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    names = _strings("class_names", class_names)
    texts = [text for name in names for text in prompts(name, templates)]
    device = model.logit_scale.device
    length = model.config.context_length
    encoded = torch.cat(
        [
            model.encode_text(tokenize(texts[batch], length).to(device))
            for batch in slices(len(texts), batch_size)
        ]
    )
    return class_embeddings(encoded.unflatten(0, (len(names), -1)))


def classify(
    image_emb: Array,
    class_emb: Array,
    labels: Integers,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ClassificationResult:
    """Accuracy of the class that is most similar (by cosine) to each image.

    Args:
        image_emb: [N, D].
        class_emb: [C, D], on any device.
        labels: [N] integers, the row of class_emb that each image belongs to.
        chunk_elements: most similarities held at a time.

    Raises:
        ValueError: shapes do not fit, an array is empty or not finite, or a label has no class.
        TypeError: the embeddings are not floating, or the labels no integers.
    """
    images = Embeddings.of("image_emb", image_emb)
    classes = Embeddings.of("class_emb", class_emb, device=images.device)
    if images.data.shape[1] != classes.data.shape[1]:
        raise ValueError(
            f"image_emb has {images.data.shape[1]} dimensions and class_emb has "
            f"{classes.data.shape[1]}; they must come from one model"
        )
    target = indices("labels", labels, ("image_emb", len(images)), len(classes), images.device)
    weight = classes.block(slice(None))
    slack = rounding_error(weight.dtype, weight.shape[1])
    step = rows_at_a_time(chunk_elements, len(classes))

    def ranks() -> Iterator[Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            for rows in slices(len(images), step):
                yield label_ranks(images.block(rows) @ weight.T, target[rows], slack)

    return accuracy(torch.cat(list(ranks())), target, len(classes))


def label_ranks(scores: Tensor, labels: Tensor, slack: float = 0.0) -> Tensor:
    """How many classes come before each label's: those with more, and equals with lower numbers.

    Args:
        scores: [N, C].
        labels: [N].
        slack: scores this close are equal.

    Returns:
        [N] int64, from 0.
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    before = (scores > own + slack) | (earlier & (scores >= own - slack))
    return before.sum(1)


def accuracy(ranks: Tensor, labels: Tensor, classes: int) -> ClassificationResult:
    """The result of ranks [N] (from 0) of labels [N]."""
    right = ranks == 0
    images_of = torch.bincount(labels, minlength=classes).tolist()
    right_of = torch.bincount(labels[right], minlength=classes).tolist()
    per_class = tuple(
        part / whole if whole else None for part, whole in zip(right_of, images_of, strict=True)
    )
    recalls = [recall for recall in per_class if recall is not None]
    return ClassificationResult(
        top1=float(right.double().mean()),
        top5=float((ranks < 5).double().mean()),
        mean_per_class=sum(recalls) / len(recalls),
        per_class=per_class,
        images=len(labels),
        classes=classes,
        classes_without_images=classes - len(recalls),
    )


def _strings(name: str, value: Sequence[str]) -> list[str]:
    if isinstance(value, str):
        raise TypeError(f"{name} is one string, {value!r}; takes a list of strings")
    strings = list(value)
    if not strings:
        raise ValueError(f"{name} is empty; takes at least one")
    return strings
