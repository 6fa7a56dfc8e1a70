"""Data parallel training, plain and sharded: the gradients of one process on the whole batch."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rwkv_clip.loss import LOSSES, PairLoss, create_loss
from rwkv_clip.model import RWKVCLIP, CLIPConfig, ImageConfig, TextConfig, create_model
from tests.processes import run_ranks

PROCESSES = 3
CONFIG = CLIPConfig(
    ImageConfig(
        depth=2,
        heads=2,
        embed_dim=32,
        hidden_dim=64,
        patch_size=8,
        image_size=32,
        class_token=True,
        drop_path=0.3,
    ),
    TextConfig(depth=2, heads=4, embed_dim=32, hidden_dim=48, context_length=9, vocab_size=50),
)
# A process may have nothing, as where its images cannot be read.
SIZES = [(5, 0, 1), (0, 0, 4)]
# In micro-batches of three some are empty, on some processes all.
CASES = list(product(LOSSES, SIZES, (1, 3)))
BIAS = -3.0

Inputs = tuple[Tensor, ...]


def make() -> RWKVCLIP:
    torch.manual_seed(0)
    return create_model(CONFIG)


def batch(rows: int) -> Inputs:
    """Images, texts and the seeds of their stochastic depth."""
    generator = torch.Generator().manual_seed(rows)
    image = torch.randn(rows, 3, 32, 32, generator=generator)
    text = torch.randint(0, 50, (rows, 9), generator=generator)
    return image, text, torch.arange(rows)


def replicated(model: RWKVCLIP) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: RWKVCLIP) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model.set_activation_checkpointing(True)
    for block in (*model.image_model.layers, *model.text_model.blocks):
        fully_shard(block, mesh=mesh)
    # PyTorch shards no scalars: the logit scale stays whole, its gradient is averaged below.
    return fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})


def backward(trained: nn.Module, loss: PairLoss, inputs: Inputs, pieces: int) -> None:
    """Leave the global batch's gradient with the parameters, by micro-batches as GradCache does."""
    if pieces == 1:
        loss(*trained(*inputs), BIAS).backward()
        return
    split = list(zip(*(x.tensor_split(pieces) for x in inputs), strict=True))
    with torch.no_grad():
        images, texts, scales = zip(*(trained(*piece) for piece in split), strict=True)
    solved = loss.value_and_gradients(torch.cat(images), torch.cat(texts), scales[0], BIAS)
    rows = [len(image) for image in images]
    by_piece = zip(solved.image_emb.split(rows), solved.text_emb.split(rows), strict=True)
    for at, (piece, (d_image, d_text)) in enumerate(zip(split, by_piece, strict=True)):
        last = at == pieces - 1
        d_scale = solved.logit_scale if last else torch.zeros_like(solved.logit_scale)
        waits = isinstance(trained, DistributedDataParallel) and not last
        with trained.no_sync() if waits else nullcontext():
            torch.autograd.backward(trained(*piece), (d_image, d_text, d_scale))


def gradients(model: RWKVCLIP) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's whole gradient, in this process alone or averaged over all."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        elif sharded:
            dist.all_reduce(gradient)
            gradient /= PROCESSES
        yield name, gradient


def worker(rank: int, folder: Path, way: Callable[[RWKVCLIP], nn.Module]) -> None:
    found = []
    for name, sizes, pieces in CASES:
        model = make()
        inputs = tuple(x.split(sizes)[rank] for x in batch(sum(sizes)))
        backward(way(model), create_loss(name), inputs, pieces)
        found.append(dict(gradients(model)))
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("way", [replicated, sharded])
def test_gradients_are_those_of_the_whole_batch_on_every_process(way, tmp_path):
    run_ranks(worker, PROCESSES, tmp_path, way)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for case, *found in zip(CASES, *ranks, strict=True):
        name, sizes, _ = case
        model = make()
        backward(model, create_loss(name), batch(sum(sizes)), 1)
        for parameter, expected in gradients(model):
            limit = 1e-5 * expected.abs().max() + 1e-9
            for got in found:
                assert (got[parameter] - expected).abs().max() <= limit, (case, parameter)
