"""The embedding job: the library's vectors, part by part, of the model that was asked for."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import rwkv_clip
from ray_jobs.beside import CAPTIONS, DESCRIPTIONS, Beside
from ray_jobs.embed import EmbedConfig, EmbedError, embed, vectors_folder
from ray_jobs.encoding import matrix
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.pipeline import PipelineConfig, run_stage
from ray_jobs.storage import Storage
from ray_jobs.tracking import TrackingConfig
from ray_jobs.tracking.source import ModelSourceError, model_source, stored_model
from ray_jobs.train import TrainResult
from ray_jobs.training.batches import PairFiles
from ray_jobs.training.config import ModelConfig
from rwkv_clip.model import create_model, load_checkpoint, save_checkpoint
from tests.ray_jobs.small import TRAIN

CONFIG = EmbedConfig(batch=32, cpus_per_worker=0.2)


def write_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    save_checkpoint(create_model(ModelConfig.model_validate(TRAIN["model"]).clip_config()), folder)


@pytest.fixture(scope="module")
def storage(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with pairs in several parts, and a model."""
    made = Storage.at(tmp_path_factory.mktemp("embed"))
    source = {"kind": "emoji", "vendor": "twemoji", "limit": 120, "unit_rows": 40}
    config = {"source": source, "cpus_per_task": 0.2}
    ingest(IngestConfig.model_validate(config), made, "test")
    write_model(made.path("model"), 0)
    return made


def test_vectors_are_the_library_s_and_a_stopped_run_does_what_is_missing(storage):
    source = stored_model(storage, "model")
    result = embed(CONFIG, storage, source)
    assert (result.rows, result.left_out, result.dimensions) == (120, 0, 32)
    manifest = Manifest.from_storage(storage, "test")
    assert len(manifest.parts) > 1
    folder = vectors_folder("test")
    files = [f"{folder}/{part.name}.parquet" for part in manifest.parts]
    pairs = PairFiles.of(storage, "test").take(np.arange(120))
    model = load_checkpoint(storage.path("model")).eval()
    tables = [storage.read_table(file) for file in files]
    assert [one for table in tables for one in table["id"].to_pylist()] == [
        pair["id"] for pair in pairs
    ]
    with torch.inference_mode():
        transform = rwkv_clip.image_transform(model.config)
        images = model.encode_image(transform.batch([pair["image"] for pair in pairs]).pixels)
        texts = model.encode_text(
            rwkv_clip.tokenize([pair["caption"] for pair in pairs], model.config.context_length)
        )
    for column, expected in (("image_embedding", images), ("text_embedding", texts)):
        found = np.concatenate([matrix(table[column]) for table in tables])
        np.testing.assert_allclose(found, expected, atol=1e-5)

    kept = Path(storage.path(files[0])).stat()
    Path(storage.path(files[1])).unlink()
    Path(storage.path(f"{folder}/manifest.json")).unlink()
    again = embed(CONFIG, storage, source)
    assert replace(again, seconds=result.seconds) == result
    assert storage.read_table(files[1]).equals(tables[1])
    assert Path(storage.path(files[0])).stat().st_mtime_ns == kept.st_mtime_ns
    assert embed(CONFIG, storage, source).resumed
    described = Beside(DESCRIPTIONS, "test").manifest_file
    storage.write_json(described, {"run": {"model": "an-llm"}})
    assert embed(CONFIG, storage, source).resumed, "captions are still what they were"
    storage.delete(described)
    captioned = Beside(CAPTIONS, "test").manifest_file
    storage.write_json(captioned, {"run": {"model": "a-vlm"}})
    with pytest.raises(EmbedError, match="or of other data, texts or precision"):
        embed(CONFIG, storage, source)
    claim = f"{vectors_folder('test')}/run.json"
    noted = storage.read_json(claim)
    storage.write_json(claim, {key: value for key, value in noted.items() if key != "beside"})
    assert embed(CONFIG, storage, source).resumed, "an older release did not note the texts"
    storage.write_json(claim, noted)
    storage.delete(captioned)
    with pytest.raises(EmbedError, match=r"of another model than .*, or of other data"):
        embed(CONFIG.model_copy(update={"text": None}), storage, source)
    rounded = CONFIG.model_copy(update={"precision": "bfloat16"})
    with pytest.raises(EmbedError, match="texts or precision"):
        embed(rounded, storage, source)
    anew = embed(rounded.model_copy(update={"text": None, "replace": True}), storage, source)
    assert (anew.rows, anew.resumed) == (120, False)
    tables = [storage.read_table(file) for file in files]
    assert tables[0].column_names == ["id", "image_embedding"]
    found = np.concatenate([matrix(table["image_embedding"]) for table in tables])
    assert 0 < np.linalg.norm(found - images.numpy(), axis=1).max() < 0.02


