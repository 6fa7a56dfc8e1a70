"""Images a second on one core: `ImageTransform` against a plain Pillow and NumPy pipeline.

The plain pipeline decodes in full, resizes, crops and normalises in float32. What it makes and what
the transform for evaluation makes are compared before anything is timed (their distance, in 1/255,
is printed); the one for training crops at random, and its pixels are the tests' affair. All three
run once to warm up, are timed in turn, and the medians are reported. The goal is that evaluation is
never slower than the plain pipeline.

    python benchmarks/transforms.py [--repeats 9]
"""

import argparse
import io

import numpy as np
import torch
from _common import header, interleaved, machine, row, verdict
from PIL import Image

from rwkv_clip.transforms import CLIP_MEAN, CLIP_STD, ImageTransform

CASES = [
    ("JPEG", 500, 375),
    ("JPEG", 640, 480),
    ("JPEG", 1280, 960),
    ("JPEG", 4000, 3000),
    ("PNG", 500, 375),
    ("WEBP", 640, 480),
]
GOAL = 1.0
SIDE = 224
# Draft decoding keeps twice the resolution of the output; see rwkv_clip/transforms.py.
LARGEST_MEAN_DISTANCE = 1.0


def encoded(kind: str, width: int, height: int) -> bytes:
    """Smooth shapes with some noise, compressed as photographs are."""
    y, x = np.mgrid[:height, :width] / height
    rng = np.random.default_rng(0)
    channels = [np.sin(x * (20 + 7 * c)) * np.cos(y * (15 + 5 * c)) * 80 + 128 for c in range(3)]
    pixels = np.stack(channels, 2) + rng.normal(0, 6, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def plain(data: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    size = (SIDE * width // min(image.size), SIDE * height // min(image.size))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    image = image.crop((left, top, left + SIDE, top + SIDE))
    pixels = np.asarray(image).astype(np.float32) / 255
    pixels = (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    evaluate, train = ImageTransform(SIDE), ImageTransform(SIDE, train=True)
    std = torch.tensor(CLIP_STD)[:, None, None]
    torch.set_num_threads(1)
    print(machine())
    images = {
        f"{kind} {width} x {height}": encoded(kind, width, height) for kind, width, height in CASES
    }
    for name, data in images.items():
        distance = (evaluate(data) - plain(data)).abs() * std * 255
        if not distance.mean() <= LARGEST_MEAN_DISTANCE:
            raise SystemExit(f"{name}: pixels differ; nothing was timed")
        print(f"verified: {name}, {distance.mean():.2f} apart, at most {distance.max():.1f}")
    print()
    header("", "for evaluation", "for training", "plain Pillow", "times", "target", "")
    for name, data in images.items():
        works = {
            "evaluation": lambda d=data: evaluate(d),
            "training": lambda d=data: train(d, 0),
            "plain": lambda d=data: plain(d),
        }
        times = interleaved(works, repeats)
        ratio = times["plain"] / times["evaluation"]
        rates = [f"{1 / time:.0f}" for time in times.values()]
        row(name, *rates, f"{ratio:.2f}", f"{GOAL:.2f}", verdict(ratio >= GOAL))


if __name__ == "__main__":
    main()
