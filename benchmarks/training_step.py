"""Pairs a second and peak memory of one training step against transformers' CLIP ViT-B/32.

A step is the forward pass, the contrastive loss and the backward pass, without an optimizer;
RWKV-CLIP B/32 with its stochastic depth, CLIP with SDPA attention, both with random weights.
Gradients are compared with those of the plain definitions before anything is timed, and each
model's first loss with its loss in float32 where steps are of another kind. Each model is in a
fresh process of its own, whose peak memory is told (on a GPU: what PyTorch allocated); once both
are warm, one steps while the other waits, in turn, and the medians are reported.

    python benchmarks/training_step.py [--quick] [--batch 16] [--repeats 5]

On a CPU it is in float32, and eager. Where there is a GPU it runs there, on batches of 512 in
bfloat16, compiled and then eager, 20 steps each; --device, --precision and --compile choose
otherwise.
"""

import argparse
import multiprocessing as mp
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from _common import (
    header,
    machine,
    refuse_unless,
    relative_error,
    row,
    seconds,
    statements,
    verdict,
)
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import rwkv_clip
from rwkv_clip.loss import contrastive_loss

TEXT_TOKENS = 77
FASTER, FASTER_ON_GPU = 1.05, 1.00
MIB = 2**20
# Of gradients in bfloat16, whose steps are of 0.4 %; measured on a CPU: 3.0 %.
GRADIENT_LIMITS = {"float32": 1e-4, "bfloat16": 0.1}
# Stochastic depth alone moves the loss by some per cent, and a compiled step draws other numbers.
LOSS_LIMIT = 0.15
NAMES = ("ours", "theirs")

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Settings:
    """How both models are run."""

    batch: int
    device: str
    precision: str
    compile: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Ready:
    """What a process tells of its model before it is timed.

    Attributes:
        first: seconds of the first step, which compiles.
        loss: of the first step; `expected`: of the same pairs in float32, eager.
        peak: bytes, of the process or, on a GPU, of what was allocated there.
        step: bytes of the peak that were not there before; `saved`: what the forward pass keeps.
            Both are None where nobody asks.
    """

    first: float
    loss: float
    expected: float | None
    peak: int
    step: int | None
    saved: int | None


def make_step(name: str, settings: Settings) -> tuple[nn.Module, Step, Step]:
    """The model, "ours" or "theirs", its training step on random pairs, and their plain loss.

    The step returns the loss. Gradients are set, not added to: an optimizer's zero_grad costs
    nothing by default. The plain loss is without gradients, in float32 and, before the first step,
    without a compiler.
    """
    torch.manual_seed(0)
    batch, device = settings.batch, torch.device(settings.device)
    pixels = torch.randn(batch, 3, 224, 224).to(device)
    tokens = torch.randint(1, 49408, (batch, TEXT_TOKENS)).to(device)
    model = rwkv_clip.create_model("RWKV-CLIP-B-32") if name == "ours" else _clip()
    model.to(device).train()
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

    @torch.no_grad()
    def plain() -> Tensor:
        return loss_of_pairs()

    return model, step, plain


def _clip() -> nn.Module:
    model: nn.Module = CLIPModel(CLIPConfig(attn_implementation="sdpa"))
    return model


def verify(settings: Settings) -> None:
    """Compare gradients of two pairs with those of the definitions in float32."""

    def gradients(precision: str) -> dict[str, Tensor]:
        alike = Settings(2, settings.device, precision, compile=False)
        model, step, _ = make_step("ours", alike)
        torch.manual_seed(1)  # of the stochastic depth
        step()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    got = gradients(settings.precision)
    with statements():
        expected = gradients("float32")
    parameters = dict(rwkv_clip.create_model("RWKV-CLIP-B-32", device="meta").named_parameters())
    if got.keys() != parameters.keys():
        raise SystemExit("some parameters have no gradient; nothing was timed")
    error = max(relative_error(got[name], expected[name]) for name in got)
    limit = GRADIENT_LIMITS[settings.precision]
    refuse_unless("every gradient with kernels against the definitions'", error, limit)


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