def register_champion(client: MlflowClient, model: str, artifacts: Path) -> None:
    """Make a checkpoint's folder the champion of `small`."""
    run = client.create_run(client.create_experiment("small", str(artifacts)))
    client.log_artifacts(run.info.run_id, model, "model/checkpoint")
    client.create_registered_model("small")
    place = f"{run.info.artifact_uri}/model"
    version = client.create_model_version("small", place, run.info.run_id)
    client.set_registered_model_alias("small", "champion", version.version)


def test_a_model_of_the_registry_is_embedded_with(storage, tmp_path):
    other = Storage.at(tmp_path / "other")
    write_model(other.path("model"), 1)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    register_champion(MlflowClient(tracking_uri=uri), other.path("model"), tmp_path / "artifacts")
    tracking = TrackingConfig(uri=uri)
    with model_source("models:/small@champion", storage, tracking) as source:
        assert source.digest == stored_model(other, "model").digest
        assert source.publish(storage, "published") == "published"
    assert stored_model(storage, "published").digest == source.digest
    with (
        pytest.raises(ModelSourceError, match="cannot be had"),
        model_source("models:/small@nobody", storage, tracking),
    ):
        pass
    with (
        pytest.raises(ModelSourceError, match=r"has no model\.safetensors"),
        model_source(str(tmp_path), storage, tracking),
    ):
        pass


def test_the_stage_takes_the_configuration_s_model_or_the_one_that_is_served(ray_cluster, tmp_path):
    copy = Storage.at(tmp_path / "run")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    checkpoint = "train/step-000000009"
    write_model(copy.path(checkpoint), 2)
    ended = asdict(TrainResult(checkpoint, 9, 0, 1.0, [], [], checkpoint))
    del ended["resumed"]
    copy.write_json("train/result.json", {"run": {}, "result": ended})
    settings = {
        "storage": {"uri": copy.uri},
        "train_data": {"source": {"kind": "emoji", "limit": 40, "unit_rows": 40}},
        "test_data": {"source": {"kind": "emoji", "limit": 40, "unit_rows": 40}},
        "train": TRAIN,
        "tracking": {"uri": uri, "model_name": "small", "system_metrics_seconds": None},
    }

    def outcome(served: str | None = None, **changes: Any) -> str:
        section = {"cpus_per_worker": 0.2, "text": None, **changes}
        serve = {} if served is None else {"model": served}
        config = PipelineConfig.model_validate({**settings, "embed": section, "serve": serve})
        if not copy.exists("pairs/test/manifest.json"):
            run_stage(config, copy, "ingest")
        (stage,) = run_stage(config, copy, "embed")
        return stage.outcome

    assert "40 of test in 32 dimensions" in outcome(model=copy.path(checkpoint))
    table = copy.read_table(f"{vectors_folder('test')}/part-00000.parquet")
    assert table.column_names == ["id", "image_embedding"]
    assert f"by {checkpoint}, were done already" in outcome(), "there is no champion"

    write_model(tmp_path / "other", 3)
    register_champion(MlflowClient(tracking_uri=uri), str(tmp_path / "other"), tmp_path / "kept")
    with pytest.raises(EmbedError, match="of another model"):
        outcome()
    assert outcome(replace=True).endswith("by models:/small/1")
    served = stored_model(Storage.at(tmp_path / "other"), "").digest
    assert copy.read_json(f"{vectors_folder('test')}/manifest.json")["run"]["model"] == served
    for one in (None, "models:/small@champion", "models:/small/1"):
        assert outcome(one, replace=True).endswith("by models:/small/1, were done already")
    assert outcome(copy.path(checkpoint), replace=True).endswith(f"by {copy.path(checkpoint)}")
