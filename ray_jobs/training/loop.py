"""What every training worker runs: batches in, steps, checkpoints out.

Choices:
- The gradient is that of the global batch, whatever the number of workers and of micro-batches
  (GradCache's two passes, arXiv 2101.06983).
- A sample's stochastic depth follows its own seed, and dropout one of (seed, step, rank), so a run
  that goes on in the middle of an epoch draws what it would have drawn.
- A loss that is not finite ends the run, with the batch's ids and the last good checkpoint: trying
  again would end the same way.
- A global batch without one usable sample changes nothing: all workers skip its step, which counts.
"""

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ray_jobs.training.batches import Batch, BatchMaker, Images, PairFiles, stream
from ray_jobs.training.checkpoint import RunState, checkpoint_name, load_state, save_state
from ray_jobs.training.config import TrainConfig
from ray_jobs.training.plan import DataPlan
from ray_jobs.training.recipe import (
    MAX_LOGIT_SCALE,
    create_optimizer,
    learning_rate,
    set_learning_rate,
)
from rwkv_clip.jitter import ColourJitter
from rwkv_clip.loss import PairLoss, create_loss
from rwkv_clip.memory import keep_freed_memory
from rwkv_clip.model import RWKVCLIP, create_model
from rwkv_clip.precision import products_in

logger = logging.getLogger(__name__)

Inputs = tuple[Tensor, Tensor, Tensor]  # pixels, tokens and seeds of a batch
OnRecord = Callable[[Mapping[str, float]], None]

_TOLD_IDS = 8  # of what was skipped


@dataclass(frozen=True)
class WorkerTask:
    """What a worker is told: everything it needs, small enough to be sent.

    Attributes:
        config: of the run.
        files: the pairs.
        steps: of the whole run.
        on_record: called on rank 0 with every record of metrics.
        folder: of the storage, that holds the run.
    """

    config: TrainConfig
    files: PairFiles
    steps: int
    on_record: OnRecord | None = None
    folder: str = "train"

    @property
    def plan(self) -> DataPlan:
        config = self.config
        return DataPlan(
            self.files.flat_row_groups,
            config.batch,
            config.data.lanes,
            config.data.shuffle_steps,
            config.seed,
        )


class NonFiniteLossError(RuntimeError):
    """Training met a loss that is no number."""


def train_worker(settings: Mapping[str, Any]) -> None:
    """Ray Train's training function."""
    Worker(settings["task"], Place.under_ray()).run()


