"""Validation beside training: a task of its own takes each checkpoint, and nobody waits for it.

Ray Train starts the task when a checkpoint is uploaded and keeps the best ones by its answer. The
answer is also written to the storage, where it outlives the run's processes:
`train/validation/step-000000120.json`.

There is one at a time: workers ask for none while another is under way or waits for room, because
each that waits keeps its checkpoint from being deleted. The last checkpoint is always validated.
"""

from dataclasses import dataclass
from typing import Any

import ray.train
import torch

from ray_jobs.encoding import EncoderConfig, PairEncoder, fetch_model, with_text
from ray_jobs.storage import Storage
from ray_jobs.training.batches import PairFiles
from ray_jobs.training.config import ValidationConfig
from rwkv_clip.evaluation import retrieval


@dataclass(frozen=True)
class Validator:
    """What the task runs.

    Attributes:
        config: how much is done.
        files: the pairs that are searched.
        folder: of the storage, that holds the run.
    """

    config: ValidationConfig
    files: PairFiles
    folder: str

    @property
    def score(self) -> str:
        """The metric that the best checkpoint is found by."""
        return f"validation_{self.config.metric}"

    def task(self) -> ray.train.ValidationConfig:
        """What Ray Train is told."""
        options = {
            "num_cpus": self.config.cpus,
            "num_gpus": self.config.gpus,
            # Ray Train ends the training if a task's process has died once too often; this one is
            # begun anew until its time is over.
            "max_retries": -1,
        }
        run: Any = self  # Ray's protocol knows no named arguments
        return ray.train.ValidationConfig(fn=run, ray_remote_kwargs=options)

    def __call__(self, checkpoint: "ray.train.Checkpoint", *, step: int) -> dict[str, float]:
        """Metrics of a checkpoint, all of them named `validation_...`."""
        model = fetch_model(checkpoint.filesystem, checkpoint.path)
        encoder = PairEncoder(
            model,
            self.files,
            self.config.text,
            EncoderConfig(),
            gpus_key="train.validation.gpus",
        )
        rows = min(self.config.pairs, sum(self.files.flat_row_groups))
        batches = [
            encoder.encode(first, min(self.config.batch, rows - first))
            for first in range(0, rows, self.config.batch)
        ]
        image_emb = torch.cat([batch.image_emb for batch in batches]).float().cpu().numpy()
        text_emb = torch.cat([batch.text_emb for batch in batches]).float().cpu().numpy()
        asked = with_text([text for batch in batches for text in batch.texts])
        result = retrieval(image_emb, text_emb[asked], asked)
        metrics = {f"validation_{name}": value for name, value in result.metrics().items()}
        record = {"step": step, **metrics}
        self.files.storage.write_json(f"{self.folder}/validation/step-{step:09d}.json", record)
        return metrics


def validations(storage: Storage, folder: str) -> list[dict[str, float]]:
    """The records of all validations of a run, in order."""
    return [storage.read_json(name) for name in storage.names(f"{folder}/validation", ".json")]
