"""The training job: pairs from the storage, Ray Train's workers, checkpoints in the storage.

    python -m ray_jobs.train --config FILE

Everything lives below one folder of the storage, `train/`. A run that was killed goes on from its
last checkpoint when it is started again; one that ended returns its result at once.
"""

import logging
import math
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ray_jobs import job
from ray_jobs.beside import written
from ray_jobs.encoding import check_texts
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.room import Need, warn_without_room
from ray_jobs.storage import Storage
from ray_jobs.training.batches import PairFiles, choose_text
from ray_jobs.training.checkpoint import STATE_FILE, RunState, checkpoint_name
from ray_jobs.training.config import TextWeights, TrainConfig
from ray_jobs.training.loop import NonFiniteLossError, WorkerTask, train_worker
from ray_jobs.training.plan import DataPlan, PlanError
from ray_jobs.training.process_group import ProcessGroupConfig
from ray_jobs.training.validation import Validator, validations
from rwkv_clip.heap import kept_memory
from rwkv_clip.signals import keeping

logger = logging.getLogger(__name__)

FOLDER = "train"
VALIDATION = "validation"
_RESULT = "result.json"
_NOT_FINITE = "not-finite.json"
# What a run may go on with another value of: batches and gradients are the same.
_RUNTIME = frozenset(
    f"train.{key}"
    for key in (
        "cpus_per_worker",
        "threads",
        "activation_checkpointing",
        "log_steps",
        "checkpoint_steps",
        "keep_checkpoints",
        "max_failures",
        "data.cpus_per_task",
        "data.tasks",
        "validation.cpus",
        "validation.gpus",
        "validation.batch",
        "validation.seconds",
    )
)

SUMMARY = "train on the pairs and their descriptions"
configure = job.configure
run = partial(job.run_stage, "train")


class TrainError(RuntimeError):
    """Training cannot start or go on; the message says what to do."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left.

    Attributes:
        checkpoint: the last checkpoint's folder, as a name in the storage.
        steps: of the run, skipped ones included.
        left_out: samples whose image could not be decoded, or that had no text to train on.
        seconds: in steps, waiting for data included.
        history: the records of metrics, in order.
        validations: the records of all validations, in order.
        best: the best checkpoint by validation, as a name in the storage; the last one without.
        skipped_steps: steps that had no other samples.
        skipped_validations: checkpoints that were not validated, as a validation was under way.
        resumed: whether an earlier run had done all of it.
    """

    checkpoint: str
    steps: int
    left_out: int
    seconds: float
    history: list[dict[str, float]]
    validations: list[dict[str, float]]
    best: str
    skipped_steps: int = 0
    skipped_validations: int = 0
    resumed: bool = False


def total_steps(config: TrainConfig, files: PairFiles) -> int:
    """Steps of a run; raises TrainError where the data does not fill a batch."""
    try:
        data = config.data
        plan = DataPlan(
            files.flat_row_groups, config.batch, data.lanes, data.shuffle_steps, config.seed
        )
    except PlanError as error:
        raise TrainError(f"train.batch: {error}") from error
    return max(1, round(config.epochs * plan.steps_per_epoch))


def check_trainable(
    config: TrainConfig,
    files: PairFiles,
    texts: Mapping[str, TextWeights],
    coming: Collection[str] = (),
) -> None:
    """Look whether trainings will find pairs enough, and texts.

    Args:
        config: of the trainings.
        files: of the pairs.
        texts: what each chooses from, by the configuration's key.
        coming: texts that are to be made first.

    Raises:
        TrainError: the pairs do not fill a batch, or none has a text that is chosen.
    """
    total_steps(config, files)
    for key, chosen in texts.items():
        weights = chosen.model_dump()
        wanted = [name for name, weight in weights.items() if weight]
        if files.beside or not {*wanted}.isdisjoint(coming):
            continue
        anything = np.random.default_rng(0)
        if not any(choose_text(pair, weights, anything) for pair in files.texts()):
            raise TrainError(
                f"{key}: no pair has one of the texts that it gives a weight "
                f"({', '.join(wanted) or 'none'}); weigh those that pairs have, or have captions "
                "or descriptions made first, by captioning or synthesis"
            )