@dataclass(frozen=True)
class Place:
    """Which of the training processes this one is, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def under_ray(cls) -> "Place":
        """Of a worker of Ray Train."""
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        return cls(context.get_world_rank(), context.get_world_size(), device)

    @classmethod
    def without_ray(cls) -> "Place":
        """The only process, on the CPU."""
        return cls(0, 1, torch.device("cpu"))


class Worker:
    """One training process."""

    def __init__(self, task: WorkerTask, place: Place) -> None:
        self.task = task
        self.config = task.config
        self.rank, self.world_size, self.device = place.rank, place.world_size, place.device
        keep_freed_memory()
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        torch.manual_seed(self.config.seed)
        self.model = create_model(self.config.model.clip_config(), device=self.device)
        self.model.set_activation_checkpointing(self.config.activation_checkpointing)
        self.trained = self._distribute(self.model)
        self.optimizer = create_optimizer(self.model, self.config.recipe)
        self.loss: PairLoss = create_loss(self.config.loss)
        self.state = RunState()
        self._left_out = 0  # of this worker's samples, since the last checkpoint
        self._validating = ""  # the last checkpoint that this process had validated

    def run(self) -> None:
        """Train from the last checkpoint, or from the beginning, to the end."""
        self._restore()
        last = self.task.steps
        meter = _Meter()
        for batch in self._batches(last):
            step = self.state.step
            waited = meter.waited()
            metrics = self._step(step, batch)
            if not metrics:
                self._skip(step, batch)
            elif not math.isfinite(metrics["loss"]):
                self._stop_not_finite(step, batch)
                return
            self.state.step = step + 1
            meter.count(self.config.batch, waited)
            ended = self.state.step == last or self._learns_nothing()
            if metrics and (self.state.step % self.config.log_steps == 0 or ended):
                self._record(metrics, meter)
            if self.state.step % self.config.checkpoint_steps == 0 or ended:
                self._checkpoint(metrics)
            if ended:
                return
            meter.begin_wait()

    def _distribute(self, model: RWKVCLIP) -> nn.Module:
        if self.config.compile:
            model.compile()
        if self.world_size == 1:
            return model
        if self.config.sharding == "fsdp2":
            from torch.distributed.fsdp import fully_shard  # which takes a second

            # PyTorch would take GPUs that are there, and workers that were given none see them too.
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for block in (*model.image_model.layers, *model.text_model.blocks):
                fully_shard(block, mesh=mesh)
            # PyTorch shards no scalars: the logit scale stays whole on every worker.
            fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            self.state = load_state(Path(folder), self.model, self.optimizer)
        logger.info("goes on after step %d", self.state.step)

    def _batches(self, last: int) -> Iterator[Batch]:
        """The worker's share of each batch from where the run stands."""
        data = self.config.data
        return stream(self._maker(), self.state.step, last, data.cpus_per_task, data.tasks)

    def _maker(self) -> BatchMaker:
        """What makes this worker's batches."""
        data, plan = self.config.data, self.task.plan
        jitter = ColourJitter(**data.jitter.model_dump()) if data.jitter else None
        return BatchMaker(
            self.task.files,
            plan,
            plan.lanes_of(self.rank, self.world_size),
            Images.of(self.model.config, jitter),
            self.model.config.context_length,
            data.texts.model_dump(),
        )

    def _step(self, step: int, batch: Batch) -> dict[str, float]:
        """One step of the optimizer; its metrics, or none where no worker has a usable sample."""
        recipe = self.config.recipe
        inputs = self._to_device(batch)
        sizes = self.loss.sizes(inputs[0])
        if not any(sizes):
            return {}
        rate = learning_rate(step, self.task.steps, recipe)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        self._seed(step)
        if self.config.micro_batches == 1:
            loss = self._backward(inputs, sizes)
        else:
            loss = self._backward_in_pieces(inputs, sizes)
        self._reduce_scale()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        if loss.isfinite() and norm.isfinite():
            self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return {
            "loss": float(loss) if whole.isfinite() else math.nan,
            "learning_rate": rate,
            "logit_scale": float(self.model.logit_scale.exp()),
            "gradient_norm": float(whole),
        }

    def _skip(self, step: int, batch: Batch) -> None:
        """Count a step that no worker has a usable sample for."""
        ids = [str(identity) for identity in batch["id"][:_TOLD_IDS]]
        self.state.skipped_steps += 1
        self.state.skipped_ids = [*self.state.skipped_ids, *ids][:_TOLD_IDS]
        logger.warning("step %d is skipped: none of its samples is usable: %s ...", step, ids)

    def _learns_nothing(self) -> bool:
        """Whether a whole epoch had nothing usable; the next ones have the same samples."""
        skipped = self.state.skipped_steps
        return skipped == self.state.step and skipped >= self.task.plan.steps_per_epoch

    def _to_device(self, batch: Batch) -> Inputs:
        """Normalised pixels [b, 3, S, S], tokens [b, T] and seeds [b] of the usable samples."""
        usable = batch["usable"]
        self._left_out += int((~usable).sum())
        whole = bool(usable.all())
        pixels, tokens, seeds = (
            torch.from_numpy(np.ascontiguousarray(_kept(batch[name], usable, whole))).to(
                self.device, non_blocking=True
            )
            for name in ("pixels", "tokens", "seeds")
        )
        mean, scale = self._normalisation
        return normalise(pixels, mean, scale), tokens.long(), seeds

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and inverse spread of pixels in 0..255, [1, 3, 1, 1] each."""
        config = self.model.config
        mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
        shape = (1, 3, 1, 1)
        return (255 * mean).view(shape).to(self.device), (1 / (255 * std)).view(shape).to(
            self.device
        )

    def _seed(self, step: int) -> None:
        mixed = np.random.SeedSequence([self.config.seed, step, self.rank]).generate_state(1)
        torch.manual_seed(int(mixed[0]))

    def _autocast(self) -> AbstractContextManager[Any]:
        return products_in(self.config.precision, self.device)

    def _backward(self, inputs: Inputs, sizes: list[int]) -> Tensor:
        """Leave the global batch's gradient with the parameters, and return its loss.

        Args:
            inputs: of this worker's samples.
            sizes: how many samples each worker has.
        """
        with self._autocast():
            loss: Tensor = self.loss(*self.trained(*inputs), sizes=sizes)
        loss.backward()
        return loss.detach()

    def _backward_in_pieces(self, inputs: Inputs, sizes: list[int]) -> Tensor:
        """The same with the activations of one piece at a time."""
        split = (one.tensor_split(self.config.micro_batches) for one in inputs)
        pieces = list(zip(*split, strict=True))
        states, embeddings = [], []
        for piece in pieces:
            states.append(_random_state(self.device))
            with torch.no_grad(), self._autocast():
                embeddings.append(self.trained(*piece))
        images = torch.cat([images for images, _, _ in embeddings])
        texts = torch.cat([texts for _, texts, _ in embeddings])
        solved = self.loss.value_and_gradients(images, texts, embeddings[0][2], sizes=sizes)
        lengths = [len(image) for image, _, _ in pieces]
        gradients = zip(
            solved.image_emb.split(lengths), solved.text_emb.split(lengths), strict=True
        )
        for at, (piece, (d_image, d_text)) in enumerate(zip(pieces, gradients, strict=True)):
            last = at == len(pieces) - 1
            _set_random_state(self.device, states[at])
            with self._reducing(last), self._autocast():
                outputs = self.trained(*piece)
                d_scale = solved.logit_scale if last else torch.zeros_like(solved.logit_scale)
                torch.autograd.backward(outputs, (d_image, d_text, d_scale))
        return solved.loss

    def _reducing(self, last: bool) -> Any:
        """Workers exchange gradients after the last piece only."""
        if isinstance(self.trained, DistributedDataParallel) and not last:
            return self.trained.no_sync()
        return nullcontext()

    def _reduce_scale(self) -> None:
        """What DistributedDataParallel does for all parameters and FSDP for those it shards."""
        gradient = self.model.logit_scale.grad
        if self.config.sharding == "fsdp2" and self.world_size > 1 and gradient is not None:
            dist.all_reduce(gradient)
            gradient /= self.world_size

    def _record(self, metrics: Mapping[str, float], meter: "_Meter") -> None:
        workers = float(self.world_size)
        record = {
            "step": float(self.state.step),
            **metrics,
            **meter.read(),
            "workers": workers,
        }
        self.state.history.append(record)
        if self.rank == 0 and self.task.on_record is not None:
            self.task.on_record(record)

    def _checkpoint(self, metrics: Mapping[str, float]) -> None:
        """Write the state and hand it to Ray Train, which uploads it while training goes on."""
        self._count_left_out()
        first = self.rank == 0
        validation = self._validation() if first else False
        folder = Path(tempfile.mkdtemp(prefix="rwkv-clip-")) if first else None
        try:
            save_state(folder, self.model, self.optimizer, self.state)
        except BaseException:
            if folder:  # or each attempt on a full disk would leave one
                shutil.rmtree(folder, ignore_errors=True)
            raise
        ray.train.report(
            {"step": self.state.step, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None,
            checkpoint_dir_name=checkpoint_name(self.state.step),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            validation=validation,
        )

    def _count_left_out(self) -> None:
        """Add up all workers' samples, of which the first worker writes the number."""
        more = torch.tensor(self._left_out, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(more)
        self.state.left_out += int(more)
        self._left_out = 0

    def _validation(self) -> ray.train.ValidationTaskConfig | bool:
        """What is asked of the task that validates the checkpoint of this step, if it is."""
        config, step = self.config.validation, self.state.step
        if config is None:
            return False
        if step < self.task.steps and is_validating(self._validating, _reported()):
            self.state.skipped_validations += 1
            logger.warning("step %d is not validated: an earlier validation has not ended", step)
            return False
        self._validating = checkpoint_name(step)
        return ray.train.ValidationTaskConfig(fn_kwargs={"step": step}, timeout_s=config.seconds)

    def _stop_not_finite(self, step: int, batch: Batch) -> None:
        """Leave word of what happened where the driver finds it."""
        value = {
            "step": step,
            "rank": self.rank,
            "ids": [str(identity) for identity in batch["id"]],
            "state": {**asdict(self.state), "history": self.state.history[-3:]},
        }
        name = f"{self.task.folder}/not-finite-{self.rank}.json"
        self.task.files.storage.write_json(name, value)
        logger.error("the loss of step %d is not finite: %s", step, json.dumps(value["state"]))


def _reported() -> list[ray.train.ReportedCheckpoint]:
    """The checkpoints that Ray Train has taken over by now, but for those that it deleted."""
    taken = ray.train.CheckpointConsistencyMode.COMMITTED
    reported: list[ray.train.ReportedCheckpoint]
    # But for the limit, it would wait for the upload of the one before.
    reported = ray.train.get_all_reported_checkpoints(consistency_mode=taken, timeout_s=0)
    return reported


def is_validating(last: str, reported: Iterable[ray.train.ReportedCheckpoint]) -> bool:
    """Whether a validation that was asked for has not ended.

    Args:
        last: name of the checkpoint that this process asked for it with last; empty if there is
            none, though an earlier process may have asked.
        reported: the checkpoints that Ray Train has taken over, the newest of them included.
    """
    newest, pending = "", ray.train.ReportedCheckpointStatus.PENDING_VALIDATION
    for one in reported:
        if one.status is pending:
            return True
        newest = max(newest, PurePosixPath(one.checkpoint.path).name)
    return newest < last  # which is still on its way


def normalise(pixels: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(pixels - mean) * scale in float32, [B, 3, S, S].

    Args:
        pixels: uint8 [B, 3, S, S].
        mean, scale: of pixels in 0..255, [1, 3, 1, 1] each, where the pixels are.
    """
    # In place: a batch of floats is large, and a second one costs more than the arithmetic.
    return pixels.float().sub_(mean).mul_(scale)


class _Meter:
    """Throughput and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start = self._wait_start = time.perf_counter()
        self._pairs = 0
        self._waiting = 0.0

    def begin_wait(self) -> None:
        self._wait_start = time.perf_counter()

    def waited(self) -> float:
        return time.perf_counter() - self._wait_start

    def count(self, pairs: int, waited: float) -> None:
        self._pairs += pairs
        self._waiting += waited

    def read(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        read = {
            "pairs_per_second": self._pairs / seconds,
            "data_wait_share": self._waiting / seconds,
            "seconds": seconds,
        }
        self._restart()
        return read


def _kept(values: np.ndarray[Any, Any], usable: np.ndarray[Any, Any], whole: bool) -> Any:
    return values if whole else values[usable]


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
