"""Runs in a real MLflow store, and a registry whose champion has to be beaten."""

import base64
import json
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from PIL import Image
from pydantic import ValidationError

from ray_jobs.evaluate import scored_on
from ray_jobs.storage import Storage, StorageConfig, digest_of_json
from ray_jobs.tracking import Tracker, TrackingConfig, TrackingError
from ray_jobs.tracking.config import Place, check_artifacts, tracking_place
from ray_jobs.tracking.machine import MachineMetrics
from ray_jobs.tracking.metrics import StepMetrics, counts
from ray_jobs.tracking.registry import CHAMPION, champion_of, crown, register
from ray_jobs.tracking.runs import StageRun, current_store
from ray_jobs.tracking.store import open_store
from rwkv_clip import __version__, load_checkpoint, tokenize
from rwkv_clip.model import create_model, save_checkpoint
from rwkv_clip.model.config import named_config
from rwkv_clip.ops import build_info
from rwkv_clip.transforms import image_transform

SETTINGS: dict[str, Any] = {"train": {"batch": 8, "data": {"texts": {"caption": 1.0}}}}
METRIC = "text_to_image_recall_at_10"
RECORDS = [{"step": float(step), "loss": 5.0 - step, "seconds": 1.0} for step in range(1, 6)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.at(tmp_path / "storage")


def tracker(storage: Storage, **settings: Any) -> Tracker:
    config = TrackingConfig(system_metrics_seconds=None)
    return Tracker(config, storage, {**SETTINGS, **settings}, "a run")


def store(storage: Storage) -> str:
    """Where a storage keeps its runs when nobody says otherwise."""
    return f"sqlite:///{storage.path('mlflow/mlflow.db')}"


def runs(storage: Storage) -> dict[str, Any]:
    """All runs by name."""
    client = MlflowClient(tracking_uri=store(storage))
    experiment = client.get_experiment_by_name("rwkv-clip")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return {run.info.run_name: run for run in found}


def steps_of(storage: Storage, run: Any) -> list[int]:
    client = MlflowClient(tracking_uri=store(storage))
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]


def test_a_pipeline_is_a_parent_with_a_child_for_each_stage(storage):
    with tracker(storage) as tracked, tracked.stage("train") as run:
        run.params({"batch": 8})
        run.dataset("train", "/data/pairs", "0123", "training")
        for record in RECORDS:
            run.step(record)
    found = runs(storage)
    parent, child = found["a run"], found["train"]
    assert parent.data.params["train.data.texts.caption"] == "1.0"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics == {"loss": 0.0}
    assert child.inputs.dataset_inputs[0].dataset.digest == "0123"
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert parent.data.tags["rwkv_clip.version"]


def test_every_bucket_has_runs_of_its_own_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    uris = ("s3://one/run", "s3://another/run")
    places = [tracking_place(TrackingConfig(), Storage(StorageConfig(uri=uri))) for uri in uris]
    assert [place.artifacts for place in places] == [f"{uri}/mlflow/artifacts" for uri in uris]
    assert len({place.uri for place in places}) == 2
    for place in places:
        assert place.passing
        assert place.uri.startswith(f"sqlite:///{tmp_path}/")


@pytest.mark.parametrize(
    ("uri", "artifacts"),
    [
        ("sqlite:///{folder}/mlflow.db", "{folder}/mlruns"),
        ("sqlite:///mlflow.db?timeout=60", "{folder}/mlruns"),
        ("postgresql+psycopg2://user@host/mlflow", "{folder}/run/mlflow/artifacts"),
        ("https://mlflow.example.com", None),
        ("databricks", None),
    ],
)
def test_artifacts_are_never_left_in_the_working_directory(tmp_path, monkeypatch, uri, artifacts):
    monkeypatch.chdir(tmp_path)
    config = TrackingConfig(uri=uri.format(folder=tmp_path))
    place = tracking_place(config, Storage.at(tmp_path / "run"))
    assert place.artifacts == (artifacts and artifacts.format(folder=tmp_path))


