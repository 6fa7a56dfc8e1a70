"""How large a cluster, and how long: 15 million, 100 million and 1 billion pairs, computed.

Measured are the rates that benchmarks/README.md records, read from its tables: images that a core
prepares, the pipeline's share of bare vLLM, and the pairs that an H200 trains on. Counted are the
operations of a training step, by PyTorch, on the model itself. The rest is assumed; each assumption
is an option.

    python benchmarks/sizing.py [--gpu-tflops 989] [--cores 32] ...
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import rwkv_clip

RECORD = Path(__file__).with_name("README.md")
PAIRS = 2  # of the step that is counted
MEASURED_TFLOPS = 989.0  # the bfloat16 peak of the GPU that was measured
BATCHED_BYTES = 224 * 224 * 3 + 4 * 77  # of a pair on its way to a GPU: uint8 pixels, int32 tokens


@dataclass(frozen=True)
class Scale:
    """A data set, and what it is given.

    Attributes:
        epochs: passes over it; the larger the set, the fewer are worth their price.
        nodes: of GPUs, eight each.
    """

    name: str
    pairs: float
    epochs: float
    nodes: int


SCALES = (
    Scale("15 M", 15e6, 32, 1),
    Scale("100 M", 100e6, 16, 4),
    Scale("1 B", 1e9, 4, 8),
)


def recorded(row: str) -> list[float]:
    """The numbers of a row of a table in benchmarks/README.md."""
    for line in RECORD.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"| {row} |"):
            return [float(one) for one in re.findall(r"\|\s*([\d.]+)\s*(?=\|)", line)]
    raise SystemExit(f"{RECORD.name} has no row {row!r}")


def step_gflop() -> float:
    """Operations of a pair, forward and backward, in B/32's products."""
    model = rwkv_clip.create_model("RWKV-CLIP-B-32", device="meta").train()
    config = model.config
    pixels = torch.empty(PAIRS, 3, config.image_size, config.image_size, device="meta")
    tokens = torch.zeros(PAIRS, config.context_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        (image @ text.T).sum().backward()
    return float(counter.get_total_flops()) / PAIRS / 1e9


def table(given: argparse.Namespace, images_a_core: float, share: float, gflop: float) -> str:
    """The table, as the operator's guide shows it."""
    flops = given.gpu_tflops * 1e12
    describing = share * given.llm_share * flops / (2e9 * given.llm_billions * given.llm_tokens)
    training = given.train_share * flops / (gflop * 1e9)
    columns = []
    for scale in SCALES:
        gpus, cores = 8 * scale.nodes, round(8 * scale.nodes * given.cores)
        ingest = scale.pairs / (given.ingest_a_core * cores) / 3600
        describe = scale.pairs * given.attempts / (describing * gpus) / 3600
        seen = scale.pairs * scale.epochs
        by_gpus, by_cores = training * gpus, images_a_core * cores
        rate = min(by_gpus, by_cores)
        train = seen / rate / 3600
        terabytes = scale.pairs * given.pair_kb * 1e3 / 1e12
        hours = ingest + describe + train
        columns.append(
            {
                "epochs": f"{scale.epochs:g}",
                "GPUs": f"{gpus}",
                "cores, GPU nodes' and others": f"{cores:,}",
                "ingest, hours": f"{ingest:,.1f}",
                "describe, hours": f"{describe:,.1f}",
                "train, hours": f"{train:,.1f}",
                "of which held up by": "cores" if by_cores < by_gpus else "GPUs",
                "cores that would keep the GPUs busy": f"{by_gpus / images_a_core:,.0f}",
                "into a GPU node, GB/s": f"{rate * BATCHED_BYTES / scale.nodes / 1e9:.1f}",
                "all, hours": f"{hours:,.0f}",
                "GPU hours": f"{gpus * (describe + train):,.0f}",
                "core hours": f"{cores * hours:,.0f}",
                "storage, TB": f"{terabytes:,.1f}",
                "read from storage, TB": f"{terabytes * (1 + scale.epochs):,.0f}",
            }
        )
    lines = [f"| pairs | {' | '.join(scale.name for scale in SCALES)} |", "|---|---|---|---|"]
    lines += [f"| {key} | {' | '.join(one[key] for one in columns)} |" for key in columns[0]]
    return "\n".join(lines)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What is assumed."""
    parser = argparse.ArgumentParser(description="Size a cluster.")
    assumptions: tuple[tuple[str, float | None, str], ...] = (
        ("gpu-tflops", 989.0, "a GPU's bfloat16 peak; an H100's by default, an A100 has 312"),
        ("train-share", None, "of that peak in training; by default an H200's, as measured"),
        ("llm-share", 0.3, "of that peak in vLLM"),
        ("llm-billions", 8.0, "of parameters of the language model"),
        ("llm-tokens", 230.0, "that a description takes, read and written"),
        ("attempts", 1.1, "answers asked for a pair"),
        ("cores", 32.0, "for each GPU, on its node and on workers without GPUs"),
        ("ingest-a-core", 200.0, "pairs a second that a core reads, decodes and writes"),
        ("pair-kb", 40.0, "of a stored pair"),
    )
    for name, value, told in assumptions:
        parser.add_argument(f"--{name}", type=float, default=value, help=told)
    return parser.parse_args(given)


def main() -> int:
    """Print what goes in, and the table."""
    given = arguments()
    (images_a_core, *_), (_, share, *_) = recorded("Ray Data, our transform"), recorded("pipeline")
    gflop = step_gflop()
    pairs_a_gpu, *_ = recorded("pairs a second on the GPU")
    assumed = {key: value for key, value in vars(given).items() if value is not None}
    measured = pairs_a_gpu * gflop / 1e3 / MEASURED_TFLOPS
    if given.train_share is None:
        given.train_share = measured
    print(
        f"measured: {images_a_core:g} images a second and core, {share:g} of bare vLLM, "
        f"{pairs_a_gpu:g} pairs a second on a GPU ({measured:.3f} of its peak)"
    )
    print(f"counted:  {gflop:.1f} GFLOP a pair, forward and backward")
    print("assumed: ", ", ".join(f"{key} {value:g}" for key, value in assumed.items()))
    print()
    print(table(given, images_a_core, share, gflop))
    return 0


if __name__ == "__main__":
    sys.exit(main())
