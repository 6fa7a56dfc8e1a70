"""Pairs a second and peak memory of one training step against transformers' CLIP ViT-B/32.

A step is the forward pass, the contrastive loss and the backward pass, in float32, without an
optimizer; RWKV-CLIP B/32 with its stochastic depth, CLIP with SDPA attention, both with random
weights. Gradients are compared with those of the plain definitions before anything is timed. The
two models are timed in turn and the medians reported; memory is that of fresh processes.

    python benchmarks/training_step.py [--quick] [--batch 16] [--repeats 5]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _common import interleaved, machine, refuse_unless, relative_error, statements, verdict
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import rwkv_clip
from rwkv_clip.loss import contrastive_loss

TEXT_TOKENS = 77
FASTER = 1.05
MIB = 2**20

Step = Callable[[], Tensor]


def make_step(name: str, batch: int) -> tuple[nn.Module, Step]:
    """The model, "ours" or "theirs", and its training step on random pairs, which returns the loss.

    Gradients are set, not added to: an optimizer's zero_grad costs nothing by default.
    """
    torch.manual_seed(0)
    pixels, tokens = torch.randn(batch, 3, 224, 224), torch.randint(1, 49408, (batch, TEXT_TOKENS))
    model = rwkv_clip.create_model("RWKV-CLIP-B-32") if name == "ours" else _clip()
    model.train()

    def loss_of_pairs() -> Tensor:
        if name == "ours":
            return contrastive_loss(*model(pixels, tokens))
        loss: Tensor = model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
        return loss

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = loss_of_pairs()
        loss.backward()
        return loss

    return model, step


def _clip() -> nn.Module:
    return CLIPModel(CLIPConfig(attn_implementation="sdpa"))


def verify() -> None:
    model, step = make_step("ours", 2)

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(1)  # of the stochastic depth
        step()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    got = gradients()
    with statements():
        expected = gradients()
    if got.keys() != dict(model.named_parameters()).keys():
        raise SystemExit("some parameters have no gradient; nothing was timed")
    error = max(relative_error(got[name], expected[name]) for name in got)
    refuse_unless("every gradient with kernels against without", error, 1e-4)


def saved_bytes(model: nn.Module, step: Step) -> int:
    """The memory that the forward pass keeps for the backward pass, parameters left out."""
    own = {x.untyped_storage().data_ptr() for x in model.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step()
    return sum(kept.values())


def resident(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(name: str, batch: int) -> None:
    """The memory of two steps in this process, as JSON."""
    model, step = make_step(name, batch)
    before = resident("VmRSS")
    step()
    step()
    peak = resident("VmHWM")
    print(json.dumps({"peak": peak, "step": peak - before, "saved": saved_bytes(model, step)}))


def measured(name: str, batch: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--measure", name, "--batch", str(batch)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    memory: dict[str, int] = json.loads(output.splitlines()[-1])
    return memory


def report(batch: int, repeats: int) -> None:
    steps = {name: make_step(name, batch)[1] for name in ("ours", "theirs")}
    times = interleaved(steps, repeats)
    ours, theirs = measured("ours", batch), measured("theirs", batch)
    ratio = times["theirs"] / times["ours"]
    print(f"\n| batch {batch} | RWKV-CLIP B/32 | CLIP ViT-B/32 | ratio | target | |")
    print("|---|---|---|---|---|---|")
    print(
        f"| pairs a second | {batch / times['ours']:.2f} | {batch / times['theirs']:.2f} "
        f"| {ratio:.2f} | {FASTER:.2f} | {verdict(ratio >= FASTER)} |"
    )
    rows = (("peak memory", "peak"), ("of it, the step's", "step"), ("kept activations", "saved"))
    for label, key in rows:
        share = ours[key] / theirs[key]
        target = f"1.00 | {verdict(share <= 1)}" if key == "peak" else " |"
        print(
            f"| {label}, MiB | {ours[key] / MIB:.0f} | {theirs[key] / MIB:.0f} | {share:.2f} "
            f"| {target} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller batch and fewer repeats")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batch = arguments.batch or (8 if arguments.quick else 16)
    if arguments.measure:
        measure(arguments.measure, batch)
        return
    print(machine())
    verify()
    report(batch, 3 if arguments.quick else arguments.repeats)


if __name__ == "__main__":
    main()
