"""The paper's data sets are there, with prompts that work and the metric that is reported."""

import pytest
import torch

from rwkv_clip.evaluation import classify, dataset_names, dataset_spec, prompts

MEAN_PER_CLASS = {"pets", "flowers", "caltech101", "aircraft"}
TEMPLATES = {
    "cifar10": 18,
    "cifar100": 18,
    "food101": 1,
    "pets": 1,
    "flowers": 1,
    "sun397": 2,
    "stanford_car": 8,
    "dtd": 8,
    "caltech101": 34,
    "aircraft": 2,
    "imagenet": 80,
}


def test_the_papers_eleven_data_sets_are_there_in_its_order() -> None:
    assert list(dataset_names()) == list(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_data_set_has_its_templates_and_metric(name: str) -> None:
    spec = dataset_spec(name)
    assert spec.name == name
    assert len(set(spec.templates)) == len(spec.templates) == TEMPLATES[name]
    assert all("dog" in prompt for prompt in prompts("dog", spec.templates))
    assert spec.metric == ("mean_per_class" if name in MEAN_PER_CLASS else "top1")


def test_counts_are_those_of_the_published_evaluation() -> None:
    assert dataset_spec("imagenet").classes == 1000
    assert dataset_spec("imagenet").test_images is None
    assert (dataset_spec("dtd").classes, dataset_spec("dtd").test_images) == (47, 1880)


def test_the_score_is_the_metric_of_the_data_set() -> None:
    result = classify(torch.eye(2)[[0, 0, 0, 0]], torch.eye(2), [0, 0, 0, 1])
    assert dataset_spec("cifar10").score(result) == 0.75
    assert dataset_spec("pets").score(result) == 0.5


def test_class_names_are_recognised_in_their_order() -> None:
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    spec = dataset_spec("cifar10")
    assert spec.has_class_names(names)
    assert not spec.has_class_names(names[::-1])


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'cifar'; takes cifar10, cifar100, .*imagenet"):
        dataset_spec("cifar")
