"""Training on a real Ray cluster: it ends, goes on after a kill, and is one for any workers."""

import logging
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError
from ray.train import (
    Checkpoint,
    ControllerError,
    ReportedCheckpoint,
    ReportedCheckpointStatus,
)

from ray_jobs.encoding import TextsError
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.storage import Storage
from ray_jobs.train import (
    TrainError,
    TrainResult,
    check_room,
    interruptible,
    total_steps,
    train,
)
from ray_jobs.training.batches import PairFiles
from ray_jobs.training.checkpoint import RunState, checkpoint_name
from ray_jobs.training.loop import NonFiniteLossError, is_validating
from rwkv_clip.model import load_checkpoint
from tests.machine import grow, small_file_system
from tests.ray_jobs.small import PAIRS, TRAIN
from tests.ray_jobs.training.runs import SKIPPED, assert_same_curve, config_of


def test_a_run_ends_with_a_model_and_its_history(undisturbed):
    storage, result = undisturbed
    assert result.steps == total_steps(config_of(), PairFiles.of(storage)) == 9
    learnt = [step for step in range(1, 10) if step != SKIPPED]
    assert [record["step"] for record in result.history] == learnt
    assert {"loss", "learning_rate", "logit_scale", "gradient_norm"} <= result.history[0].keys()
    assert {"pairs_per_second", "data_wait_share"} <= result.history[0].keys()
    model = load_checkpoint(storage.path(result.checkpoint))
    assert model.config.image_size == 32


def test_a_finished_run_is_not_run_again(undisturbed):
    storage, result = undisturbed
    again = train(config_of(), storage)
    assert again.resumed
    assert again.history == result.history
    elsewhere = config_of(threads=1, max_failures=0, keep_checkpoints=5, checkpoint_steps=7)
    assert train(elsewhere, storage).history == result.history


class Recorder:
    """Collects records through the storage, as it is called in another process."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __call__(self, record: Mapping[str, float]) -> None:
        self.storage.write_json(f"records/{int(record['step']):03d}.json", dict(record))


# Of two CPUs the workers hold so much that a validation waits for their end.
NO_ROOM = {"pairs": 150, "batch": 64, "cpus": 1.3}
VALIDATED = config_of(workers=2, log_steps=2, validation=NO_ROOM)


@pytest.fixture(scope="module")
def validated(
    emoji_storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Storage, TrainResult]:
    """A run on two workers, with validated checkpoints, and somebody who listens to its records."""
    folder = tmp_path_factory.mktemp("validated")
    (folder / "pairs").mkdir()
    (folder / "pairs/train").symlink_to(emoji_storage.path("pairs/train"))
    storage = Storage.at(folder)
    source = {"kind": "emoji", "limit": PAIRS, "unit_rows": 90}
    ingest(IngestConfig(source=source, row_group_rows=32), storage, "validation")
    return storage, train(VALIDATED, storage, on_record=Recorder(storage))


def test_two_workers_have_the_curve_of_one(undisturbed, validated):
    assert_same_curve(validated[1], undisturbed[1], 1e-4, log_steps=2)


SHARDED: dict[str, Any] = {"workers": 2, "sharding": "fsdp2"}
IN_PIECES: dict[str, Any] = {"micro_batches": 2, "activation_checkpointing": True}


# For their time; the run that a full disk stops has all of these settings.
@pytest.mark.chaos
@pytest.mark.parametrize(
    "changes",
    [SHARDED | IN_PIECES, SHARDED, {"workers": 2} | IN_PIECES],
    ids=["sharded and in pieces", "sharded", "in pieces"],
)
def test_pieces_and_shards_have_the_curve_of_one(undisturbed, own_storage, changes):
    _, expected = undisturbed
    result = train(config_of(**changes), own_storage)
    assert_same_curve(result, expected, 1e-4)


@pytest.mark.chaos  # for its time: a minute goes into compiling
@pytest.mark.parametrize(
    "changes", [{}, {"workers": 2}, SHARDED], ids=["one worker", "two", "sharded"]
)
def test_a_compiled_model_in_bfloat16_has_nearly_the_same_curve(undisturbed, own_storage, changes):
    _, expected = undisturbed
    result = train(config_of(compile=True, precision="bfloat16", **changes), own_storage)
    assert_same_curve(result, expected, 2e-2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for one checkpoint and a half, of 20 MB each."""
    with small_file_system(tmp_path / "disk", "32m") as folder:
        yield folder