def test_a_run_that_is_started_again_goes_on_and_logs_no_step_twice(storage):

    def fail() -> None:
        with tracker(storage) as tracked, tracked.stage("train") as run:
            run.step(RECORDS[0])
            run.step(RECORDS[1])
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        fail()
    failed = runs(storage)
    assert failed["train"].info.status == failed["a run"].info.status == "FAILED"
    assert failed["train"].data.tags["error"] == "the disk is full"
    with tracker(storage) as tracked, tracked.stage("train") as run:
        run.step(RECORDS[1])
        run.history(RECORDS)
    found = runs(storage)
    assert len(found) == 2
    assert found["train"].info.run_id == failed["train"].info.run_id
    assert found["train"].info.status == "FINISHED"
    assert found["train"].data.tags["restarts"] == "1"
    assert not {"error"} & {*found["train"].data.tags, *found["a run"].data.tags}
    assert steps_of(storage, found["train"]) == [1, 2, 3, 4, 5]
    with tracker(storage) as tracked, tracked.stage("train") as run:
        assert run.run_id is None  # all of it is there


def test_a_run_tells_which_version_began_it_and_which_went_on(storage, monkeypatch):
    key = "mlflow.source.git.commit"
    for commit in ("first", "second", "third"):
        monkeypatch.setattr("ray_jobs.tracking.runs.get_git_commit", lambda _, told=commit: told)
        with tracker(storage):
            pass
    (tags,) = (run.data.tags for run in runs(storage).values())
    assert (tags[key], tags[f"continued.{key}"]) == ("first", "third")
    assert tags["continued.rwkv_clip.version"] == tags["rwkv_clip.version"] == __version__
    assert tags["restarts"] == "2"


def test_work_whose_results_are_gone_gets_a_run_of_its_own(storage):
    first: list[str] = []
    for done, records in ((False, RECORDS), (True, []), (False, RECORDS[:2]), (True, [])):
        with tracker(storage) as tracked, tracked.stage("train", done) as run:
            run.history(records)
            first += [run.run_id] if run.run_id else []
    before, after = first
    client = MlflowClient(tracking_uri=store(storage))
    steps = [[one.step for one in client.get_metric_history(run, "loss")] for run in first]
    assert steps == [[1, 2, 3, 4, 5], [1, 2]]
    parents = {client.get_run(run).data.tags["mlflow.parentRunId"] for run in (before, after)}
    assert len(parents) == 1


def test_work_on_other_data_gets_a_run_of_its_own(storage):

    def work(data: str, *, done: bool = False, fails: bool = False) -> str | None:
        with tracker(storage) as tracked, tracked.stage("train", done, of=data) as run:
            run.params({"data_digest": data})
            if fails:
                raise RuntimeError("the loss is not a number")
            assert run.complete == (run.run_id is not None)
            return run.run_id

    with pytest.raises(RuntimeError):
        work("bad", fails=True)
    failed = runs(storage)["train"]
    mended = work("good")
    assert mended not in (None, failed.info.run_id)
    with pytest.raises(RuntimeError):
        work("other", done=True, fails=True)  # what is there is of the data before
    assert work("good", done=True) is None
    client = MlflowClient(tracking_uri=store(storage))
    old = client.get_run(failed.info.run_id)
    assert (old.info.status, old.data.params["data_digest"]) == ("FAILED", "bad")
    assert client.get_run(mended).data.params["data_digest"] == "good"


def test_another_configuration_is_another_run(storage):
    def parent(**settings: Any) -> str:
        with tracker(storage, **settings) as tracked:
            assert tracked.parent.run_id is not None
            return tracked.parent.run_id

    first = parent()
    other = parent(seed=1)
    assert other != first
    assert (parent(), parent(seed=1)) == (first, other), "each goes on in its own"
    MlflowClient(tracking_uri=store(storage)).delete_run(other)
    assert parent(seed=1) not in (first, other)