def train(
    config: TrainConfig,
    storage: Storage,
    name: str = "train",
    on_record: Callable[[Mapping[str, float]], None] | None = None,
    folder: str = FOLDER,
) -> TrainResult:
    """Train on a data set of the storage; goes on where an earlier run stopped.

    Ray must be initialised.

    Args:
        config: of the run.
        storage: holds the pairs, and gets the checkpoints.
        name: of the data set.
        on_record: called on the first worker with every record of metrics; sent there, so it must
            be possible to serialise.
        folder: of the storage, that holds the run.

    Raises:
        TrainError: the data does not fit the configuration, nothing in it can be learnt from, or
            the storage holds another run, or another job trains there at the same time.
        TextsError: no pair has the text that validation searches by.
        NonFiniteLossError: the loss stopped being a number.
    """
    files = PairFiles.of(storage, name)
    steps = total_steps(config, files)
    identity = {
        "config": config.model_dump(mode="json"),
        "steps": steps,
        **data_identity(storage, name),
    }
    if config.validation is not None:  # scores on other pairs would not be comparable
        identity[VALIDATION] = data_identity(storage, VALIDATION)
    if is_trained(storage, folder):
        return _finished(storage, folder, identity)
    _claim(storage, folder, identity)
    task = WorkerTask(config, files, steps, on_record, folder=folder)
    validator = None
    if config.validation is not None:
        validation = PairFiles.of(storage, VALIDATION)
        text, pairs = config.validation.text, config.validation.pairs
        check_texts(validation, text, "train.validation.text", pairs)
        validator = Validator(config.validation, validation, folder)
    check_room(config)
    try:
        with interruptible():
            result = _trainer(config, storage, task, validator).fit()
    except ControllerError as error:
        if not isinstance(error.controller_failure, FileNotFoundError):
            raise
        if is_trained(storage, folder):
            return _finished(storage, folder, identity)
        raise TrainError(
            f"{storage.child_uri(folder)} lost a checkpoint while this trained "
            f"({error.controller_failure}): another job seems to be at work on this storage. Start "
            "again when that has ended, which takes up its result, or choose another storage.uri"
        ) from error
    _raise_if_not_finite(storage, folder, result.checkpoint)
    score = validator.score if validator else None
    return _conclude(storage, folder, identity, result.checkpoint, score)


def data_identity(storage: Storage, name: str) -> dict[str, Any]:
    """What tells a data set, with the texts beside it, from any other.

    Raises:
        TrainError: the texts beside it were made for another one.
    """
    digest = Manifest.from_storage(storage, name).data_digest
    runs = {}
    for one in written(storage, name):
        runs[one.kind] = run = storage.read_json(one.manifest_file)["run"]
        if run.get("data_digest", digest) != digest:
            raise TrainError(
                f"{storage.child_uri(one.folder)} belongs to other pairs than {name} has now; "
                "delete that folder and make it again"
            )
    return {"data_digest": digest, **runs}


def is_trained(storage: Storage, folder: str = FOLDER) -> bool:
    """Whether a run has finished there."""
    return storage.exists(f"{folder}/{_RESULT}")


def trained(storage: Storage, folder: str = FOLDER) -> TrainResult:
    """What a finished run left; raises TrainError if there is none."""
    name = f"{folder}/{_RESULT}"
    if not is_trained(storage, folder):
        raise TrainError(
            f"{storage.child_uri(name)} does not exist: no training has ended there; run train"
        )
    return TrainResult(**{**storage.read_json(name)["result"], "resumed": True})