def test_pieces_and_shards_have_the_curve_of_one_through_a_full_disk(
    undisturbed, emoji_storage, small_disk
):
    _, expected = undisturbed
    (small_disk / "pairs").symlink_to(emoji_storage.path("pairs"))
    storage = Storage.at(small_disk)
    # A checkpoint is whole, and sharded anew when a run goes on from it.
    config = config_of(max_failures=0, **SHARDED, **IN_PIECES)
    with pytest.raises(Exception, match="No space left on device"):
        train(config, storage)
    grow(small_disk, "300m")
    # From the checkpoint that was there, in the middle of an epoch.
    assert_same_curve(train(config, storage), expected, 1e-4)


def test_a_loss_that_is_no_number_names_the_pairs_and_the_checkpoint(own_storage):
    # The first step is taken, and with it the weights are so large that the second has no loss.
    recipe = {"learning_rate": 1e30, "clip_norm": 1e30}
    told = r"at step 1 .*ids are noto-.*\(32 in all.*last good checkpoint is \S+/step-000000001\."
    with pytest.raises(NonFiniteLossError, match=told):
        train(config_of(recipe=recipe, checkpoint_steps=1, workers=2), own_storage)
    kept = own_storage.read_json("train/not-finite.json")
    assert kept["step"] == 1
    assert [(one["rank"], len(one["ids"])) for one in kept["workers"]] == [(0, 16), (1, 16)]
    assert not [name for name in own_storage.names("train") if "not-finite-" in name]
    assert own_storage.exists("train/step-000000001/model.safetensors")


def test_a_run_without_anything_to_learn_from_names_the_pairs_and_the_weights(own_storage):
    texts = {"web_text": 0, "caption": 0, "description": 1}  # before any description was written
    config = config_of(data={**TRAIN["data"], "texts": texts}, epochs=9)
    told = r"of 192, none has .*train\.data\.texts .*ids are noto-.*delete \S+/train$"
    with pytest.raises(TrainError, match=told):  # after one epoch
        train(config, own_storage)
    assert not own_storage.exists("train/result.json")


def test_texts_of_other_pairs_are_told_before_the_work(own_storage):
    held = {"run": {"data_digest": "of other pairs"}, "result": {}}
    own_storage.write_json("descriptions/train/manifest.json", held)
    with pytest.raises(TrainError, match=r"descriptions/train belongs to other pairs.*delete"):
        train(config_of(), own_storage)


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_job_that_meets_another_takes_its_result_or_says_so(
    undisturbed, own_storage, monkeypatch, has_ended
):
    done, result = undisturbed
    ended = {file: done.read_json(f"train/{file}") for file in ("run.json", "result.json")}

    class Trainer:
        def fit(self) -> None:
            if has_ended:
                own_storage.write_json("train/result.json", ended["result.json"])
            raise ControllerError(FileNotFoundError("Path not found: train/step-000000004"))

    monkeypatch.setattr("ray_jobs.train._trainer", lambda *_: Trainer())
    own_storage.write_json("train/run.json", ended["run.json"])
    if has_ended:
        assert train(config_of(), own_storage).history == result.history
    else:
        with pytest.raises(TrainError, match=r"/train lost .*step-000000004\): another job seems"):
            train(config_of(), own_storage)


def test_an_interrupt_is_one_during_training_and_after_it():
    def fit() -> None:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(1))  # as Ray Train does
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_state_of_another_version_is_read():
    older = {"step": 4, "left_out": 2, "seconds": 0.0, "history": [{"step": 4.0}]}
    assert RunState.of(older) == RunState(step=4, left_out=2, history=[{"step": 4.0}])


def test_a_loss_that_needs_what_the_model_lacks_is_refused():
    with pytest.raises(ValidationError, match=r"sigmoid loss .* bias"):
        config_of(loss="sigmoid")


def test_another_configuration_is_refused_with_what_differs(undisturbed):
    storage, _ = undisturbed
    with pytest.raises(TrainError, match=r"\(train\.seed: 0 there, 7 now\)"):
        train(config_of(seed=7), storage)


def test_what_does_not_fit_is_refused_before_the_work(own_storage):
    with pytest.raises(TrainError, match=r"train\.batch.*do not fill a batch of 4,096"):
        train(config_of(batch=4096), own_storage)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"workers": 3}, "4 lanes cannot be shared by 3 workers"),
        ({"batch": 30}, "30 cannot be cut into 4 equal lanes"),
        ({"model": {"name": "RWKV-CLIP-Tiny", "image": {"heads": 7}}}, "model: .*heads"),
        ({"seed": -1}, "seed"),
        ({"validation": {"metric": "text_to_image_recal_at_10"}}, "validation.metric"),
        ({"validation": {"text": "captoin"}}, "validation.text"),
    ],
)
def test_what_needs_no_data_to_be_wrong_is_told_at_once(changes, told):
    with pytest.raises(ValidationError, match=told):
        config_of(**changes)


