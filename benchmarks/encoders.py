"""Samples a second of both encoders against transformers' CLIP with SDPA attention.

Float32, random weights for CLIP, the golden weights for B/32. Results are compared before anything
is timed. The two models and a large matrix product are timed in turn and the medians reported;
"of matmul" is the share of the product's operations a second that our encoder keeps.

    python benchmarks/encoders.py [--quick] [--repeats 7]
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import (
    MATMUL_SIDE,
    header,
    interleaved,
    machine,
    matmul,
    published_b32,
    refuse_unless,
    relative_error,
    row,
    statements,
    verdict,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import rwkv_clip
from rwkv_clip.model import RWKVCLIP

TEXT_TOKENS = 77
# Operations of one sample, 2 per multiply-add, the operator included; an image's by patch.
TEXT_GFLOP = 5.41
IMAGE_GFLOP_BY_PATCH = {32: 8.60 / 49, 16: 33.81 / 196}
OF_MATMUL = 0.80
GROWTH = 1.10
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Case:
    """One row: what is encoded, the baseline, and how many times its rate is the target."""

    name: str
    batch: int
    gflop: float
    ours: Callable[[], object]
    theirs: Callable[[], object]
    target: float
    of_matmul: float | None = None


def clip_vision(patch: int) -> nn.Module:
    config = CLIPVisionConfig(patch_size=patch, attn_implementation="sdpa")
    model: nn.Module = CLIPVisionModelWithProjection(config)
    return model.eval()


def clip_text() -> nn.Module:
    model: nn.Module = CLIPTextModelWithProjection(CLIPTextConfig(attn_implementation="sdpa"))
    return model.eval()


def image_case(
    model: RWKVCLIP, clip: nn.Module, side: int, batch: int, target: float, of_matmul: float | None
) -> Case:
    patch = model.config.image.patch_size
    pixels = torch.randn(batch, 3, side, side)
    gflop = IMAGE_GFLOP_BY_PATCH[patch] * (side // patch) ** 2
    return Case(
        f"image B/{patch} {side} px",
        batch,
        gflop,
        lambda: model.encode_image(pixels),
        lambda: clip(pixel_values=pixels, interpolate_pos_encoding=True),
        target,
        of_matmul,
    )


def text_case(model: RWKVCLIP, batch: int) -> Case:
    tokens = torch.randint(1, model.config.vocab_size, (batch, TEXT_TOKENS))
    clip = clip_text()
    return Case(
        f"text {TEXT_TOKENS} tokens",
        batch,
        TEXT_GFLOP,
        lambda: model.encode_text(tokens),
        lambda: clip(input_ids=tokens),
        1.05,
        OF_MATMUL,
    )


def run(case: Case, repeats: int) -> None:
    works = {"ours": case.ours, "theirs": case.theirs, "matmul": matmul()}
    times = interleaved(works, repeats)
    ratio = times["theirs"] / times["ours"]
    rate = case.batch * case.gflop / times["ours"]
    share = rate / (2 * MATMUL_SIDE**3 / 1e9 / times["matmul"])
    met = ratio >= case.target and (case.of_matmul is None or share >= case.of_matmul)
    target = f"{case.target:.2f}" + (f", {case.of_matmul:.0%}" if case.of_matmul else "")
    rates = [f"{case.batch / times[name]:.2f}" for name in ("ours", "theirs")]
    row(case.name, f"{case.batch}", *rates, f"{ratio:.2f}", f"{share:.0%}", target, verdict(met))


def run_growth(model: RWKVCLIP, repeats: int) -> None:
    """The time of one token as the image grows, with the same number of tokens in every batch."""
    works = {}
    for side in (256, 512, 1024):
        tokens = (side // 16) ** 2
        pixels = torch.randn(TOKENS_PER_BATCH // tokens, 3, side, side)
        works[f"{tokens}"] = lambda pixels=pixels: model.encode_image(pixels)
    times = interleaved(works, repeats)
    print()
    header("B/16 tokens an image", "microseconds a token", "times those of 256", "target", "")
    for count, time in times.items():
        growth = time / times["256"]
        # What the others are compared with has no target: it cannot miss one.
        target = (f"< {GROWTH:.2f}", verdict(growth < GROWTH)) if count != "256" else ("", "")
        row(count, f"{time / TOKENS_PER_BATCH * 1e6:.0f}", f"{growth:.3f}", *target)


def verified_b16() -> RWKVCLIP:
    torch.manual_seed(0)
    model = rwkv_clip.create_model("RWKV-CLIP-B-16").eval()
    pixels = torch.randn(1, 3, 256, 320)
    with torch.inference_mode():
        embedding = model.encode_image(pixels)
        with statements():
            expected = model.encode_image(pixels)
    error = relative_error(embedding, expected)
    refuse_unless("B/16 with kernels against without", error, 1e-5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="B/32 and texts alone, fewer repeats")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    repeats = 3 if arguments.quick else arguments.repeats
    print(machine())
    b32 = published_b32()
    b16 = None if arguments.quick else verified_b16()
    print()
    header("", "batch", "ours/s", "CLIP/s", "ratio", "of matmul", "target", "")
    with torch.inference_mode():
        run(image_case(b32, clip_vision(32), 224, 32, 1.05, OF_MATMUL), repeats)
        run(text_case(b32, 32), repeats)
        if b16 is not None:
            clip = clip_vision(16)
            run(image_case(b16, clip, 512, 4, 1.15, None), max(3, repeats // 2))
            run(image_case(b16, clip, 1024, 1, 1.70, None), max(3, repeats // 2))
            run_growth(b16, max(3, repeats // 2))


if __name__ == "__main__":
    main()