@pytest.mark.parametrize("alone", [True, False], ids=["one", "several"])
def test_runs_that_an_older_release_noted_go_on(storage, alone):
    with tracker(storage) as tracked, tracked.stage("train") as run:
        pass
    record = {
        **{"uri": tracked.uri, "settings": digest_of_json(SETTINGS), "told": True},
        **{"parent": tracked.parent.run_id, "stages": {"train": {"run_id": run.run_id}}},
    }
    storage.delete("tracking")
    other = {**record, "settings": "of another configuration"}
    storage.write_json("tracking.json", record if alone else {"records": [other, record]})
    with tracker(storage) as again, again.stage("train") as taken_up:
        pass
    assert (again.parent.run_id, taken_up.run_id) == (tracked.parent.run_id, run.run_id)


def test_stages_and_configurations_that_run_at_the_same_time_note_all_their_runs(storage):
    with (
        tracker(storage) as first,
        tracker(storage) as second,
        tracker(storage, seed=1) as other,
        first.stage("synthesis") as describing,
        second.stage("train") as training,
        other.stage("train") as elsewhere,
    ):
        pass
    for settings, runs_of in (
        ({}, {"synthesis": describing.run_id, "train": training.run_id}),
        ({"seed": 1}, {"train": elsewhere.run_id}),
    ):
        again = tracker(storage, **settings)
        assert {name: again.run_id(name) for name in runs_of} == runs_of
        assert all(map(again.logged, runs_of))


def test_a_killed_process_leaves_runs_that_say_so(storage):
    program = (
        "import os, signal, sys\n"
        "from ray_jobs.storage import Storage\n"
        "from ray_jobs.tracking import Tracker, TrackingConfig\n"
        "tracker = Tracker(TrackingConfig(system_metrics_seconds=None), Storage.at(sys.argv[1]),"
        " {}, 'a run')\n"
        "with tracker, tracker.stage('train'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, storage.uri]
    subprocess.run(command, cwd=Path(__file__).parents[3], check=False)
    deadline, waiting = time.monotonic() + 60, threading.Event()
    while {run.info.status for run in runs(storage).values()} != {"KILLED"}:
        assert time.monotonic() < deadline
        waiting.wait(0.2)
    assert set(runs(storage)) == {"a run", "train"}


def test_a_store_that_cannot_be_reached_is_told_before_any_work(storage):
    config = TrackingConfig(uri="http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"mend tracking\.uri or MLFLOW_TRACKING_URI"):
        Tracker(config, storage, SETTINGS, "a run")


def test_a_store_is_made_by_one_process_and_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "mlflow.db"

    def killed(engine: Any) -> None:
        with pytest.raises(Timeout), FileLock(f"{file}.lock", timeout=0):
            pass
        half_made(Path(engine.url.database))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlflow.store.db.utils._initialize_tables", killed)
        with pytest.raises(KeyboardInterrupt):
            open_store(f"sqlite:///{file}")
    assert not file.exists()
    assert open_store(f"sqlite:///{file}").search_experiments()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def half_made(file: Path) -> None:
    """A store as a process leaves it that is killed at one of MLflow's migrations."""
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE _alembic_tmp_metrics (key VARCHAR)")


def test_a_store_that_is_half_made_is_told_with_its_file(tmp_path):
    file = tmp_path / "mlflow.db"
    half_made(file)
    told = rf"_alembic_tmp_metrics already exists\); .*killed.* tables in {file},.* delete it"
    with pytest.raises(TrackingError, match=told):
        Tracker(TrackingConfig(uri=f"sqlite:///{file}"), Storage.at(tmp_path), SETTINGS, "a run")


def test_a_store_that_is_no_database_is_told_with_its_file(tmp_path):
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"something else" * 100)
    with pytest.raises(TrackingError, match=rf"not a database\); look at {file},"):
        open_store(f"sqlite:///{file}")


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://bucket/a#b", "holds #, "),
        ("s3://bucket/a#b?", r"holds # and \?, "),
        ("/folder/a?b", r"holds \?, "),
        ("/folder/a#b", None),
        ("s3://bucket/a%23b", None),
    ],
)
def test_a_storage_outside_of_which_mlflow_would_write_is_told(uri, told):
    storage = Storage(StorageConfig(uri=uri))
    place = Place("sqlite:///mlflow.db", storage.child_uri("mlflow/artifacts"))
    check_artifacts(Place("http://mlflow", None), storage)
    if told is None:
        check_artifacts(place, storage)
    else:
        with pytest.raises(TrackingError, match=rf"^storage\.uri: .* {told}where MLflow"):
            check_artifacts(place, storage)


