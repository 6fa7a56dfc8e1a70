"""Results are CLIP_benchmark's JSON, written and read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_clip.evaluation import (
    BenchmarkResult,
    benchmark_result,
    classify,
    linear_probe,
    read_result,
    retrieval,
    write_result,
)

ABOUT = {"dataset": "cifar10", "model": "RWKV-CLIP-B-32", "pretrained": "yfcc15m"}
PUBLISHED = {
    "dataset": "wds/cifar10",
    "model": "ViT-B-32-quickgelu",
    "pretrained": "laion400m_e32",
    "task": "zeroshot_classification",
    "metrics": {"acc1": 0.9074, "acc5": 0.998, "mean_per_class_recall": 0.9073},
    "language": "en",
}


def results() -> list[BenchmarkResult]:
    eye = torch.eye(6)
    of_classes = classify(eye, eye, [0, 1, 2, 3, 4, 0])
    of_pairs = retrieval(eye, eye, [0, 1, 2, 3, 5, 4], ks=[1, 5])
    tested = eye.clone()
    tested[5, 0] = 0.5  # the right class comes second, with no tie for rounding to decide
    of_probe = linear_probe(eye, torch.arange(6), tested, [0, 1, 2, 3, 4, 0], strengths=[0.5])
    return [benchmark_result(result, **ABOUT) for result in (of_classes, of_pairs, of_probe)]


def test_tasks_and_metrics_have_clip_benchmarks_names() -> None:
    classes, pairs, probe = results()
    assert classes.task == "zeroshot_classification"
    assert classes.metrics == pytest.approx(
        {"acc1": 5 / 6, "acc5": 1, "mean_per_class_recall": 0.9}
    )
    assert pairs.task == "zeroshot_retrieval"
    assert set(pairs.metrics) == {
        f"{kind}_retrieval_recall@{k}" for kind in ("image", "text") for k in (1, 5)
    }
    assert probe.task == "linear_probe"
    assert probe.metrics == pytest.approx(
        {
            "lp_acc1": 5 / 6,
            "lp_acc5": 1,
            "lp_mean_per_class_recall": 0.9,
            "l2_strength": 0.5,
        }
    )


def test_image_retrieval_is_what_a_caption_finds() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2]])  # the third one has no caption
    texts = torch.tensor([[1.0, 0.2], [0.0, 1.0]])
    result = benchmark_result(retrieval(images, texts, [0, 1], ks=[1]), **ABOUT)
    assert result.metrics == {"image_retrieval_recall@1": 0.5, "text_retrieval_recall@1": 1.0}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_written_is_read_again(index: int, tmp_path: Path) -> None:
    result = results()[index]
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result
    content = json.loads((tmp_path / "result.json").read_text())
    assert set(content) == {"dataset", "model", "pretrained", "task", "metrics", "language"}


def test_a_published_file_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text(json.dumps(PUBLISHED))
    write_result(tmp_path / "ours.json", read_result(tmp_path / "theirs.json"))
    assert json.loads((tmp_path / "ours.json").read_text()) == PUBLISHED


def test_top_five_of_fewer_than_five_classes_has_no_value(tmp_path: Path) -> None:
    result = benchmark_result(classify(torch.eye(4), torch.eye(4), [0, 1, 2, 3]), **ABOUT)
    write_result(tmp_path / "result.json", result)
    text = (tmp_path / "result.json").read_text()
    assert '"acc5": null' in text
    assert read_result(tmp_path / "result.json").metrics["acc5"] is None


def test_what_only_some_versions_write_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = PUBLISHED | {"classnames": ["a"], "metrics": {"acc5": float("nan")}}
    content["metrics"] |= {"acc1": 1, "report": "text", "normalized": True}
    del content["language"]
    (tmp_path / "result.json").write_text(json.dumps(content))
    result = read_result(tmp_path / "result.json")
    assert result.metrics == {"acc5": None, "acc1": 1.0}
    assert result.language == "en"


def test_numbers_that_json_lacks_are_not_written(tmp_path: Path) -> None:
    bad = BenchmarkResult(**ABOUT, task="linear_probe", metrics={"lp_acc1": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        write_result(tmp_path / "result.json", bad)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 200_000, "is no JSON"),
        ('{"metrics": ' + "9" * 5000 + "}", "is no JSON"),
        (json.dumps(PUBLISHED | {"metrics": {"acc1": 10**400}}), "a metric that is too large"),
        ("[]", "no object `metrics`"),
        ("{}", "no object `metrics`"),
        (json.dumps(PUBLISHED | {"task": "captioning"}), "task 'captioning'; takes zeroshot"),
        (json.dumps(PUBLISHED | {"model": None}), "model None; takes a string"),
    ],
)
def test_a_file_that_is_no_result_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_result(path)
    assert str(path) in str(error.value)