def check_room(config: TrainConfig) -> None:
    """Warn if the cluster has no room for workers and their data, or for validation beside them."""
    workers = config.min_workers or config.workers
    key = "train.min_workers" if config.min_workers else "train.workers"
    training = (
        Need(key, config.cpus_per_worker, config.gpus_per_worker, workers),
        Need("train.data.cpus_per_task", config.data.cpus_per_task),  # of the first task at least
    )
    there_is_room = warn_without_room(*training)
    if (validation := config.validation) is None:
        return
    need = Need("train.validation", validation.cpus, validation.gpus)
    less = "less in train.validation.cpus and train.validation.gpus"
    if warn_without_room(need, then=f"no checkpoint is validated; give {less}") and there_is_room:
        warn_without_room(
            *training,
            need,
            then="validations wait until training ends, and most checkpoints have none; give "
            f"fewer {key}, or {less}",
        )


@contextmanager
def interruptible() -> Iterator[None]:
    """An interrupt in the block raises KeyboardInterrupt, and those after it are heeded as before.

    Ray Train puts a handler of its own there and leaves it: an interrupt ends it by SystemExit with
    a status of 1, and what comes later in this process cannot be interrupted.
    """
    with keeping(signal.SIGINT):
        try:
            yield
        except SystemExit as error:
            raise KeyboardInterrupt from error


def _trainer(
    config: TrainConfig, storage: Storage, task: WorkerTask, validator: Validator | None = None
) -> TorchTrainer:
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    workers = (config.min_workers, config.workers) if config.min_workers else config.workers
    trainer: Any = TorchTrainer  # their declarations are those of Ray Train V1
    scaling: Any = ScalingConfig
    running: Any = RunConfig
    scaling = scaling(
        num_workers=workers,
        use_gpu=config.gpus_per_worker > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=config.resize_seconds,
    )
    made: TorchTrainer = trainer(
        train_worker,
        train_loop_config={"task": task},
        torch_config=ProcessGroupConfig(max_failures=config.max_failures),
        scaling_config=scaling,
        run_config=running(
            name=task.folder,
            storage_path=storage.path(),
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": kept_memory(config.gpus_per_worker)},
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep_checkpoints,
                checkpoint_score_attribute=validator.score if validator else None,
            ),
        ),
        validation_config=validator.task() if validator else None,
    )
    return made


def _claim(storage: Storage, folder: str, identity: Mapping[str, Any]) -> None:
    """Note whose run the folder holds; refuse to go on with another's."""
    name = f"{folder}/run.json"
    noted = storage.find_json(name)
    held = identity if noted is None else _completed(noted, identity)
    if told := _differences(held, identity):
        raise TrainError(
            f"{storage.child_uri(folder)} holds a run with other settings ({told}); choose another "
            "storage.uri, or delete that folder"
        )
    if held != noted:
        storage.write_json(name, held)