def test_a_deleted_experiment_is_told_before_any_work(storage):
    with tracker(storage) as tracked:
        pass
    waiting = tracker(storage, seed=1)
    tracked.client.delete_experiment(tracked.experiment)
    with pytest.raises(TrackingError, match=r"was deleted .* restore --experiment-id 1\)"):
        tracker(storage)
    with pytest.raises(TrackingError, match=r"refuses a run in the experiment rwkv-clip \("):
        waiting.__enter__()


def test_what_mlflow_does_not_tell_of_earlier_runs_is_not_taken_for_gone(storage, monkeypatch):
    with tracker(storage):
        pass

    def away(*_: Any) -> None:
        raise MlflowException("it is away", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(MlflowClient, "get_run", away)
    with pytest.raises(TrackingError, match=r"cannot be used \(it is away\)"):
        tracker(storage)


def test_a_run_that_fails_as_it_begins_ends_and_is_taken_up(storage, monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StageRun, "json", stop)  # while settings are uploaded
        with pytest.raises(KeyboardInterrupt), tracker(storage):
            pass
    assert runs(storage)["a run"].info.status == "KILLED"
    with tracker(storage) as tracked:
        assert tracked.client.list_artifacts(tracked.parent.run_id)[0].path == "config.json"
    assert len(runs(storage)) == 1


class Away:
    """A client of a store that is away for the first calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.steps: list[int] = []

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return []

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.left -= 1
        if self.left >= 0:
            raise MlflowException("connection refused")
        self.steps += [metric.step for metric in metrics]


def test_metrics_that_were_lost_while_mlflow_was_away_arrive_later(monkeypatch):
    told: list[str] = []
    # What other packages have done to logging in this process is not the question.
    monkeypatch.setattr(
        "ray_jobs.tracking.metrics.logger.warning", lambda *said: told.append(said[0])
    )
    client = Away(calls=1)
    metrics = StepMetrics(client, "run")  # type: ignore[arg-type]
    for record in RECORDS[:3]:
        metrics(record)
    assert "training goes on" in told[0]
    metrics.catch_up(RECORDS)
    assert client.steps == [1, 2, 3, 4, 5]


def test_the_machine_is_watched_on_after_mlflow_was_away(storage, monkeypatch):
    away, back = threading.Event(), threading.Event()
    get_run, log_batch = MlflowClient.get_run, MlflowClient.log_batch

    def get_once_it_is_back(client: MlflowClient, run_id: str) -> Any:
        if not away.is_set():
            away.set()
            raise MlflowException("it is away")
        return get_run(client, run_id)

    def log(client: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> None:
        log_batch(client, run_id, metrics, **others)
        if any(metric.key.startswith("system/") for metric in metrics):
            back.set()

    with tracker(storage) as tracked:
        monitor = MachineMetrics(tracked.parent.run_id, 0.05, tracked.uri)
        monkeypatch.setattr(MlflowClient, "get_run", get_once_it_is_back)
        monkeypatch.setattr(MlflowClient, "log_batch", log)
        monitor.start()
        assert back.wait(300)
        monitor.finish()
    assert "system/cpu_utilization_percentage" in runs(storage)["a run"].data.metrics


@pytest.fixture
def checkpoint(storage: Storage) -> str:
    folder = Path(storage.path("train/step-000000001"))
    folder.mkdir(parents=True)
    save_checkpoint(create_model(named_config("RWKV-CLIP-Tiny")), folder)
    return "train/step-000000001"


def train_anew(storage: Storage, checkpoint: str, seed: int) -> None:
    torch.manual_seed(seed)
    save_checkpoint(create_model(named_config("RWKV-CLIP-Tiny")), storage.path(checkpoint))


def registered(storage: Storage, checkpoint: str, score: float, **settings: Any) -> Any:
    if "seed" in settings:
        train_anew(storage, checkpoint, settings["seed"])
    with tracker(storage, **settings) as tracked:
        with tracked.stage("train"):
            pass
        digest = settings.get("digest", "of the test data")
        on = scored_on("test", digest, settings.get("text", "caption"))
        found = register(tracked, storage, checkpoint, {METRIC: score}, {METRIC: on})
        crown(tracked, found)
        return found


def test_only_a_better_model_becomes_the_champion(storage, checkpoint, capfd):
    first = registered(storage, checkpoint, 0.25)
    assert (first.version, first.champion) == ("1", True)
    again = registered(storage, checkpoint, 0.25)
    assert (again.version, again.champion) == ("1", True)
    worse = registered(storage, checkpoint, 0.20, seed=1)
    assert (worse.version, worse.champion) == ("2", False)
    assert "does not beat champion version 1" in worse.told
    elsewhere = registered(storage, checkpoint, 0.90, seed=2, digest="of other data")
    assert not elsewhere.champion
    assert "other test data" in elsewhere.told
    by_others = registered(storage, checkpoint, 0.95, seed=4, text="web_text")
    assert not by_others.champion
    assert "was evaluated by caption and not by web_text" in by_others.told
    better = registered(storage, checkpoint, 0.30, seed=3)
    assert better.champion
    client = MlflowClient(tracking_uri=store(storage))
    champion = client.get_model_version_by_alias("rwkv-clip", CHAMPION)
    assert str(champion.version) == better.version
    told = "".join(capfd.readouterr())
    assert "egistered model" not in told  # MLflow's own words; our terminal has a line of its own
    assert "Created version" not in told


def test_a_champion_of_the_meantime_is_not_displaced(storage, checkpoint):
    registered(storage, checkpoint, 0.25)
    train_anew(storage, checkpoint, 1)
    with tracker(storage, seed=1) as tracked:
        with tracked.stage("train"):
            pass
        on = scored_on("test", "of the test data", "caption")
        better = register(tracked, storage, checkpoint, {METRIC: 0.30}, {METRIC: on})
        assert (better.champion, better.before) == (True, "1")
        registered(storage, checkpoint, 0.40, seed=2)
        crowned = crown(tracked, better)
    assert not crowned.champion
    assert "version 3 has become the champion meanwhile" in crowned.told
    client = MlflowClient(tracking_uri=store(storage))
    assert str(client.get_model_version_by_alias("rwkv-clip", CHAMPION).version) == "3"


def test_a_registry_that_does_not_tell_has_no_champion_to_beat(storage):
    class Away:
        def get_model_version_by_alias(self, *_: str) -> None:
            raise MlflowException("it is away", error_code=TEMPORARILY_UNAVAILABLE)

    with pytest.raises(MlflowException, match="it is away"):
        champion_of(Away(), "rwkv-clip")  # type: ignore[arg-type]
    assert champion_of(MlflowClient(tracking_uri=store(storage)), "rwkv-clip") is None


def test_a_training_that_was_done_again_is_another_version(storage, checkpoint):
    assert registered(storage, checkpoint, 0.25).version == "1"
    train_anew(storage, checkpoint, 1)
    again = registered(storage, checkpoint, 0.30)
    assert (again.version, again.champion) == ("2", True)
    assert registered(storage, checkpoint, 0.30).version == "2"


def test_the_same_weights_are_registered_once_whatever_else_is_configured(storage, checkpoint):
    first = registered(storage, checkpoint, 0.25)
    client = MlflowClient(tracking_uri=store(storage))
    run = client.get_model_version("rwkv-clip", first.version).run_id
    client.set_terminated(run, "KILLED")  # while it was reopened
    again = registered(storage, checkpoint, 0.25, embed={"replace": True})
    assert (again.version, again.champion) == (first.version, True)
    assert client.get_run(run).info.status == "FINISHED"
    client.delete_run(run)
    assert registered(storage, checkpoint, 0.25, embed=None).version == first.version


def test_registering_leaves_the_training_as_it_ended(storage, checkpoint, monkeypatch):
    def away(*_: Any, **__: Any) -> None:
        raise OSError("the artifact store is away")

    monkeypatch.setattr(mlflow.pyfunc, "log_model", away)
    with pytest.raises(OSError, match="is away"):
        registered(storage, checkpoint, 0.25)
    client = MlflowClient(tracking_uri=store(storage))
    experiment = client.get_experiment_by_name("rwkv-clip").experiment_id
    (run,) = client.search_runs([experiment], "attributes.run_name = 'train'")
    assert run.info.status == "FINISHED"


def test_a_run_that_died_while_it_was_reopened_has_finished_all_the_same(storage, checkpoint):
    registered(storage, checkpoint, 0.25)
    client = MlflowClient(tracking_uri=store(storage))
    experiment = client.get_experiment_by_name("rwkv-clip").experiment_id
    (run,) = client.search_runs([experiment], "attributes.run_name = 'train'")
    client.set_terminated(run.info.run_id, "KILLED")
    registered(storage, checkpoint, 0.25)
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_champion_that_was_not_scored_so_stays_and_it_is_told(storage, checkpoint):
    registered(storage, checkpoint, 0.25)
    MlflowClient(tracking_uri=store(storage)).delete_model_version_tag("rwkv-clip", "1", METRIC)
    other = registered(storage, checkpoint, 0.30, seed=1)
    assert not other.champion
    assert f"version 1 was not evaluated on {METRIC} and stays" in other.told
    assert "point the alias champion at version 2" in other.told


def test_a_champion_of_an_older_release_is_compared_by_pairs_alone(storage, checkpoint):
    registered(storage, checkpoint, 0.25)
    client = MlflowClient(tracking_uri=store(storage))
    client.delete_model_version_tag("rwkv-clip", "1", "test_set")
    other = registered(storage, checkpoint, 0.30, seed=1, digest="of pairs, and no set beside them")
    assert not other.champion
    assert "older release, which did not tell sets apart, and stays" in other.told
    assert "point the alias champion at version 2" in other.told
    assert registered(storage, checkpoint, 0.40, seed=2).champion


def test_a_metric_that_is_better_when_smaller_cannot_make_champions():
    with pytest.raises(ValidationError, match="better when it is smaller"):
        TrackingConfig(champion_metric="text_to_image_median_rank")


@pytest.mark.parametrize("name", ["team/clip", "our's", "clip@champion", "a:b", " "])
def test_a_name_that_the_registry_does_not_take_is_told_before_any_work(name):
    with pytest.raises(ValidationError, match="takes a name of letters"):
        TrackingConfig(model_name=name)


def test_the_registered_model_embeds_as_the_checkpoint_does(storage, checkpoint, monkeypatch):
    found = registered(storage, checkpoint, 0.25)
    with current_store(store(storage)):
        loaded = mlflow.pyfunc.load_model(found.uri)
    png = picture()
    asked = [{"text": "a dog"}, {"image": base64.b64encode(png).decode()}, {"text": "a cat"}]
    expected = embedded(storage, checkpoint)
    close = partial(torch.testing.assert_close, expected=expected, rtol=0, atol=1e-5)
    close(torch.tensor(loaded.predict(asked)))
    rows = {"id": [1, 2, 3], "text": ["a dog", None, "a cat"], "image": [None, png, None]}
    close(torch.tensor(loaded.predict(pd.DataFrame(rows))))
    pieces = type(loaded.unwrap_python_model())._embed.__globals__
    monkeypatch.setitem(pieces, "_PIECE", 2)
    close(torch.tensor(loaded.predict(asked)))
    files = [path.suffix for path in Path(storage.path("mlflow/artifacts")).rglob("*")]
    assert ".safetensors" in files
    assert not {".pkl", ".pt", ".pickle"} & set(files)
    with pytest.raises(Exception, match="takes either text or image"):
        loaded.predict([{"text": "a dog", "image": "aGk="}])
    signature = loaded.metadata.signature
    assert "image: string (optional), text: string (optional)" in str(signature.inputs)
    assert "Array(double)" in str(signature.outputs)
    assert [list(item) for item in loaded.input_example] == [["text"], ["image"]]
    assert len(loaded.predict(loaded.input_example)) == 2


ELSEWHERE = """
import json, sys
# As where nobody has installed the library: without the checkout that the environment has.
kept = [one for one in sys.meta_path if "__editable__" not in getattr(one, "__module__", "")]
sys.meta_path = kept
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
from rwkv_clip.ops import build_info
print(json.dumps([build_info()["library"], model.predict(json.loads(sys.argv[2]))]))
"""


def test_the_registered_model_works_where_the_library_is_not_installed(
    storage, checkpoint, tmp_path
):
    found = registered(storage, checkpoint, 0.25)
    with current_store(store(storage)):
        folder = mlflow.artifacts.download_artifacts(found.uri, dst_path=str(tmp_path / "model"))
    needed = Path(folder, "requirements.txt").read_text().split()
    assert {"torch", "safetensors", "mlflow"} < {name.partition("==")[0] for name in needed}
    assert not [one for one in needed if "rwkv" in one or "+" in one], "what no index has"
    asked = [{"text": "a dog"}, {"image": base64.b64encode(picture()).decode()}, {"text": "a cat"}]
    command = [sys.executable, "-c", ELSEWHERE, folder, json.dumps(asked)]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    library, vectors = json.loads(answer.stdout)
    assert library == (build_info()["library"] and str(Path(folder, "code/rwkv_clip/_C.so")))
    expected = embedded(storage, checkpoint)
    torch.testing.assert_close(torch.tensor(vectors), expected, rtol=0, atol=1e-5)


def embedded(storage: Storage, checkpoint: str) -> torch.Tensor:
    """Of a text, the picture and another text, by the library."""
    model = load_checkpoint(storage.path(checkpoint))
    with torch.inference_mode():
        texts = model.encode_text(tokenize(["a dog", "a cat"], model.config.context_length))
        image = model.encode_image(image_transform(model.config)(picture())[None])
    return torch.stack([texts[0], image[0], texts[1]])


def picture() -> bytes:
    out = BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def test_what_the_data_calls_its_sources_is_counted_in_names_that_mlflow_takes(storage):
    sources = {"Qwen2-VL (7B)": 5, "none: image": 2, **{f"kind {at}?": 1 for at in range(500)}}
    metrics = counts("source", sources)
    assert metrics["source_Qwen2-VL _7B_"] == 5
    assert metrics["source_none: image"] == 2
    assert len(metrics) < 50
    assert sum(metrics.values()) == sum(sources.values())
    with Tracker(TrackingConfig(), storage, {}, "run") as tracker:
        tracker.parent.metrics(metrics)
        run = tracker.client.get_run(tracker.parent.run_id)
    assert {name: run.data.metrics[name] for name in metrics} == metrics
