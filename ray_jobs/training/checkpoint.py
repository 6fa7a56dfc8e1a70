"""A training run's state as a folder: the model, the optimizer, and where the run stands.

    model.safetensors, config.json   as `rwkv_clip.save_checkpoint` writes them
    optimizer.safetensors            AdamW's moments by parameter, float32
    training.json                    step, what was left out, and the history of metrics

Nothing is pickled, and nothing depends on how many workers wrote it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_clip.model import RWKVCLIP, create_model, load_checkpoint, save_checkpoint

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training.json"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint of a step, below that of its run."""
    return f"step-{step:09d}"


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: steps done, skipped ones included.
        left_out: samples whose image could not be decoded, or that had no text to train on.
        skipped_steps: steps without any other sample, which changed nothing.
        skipped_ids: some of the samples of these.
        skipped_validations: checkpoints that were not validated, as a validation was under way.
        history: metrics by step, as logged.
    """

    step: int = 0
    left_out: int = 0
    skipped_steps: int = 0
    skipped_ids: list[str] = field(default_factory=list)
    skipped_validations: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> "RunState":
        """From training.json, of other versions too: these may have had other counts."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in written.items() if name in known})


def save_state(
    folder: Path | None,
    model: RWKVCLIP,
    optimizer: torch.optim.Optimizer,
    state: RunState,
) -> None:
    """Gather a run's state and write it.

    Every worker calls this, because each may hold a share of it.

    Args:
        folder: to write to; None for all workers but one.
        model: whose parameters may be sharded.
        optimizer: of these.
        state: where the run stands.
    """
    # Which takes a second, and the driver's and Ray Train's own processes import this module too.
    from torch.distributed.checkpoint import state_dict as gathered

    whole_options = gathered.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = gathered.get_model_state_dict(model, options=whole_options)
    moments: dict[str, Any] = gathered.get_optimizer_state_dict(
        model, optimizer, options=whole_options
    )
    if folder is None:
        return
    whole = create_model(model.config, device="meta").to_empty(device="cpu")
    whole.load_state_dict(weights)
    save_checkpoint(whole, folder)
    tensors: dict[str, Tensor] = {}
    for name, values in moments["state"].items():
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in values.items()}
    save_file(tensors, folder / OPTIMIZER_FILE)
    text = json.dumps(asdict(state)) + "\n"
    (folder / STATE_FILE).write_text(text, encoding="utf-8")


def load_state(folder: Path, model: RWKVCLIP, optimizer: torch.optim.Optimizer) -> RunState:
    """Put a saved state into a model and its optimizer; every worker calls this."""
    from torch.distributed.checkpoint import state_dict as gathered

    broadcast = gathered.StateDictOptions(full_state_dict=True)
    weights = load_checkpoint(folder).state_dict()
    gathered.set_model_state_dict(model, weights, options=broadcast)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / OPTIMIZER_FILE).items():
        name, _, what = key.rpartition("/")
        moments.setdefault(name, {})[what] = value
    # The groups' settings are the configuration's; only the moments come from the file.
    current: dict[str, Any] = gathered.get_optimizer_state_dict(model, optimizer, options=broadcast)
    state: dict[str, Any] = {"state": moments, "param_groups": current["param_groups"]}
    gathered.set_optimizer_state_dict(model, optimizer, state, options=broadcast)
    return RunState.of(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