def _completed(held: Mapping[str, Any], identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a run noted; versions that noted no pairs of validation are taken to have had these."""
    return {VALIDATION: identity[VALIDATION], **held} if VALIDATION in identity else held


def _differences(held: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """The keys whose values differ and decide what is learnt, with both."""
    found = []
    for key in sorted({*held, *wanted}):
        old, new, name = held.get(key), wanted.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = _differences(old, new, "train." if name == "config" else f"{name}.")
            found += [inner] if inner else []
        elif old != new and name not in _RUNTIME:
            found.append(f"{name}: {old!r} there, {new!r} now")
    return ", ".join(found)


def _raise_if_not_finite(storage: Storage, folder: str, checkpoint: Any) -> None:
    records = storage.names(folder, suffix=".json")
    found = [name for name in records if "/not-finite-" in name]
    if not found:
        return
    told = sorted((storage.read_json(name) for name in found), key=lambda one: one["rank"])
    kept = f"{folder}/{_NOT_FINITE}"
    storage.write_json(kept, {"step": told[0]["step"], "workers": told})
    for name in found:
        storage.delete(name)  # the next attempt, from the checkpoint, is judged by its own
    ids = [identity for one in told for identity in one["ids"]]
    last = checkpoint.path if checkpoint else "none"
    raise NonFiniteLossError(
        f"the loss or its gradient at step {told[0]['step']} is not a number; the batch's ids are "
        f"{', '.join(ids[:8])} ... ({len(ids)} in all, in {storage.child_uri(kept)}); the last "
        f"good checkpoint is {last}. Look at these pairs, or begin a run with a lower "
        "train.recipe.learning_rate in another storage.uri"
    )


def _conclude(
    storage: Storage, folder: str, identity: Mapping[str, Any], checkpoint: Any, score: str | None
) -> TrainResult:
    """Read the run's end from its last checkpoint, and note it.

    Raises:
        TrainError: there is none, or no step had a sample to learn from.
    """
    if checkpoint is None:
        raise TrainError("training ended without a checkpoint")
    name = f"{folder}/{checkpoint.path.rstrip('/').rpartition('/')[2]}"
    state = RunState.of(storage.read_json(f"{name}/{STATE_FILE}"))
    _tell_skipped_steps(storage, folder, state)
    records = validations(storage, folder)
    if state.skipped_validations:
        logger.warning(
            "%d checkpoints were not validated, because the validation of an earlier one was under "
            "way or waited for room; give more train.checkpoint_steps, or fewer "
            "train.validation.pairs",
            state.skipped_validations,
        )
    if score and not records:
        logger.warning(
            "no checkpoint could be validated, so the last one counts as the best; why is in Ray's "
            "logs, under `Validation failed` or `exceeded timeout_s` (train.validation.seconds)"
        )
    result = TrainResult(
        checkpoint=name,
        steps=state.step,
        left_out=state.left_out,
        seconds=sum(record["seconds"] for record in state.history),
        history=state.history,
        validations=records,
        best=_best(storage, folder, records, score) or name,
        skipped_steps=state.skipped_steps,
        skipped_validations=state.skipped_validations,
    )
    storage.write_json(f"{folder}/{_RESULT}", {"run": identity, "result": asdict(result)})
    return result


def _tell_skipped_steps(storage: Storage, folder: str, state: RunState) -> None:
    """Warn of steps without a usable sample; raise TrainError if there are no others."""
    if not state.skipped_steps:
        return
    ids = f"{', '.join(state.skipped_ids)} ..."
    if state.skipped_steps == state.step:
        raise TrainError(
            f"no pair could be trained on: of {state.left_out:,}, none has both an image that can "
            "be decoded and a text that train.data.texts gives a weight or, without any text, "
            f"tags; their ids are {ids}. Change train.data.texts or ingest other pairs, and delete "
            f"{storage.child_uri(folder)}"
        )
    logger.warning(
        "%d of %d steps were skipped, because none of their pairs has both an image that can be "
        "decoded and a text to train on; the first ids are %s",
        state.skipped_steps,
        state.step,
        ids,
    )


def _best(
    storage: Storage, folder: str, records: list[dict[str, float]], score: str | None
) -> str | None:
    """The best of the checkpoints that are still there; the earlier one where two are equal."""
    there = []
    for record in records:
        name = f"{folder}/{checkpoint_name(int(record['step']))}"
        if storage.exists(f"{name}/{STATE_FILE}"):
            there.append((record.get(score, -math.inf) if score else 0.0, name))
    return max(there, key=lambda one: one[0])[1] if there else None


def _finished(storage: Storage, folder: str, identity: Mapping[str, Any]) -> TrainResult:
    value = storage.read_json(f"{folder}/{_RESULT}")
    if told := _differences(_completed(value["run"], identity), identity):
        raise TrainError(
            f"{storage.child_uri(folder)} holds a finished run with other settings ({told}); "
            "choose another storage.uri, or delete that folder"
        )
    return TrainResult(**{**value["result"], "resumed": True})


if __name__ == "__main__":
    job.main("train")
