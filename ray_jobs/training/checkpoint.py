"""A training run's state as a folder: the model, the optimizer, and where the run stands.

    model.safetensors, config.json   as `rwkv_clip.save_checkpoint` writes them
    optimizer.safetensors            AdamW's moments by parameter, float32
    training.json                    step, samples left out, and the history of metrics

Nothing is pickled, and nothing depends on how many workers wrote it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rwkv_clip.model import create_model, load_checkpoint, save_checkpoint
from rwkv_clip.model.config import CLIPConfig

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training.json"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint of a step, below that of its run."""
    return f"step-{step:09d}"


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: steps done.
        left_out: samples that could not be decoded.
        seconds: of training so far, over all attempts.
        history: metrics by step, as logged.
    """

    step: int = 0
    left_out: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: CLIPConfig,
    state: RunState,
    writes: bool,
) -> None:
    """Gather a run's state and write it; every worker calls this, one of them with `writes`."""
    # Which takes a second, and the driver's and Ray Train's own processes import this module too.
    from torch.distributed.checkpoint import state_dict as gathered

    whole_options = gathered.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = gathered.get_model_state_dict(model, options=whole_options)
    moments: dict[str, Any] = gathered.get_optimizer_state_dict(
        model, optimizer, options=whole_options
    )
    if not writes:
        return
    whole = create_model(config, device="meta").to_empty(device="cpu")
    whole.load_state_dict(weights)
    save_checkpoint(whole, folder)
    tensors: dict[str, Tensor] = {}
    for name, values in moments["state"].items():
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in values.items()}
    save_file(tensors, folder / OPTIMIZER_FILE)
    text = json.dumps(asdict(state)) + "\n"
    (folder / STATE_FILE).write_text(text, encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
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
    return RunState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
