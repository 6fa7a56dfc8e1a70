"""Pairs a second and peak memory of one training step against transformers' CLIP ViT-B/32.

A step is the forward pass, the contrastive loss and the backward pass, without an optimizer;
RWKV-CLIP B/32 with its stochastic depth, CLIP with SDPA attention, both with random weights.
Gradients are compared with those of the plain definitions before anything is timed. The two models
are timed in turn and the medians reported; memory is that of fresh processes, on a GPU what
PyTorch allocated for each.

    python benchmarks/training_step.py [--quick] [--batch 16] [--repeats 5]

On a CPU it is in float32, and eager. Where there is a GPU it runs there, on batches of 512 in
bfloat16, compiled; --device, --precision and --compile choose otherwise.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Settings:
    """How both models are run."""

    batch: int
    device: str
    precision: str
    compile: bool

    def arguments(self) -> list[str]:
        """The same on a command line."""
        given = {name: str(value) for name, value in asdict(self).items() if name != "compile"}
        told = [part for name, value in given.items() for part in (f"--{name}", value)]
        return [*told, "--compile" if self.compile else "--no-compile"]


def make_step(name: str, settings: Settings) -> tuple[nn.Module, Step]:
    """The model, "ours" or "theirs", and its training step on random pairs, which returns the loss.

    Gradients are set, not added to: an optimizer's zero_grad costs nothing by default.
    """
    torch.manual_seed(0)
    batch, device = settings.batch, torch.device(settings.device)
    pixels = torch.randn(batch, 3, 224, 224).to(device)
    tokens = torch.randint(1, 49408, (batch, TEXT_TOKENS)).to(device)
    model = rwkv_clip.create_model("RWKV-CLIP-B-32") if name == "ours" else _clip()
    model.to(device).train()
    if settings.compile:
        model.compile()
    bfloat16 = settings.precision == "bfloat16"

    def loss_of_pairs() -> Tensor:
        if name == "ours":
            return contrastive_loss(*model(pixels, tokens))
        loss: Tensor = model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
        return loss

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of_pairs()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or the clock is stopped before the step is done
        return loss

    return model, step


def _clip() -> nn.Module:
    return CLIPModel(CLIPConfig(attn_implementation="sdpa"))


def verify(device: str) -> None:
    model, step = make_step("ours", Settings(2, device, "float32", compile=False))

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


def measure(name: str, settings: Settings) -> None:
    """The memory of two steps in this process, as JSON."""
    model, step = make_step(name, settings)
    before = resident("VmRSS")
    step()
    step()
    peak = resident("VmHWM")
    # Compiled, the forward pass shows nobody what it keeps.
    saved = None if settings.compile else saved_bytes(model, step)
    print(json.dumps({"peak": peak, "step": peak - before, "saved": saved}))


def measured(name: str, settings: Settings) -> dict[str, int | None]:
    """The same of a fresh process."""
    command = [sys.executable, __file__, "--measure", name, *settings.arguments()]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    memory: dict[str, int | None] = json.loads(output.splitlines()[-1])
    return memory


def allocated(
    model: nn.Module, step: Step, others: int, settings: Settings
) -> dict[str, int | None]:
    """The memory of a step on a GPU; `others`: bytes that are not the model's own."""
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    saved = None if settings.compile else saved_bytes(model, step)
    return {"peak": peak - others, "step": peak - held, "saved": saved}


def report(settings: Settings, repeats: int) -> None:
    batch = settings.batch
    on_gpu = settings.device.startswith("cuda")
    steps, memory = {}, {}
    for name in ("ours", "theirs"):
        before = torch.cuda.memory_allocated() if on_gpu else 0
        model, steps[name] = make_step(name, settings)
        if on_gpu:
            memory[name] = allocated(model, steps[name], before, settings)
    times = interleaved(steps, repeats)
    if not on_gpu:
        memory = {name: measured(name, settings) for name in steps}
    ours, theirs = memory["ours"], memory["theirs"]
    ratio = times["theirs"] / times["ours"]
    print(f"\n| batch {batch} | RWKV-CLIP B/32 | CLIP ViT-B/32 | ratio | target | |")
    print("|---|---|---|---|---|---|")
    print(
        f"| pairs a second | {batch / times['ours']:.2f} | {batch / times['theirs']:.2f} "
        f"| {ratio:.2f} | {FASTER:.2f} | {verdict(ratio >= FASTER)} |"
    )
    rows = (("peak memory", "peak"), ("of it, the step's", "step"), ("kept activations", "saved"))
    for label, key in rows:
        mine, other = ours[key], theirs[key]
        if mine is None or other is None:
            continue
        share = mine / other
        target = f"1.00 | {verdict(share <= 1)}" if key == "peak" else " |"
        print(f"| {label}, MiB | {mine / MIB:.0f} | {other / MIB:.0f} | {share:.2f} | {target} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller batch and fewer repeats")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    arguments = parser.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    settings = Settings(
        arguments.batch or (512 if on_gpu else 8 if arguments.quick else 16),
        arguments.device,
        arguments.precision or ("bfloat16" if on_gpu else "float32"),
        on_gpu if arguments.compile is None else arguments.compile,
    )
    if arguments.measure:
        measure(arguments.measure, settings)
        return
    print(machine())
    print(settings)
    verify(settings.device)
    report(settings, 3 if arguments.quick else arguments.repeats)


if __name__ == "__main__":
    main()
