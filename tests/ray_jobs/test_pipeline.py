"""The main job by its command line: from a source to an evaluated model, and again in no time."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ray_jobs.embed import EmbedResult
from ray_jobs.embed import embed as embed_pairs
from ray_jobs.ingestion.manifest import Manifest, Part
from ray_jobs.pipeline import PipelineConfig, pipeline, run_stage
from ray_jobs.stages import Stages
from ray_jobs.storage import Storage
from ray_jobs.synthesize import SynthesisError
from ray_jobs.tracking.registry import CHAMPION, champion_of
from ray_jobs.tracking.source import stored_model
from ray_jobs.train import TrainError
from ray_jobs.training.config import ModelConfig
from rwkv_clip.cli import main
from rwkv_clip.config import ConfigError, load_config
from rwkv_clip.model import create_model, save_checkpoint
from tests.machine import small_file_system
from tests.ray_jobs.small import TRAIN

BASELINE = {"web_text": 1, "caption": 0, "description": 0}
ROOT = Path(__file__).parents[2]


def config_file(folder: Path, **changes: object) -> Path:
    source = {"kind": "emoji", "limit": 120, "unit_rows": 60}
    config = {
        "storage": {"uri": str(folder / "storage")},
        "train_data": {"source": {**source, "vendor": "noto"}, "cpus_per_task": 0.2},
        "test_data": {"source": {**source, "vendor": "twemoji"}, "cpus_per_task": 0.2},
        "train": TRAIN,
        "evaluation": {"cpus_per_worker": 0.2, "batch": 50},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def crown_another(storage: Storage, folder: Path) -> str:
    """Make the first version's better rival the champion; gives the digest of its weights."""
    torch.manual_seed(1)
    model = create_model(ModelConfig.model_validate(TRAIN["model"]).clip_config())
    save_checkpoint(model, folder / "checkpoint")
    client = MlflowClient(tracking_uri=f"sqlite:///{storage.path('mlflow/mlflow.db')}")
    tags = client.get_model_version("rwkv-clip", "1").tags
    scored = {**tags, "text_to_image_recall_at_10": "2.0"}
    rival = client.create_model_version("rwkv-clip", str(folder), tags=scored)
    client.set_registered_model_alias("rwkv-clip", CHAMPION, rival.version)
    return stored_model(Storage.at(folder), "checkpoint").digest


def embedded_by(storage: Storage) -> str:
    """The digest of the weights that the vectors are of."""
    digest: str = storage.read_json("vectors/test/manifest.json")["run"]["model"]
    return digest


