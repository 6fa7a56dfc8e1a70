"""Pairs that are searched by their texts, some of which have none."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ray_jobs.encoding import TextsError
from ray_jobs.evaluate import (
    Evaluation,
    EvaluationConfig,
    EvaluationResult,
    OpenedSets,
    scored_on,
)
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.pipeline import PipelineConfig, pipeline, run_stage
from ray_jobs.storage import Storage
from ray_jobs.tracking.source import ModelSourceError, stored_model
from ray_jobs.training.batches import PairFiles
from rwkv_clip import image_transform, tokenize
from rwkv_clip.evaluation import retrieval
from rwkv_clip.model import create_model, save_checkpoint
from tests.serve.small import small_config

PAIRS, WITHOUT = 40, 15


def make_pairs(folder: Path, without: int) -> Storage:
    """Pairs of which the first have no caption."""
    made = Storage.at(folder)
    source = {"kind": "emoji", "vendor": "twemoji", "limit": PAIRS, "unit_rows": PAIRS}
    ingest(IngestConfig(source=source), made, "test")
    without_captions(made, without)
    return made


@pytest.fixture(scope="module")
def storage(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return make_pairs(tmp_path_factory.mktemp("evaluate"), WITHOUT)


def without_captions(storage: Storage, count: int) -> None:
    """Take the first captions away."""
    (part,) = Manifest.from_storage(storage, "test").parts
    table = storage.read_table(part.path)
    at = table.schema.get_field_index("caption")
    field = table.schema.field(at)
    kept = [None] * count + table["caption"].to_pylist()[count:]
    storage.write_table(part.path, table.set_column(at, field, pa.array(kept, field.type)))


def run(storage: Storage, seed: int) -> tuple[EvaluationResult, dict[str, float]]:
    """An evaluation of a model, and what it should find."""
    torch.manual_seed(seed)
    model = create_model(small_config()).eval()
    save_checkpoint(model, storage.path("train/step-000000009"))
    config = EvaluationConfig(cpus_per_worker=0.2, batch=16)
    found = Evaluation(config, storage, "train/step-000000009").run()
    pairs = PairFiles.of(storage, "test").take(np.arange(PAIRS))
    with torch.inference_mode():
        images = image_transform(model.config).batch([pair["image"] for pair in pairs]).pixels
        texts = tokenize([pair["caption"] for pair in pairs[WITHOUT:]], model.config.context_length)
        expected = retrieval(
            model.encode_image(images), model.encode_text(texts), np.arange(WITHOUT, PAIRS)
        )
    return found, expected.metrics()


Found = tuple[EvaluationResult, dict[str, float]]


@pytest.fixture(scope="module")
def found(storage: Storage) -> tuple[Found, Found]:
    """What was found by a model, and then by another one under the same name."""
    return run(storage, 0), run(storage, 1)


def test_images_are_searched_by_the_texts_that_there_are(found):
    (result, expected), _ = found
    told = {**expected, "pairs": PAIRS, "pairs_without_text": WITHOUT}
    assert result.metrics == pytest.approx(told)
    assert all(one["text"] for one in result.examples)
    for one in result.examples:
        place = one["nearest"].index(one["id"]) + 1 if one["id"] in one["nearest"] else None
        assert one["rank"] == place if place else one["rank"] > len(one["nearest"])


def test_what_an_evaluation_took_is_kept_with_its_result(storage, found):
    _, (result, _) = found
    again = Evaluation(EvaluationConfig(cpus_per_worker=0.2, batch=16), storage, result.checkpoint)
    assert again.held is not None
    assert again.held.seconds == result.seconds > 0
    assert again.held.images == PAIRS


def test_all_images_of_the_sets_are_counted(tmp_path):
    told = {"path": str(table_of(tmp_path / "set"))}
    labelled = {"name": "own", "test": told, "train": told, "class_names": ["a", "b"]}
    sets = {"classification": [labelled], "retrieval": [{"name": "own", "test": told}]}
    config = EvaluationConfig.model_validate(sets)
    assert OpenedSets.of(config).images == 2 + 2 + 2


def test_each_score_is_of_its_own_test_data(storage, found):
    (result, _), _ = found
    on = scored_on("test", Manifest.from_storage(storage, "test").data_digest, "caption")
    assert result.tested == dict.fromkeys(result.metrics, on)


def table_of(folder: Path) -> Path:
    """A set of two images with labels and captions of two kinds."""
    folder.mkdir(parents=True)
    columns = {"image": [b"1", b"2"], "label": [0, 1], "coarse": [0, 0]}
    table = pa.table({**columns, "caption": ["a", "b"], "long": ["a long", "b long"]})
    pq.write_table(table, folder / "set.parquet", row_group_size=1)
    return folder / "set.parquet"


def digests(path: Path, *sections: str, **changes: Any) -> list[str]:
    """Of sets of one file."""
    told = {"path": str(path), **changes.pop("test", {})}
    one = {"name": "own", "test": told}
    labelled = {**one, "class_names": ["a", "b"], **changes}
    sets = {"classification": [labelled], "retrieval": [one]}
    config = EvaluationConfig.model_validate({name: sets[name] for name in sections})
    return OpenedSets.of(config).digests


def test_a_set_is_told_by_what_is_asked_of_it_and_not_by_where_it_is(tmp_path):
    path, labels, captions = table_of(tmp_path / "one"), "classification", "retrieval"
    names = tmp_path / "names.json"
    names.write_text('["a", "b"]')
    first = digests(path, labels)
    published = ["a photo of a {}."]
    for same in (
        digests(table_of(tmp_path / "moved"), labels),
        digests(path, labels, test={"unit_rows": 1}),
        digests(path, labels, templates=published, class_names=str(names)),
        digests(path, labels, captions)[:1],
    ):
        assert same == first
    others = (
        digests(path, labels, test={"label": "coarse"}),
        digests(path, labels, class_names=["a", "c"]),
        digests(path, labels, templates=["{}"]),
        digests(path, labels, train={"path": str(path)}),
        digests(path, captions),
        digests(path, captions, test={"captions": "long"}),
    )
    assert len({first[0], *(one for (one,) in others)}) == 1 + len(others)


def test_another_model_under_the_same_name_is_evaluated_anew(found):
    (first, _), (second, expected) = found
    assert second.examples != first.examples
    assert second.metrics == pytest.approx(
        {**expected, "pairs": PAIRS, "pairs_without_text": WITHOUT}
    )


def test_a_model_that_was_not_trained_here_is_scored_as_one_that_was(storage, found, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    torch.manual_seed(1)
    save_checkpoint(create_model(small_config()), folder)
    source = {"kind": "emoji", "vendor": "twemoji", "limit": PAIRS}
    config = PipelineConfig.model_validate(
        {
            "storage": {"uri": storage.uri},
            "tracking": None,
            "train_data": {"source": source},
            "test_data": {"source": source},
            "evaluation": {"model": str(folder), "cpus_per_worker": 0.2, "batch": 16},
        }
    )
    (stage,) = run_stage(config, storage, "evaluate")
    told = storage.read_json(f"{stage.name}/test/result.json")["result"]
    assert stage.name == f"evaluation-{stored_model(Storage.at(folder), '').digest[:12]}"
    (own, _), (same, _) = found
    assert told["metrics"] == same.metrics != own.metrics
    (again,) = run_stage(config, storage, "evaluate")
    assert again.outcome.endswith("were done already")
    with pytest.raises(ModelSourceError, match=r"evaluation\.model .* leave it out"):
        pipeline(config, storage)


def test_without_any_text_nothing_is_searched(ray_cluster, tmp_path):
    storage = make_pairs(tmp_path, PAIRS)
    with pytest.raises(TextsError, match=r"evaluation\.text: no pair of .* has a caption"):
        run(storage, 0)