def in_process(pipe: Connection, name: str, settings: Settings) -> None:
    """The process of a model: it tells what it has, then the seconds of a step at each call."""
    model, step, plain = make_step(name, settings)
    usual = settings.precision == "float32" and not settings.compile
    expected = None if usual else plain().item()
    if settings.compile:
        model.compile()
    before = resident("VmRSS")
    began = time.perf_counter()
    loss = step().item()
    first = time.perf_counter() - began
    if settings.on_gpu:
        torch.cuda.reset_peak_memory_stats()  # the compiler tries out what takes more
        step()
        ready = Ready(first, loss, expected, torch.cuda.max_memory_allocated(), None, None)
    else:
        step()
        peak = resident("VmHWM")
        # Compiled, the forward pass shows nobody what it keeps.
        saved = None if settings.compile else saved_bytes(model, step)
        ready = Ready(first, loss, expected, peak, peak - before, saved)
    pipe.send(ready)
    with suppress(EOFError):  # nobody asks any more
        while pipe.recv():
            pipe.send(seconds(step))


@contextmanager
def process(name: str, settings: Settings) -> Iterator[tuple[Ready, Callable[[], float]]]:
    """A fresh process with a model: what it told, and how to have it take a timed step."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    started = context.Process(target=in_process, args=(theirs, name, settings))
    started.start()
    theirs.close()  # so that its end is heard of

    def told() -> object:
        try:
            return ours.recv()
        except EOFError:
            raise SystemExit(f"the process of {name!r} has ended; see above") from None

    def timed() -> float:
        ours.send(True)
        taken = told()
        assert isinstance(taken, float)
        return taken

    try:
        ready = told()
        assert isinstance(ready, Ready)
        yield ready, timed
    finally:
        ours.close()
        started.join()


def measure(settings: Settings, repeats: int) -> tuple[dict[str, Ready], dict[str, float]]:
    """What both processes told, and the median seconds of their steps, taken in turn."""
    with process("ours", settings) as ours, process("theirs", settings) as theirs:
        both = dict(zip(NAMES, (ours, theirs), strict=True))
        for name, (ready, _) in both.items():
            if ready.expected is not None:
                error = abs(ready.loss - ready.expected) / abs(ready.expected)
                refuse_unless(f"the first loss of {name}", error, LOSS_LIMIT)
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(repeats):
            for name, (_, timed) in both.items():
                times[name].append(timed())
    readies = {name: ready for name, (ready, _) in both.items()}
    return readies, {name: median(taken) for name, taken in times.items()}


def report(settings: Settings, repeats: int) -> None:
    """Measure, then print the table, whose rows on a GPU sizing.py knows by their names."""
    batch, on_gpu = settings.batch, settings.on_gpu
    ready, times = measure(settings, repeats)
    eager = None
    if settings.compile:
        _, eager = measure(replace(settings, compile=False), repeats)
    where = "pairs a second on the GPU" if on_gpu else "pairs a second"
    faster = FASTER_ON_GPU if on_gpu else FASTER

    def rates(label: str, taken: dict[str, float], target: float | None) -> None:
        ratio = taken["theirs"] / taken["ours"]
        cells = [f"{batch / taken[name]:.{0 if on_gpu else 2}f}" for name in NAMES]
        judged = ("", "") if target is None else (f"{target:.2f}", verdict(ratio >= target))
        row(label, *cells, f"{ratio:.2f}", *judged)

    def memory(label: str, ours: int | None, theirs: int | None, has_target: bool) -> None:
        if ours is None or theirs is None:
            return
        share = ours / theirs
        judged = ("1.00", verdict(share <= 1)) if has_target else ("", "")
        row(f"{label}, MiB", f"{ours / MIB:.0f}", f"{theirs / MIB:.0f}", f"{share:.2f}", *judged)

    print()
    header(f"batch {batch}", "RWKV-CLIP B/32", "CLIP ViT-B/32", "ratio", "target", "")
    rates(where, times, faster)
    ours, theirs = ready["ours"], ready["theirs"]
    memory("its peak memory" if on_gpu else "peak memory", ours.peak, theirs.peak, True)
    memory("of it, the step's", ours.step, theirs.step, False)
    memory("kept activations", ours.saved, theirs.saved, False)
    if eager is not None:
        rates(f"{where}, eager", eager, None)
        first = [f"{ready[name].first:.0f}" for name in NAMES]
        row("seconds to the first step, compiled", *first, "", "", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller batch and fewer repeats")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int)
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
    print(machine())
    print(settings)
    verify(settings)
    report(settings, arguments.repeats or (3 if arguments.quick else 20 if on_gpu else 5))


if __name__ == "__main__":
    main()