def runs_of(client: MlflowClient) -> list[str]:
    """The names of the runs, all of which have ended well."""
    runs = client.search_runs([client.get_experiment_by_name("rwkv-clip").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    return sorted(run.info.run_name for run in runs)


def test_a_run_ends_with_scores_and_its_repetition_skips_every_stage(
    ray_cluster, tmp_path, capsys, monkeypatch
):
    embed = {"cpus_per_worker": 0.2, "replace": True}
    file = config_file(tmp_path, baseline=BASELINE, embed=embed)
    config = load_config(PipelineConfig, file)
    storage = Storage(config.storage)
    crowned = []

    def embed_after_a_look(*args: Any) -> EmbedResult:
        client = MlflowClient(tracking_uri=f"sqlite:///{storage.path('mlflow/mlflow.db')}")
        crowned.append(champion_of(client, "rwkv-clip"))
        return embed_pairs(*args)

    monkeypatch.setattr("ray_jobs.stages.embed", embed_after_a_look)
    first = pipeline(config, storage)
    assert crowned == [None], "endpoints follow the champion, and its vectors shall be there"
    assert first.evaluation is not None
    assert first.evaluation.metrics["pairs"] == 120
    assert first.evaluation.chance == pytest.approx(10 / 120)
    assert 0 <= first.evaluation.metrics["text_to_image_recall_at_10"] <= 1
    example = first.evaluation.examples[0]
    assert len(example["nearest"]) == 5
    assert example["similarity"] == sorted(example["similarity"], reverse=True)
    vectors = storage.read_table("evaluation/test/embeddings/part-00000.parquet")
    assert vectors.num_rows == 120
    embedded = storage.read_table("vectors/test/part-00000.parquet", ["image_embedding"])
    assert len(embedded) > 0
    assert first.baseline is not None
    assert first.baseline.metrics != first.evaluation.metrics
    assert first.registered is not None
    assert first.registered.champion
    assert embedded_by(storage) == stored_model(storage, first.train.best).digest
    client = MlflowClient(tracking_uri=f"sqlite:///{storage.path('mlflow/mlflow.db')}")
    names = ["RWKV-CLIP", "baseline", "baseline-evaluation", "evaluation", "train"]
    assert runs_of(client) == names

    (ingested,) = storage.names("times/ingest-train")
    took = storage.read_json(ingested)

    storage.delete("evaluation/test/result.json")
    champion = crown_another(storage, tmp_path / "rival")
    second = pipeline(config, storage)
    assert second.train.resumed
    assert second.evaluation == first.evaluation
    assert second.registered is not None
    told = second.registered.told
    assert second.registered == replace(first.registered, champion=False, told=told, before="2")
    by_name = {stage.name: stage for stage in second.stages}
    assert by_name["embed"].outcome.endswith("by models:/rwkv-clip/2")
    assert embedded_by(storage) == champion, "searches are answered by the champion"
    assert runs_of(client) == sorted([*names, "evaluation"])

    after_second = storage.read_bytes("report.html").decode()

    opened = []

    def open_none(configs: object) -> list[object]:
        opened.append(configs)
        return []

    def away(*_: object) -> None:
        raise MlflowException("it is away")

    monkeypatch.setattr("ray_jobs.evaluate.open_sets", open_none)
    monkeypatch.setattr("ray_jobs.stages.register", away)
    capsys.readouterr()
    third = pipeline(config, storage)
    assert third.train.resumed
    assert "train: done" in capsys.readouterr().err
    assert third.peak_memory >= first.peak_memory > 500e6  # of Ray, its workers and this process
    assert third.evaluation == first.evaluation
    assert third.baseline == first.baseline
    assert runs_of(client) == sorted([*names, "evaluation"])
    assert len(opened) == 1
    last = {stage.name: stage for stage in third.stages}
    assert last["evaluation"].outcome.endswith("were done already")
    assert last["embed"].outcome.startswith("waits until MLflow tells which model is served")
    assert embedded_by(storage) == champion
    page = storage.read_bytes("report.html").decode()
    assert "with web text alone" in page
    assert storage.read_json(ingested) == took
    rows = re.findall(r"<tr><td>([\w-]+)</td><td>[\d.]+ s", page)
    assert rows == ["ingest", "train", "evaluation", "baseline", "baseline-evaluation"]
    assert "<td>register</td>" in after_second, "as it took when the model was registered"
    assert f"at most {third.peak_memory / 1e9:.1f} GB of memory" in page
    assert page.count('class="query"') == len(first.evaluation.examples)
    assert not re.findall(r"""(?:src|href|url)\s*[=(]["']?+(?!data:|#)""", page)  # nothing to load


def test_a_mistake_in_the_configuration_is_told_before_any_work(tmp_path, capsys):
    path = config_file(tmp_path, trian={"epochs": 1})
    assert main(["pipeline", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert "trian" in told
    assert "did you mean 'train'?" in told
    assert not (tmp_path / "storage").exists()


def test_a_server_that_does_not_answer_is_told_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3 = {"endpoint": "http://127.0.0.1:9", "region": "us-east-1", "attempts": 1}
    path = config_file(tmp_path, storage={"uri": "s3://bucket/run", "s3": s3})
    assert main(["pipeline", "--config", str(path)]) == 2
    shown = capsys.readouterr()
    assert "storage.uri: S3 at http://127.0.0.1:9 does not do" in shown.err
    assert "NETWORK_CONNECTION" in shown.err
    assert not shown.out  # where the logs of Ray are


def test_vectors_of_pairs_that_are_not_there_are_told_before_any_work(tmp_path):
    for data, told in (("tset", "there is no tset_data"), ("test", "set it to train, or leave")):
        path = config_file(tmp_path, embed={"data": data}, test_data=None)
        with pytest.raises(ConfigError, match=told):
            load_config(PipelineConfig, path, ())


def test_what_could_not_be_trained_on_is_told_before_it_is_described(tmp_path):
    """By pairs that have what the web said, and no other text."""
    engine = {"engine": {"kind": "http", "url": "http://127.0.0.1:9/v1", "model": "m"}}
    parts = {"id": ["1", "2"], "web_text": ["a heart", "a house"], "caption": [None, None]}
    texts = pa.table({**parts, "description": [None, None], "tags": [None, None]})
    storage = Storage.at(tmp_path / "storage")
    storage.write_table("pairs/train/part-0.parquet", texts)
    part = Part("part-0", "pairs/train/part-0.parquet", 2, (2,), 100, "0")
    data = Manifest("train", (part,), {}, {}, "config", "data")
    data.save(storage)

    def check(*changes: str, **sections: Any) -> None:
        path = config_file(tmp_path, tracking=None, **sections)
        changes = ("train.batch=2", "train.data.lanes=1", *changes)
        config = load_config(PipelineConfig, path, changes)
        Stages(config, storage, None).check_training(data)

    check()
    with pytest.raises(TrainError, match=r"train\.batch: "):
        check("train.batch=3")
    alone = ("train.data.texts.web_text=0", "train.data.texts.caption=0")
    with pytest.raises(TrainError, match=r"train\.data\.texts: .*\(description\)"):
        check(*alone)
    check(*alone, synthesis=engine)
    only_captions = {"web_text": 0, "caption": 1, "description": 0}
    with pytest.raises(TrainError, match=r"baseline: .*\(caption\)"):
        check(synthesis=engine, baseline=only_captions)
    check(captioning=engine, baseline=only_captions)


def test_a_stage_alone_needs_the_texts_that_the_configuration_asks_for(tmp_path, monkeypatch):
    engine = {"engine": {"kind": "http", "url": "http://127.0.0.1:9/v1", "model": "m"}}
    path = config_file(tmp_path, tracking=None, captioning=engine, synthesis=engine)
    begun: list[str] = []
    for method in ("describe", "train", "embed"):
        note = partial(lambda name, *_: begun.append(name), method)
        monkeypatch.setattr(f"ray_jobs.stages.Stages.{method}", note)

    def run(stage: str, *changes: str) -> None:
        run_stage(load_config(PipelineConfig, path, changes), storage, stage)

    storage = Storage.at(tmp_path / "storage")
    Manifest("train", (), {}, {}, "config", "data").save(storage)
    storage.write_json("captions/train/run.json", {})  # begun and killed
    of_train = ("embed.data=train", "embed.text=caption")
    for stage in ("synthesize", "train", "embed"):
        with pytest.raises(SynthesisError, match=r"captions .* not finished; run caption first"):
            run(stage, *of_train)
    storage.write_json("captions/train/manifest.json", {})
    for stage, text in (("train", "caption"), ("embed", "description")):
        with pytest.raises(SynthesisError, match=r"descriptions .* run synthesize first"):
            run(stage, *of_train, f"embed.text={text}")
    assert not begun
    run("embed", *of_train)
    run("embed", "embed.data=test", "embed.text=description")
    run("synthesize")
    run("train", "synthesis=null")
    storage.write_json("descriptions/train/manifest.json", {})
    run("train")
    assert begun == ["embed", "embed", "describe", "train", "train"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    with small_file_system(tmp_path / "disk", "300k") as folder:
        yield folder


def test_a_full_disk_ends_the_job_with_what_to_do(ray_cluster, small_disk, tmp_path, capsys):
    path = config_file(tmp_path, storage={"uri": str(small_disk)}, tracking=None)
    assert main(["pipeline", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "Free some and start again" in told


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_committed_configurations_are_valid(path):
    config = load_config(PipelineConfig, path)
    assert config.train.model.clip_config().name


def test_the_comparison_is_the_default_run_and_a_baseline():
    default = load_config(PipelineConfig, ROOT / "configs/emoji.yaml")
    compared = load_config(PipelineConfig, ROOT / "configs/emoji-comparison.yaml")
    assert compared.baseline is not None
    assert compared.model_copy(update={"baseline": None}) == default
