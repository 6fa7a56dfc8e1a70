"""Data parallel training, plain and sharded: the gradients of one process on the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rwkv_clip.model import RWKVCLIP, CLIPConfig, ImageConfig, TextConfig, create_model
from tests.processes import run_ranks

PROCESSES = 2
CONFIG = CLIPConfig(
    ImageConfig(
        depth=2, heads=2, embed_dim=32, hidden_dim=64, patch_size=8, image_size=32, class_token=True
    ),
    TextConfig(depth=2, heads=4, embed_dim=32, hidden_dim=48, context_length=9, vocab_size=50),
)


def make() -> RWKVCLIP:
    torch.manual_seed(0)
    return create_model(CONFIG)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2 * PROCESSES, 3, 32, 32, generator=generator)
    text = torch.randint(0, 50, (2 * PROCESSES, 9), generator=generator)
    target = torch.randn(2 * PROCESSES, 32, generator=generator)
    return image, text, target


def loss_of(model: torch.nn.Module, image: Tensor, text: Tensor, target: Tensor) -> Tensor:
    """A mean over samples, so that the mean over processes is that of the whole batch."""
    image_embedding, text_embedding, scale = model(image, text)
    return scale * ((image_embedding + text_embedding) * target).sum(dim=1).mean()


def worker(rank: int, folder: Path, way: str) -> None:
    model = make()
    share = slice(2 * rank, 2 * rank + 2)
    if way == "replicated":
        trained: torch.nn.Module = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        model.set_activation_checkpointing(True)
        for block in (*model.image_model.layers, *model.text_model.blocks):
            fully_shard(block, mesh=mesh)
        # PyTorch shards no scalars: the logit scale stays whole, its gradient is averaged below.
        trained = fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    loss_of(trained, *(x[share] for x in batch())).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        elif way == "sharded":
            dist.all_reduce(gradient)
            gradient /= PROCESSES
        gradients[name] = gradient
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_gradients_are_those_of_the_whole_batch(way, tmp_path):
    run_ranks(worker, PROCESSES, tmp_path, way)
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = make()
    loss_of(model, *batch()).backward()
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        assert expected is not None
        error = (gradients[name] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max() + 1e-9, name