def test_pairs_without_the_texts_to_validate_by_are_refused_before_the_work(own_storage):
    source = {"kind": "emoji", "limit": 60, "unit_rows": 60}
    ingest(IngestConfig(source=source), own_storage, "validation")
    (part,) = Manifest.from_storage(own_storage, "validation").parts
    table = own_storage.read_table(part.path)
    at = table.schema.get_field_index("caption")
    empty = pa.nulls(len(table), table.schema.field(at).type)
    own_storage.write_table(part.path, table.set_column(at, table.schema.field(at), empty))
    config = config_of(validation={"pairs": 20})
    told = r"train\.validation\.text: none of the first 20 pairs .* set it to web_text"
    with pytest.raises(TextsError, match=told):
        train(config, own_storage)

    # Nor is a run gone on with whose validations were made on other pairs.
    noted = own_storage.read_json("train/run.json")
    older = {key: value for key, value in noted.items() if key != "validation"}
    own_storage.write_json("train/run.json", older)
    with pytest.raises(TextsError, match=told):
        train(config, own_storage)
    assert own_storage.read_json("train/run.json") == noted
    change_digest(own_storage, "validation")
    with pytest.raises(TrainError, match=r"\(validation\.data_digest: '\w+' there, 'other' now\)"):
        train(config, own_storage)


def change_digest(storage: Storage, name: str) -> None:
    """Make a data set one of other pairs."""
    manifest = storage.read_json(f"pairs/{name}/manifest.json")
    storage.write_json(f"pairs/{name}/manifest.json", {**manifest, "data_digest": "other"})


def test_records_reach_whoever_listens(validated):
    storage, result = validated
    assert [storage.read_json(name) for name in storage.names("records")] == result.history


@pytest.mark.parametrize(
    ("last", "reported", "expected"),
    [
        (0, {}, False),
        (4, {}, True),  # its upload has not ended
        (4, {4: "PENDING_VALIDATION"}, True),
        (0, {4: "PENDING_VALIDATION"}, True),  # asked for before the worker began anew
        (4, {4: "VALIDATED"}, False),
        (4, {4: "VALIDATION_FAILED"}, False),
        (4, {4: "VALIDATION_TIMEOUT"}, False),
        (4, {8: "COMMITTED"}, False),  # it was validated, and not worth keeping
        (12, {4: "VALIDATED", 8: "COMMITTED"}, True),
    ],
)
def test_a_validation_is_under_way_until_its_checkpoint_has_an_answer(last, reported, expected):
    there = [
        ReportedCheckpoint(
            Checkpoint(f"/run/{checkpoint_name(step)}"), {}, ReportedCheckpointStatus(status)
        )
        for step, status in reported.items()
    ]
    assert is_validating(checkpoint_name(last) if last else "", there) is expected


@pytest.mark.parametrize(
    ("cpus", "told"),
    [
        (0.5, None),
        (
            1.3,
            "validations wait until training ends, .* give fewer train.workers, or less in train",
        ),
        (3, "no checkpoint is validated; give less in train.validation.cpus"),
    ],
)
def test_a_validation_without_room_is_told_before_the_work(ray_cluster, caplog, cpus, told):
    with caplog.at_level(logging.WARNING):
        check_room(config_of(workers=2, validation={"cpus": cpus}))
    assert len(caplog.messages) == (told is not None)
    assert told is None or re.search(told, caplog.text)


def test_checkpoints_are_validated_and_the_best_is_kept(validated):
    storage, result = validated
    # One at a time may wait for room, and that of the last checkpoint is waited for.
    assert [record["step"] for record in result.validations] == [4, 9]
    assert result.skipped_validations == 1
    scores = {
        record["step"]: record["validation_text_to_image_recall_at_10"]
        for record in result.validations
    }
    kept = {int(path.name[-9:]) for path in Path(storage.path("train")).glob("step-*")}
    best = int(result.best[-9:])
    assert scores[best] == max(scores[step] for step in kept)
    assert scores[best] == max(scores.values())
    assert load_checkpoint(storage.path(result.best)).config.image_size == 32

    record = storage.read_json("train/result.json")
    older = {key: value for key, value in record["run"].items() if key != "validation"}
    storage.write_json("train/result.json", {**record, "run": older})
    assert train(VALIDATED, storage).best == result.best
    storage.write_json("train/result.json", record)
    change_digest(storage, "validation")
    with pytest.raises(TrainError, match=r"finished run .*validation\.data_digest"):
        train(VALIDATED, storage)


def test_without_validation_the_last_checkpoint_is_the_best(undisturbed):
    _, result = undisturbed
    assert result.best == result.checkpoint
    assert result.validations == []
